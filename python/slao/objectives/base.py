"""An objective turns a task's rows into batches, a batch into a loss, and a trained model into a score."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..modes import eval_mode
from ..streams import ImageRow, Row, Stream, Task

CANDIDATES: tuple[str, ...] = ("own", "all")
Features = list[dict[str, Any]]


class Objective(ABC):
    """What a model is trained to do, and how well it does it; see the subclasses.

    metrics: what `score` can return, each in [0, 1]; a task names the one it wants. own_loss: whether `loss` replaces
    the one the model returns itself. answers: whether there is an `answer`. notes: lines for whoever starts a run, such
    as that rows are cut.
    running, seen: names of the tasks being trained (joint training has them all, replay those of its rows), and of
    those trained so far, these included; `slao.train` keeps them.
    """

    name: ClassVar[str]
    metrics: ClassVar[tuple[str, ...]]
    own_loss: ClassVar[bool]
    answers: ClassVar[bool] = False
    images: ClassVar[bool] = False  # whether it reads images, else texts
    tokenizer: Any = None  # of those that read texts
    notes: tuple[str, ...] = ()
    running: tuple[str, ...] = ()
    seen: tuple[str, ...] = ()

    @abstractmethod
    def features(self, task: Task, rows: Sequence[Row]) -> Features:
        """Tokenised training rows of `task`."""

    @abstractmethod
    def collate(self, features: Features) -> dict[str, Tensor]:
        """One padded batch."""

    @abstractmethod
    def loss(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        """The mean loss of a batch; called only where `own_loss`."""

    def answer(self, model: nn.Module, task: Task, text: str) -> str:
        """What the model says to a text as it stands in a row of the task; called only where `answers`."""
        raise NotImplementedError

    @abstractmethod
    def score(self, model: nn.Module, task: Task, rows: Sequence[Row], batch_size: int) -> float:
        """The task's metric of the model on `rows`, without training it."""

    def shown(self, task: Task, features: dict[str, Any]) -> list[tuple[str, str]]:
        """(what it is, text) of the parts of a row of `features`, for a person."""
        ids, label = features.get("input_ids"), features.get("labels")
        read = repr(self.tokenizer.decode(ids)) if ids is not None and self.tokenizer is not None else "an image"
        labels: Sequence[str] = getattr(self, "labels", ())
        learned = [("LEARNS", f"the label {labels[label]!r}")] if isinstance(label, int) else []
        return [("reads", read), *learned]

    def outputs(self, model: nn.Module, rows: int, longest: int) -> int:
        """How many numbers the model gives for `rows` rows of `longest` tokens, where that is worth counting."""
        return 0

    @classmethod
    def check(cls, stream: Stream, **options: Any) -> None:
        """ValueError for options and data that it takes with no model; asked before one is loaded, and when made."""
        check_rows(cls.name, stream, cls.images)

    @classmethod
    def check_metrics(cls, stream: Stream) -> None:
        """ValueError naming the tasks whose metric this objective does not compute."""
        other = [f"{task.name} ({task.metric})" for task in stream.tasks if task.metric not in cls.metrics]
        if other:
            raise ValueError(
                f"{cls.name} scores {', '.join(cls.metrics)} only; tasks that want another: {', '.join(other)}"
            )

    def tokens(self, batch: dict[str, Tensor]) -> Tensor:
        """How many real tokens a batch has; stays on its device."""
        return batch["attention_mask"].sum()


def check_candidates(further: str = "", **chosen: str) -> None:
    """ValueError unless each is "own" (the task's labels), "all" (those of the whole stream) or `further`."""
    valid = (*CANDIDATES, further) if further else CANDIDATES
    for name, value in chosen.items():
        if value not in valid:
            raise ValueError(f"unknown {name} {value!r}; choose one of {', '.join(valid)}")


def room(objective: Objective, model: nn.Module, max_length: int, least: int) -> int:
    """How many tokens a row may have: `max_length`, or as many as the model has positions for, which is noted.

    ValueError where that is less than `least`.
    """
    if max_length < least:
        raise ValueError(f"max_length must be at least {least} (marks, and a token of text), not {max_length}")
    most = positions(model)
    if most is None or max_length <= most:
        return max_length
    objective.notes = (*objective.notes, f"longer rows are cut at {most} tokens: the model has no more positions")
    return most


def check_rows(objective: str, stream: Stream, images: bool) -> None:
    """ValueError unless the stream's rows are images, or texts: what the objective reads."""
    for task in stream.tasks:
        if any(isinstance(row, ImageRow) != images for row in (*task.train, *task.validation, *task.test)):
            what, other = ("images", "texts") if images else ("texts", "images (use image_matching)")
            raise ValueError(f"{objective} reads {what}; task {task.name!r} has {other}")
        if task.kind == "messages" and objective != "causal_lm":
            raise ValueError(f"{objective} reads single texts; task {task.name!r} has messages (use causal_lm)")


@contextmanager
def evaluating(model: nn.Module) -> Iterator[torch.device]:
    """Eval mode without gradients; each module's own mode is back after any exit. Yields the model's device."""
    with eval_mode(model), torch.no_grad():
        yield next(model.parameters()).device


_listener: Callable[[float], None] | None = None


@contextmanager
def heard(listener: Callable[[float], None] | None) -> Iterator[None]:
    """Within the block `in_batches` calls `listener` after each batch with the part of the rows that is done."""
    global _listener
    before, _listener = _listener, listener
    try:
        yield
    finally:
        _listener = before


def in_batches(
    features: Features, size: int, collate: Callable[[Features], dict[str, Tensor]], device: torch.device
) -> Iterator[tuple[list[int], dict[str, Tensor]]]:
    """(indices into `features`, batch on `device`), longest rows first: little padding, and memory peaks early.

    Within `heard` it says how far it has come.
    """
    order = sorted(range(len(features)), key=lambda i: -len(features[i].get("input_ids", ())))  # images: as they are
    for start in range(0, len(order), size):
        indices = order[start : start + size]
        batch = collate([features[i] for i in indices])
        yield indices, {key: value.to(device) for key, value in batch.items()}
        if _listener is not None:
            _listener(min(1.0, (start + size) / len(order)))


def positions(model: nn.Module) -> int | None:
    """How many tokens the model's learned positions take; None where a row can have any length."""
    found = []
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding) and re.search(r"position|\bwpe$", name.rpartition(".")[2]):
            # OPT leaves the first two out, RoBERTa those up to the padding's.
            skipped = getattr(module, "offset", 0) or (0 if module.padding_idx is None else module.padding_idx + 1)
            found.append(module.num_embeddings - skipped)
    return min(found, default=None)
