"""The same over DeepSpeed, where it is installed."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import torch

from slao import SLAO

from .lab import BATCH, RATE, TASKS, learn, make, outcome


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
        engine.destroy()  # or its hooks would reduce the gradients of the next one's steps as well
        method.end_task()
    method.save(folder / f"zero{stage} of rank {rank}")
    return outcome(method, engine)


MORE = {f"zero{stage}": functools.partial(zero, stage=stage) for stage in (2, 3)}
