"""One of several processes that train together: python ranks.py RANK RANKS FOLDER CASE...; results into FOLDER.

test_sharding.py starts them and compares what they leave with one process that does the same (`reference`).
"""

from __future__ import annotations

import functools
import os
import sys
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from accelerate.utils import FullyShardedDataParallelPlugin
from accelerate.utils.fsdp_utils import fsdp2_prepare_model
from peft import LoraConfig, get_peft_model
from peft.utils.other import fsdp_auto_wrap_policy
from torch import distributed as dist
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import Trainer, TrainingArguments

import slao_kernels
from slao import EWC, OPCM, SLAO, InfLoRA, SDLoRA
from slao.methods import Method
from slao_kernels.adapters import find_pairs
from slao_kernels.testing import tiny_model

TASKS, STEPS, BATCH, RATE = 2, 2, 4, 0.2


def make() -> nn.Module:
    """Adapters on layers of several shapes; r = 3 over two ranks leaves uneven shards."""
    torch.manual_seed(0)
    settings: dict[str, Any] = {"r": 3, "lora_alpha": 6, "target_modules": ["q_proj", "k_proj", "down_proj"]}
    model = get_peft_model(tiny_model("llama", initializer_range=0.3), LoraConfig(**settings))
    slao_kernels.patch(model)
    return model.train()


def batch(task: int, step: int, rank: int, ranks: int) -> torch.Tensor:
    """(rows, 9) token ids: this rank's rows of the batch, which is the same however many ranks share it."""
    ids = torch.randint(1, 128, (BATCH, 9), generator=torch.Generator().manual_seed(100 * task + step))
    return ids.chunk(ranks)[rank]


def learn(model: nn.Module, task: int, rank: int = 0, ranks: int = 1, engine: Any = None) -> None:
    """Plain gradient descent: what differs in the gradient differs as much in the weights."""
    optimizer = None if engine else torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=RATE)
    for step in range(STEPS):
        ids = batch(task, step, rank, ranks)
        loss = (engine or model)(input_ids=ids, labels=ids).loss
        if engine:
            engine.backward(loss)
            engine.step()
        else:
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()


def run(method: Method, model: nn.Module, rank: int = 0, ranks: int = 1) -> None:
    for task in range(TASKS):
        method.begin_task(str(task))
        learn(model, task, rank, ranks)
        method.end_task()


def weights(method: Method) -> dict[str, torch.Tensor]:
    """Every A and B as trained and as merged, whole."""
    found: dict[str, torch.Tensor] = {}
    with method._whole(write=False):
        for pair in method.pairs:
            found |= {f"{pair.name}.A": pair.A.clone(), f"{pair.name}.B": pair.B.clone()}
        for pair, merged in zip(method.pairs, method._merged_weights(), strict=True):
            shown = pair.with_weights(*merged)
            found |= {f"{pair.name}.A.merged": shown.A.clone(), f"{pair.name}.B.merged": shown.B.clone()}
    return found


def outcome(method: Method, model: nn.Module) -> dict[str, Any]:
    """What a case leaves: the weights, the merged model's logits, what fell back and why."""
    found: dict[str, Any] = {"weights": weights(method)}
    model.eval()
    with torch.no_grad(), method.merged():
        found["logits"] = model(input_ids=batch(9, 9, 0, 1)).logits.clone()
    with torch.no_grad(), Operators() as operators:
        found["trained_logits"] = model(input_ids=batch(9, 9, 0, 1)).logits.clone()
    found["operators"] = operators.counts
    found["after"] = weights(method)
    options = [m.slao_options for m in model.modules() if "slao_options" in m.__dict__]
    found["fused"] = len(options)
    found["fallbacks"] = dict(options[0].fallbacks) if options else {}
    found["notes"] = dict(options[0].notes) if options else {}
    return found


