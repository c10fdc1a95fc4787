"""The same over DeepSpeed, where it is installed."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import torch
from torch import nn

from slao import SLAO

from .cases import with_trainer
from .lab import BATCH, RATE, TASKS, learn, make, message, outcome


def settings(ranks: int, stage: int, **more: Any) -> dict[str, Any]:
    return {
        "train_micro_batch_size_per_gpu": BATCH // ranks,
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
        "gradient_clipping": 0.0,  # clips at 1 unless told otherwise
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        **more,
    }


def engine_of(model: nn.Module, config: dict[str, Any]) -> Any:
    import deepspeed

    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=RATE)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config, dist_init_required=False)
    return engine


def zero(rank: int, ranks: int, folder: Path, stage: int) -> dict[str, Any]:
    """A new engine for each task."""
    model = make()
    method = SLAO(model)
    for task in range(TASKS):
        method.begin_task(str(task))
        engine = engine_of(model, settings(ranks, stage))
        learn(model, task, rank, ranks, engine)
        engine.destroy()  # or its hooks would reduce the gradients of the next one's steps as well
        method.end_task()
    method.save(folder / f"zero{stage} of rank {rank}")
    return outcome(method, engine)


def kept(rank: int, ranks: int, folder: Path, stage: int) -> dict[str, Any]:
    """One engine for all tasks, older than the first of them; its fp32 copies have to follow what a task writes."""
    model = make()
    method = SLAO(model)
    engine = engine_of(model, settings(ranks, stage))
    for task in range(TASKS):
        method.begin_task(str(task))
        learn(model, task, rank, ranks, engine)
        method.end_task()
    return outcome(method, engine)


def trainer(rank: int, ranks: int, folder: Path, stage: int) -> dict[str, Any]:
    """transformers' Trainer makes the engine before the callback begins the task."""
    return with_trainer(rank, ranks, folder, callback=True, deepspeed=settings(ranks, stage))


def sixteen_bits(rank: int, ranks: int, folder: Path, stage: int) -> dict[str, Any]:
    """bf16 with fp32 copies: a task's beginning changes those of A alone, taking up a saved state none."""
    from deepspeed.utils import safe_get_full_fp32_param

    model = make().bfloat16()
    method = SLAO(model)
    engine = engine_of(model, settings(ranks, stage, bf16={"enabled": True}))

    def copies() -> list[list[torch.Tensor]]:
        return [[safe_get_full_fp32_param(p).clone() for p in pair.parameters] for pair in method.pairs]

    method.begin_task("0")
    learn(model, 0, rank, ranks, engine)
    trained = copies()
    method.save(folder / f"sixteen_bits{stage} of rank {rank}")
    method.load(folder / f"sixteen_bits{stage} of rank {rank}")
    loaded = copies()
    method.end_task()
    method.begin_task("1")
    begun = copies()
    with method._whole(write=False):
        now = [[pair.A.float().clone(), pair.B.float().clone()] for pair in method.pairs]
    return {"trained": trained, "loaded": loaded, "begun": begun, "now": now}


def without_zero(rank: int, ranks: int, folder: Path) -> dict[str, Any]:
    """fp32 copies that cannot be found from the parameters: of an engine under the method, and of a Trainer's."""
    engine = engine_of(make().bfloat16(), settings(ranks, 0, bf16={"enabled": True}))
    method = SLAO(engine)
    found = {
        name: message(call)
        for name, call in (("begin", lambda: method.begin_task("0")), ("load", lambda: method.load(folder)))
    }
    more = {"deepspeed": settings(ranks, 0, bf16={"enabled": True}), "bf16": True}
    return {
        **found,
        "trainer": message(lambda: with_trainer(rank, ranks, folder, callback=True, **more)),
        "task": method.task,
    }


MORE = {
    f"{case.__name__}{stage}": functools.partial(case, stage=stage)
    for case in (zero, kept, trainer, sixteen_bits)
    for stage in (2, 3)
}
MORE["without_zero"] = without_zero
