"""Models where only some layers can be fused, or weights are shared or moved: attention, experts, tied, offloaded."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator
from datetime import timedelta

import peft
import pytest
import torch
import torch.distributed as dist
import twins
from torch import Tensor, nn

import slao_kernels
from slao_kernels.testing import error_ratio, tiny_model

pytestmark = pytest.mark.usefixtures("one_thread")

TARGETS = ["q_proj", "down_proj"]


class Attention(nn.Module):
    """nn.MultiheadAttention and a projection: PEFT adapts both, with a class of its own for the first."""

    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(24, 24)
        self.mha = nn.MultiheadAttention(24, 4, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.proj(x)
        return self.mha(x, x, x)[0]


def attention() -> nn.Module:
    config = twins.config(init_lora_weights=False, target_modules=["proj", "mha"])
    return peft.inject_adapter_in_model(config, Attention()).train()


def experts() -> nn.Module:
    parameters = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    config = twins.config(target_modules=["q_proj", "o_proj"], target_parameters=parameters)
    return twins.train_a_little(peft.get_peft_model(tiny_model("mixtral", num_hidden_layers=1), config))


def tied(ensure: bool) -> nn.Module:
    """Head and embedding are one matrix; with ensure_weight_tying their adapters are views of each other too."""
    config = twins.config(target_modules=["q_proj", "embed_tokens", "lm_head"], ensure_weight_tying=ensure)
    base = tiny_model("llama", tie_word_embeddings=True)
    torch.manual_seed(0)
    model = twins.train_a_little(peft.get_peft_model(base, config))
    assert base.lm_head.base_layer.weight is base.model.embed_tokens.base_layer.weight
    for name, parameter in model.named_parameters():
        if "lora_embedding" in name:
            nn.init.normal_(parameter, std=0.02, generator=torch.Generator().manual_seed(5))
    return model


def replicated() -> nn.Module:
    """Blocks share their base weights, each with an adapter of its own."""
    model = twins.peft_model("llama", target_modules=TARGETS, layer_replication=[[0, 2], [1, 2]])
    blocks = model.base_model.model.model.layers
    assert blocks[1].mlp.down_proj.base_layer.weight is blocks[2].mlp.down_proj.base_layer.weight
    return model


# The model, how many layers are fused, and of which of PEFT's classes those that are not.
PARTLY: dict[str, tuple[Callable[[], nn.Module], int, list[str]]] = {
    # PEFT merges what is inside the attention for the call: out_proj, which is patched, does not run.
    "attention": (attention, 1, ["MultiheadAttention"]),
    "experts": (experts, 4, []),
    "tied": (lambda: tied(False), 3, ["Embedding"]),
    "tied, one adapter": (lambda: tied(True), 3, ["Embedding"]),
    "replicated": (replicated, 6, []),
}


@pytest.mark.parametrize("kind", PARTLY)
def test_some_layers_are_left_alone(kind):
    make, fused, left = PARTLY[kind]
    nets = []
    for _ in range(2):
        torch.manual_seed(0)
        nets.append(make())
    report = slao_kernels.patch(nets[0])
    assert list(report.skipped.values()) == [f"lora.layer.{name} has no fused forward" for name in left]
    assert len(report.patched) == fused + (kind == "attention")
    twins.check_same(*nets, ops=fused)


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("low", [False, True], ids=["", "low_cpu_mem_usage"])
def test_loaded_adapters(low, when, tmp_path):
    """from_pretrained and load_adapter, where low_cpu_mem_usage puts A and B on meta until they are loaded."""
    twin = twins.peft_model("llama", target_modules=TARGETS)
    twin.save_pretrained(tmp_path)
    options = {"is_trainable": True, "low_cpu_mem_usage": low}
    model = peft.PeftModel.from_pretrained(twins.base_model("llama"), tmp_path, **options)
    if when == "before":
        slao_kernels.patch(model)
    model.load_adapter(tmp_path, "other", **options)
    assert len(slao_kernels.patch(model).patched) == 4
    model.set_adapter("other")
    with twins.CountOps() as ops:
        found = twins.step(model)
    assert ops.forward == 4
    expected = {name.replace(".default.", ".other."): value for name, value in twins.step(twin).items()}
    twins.check_close(found, expected)


@pytest.mark.parametrize("when", ["patch first", "offload first"])
def test_accelerate_offload(when):
    """Every leaf's weight is on meta but for its own call: only the modules themselves know when it is there."""
    from accelerate import cpu_offload
    from accelerate.hooks import remove_hook_from_submodules

    model, twin = (twins.peft_model("llama", target_modules=TARGETS).requires_grad_(False) for _ in range(2))
    if when == "patch first":
        slao_kernels.patch(model)
    cpu_offload(model, execution_device=torch.device("cpu"))
    report = slao_kernels.patch(model)
    ids = twins.token_ids()
    assert error_ratio(model(ids).logits, twin(ids).logits) <= twins.FP32_RATIO
    assert len(report.skipped) + len(report.fallbacks) > 0  # A and B are hooked
    remove_hook_from_submodules(model)
    assert len(slao_kernels.patch(model).patched) == 4
    with twins.CountOps() as ops:
        assert error_ratio(model(ids).logits, twin(ids).logits) <= twins.FP32_RATIO
    assert ops.forward == 4


@pytest.fixture
def one_rank() -> Iterator[None]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"tcp://127.0.0.1:{free.getsockname()[1]}"
    dist.init_process_group("gloo", init_method=address, world_size=1, rank=0, timeout=timedelta(seconds=60))
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("parts", [["base_layer"], ["base_layer", "lora_B.default"]], ids=["base", "base and B"])
def test_tensor_parallel(parts, one_rank):
    """torch's own column-wise plan: sharded weights are DTensors and hooks turn x and y; only the modules know how."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor
    from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

    model, twin = twins.net(), twins.net()
    plan = {f"proj.{part}": ColwiseParallel() for part in parts}
    parallelize_module(model, init_device_mesh("cpu", (1,)), plan)
    assert isinstance(model.proj.base_layer.weight, DTensor)
    report = slao_kernels.patch(model)
    if len(parts) == 1:
        assert report.notes["proj"].startswith("base layer called: ")
    else:
        assert report.skipped["proj"] == "lora_B has hooks"  # a DTensor alone may be whole by the time it runs (FSDP2)
    found, expected = (twins.net_step(net, twins.net_input()) for net in (model, twin))
    plain = {name: value.full_tensor() if isinstance(value, DTensor) else value for name, value in found.items()}
    twins.check_close(plain, expected)


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_adapters_that_only_start_otherwise(init):
    """Fused: from then on they are plain LoRA. Kinds that are not: test_eligibility.py."""
    model, twin, report = twins.net_pair(r=4, init_lora_weights=init)
    twins.check_same(model, twin, ops=1)
    assert report.fallbacks == {}