class Operators(TorchDispatchMode):
    """How often each of the library's operators ran within the block."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: dict[str, int] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "slao_kernels":
            self.counts[func._opname] = self.counts.get(func._opname, 0) + 1
        return func(*args, **(kwargs or {}))


def reference() -> dict[str, Any]:
    """One process, whole batches."""
    model = make()
    method = SLAO(model)
    run(method, model)
    return outcome(method, model)


def blocks(model: nn.Module) -> list[nn.Module]:
    return list(model.get_submodule("base_model.model.model.layers"))


def message(call: Callable[[], object]) -> str:
    """Of the ValueError or RuntimeError that `call` raises."""
    try:
        call()
    except (ValueError, RuntimeError, OSError) as error:
        return f"{type(error).__name__}: {error}"
    return "nothing was raised"


def one_rank_fails(rank: int, ranks: int, folder: Path) -> dict[str, Any]:
    """Replicas, and something wrong on rank 1 (or 0) alone."""
    model = make()
    method = SLAO(model)
    run(method, DistributedDataParallel(model), rank, ranks)
    found: dict[str, Any] = {}
    B, A = method.pairs[2].B, method.pairs[2].A
    method.begin_task("third")
    before, good = weights(method), B[1, 1].item()
    if rank == 1:
        B[1, 1] = torch.nan
    found["end_task"] = message(method.end_task)
    B[1, 1] = good
    found["kept by end_task"] = equal(weights(method), before) and method.in_task
    method.end_task()
    before, good = weights(method), A[1, 1].item()
    if rank == 1:
        A[1, 1] = torch.inf
    found["begin_task"] = message(lambda: method.begin_task("fourth"))
    A[1, 1] = good
    found["kept by begin_task"] = equal(weights(method), before) and method.task == 3
    (folder / "a file").touch()
    found["save"] = message(lambda: method.save(folder / "a file"))
    found["save_pretrained"] = message(lambda: method.save_pretrained(folder / "a file"))
    found["load"] = message(lambda: method.load(folder / "nowhere"))
    found["too early"] = message(method.end_task if rank == 0 else lambda: method.begin_task("fourth"))
    return found


def equal(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def on_disk(rank: int, ranks: int, folder: Path, wrap: Callable[[nn.Module], nn.Module]) -> dict[str, Any]:
    """Saved in the middle of the second task; every rank names a folder of its own, and rank 0's alone counts."""
    mine = folder / f"{wrap.__name__} of rank {rank}"
    model = wrap(make())
    method = SLAO(model)
    method.begin_task("0")
    learn(model, 0, rank, ranks)
    method.end_task()
    method.save_pretrained(mine / "adapter")
    method.begin_task("1")
    learn(model, 1, rank, ranks)
    method.save(mine, {"note": rank})
    other = wrap(make())
    again = SLAO(other)
    found: dict[str, Any] = {"extra": again.load(mine)}
    found["saved"] = weights(method)
    found["loaded"] = weights(again)
    again.end_task()
    found |= outcome(again, other)
    found["files"] = sorted(str(path.relative_to(mine)) for path in mine.rglob("*"))
    return found


def patched_late(rank: int, ranks: int, folder: Path) -> dict[str, Any]:
    """Sharded first: what FSDP2 holds as DTensors is plain while its block runs."""
    model = make()
    slao_kernels.unpatch(model)
    in_blocks(model)
    report = slao_kernels.patch(model)
    method = SLAO(model)
    run(method, model, rank, ranks)
    return {**outcome(method, model), "skipped": report.skipped}


def refusals(rank: int, ranks: int, folder: Path) -> dict[str, Any]:
    """The operations themselves, given shards."""
    model = in_blocks(make())
    pairs, _ = find_pairs(model)
    shards = [pair.A for pair in pairs]
    whole = [torch.zeros(shard.shape) for shard in shards]
    found = {
        "init": message(lambda: slao_kernels.orthogonal_init_(shards)),
        "merge": message(lambda: slao_kernels.scaled_merge_(whole, shards, 0.5)),
        "fold": message(lambda: slao_kernels.fold_(shards[:1], whole[:1], [torch.zeros(3, 3)], [1.0])),
        "linear": message(
            lambda: slao_kernels.lora_linear(torch.ones(2, 32), torch.ones(8, 32), None, shards[0], torch.ones(8, 3), 1)
        ),
    }
    untouched = not any(tensor.any() for tensor in whole)
    for kind in (EWC, OPCM, SDLoRA, InfLoRA):  # made before, sharded later
        later = make()
        method = kind(later)
        in_blocks(later)
        found[method.name] = message(lambda method=method: method.begin_task("a"))
    return {**found, "untouched": untouched}


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


