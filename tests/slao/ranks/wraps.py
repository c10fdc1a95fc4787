"""The ways in which a model is spread over processes."""

from __future__ import annotations

from types import SimpleNamespace

import torch
from accelerate.utils import FullyShardedDataParallelPlugin
from accelerate.utils.fsdp_utils import fsdp2_prepare_model
from peft.utils.other import fsdp_auto_wrap_policy
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.nn.parallel import DistributedDataParallel


def blocks(model: nn.Module) -> list[nn.Module]:
    return list(model.get_submodule("base_model.model.model.layers"))


def replicas(model: nn.Module) -> nn.Module:
    return DistributedDataParallel(model)


def in_blocks(model: nn.Module) -> nn.Module:
    for block in blocks(model):
        fully_shard(block)
    return fully_shard(model)


def in_leaves(model: nn.Module) -> nn.Module:
    for block in blocks(model):
        for name, module in block.named_modules():
            if name.endswith((".lora_A.default", ".lora_B.default")):
                fully_shard(module)
    return in_blocks(model)


def in_units(model: nn.Module, orig: bool = True) -> nn.Module:
    """FSDP1 as PEFT wraps."""
    policy, cpu = fsdp_auto_wrap_policy(model), torch.device("cpu")
    return FullyShardedDataParallel(model, auto_wrap_policy=policy, use_orig_params=orig, device_id=cpu)


def in_flat_units(model: nn.Module) -> nn.Module:
    return in_units(model, orig=False)


def as_accelerate(model: nn.Module) -> nn.Module:
    """FSDP2 as accelerate prepares it; its Accelerator shards on no CPU, so this calls what that would call."""
    plugin = FullyShardedDataParallelPlugin(fsdp_version=2, auto_wrap_policy="transformer_based_wrap")
    plugin.cpu_ram_efficient_loading = False
    state = SimpleNamespace(fsdp_plugin=plugin)
    fields = {"state": state, "mixed_precision": "no", "is_main_process": True, "device": torch.device("cpu")}
    return fsdp2_prepare_model(SimpleNamespace(**fields, torch_device_mesh=None), model)


WRAPS = {
    "ddp": replicas,
    "fsdp2_blocks": in_blocks,
    "fsdp2_leaves": in_leaves,
    "fsdp2_accelerate": as_accelerate,
    "fsdp1": in_units,
    "fsdp1_flat": in_flat_units,
}
