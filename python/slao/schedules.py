"""λ(i), the weight of task i in the running merge. i counts from 1; the first task is always taken whole."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import Tensor

from slao_kernels import Interference, interference


@dataclass(frozen=True)
class MergeStats:
    """What a schedule may look at when task `task` (>= 2) is about to be merged. Tensors are live: read only.

    layers: names; each of a mixture's experts is a layer, `<layer>[<expert>]`. A, B: (r, n) and (m, r) per layer, just
    fine-tuned; A_merged, B_merged: the running merge. lambdas: those of the tasks before (a number, or one a layer).
    """

    task: int
    name: str
    layers: list[str]
    A: list[Tensor]
    B: list[Tensor]
    A_merged: list[Tensor]
    B_merged: list[Tensor]
    lambdas: list[float | list[float]]

    @cached_property
    def interference(self) -> Interference:
        """Of two adapters, (A, B) and (A_merged, B_merged); computed when first asked for, and kept.

        Ask before the merge: it writes into B_merged. PEFT's scaling, which both have, cancels in a cosine.
        """
        return interference([(self.A, self.B, 1.0), (self.A_merged, self.B_merged, 1.0)])

    def cosine(self) -> list[float]:
        """Per layer the cosine of the task vectors B A and B_merged A_merged, in [-1, 1]; 0 where one is zero."""
        return [float(value) for value in self.interference.cosines[:, 0, 1].tolist()]

    @property
    def seen(self) -> bool:
        """Whether anything has asked for `interference`."""
        return "interference" in self.__dict__


Lambda = float | Sequence[float]
Schedule = Callable[[int, MergeStats], Lambda]


def inv_sqrt(i: int, stats: MergeStats) -> float:
    """1/√i: SLAO's own (arXiv 2512.23017); the early tasks fade slowest of the shrinking schedules."""
    return 1.0 / math.sqrt(i)


def inverse(i: int, stats: MergeStats) -> float:
    """1/i: the plain average of all tasks."""
    return 1.0 / i


def adaptive(i: int, stats: MergeStats) -> list[float]:
    """i^(−(1 + c)/2), one a layer, c the cosine of the new task vector with the merge: in [1/i, 1] for every c.

    A new vector that is orthogonal to the merge gets SLAO's own 1/√i; one that says the same again the plain average's
    1/i (there the old merge has it already); the more it points against it, the nearer to 1, since an average of the
    two would cancel what the task has just learned. Our own choice for the paper's open question, not a published one.
    """
    return [min(1.0, max(1.0 / i, i ** (-(1.0 + c) / 2.0))) for c in stats.cosine()]  # rounding may leave by one bit


def schedule_name(schedule: str | float | Schedule) -> str | float:
    """What a saved state is compared by: of a function, or of an object that is called, the name."""
    if isinstance(schedule, str | int | float):
        return schedule
    return str(getattr(schedule, "__qualname__", type(schedule).__qualname__))


def lambdas_of(schedule: Schedule, stats: MergeStats) -> tuple[float | list[float], list[float]]:
    """What the schedule chose, and the same for each of the layers. ValueError for what is no λ, or not one a layer."""
    chosen: Any = schedule(stats.task, stats)
    chosen = chosen.tolist() if hasattr(chosen, "tolist") else chosen  # of a tensor or an array, 0-d ones too
    lam = float(chosen) if isinstance(chosen, int | float) else [float(value) for value in chosen]
    each = lam if isinstance(lam, list) else [lam] * len(stats.layers)  # of experts, too
    if len(each) != len(stats.layers):
        raise ValueError(f"the schedule gave {len(each)} λ for {len(stats.layers)} layers (each expert is one)")
    wrong = [f"{name}: {value}" for name, value in zip(stats.layers, each, strict=True) if not 0.0 <= value <= 1.0]
    if wrong:
        raise ValueError(f"the schedule's λ must lie in [0, 1]: {', '.join(wrong[:8])}")
    return lam, each


SCHEDULES: dict[str, Schedule] = {"inv_sqrt": inv_sqrt, "inverse": inverse, "adaptive": adaptive}


def make_schedule(schedule: str | float | Schedule) -> Schedule:
    """A schedule from its name, a constant in [0, 1], or a function of (i, MergeStats) -> λ or one λ a layer.

    Raises ValueError for an unknown name or a constant outside [0, 1].
    """
    if callable(schedule):
        return schedule
    if isinstance(schedule, int | float):
        constant = float(schedule)
        if not 0.0 <= constant <= 1.0:
            raise ValueError(f"a constant schedule must lie in [0, 1], not {schedule}")
        return lambda i, stats: constant
    if schedule not in SCHEDULES:
        raise ValueError(
            f"unknown schedule {schedule!r}; choose one of {', '.join(SCHEDULES)}, a number in [0, 1] or a function"
        )
    return SCHEDULES[schedule]
