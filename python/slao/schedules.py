"""λ(i), the weight of task i in the running merge. i counts from 1; the first task is always taken whole."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class MergeStats:
    """What a schedule may look at when task `task` (>= 2) is about to be merged. Tensors are live: read only.

    layers: names. A, B: (r, n) and (m, r) per layer, just fine-tuned; A_merged, B_merged: the running merge.
    lambdas: those of the tasks before (a number, or one number a layer).
    """

    task: int
    name: str
    layers: list[str]
    A: list[Tensor]
    B: list[Tensor]
    A_merged: list[Tensor]
    B_merged: list[Tensor]
    lambdas: list[float | list[float]]

    def cosine(self) -> list[float]:
        """Per layer the cosine of the task vectors B A and B_merged A_merged, in [-1, 1]; 0 where one is zero.

        ⟨B₁A₁, B₂A₂⟩ = trace((B₁ᵀB₂)(A₂A₁ᵀ)): r×r products, never the m×n deltas.
        """
        return [
            _cosine(*(factor.double() for factor in factors))
            for factors in zip(self.A, self.B, self.A_merged, self.B_merged, strict=True)
        ]


def _cosine(A1: Tensor, B1: Tensor, A2: Tensor, B2: Tensor) -> float:
    def inner(A: Tensor, B: Tensor, C: Tensor, D: Tensor) -> Tensor:
        return ((B.T @ D) * (A @ C.T)).sum()

    norms = torch.sqrt(inner(A1, B1, A1, B1) * inner(A2, B2, A2, B2))
    return float(inner(A1, B1, A2, B2) / norms) if norms > 0 else 0.0


Lambda = float | Sequence[float]
Schedule = Callable[[int, MergeStats], Lambda]


def inv_sqrt(i: int, stats: MergeStats) -> float:
    """1/√i: SLAO's own (arXiv 2512.23017); the early tasks fade slowest of the shrinking schedules."""
    return 1.0 / math.sqrt(i)


def inverse(i: int, stats: MergeStats) -> float:
    """1/i: the plain average of all tasks."""
    return 1.0 / i


SCHEDULES: dict[str, Schedule] = {"inv_sqrt": inv_sqrt, "inverse": inverse}


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
