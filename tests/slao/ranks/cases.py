"""What two processes do with every way of wrapping, with transformers' Trainer, and when something is wrong."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from transformers import Trainer, TrainingArguments

import slao_kernels
from slao import EWC, OPCM, OSF, SLAO, InfLoRA, LwF, SDLoRA, SlaoCallback, SLoRA
from slao.methods import METHODS, Method
from slao_kernels.adapters import find_pairs

from .lab import BATCH, RATE, STEPS, TASKS, batch, equal, head, learn, make, message, outcome, run, weights, with_head
from .wraps import WRAPS, in_blocks, in_flat_units, in_units


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
    for kind in (EWC, InfLoRA, LwF, OPCM, OSF, SDLoRA, SLoRA):  # made before, sharded later
        later = make()
        method = kind(later)
        in_blocks(later)
        found[method.name] = message(lambda method=method: method.begin_task("a"))
    return {**found, "untouched": untouched}


def trained(rank: int, ranks: int, folder: Path, wrap: Callable[[nn.Module], nn.Module]) -> dict[str, Any]:
    """The method made before the model is wrapped where that is possible, as with a Trainer."""
    model = make()
    early = None if wrap in (in_units, in_flat_units) else SLAO(model)
    wrapped = wrap(model)
    method = early or SLAO(wrapped)
    run(method, wrapped, rank, ranks)
    return outcome(method, wrapped)


def with_trainer(rank: int, ranks: int, folder: Path, **options: Any) -> dict[str, Any]:
    method, wrapped = by_trainers(ranks, folder, **options)
    return {**outcome(method, method.model), "wrapped": [cls.__name__ for cls in type(wrapped).__mro__]}


def by_trainers(
    ranks: int,
    folder: Path,
    callback: bool = False,
    kind: type[Method] = SLAO,
    dtype: torch.dtype = torch.float32,
    **more: Any,
) -> tuple[Method, nn.Module]:
    """transformers' Trainer, a new one for each task, which wraps the model through accelerate.

    callback: the task begins and ends in SlaoCallback, so when the model is wrapped already.
    """
    model = make(dtype)
    method = kind(model)
    arguments: dict[str, Any] = {"use_cpu": True, "optim": "sgd", "learning_rate": RATE, "max_grad_norm": 0.0}
    arguments |= {"lr_scheduler_type": "constant", "max_steps": STEPS, "report_to": "none", "save_strategy": "no"}
    arguments |= {"per_device_train_batch_size": BATCH // ranks, "train_sampling_strategy": "sequential"}
    arguments |= {"disable_tqdm": True, "dataloader_pin_memory": False, **more}
    wrapped: nn.Module = model
    for task in range(TASKS):
        rows = [{"input_ids": ids, "labels": ids} for step in range(STEPS) for ids in batch(task, step, 0, 1)]
        trainer = Trainer(model, TrainingArguments(str(folder / "trainer"), **arguments), None, rows)
        if callback:
            SlaoCallback(method, str(task)).attach(trainer)
            trainer.train()
        else:
            method.begin_task(str(task))
            trainer.train()
            method.end_task()
        wrapped = trainer.model_wrapped
    return method, wrapped


# On several ranks as in one process. SD-LoRA's new parameters keep it out of the callback; EWC squares the gradients of
# a rank's own batches.
KINDS = [kind for name, kind in METHODS.items() if name not in ("ewc", "sdlora")]


def every_method(rank: int, ranks: int, folder: Path, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """Each in transformers' Trainer, which wraps the model in DDP before the callback begins the task."""
    found = {}
    for kind in KINDS:
        method, _ = by_trainers(ranks, folder, callback=True, kind=kind, dtype=dtype)
        found[kind.name] = {key: value.clone() for key, value in (method._live_tensors() | method._state()).items()}
    return found


def sdlora(rank: int, ranks: int, folder: Path, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """Its magnitudes are parameters that DDP has to see."""
    model = make(dtype)
    method = SDLoRA(model)
    for task in range(TASKS):
        method.begin_task(str(task))
        learn(DistributedDataParallel(model) if ranks > 1 else model, task, rank, ranks)
        method.end_task()
    return method._live_tensors() | method._state()


def fisher(rank: int, ranks: int, folder: Path) -> dict[str, Any]:
    """EWC's information, and what this rank would have without the others."""
    model = make()
    method = EWC(model)
    method.begin_task("0")
    learn(DistributedDataParallel(model), 0, rank, ranks)
    method._count_last()  # which waits for the next pass
    mine = {key: method._squares[key] / method._batches[key] for key in method.fisher}
    method.end_task()
    return {"mine": mine, "all": method.fisher}


def heads(rank: int, ranks: int, folder: Path, wrap: Callable[[nn.Module], nn.Module]) -> dict[str, Any]:
    """What trains beside A and B, with shards: trained, saved, loaded; merged and exported where that can be."""

    def spread(how: str = "keep") -> tuple[Method, nn.Module]:
        model = with_head()
        early = None if wrap is in_units else SLAO(model, beside=how)
        wrapped = wrap(model)
        return early or SLAO(wrapped, beside=how), wrapped

    method, wrapped = spread()
    run(method, wrapped, rank, ranks)
    found: dict[str, Any] = {"kept": head(method)}
    mine = folder / f"head of {wrap.__name__}, rank {rank}"
    method.save(mine)
    again, _ = spread()
    again.load(mine)
    found["loaded"] = head(again)
    found["export"] = message(lambda: method.save_pretrained(mine))
    merging: list[Method] = []

    def average() -> None:
        method, wrapped = spread("merge")
        run(method, wrapped, rank, ranks)
        merging.append(method)

    found["merge"] = message(average)
    if merging:
        found["merged"] = head(merging[0])
    return found


HEADS = ("ddp", "fsdp2_blocks", "fsdp2_leaves", "fsdp1")

CASES: dict[str, Callable[..., dict[str, Any]]] = {
    "one_rank_fails": one_rank_fails,
    "patched_late": patched_late,
    "refusals": refusals,
    **{name: functools.partial(trained, wrap=wrap) for name, wrap in WRAPS.items()},
    **{f"{name}_on_disk": functools.partial(on_disk, wrap=wrap) for name, wrap in WRAPS.items()},
    **{f"{name}_heads": functools.partial(heads, wrap=WRAPS[name]) for name in HEADS},
    "trainer": with_trainer,
    "every_method": every_method,
    "sdlora": sdlora,
    "fisher": fisher,
    "callback": functools.partial(with_trainer, callback=True),
}
