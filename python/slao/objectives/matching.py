"""Classification by the cosine to frozen directions: nothing is trained but the LoRA, so only it forgets."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..streams import Row, Stream, Task
from .base import Objective, check_candidates, evaluating, in_batches


class Matching(Objective):
    """Logits are cosine(row, label) / temperature over the candidate labels; the loss is cross-entropy.

    A subclass embeds rows, and has one direction a label in `_table` (labels, width) that is never trained.
    train_candidates: "own" (the labels of the row's task), "all" (the stream's) or "running" (those of all tasks that
    are trained together: the row's own and those of replayed rows, in joint training all). eval_candidates: "own",
    "all" or "seen" (those of the tasks trained so far and the row's own, all where none is trained yet:
    class-incremental learning).
    Raises ValueError for a stream without labels or scored otherwise than by accuracy, or an unknown choice.
    """

    metrics = ("accuracy",)
    own_loss = True
    _table: Tensor

    def __init__(self, stream: Stream, temperature: float, train_candidates: str, eval_candidates: str) -> None:
        chosen = {"train_candidates": train_candidates, "eval_candidates": eval_candidates}
        self.check(stream, temperature=temperature, **chosen)
        self.temperature = temperature
        self.train_candidates, self.eval_candidates = train_candidates, eval_candidates
        self.labels = stream.labels
        self._index = {label: i for i, label in enumerate(self.labels)}
        self._task_index = {task.name: t for t, task in enumerate(stream.tasks)}
        # (tasks, labels): which labels a task has.
        self._own = torch.zeros(len(stream.tasks), len(self.labels), dtype=torch.bool)
        for t, task in enumerate(stream.tasks):
            self._own[t, [self._index[label] for label in task.labels]] = True

    @classmethod
    def check(cls, stream: Stream, **options: Any) -> None:
        check_candidates("running", train_candidates=options.get("train_candidates", "own"))
        check_candidates("seen", eval_candidates=options.get("eval_candidates", "own"))
        unlabelled = [task.name for task in stream.tasks if not task.labels]
        if unlabelled:
            raise ValueError(f"{cls.name} needs labels; tasks without: {', '.join(unlabelled)} (use causal_lm)")
        cls.check_metrics(stream)
        if not options.get("temperature", 1) > 0:
            raise ValueError(f"temperature must be positive, not {options['temperature']}")
        super().check(stream)

    @abstractmethod
    def _embed(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        """(rows, width), unit length, in fp32."""

    def loss(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        return F.cross_entropy(self._logits(model, batch, self._allowed(self.train_candidates)), batch["labels"])

    def score(self, model: nn.Module, task: Task, rows: Sequence[Row], batch_size: int) -> float:
        features = self.features(task, rows)
        allowed = self._allowed(self.eval_candidates)
        correct = 0
        with evaluating(model) as device:
            for _, batch in in_batches(features, batch_size, self.collate, device):
                guesses = self._logits(model, batch, allowed).argmax(1)
                correct += int((guesses == batch["labels"]).sum())
        return correct / len(rows)

    def _allowed(self, candidates: str) -> Tensor:
        """(tasks, labels): which labels a row of that task may be given."""
        if candidates == "all" or (candidates == "seen" and not self.seen):
            return torch.ones_like(self._own)
        further = {"own": (), "running": self.running, "seen": self.seen}[candidates]
        return self._own | self._own[[self._task_index[name] for name in further]].any(0)

    def _logits(self, model: nn.Module, batch: dict[str, Tensor], allowed: Tensor) -> Tensor:
        """(rows, labels of the stream), -inf where a label is no candidate."""
        embedded = self._embed(model, batch)
        logits = embedded @ self._table.to(embedded.device).T / self.temperature
        return logits.masked_fill(~allowed.to(logits.device)[batch["task"]], float("-inf"))
