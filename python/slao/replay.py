"""Rows of tasks before that are trained again with each further task: the plain remedy that others are held against."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch.utils.data import ConcatDataset, Subset

from .streams import Row, Task

SOURCES = ("per_task", "reservoir")


@dataclass(frozen=True)
class Replay:
    """Which training rows are kept, and so are among those of every later task, each once an epoch.

    fraction: this part of every task's rows, so that more are kept with every task. rows: at most so many in all,
    whatever the number of tasks. One of the two is given.
    source: "per_task" keeps of every task alike many, of a short one all, drawn at random; "reservoir" draws so that
    every row of all tasks has the same chance, and larger tasks keep more (Vitter's algorithm R, one row after
    another). Only with rows.

    What is kept after a task is drawn from the seed and the tasks so far alone, so that a resumed run has the same
    rows, and nothing else has to be saved.
    """

    rows: int | None = None
    fraction: float | None = None
    source: str = "per_task"

    def __post_init__(self) -> None:
        if (self.rows is None) == (self.fraction is None):
            raise ValueError("replay takes either rows (so many in all) or fraction (a part of every task's rows)")
        if self.source not in SOURCES:
            raise ValueError(f"unknown replay source {self.source!r}; choose {' or '.join(SOURCES)}")
        if self.rows is not None and self.rows < 1:
            raise ValueError(f"replay rows must be at least 1, not {self.rows}")
        if self.fraction is not None and not 0 < self.fraction <= 1:
            raise ValueError(f"replay fraction must lie in (0, 1], not {self.fraction}")
        if self.fraction is not None and self.source != "per_task":
            raise ValueError("a reservoir has a fixed number of rows: give replay rows, not a fraction")

    def drawn(self, rows: Sequence[int], seed: int) -> list[tuple[int, int]]:
        """(task, row) of what is kept after tasks of so many rows, in their order."""
        if self.source == "reservoir":
            return self._reservoir(rows, seed)
        kept = zip(rows, self._shares(rows), strict=True)
        # Of a smaller share the same rows, the first.
        own = [
            sorted(random.Random(f"{seed}/{task}").sample(range(n), n)[:most]) for task, (n, most) in enumerate(kept)
        ]
        return [(task, row) for task, of in enumerate(own) for row in of]

    def kept(self, tasks: Sequence[Task], seed: int) -> list[tuple[Task, Row]]:
        """The rows of these tasks that are kept after them."""
        drawn = self.drawn([len(task.train) for task in tasks], seed)
        return [(tasks[task], tasks[task].train[row]) for task, row in drawn]

    def mixed(self, datasets: Sequence[Any], seed: int = 0) -> Any:
        """The last of these data sets of the tasks so far, and of the ones before what is kept: for any Trainer.

        datasets: torch's, with a length and rows by index, or all of them the library datasets' `Dataset` with the same
        columns (as TRL takes them). Returns one of the same kind; the last of them itself where nothing is kept.
        """
        if endless := [type(one).__name__ for one in datasets if not hasattr(one, "__len__")]:
            raise ValueError(f"replay needs data sets with a length and rows by index, not {endless[0]}")
        drawn = self.drawn([len(one) for one in datasets[:-1]], seed)
        rows = [[row for task, row in drawn if task == number] for number in range(len(datasets) - 1)]
        kept = [(one, own) for one, own in zip(datasets, rows, strict=False) if own]
        if not kept:
            return datasets[-1]
        if all(type(one).__module__.partition(".")[0] == "datasets" for one in datasets):
            from datasets import concatenate_datasets

            return concatenate_datasets([datasets[-1], *(one.select(own) for one, own in kept)])
        return ConcatDataset([datasets[-1], *(Subset(one, own) for one, own in kept)])

    def _shares(self, rows: Sequence[int]) -> list[int]:
        """How many are kept of tasks of so many rows; what a short task leaves goes to the others."""
        if self.fraction is not None:
            return [max(1, round(self.fraction * count)) for count in rows]
        assert self.rows is not None
        shares, left = [0] * len(rows), self.rows
        for before, task in enumerate(sorted(range(len(rows)), key=lambda task: (rows[task], -task))):
            shares[task] = min(rows[task], left // (len(rows) - before))
            left -= shares[task]
        return shares

    def _reservoir(self, rows: Sequence[int], seed: int) -> list[tuple[int, int]]:
        assert self.rows is not None
        draw = random.Random(seed)
        held: list[tuple[int, int]] = []
        for seen, item in enumerate((task, row) for task, count in enumerate(rows) for row in range(count)):
            if len(held) < self.rows:
                held.append(item)
            elif (slot := draw.randrange(seen + 1)) < self.rows:
                held[slot] = item
        return sorted(held)


def size(kept: Sequence[tuple[Task, Row]]) -> int:
    """Bytes of the rows themselves: their texts in UTF-8, and pixels."""
    return sum(len(part) for _, row in kept for part in _parts(row))


def _parts(row: Row) -> Iterator[bytes]:
    texts = (row.prompt, row.answer, *row.references, *(text for turn in row.messages for text in turn))
    yield from (text.encode() for text in texts)
    yield getattr(row, "pixels", b"")
