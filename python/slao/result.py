"""What a training of the whole stream gave: scores, times, sizes."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from . import metrics

Score = float | None


@dataclass
class Result:
    """One method, one seed. matrix[t][i]: score on task i after task t, None where it was not taken (a method that
    trains all tasks together has only the last row).

    zero_shot: scores before any training. losses: per task, as the Trainer logged them (every 10 steps).
    train_seconds: in training steps, evaluation and merging aside. tokens: real (not padding) ones that were trained
    on. merge_seconds: in begin_task and end_task together (and observe). score_seconds: in scoring, that before the
    first task included. peak_memory_mb: see `peak_memory_mb`. state_mb: MiB of adapter, whatever else the method
    keeps, and rows for replay, after each task. answers: to TrainConfig.ask, before training and after each task
    (joint: after all). cross_entropy: of TrainConfig.retention's text, at the same times, in nats a token.
    """

    tasks: list[str]
    matrix: list[list[Score]] = field(default_factory=list)
    zero_shot: list[Score] = field(default_factory=list)
    lambdas: list[Any] = field(default_factory=list)
    losses: list[list[float]] = field(default_factory=list)
    tokens: int = 0
    train_seconds: float = 0.0
    merge_seconds: float = 0.0
    score_seconds: float = 0.0
    peak_memory_mb: float = 0.0
    state_mb: list[float] = field(default_factory=list)
    answers: list[str] = field(default_factory=list)
    cross_entropy: list[float] = field(default_factory=list)

    @property
    def finished(self) -> bool:
        return len(self.matrix) == len(self.tasks)

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.train_seconds if self.train_seconds else 0.0

    def whole_matrix(self) -> list[list[Score]]:
        """`matrix` with rows of None for the tasks that are still to come."""
        empty: list[Score] = [None] * len(self.tasks)
        return [*self.matrix, *(empty for _ in self.tasks[len(self.matrix) :])]

    def summary(self) -> dict[str, Score]:
        """AA, BWT, ... and by how much the cross-entropy of the retention text has risen; None where T is too small,
        entries are missing, as they are in an unfinished run, or it was not measured."""
        matrix = self.whole_matrix()
        return {
            "AA": metrics.average_accuracy(matrix),
            "Inc-Acc": metrics.incremental_accuracy(matrix),
            "BWT": metrics.backward_transfer(matrix),
            "forgetting": metrics.forgetting(matrix),
            "FWT": metrics.forward_transfer(matrix, self.zero_shot),
            "CE_rise": self.cross_entropy[-1] - self.cross_entropy[0] if self.finished and self.cross_entropy else None,
        }