def trained(rank: int, ranks: int, folder: Path, wrap: Callable[[nn.Module], nn.Module]) -> dict[str, Any]:
    """The method made before the model is wrapped where that is possible, as with a Trainer."""
    model = make()
    early = None if wrap in (in_units, in_flat_units) else SLAO(model)
    wrapped = wrap(model)
    method = early or SLAO(wrapped)
    run(method, wrapped, rank, ranks)
    return outcome(method, wrapped)


def with_trainer(rank: int, ranks: int, folder: Path) -> dict[str, Any]:
    """transformers' Trainer, a new one for each task, which wraps the model through accelerate."""
    model = make()
    method = SLAO(model)
    arguments: dict[str, Any] = {"use_cpu": True, "optim": "sgd", "learning_rate": RATE, "max_grad_norm": 0.0}
    arguments |= {"lr_scheduler_type": "constant", "max_steps": STEPS, "report_to": "none", "save_strategy": "no"}
    arguments |= {"per_device_train_batch_size": BATCH // ranks, "train_sampling_strategy": "sequential"}
    arguments |= {"disable_tqdm": True, "dataloader_pin_memory": False}
    wrapped: nn.Module = model
    for task in range(TASKS):
        rows = [{"input_ids": ids, "labels": ids} for step in range(STEPS) for ids in batch(task, step, 0, 1)]
        method.begin_task(str(task))
        trainer = Trainer(model, TrainingArguments(str(folder / "trainer"), **arguments), None, rows)
        trainer.train()
        method.end_task()
        wrapped = trainer.model_wrapped
    return {**outcome(method, model), "wrapped": [cls.__name__ for cls in type(wrapped).__mro__]}


def zero(rank: int, ranks: int, folder: Path, stage: int) -> dict[str, Any]:
    """A new engine for each task, as transformers' Trainer makes one: an engine keeps master weights of its own."""
    import deepspeed

    settings = {
        "train_micro_batch_size_per_gpu": BATCH // ranks,
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
        "gradient_clipping": 0.0,  # clips at 1 unless told otherwise
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }
    model = make()
    method = SLAO(model)
    for task in range(TASKS):
        method.begin_task(str(task))
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=RATE)
        engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings, dist_init_required=False)
        learn(model, task, rank, ranks, engine)
        #         engine.destroy()  # or its hooks would reduce the gradients of the next one's steps as well
        method.end_task()
    method.save(folder / f"zero{stage} of rank {rank}")
    return outcome(method, engine)


WRAPS = {
    "ddp": replicas,
    "fsdp2_blocks": in_blocks,
    "fsdp2_leaves": in_leaves,
    "fsdp2_accelerate": as_accelerate,
    "fsdp1": in_units,
    "fsdp1_flat": in_flat_units,
}
CASES: dict[str, Callable[..., dict[str, Any]]] = {
    "one_rank_fails": one_rank_fails,
    "patched_late": patched_late,
    "refusals": refusals,
    **{name: functools.partial(trained, wrap=wrap) for name, wrap in WRAPS.items()},
    **{f"{name}_on_disk": functools.partial(on_disk, wrap=wrap) for name, wrap in WRAPS.items()},
    "trainer": with_trainer,
}


# Where DeepSpeed is installed.
MORE = {f"zero{stage}": functools.partial(zero, stage=stage) for stage in (2, 3)}


def main(rank: int, ranks: int, folder: Path, cases: list[str]) -> None:
    torch.set_num_threads(1)
    # What a launcher sets, for accelerate and DeepSpeed.
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks), "DS_ACCELERATOR": "cpu"}
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": "0"}
    # A file instead of a port: nothing can clash. A hang is an error after a minute.
    dist.init_process_group("gloo", f"file://{folder / 'store'}", timedelta(seconds=60), world_size=ranks, rank=rank)
    for case in cases:
        try:
            found = {**CASES, **MORE}[case](rank, ranks, folder)
        except Exception:
            found = {"error": traceback.format_exc()}
        torch.save(found, folder / f"{case}.{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    os.environ["HF_HUB_OFFLINE"] = "1"
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]), sys.argv[4:])
