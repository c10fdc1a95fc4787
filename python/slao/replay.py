"""Rows of tasks before that are trained again with each further task: the plain remedy that others are held against."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from .streams import Row, Task

SOURCES = ("per_task", "reservoir")


@dataclass(frozen=True)
class Replay:
    """Which training rows are kept, and so are among those of every later task, each once an epoch.

    fraction: this part of every task's rows, so that more are kept with every task. rows: so many in all, whatever the
    number of tasks. One of the two is given.
    source: "per_task" keeps of every task alike many, drawn at random; "reservoir" draws so that every row of all
    tasks has the same chance, and larger tasks keep more (Vitter's algorithm R, one row after another). Only with rows.

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

    def kept(self, tasks: Sequence[Task], seed: int) -> list[tuple[Task, Row]]:
        """What is kept after these tasks, in their order."""
        if self.source == "reservoir":
            return self._reservoir(tasks, seed)
        return [(task, row) for index, task in enumerate(tasks) for row in self._drawn(task, index, len(tasks), seed)]

    def _drawn(self, task: Task, index: int, count: int, seed: int) -> Iterator[Row]:
        if self.fraction is not None:
            most = max(1, round(self.fraction * len(task.train)))
        else:
            assert self.rows is not None
            most = self.rows // count + (index < self.rows % count)
        order = random.Random(f"{seed}/{index}").sample(range(len(task.train)), len(task.train))
        yield from (task.train[place] for place in sorted(order[:most]))  # of a shorter list the same rows, the first

    def _reservoir(self, tasks: Sequence[Task], seed: int) -> list[tuple[Task, Row]]:
        assert self.rows is not None
        draw = random.Random(seed)
        held: list[tuple[int, int]] = []
        for seen, item in enumerate(
            (index, place) for index, task in enumerate(tasks) for place in range(len(task.train))
        ):
            if len(held) < self.rows:
                held.append(item)
            elif (slot := draw.randrange(seen + 1)) < self.rows:
                held[slot] = item
        return [(tasks[index], tasks[index].train[place]) for index, place in sorted(held)]


def size(kept: Sequence[tuple[Task, Row]]) -> int:
    """Bytes of the rows themselves: their texts in UTF-8, and pixels."""
    return sum(len(part) for _, row in kept for part in _parts(row))


def _parts(row: Row) -> Iterator[bytes]:
    texts = (row.prompt, row.answer, *row.references, *(text for turn in row.messages for text in turn))
    yield from (text.encode() for text in texts)
    yield getattr(row, "pixels", b"")
