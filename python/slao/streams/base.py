"""A stream is a named sequence of tasks; a task is rows of text, or images, with their answers. Nothing here knows
models."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

from slao.reading import check_text

# What a task can be scored by, each in [0, 1] and averaged over the rows; see slao.objectives.text_scores.
METRICS = ("accuracy", "exact_match", "rouge_l", "first_letter", "code_similarity", "sari")


@dataclass(frozen=True)
class Row:
    """One example.

    prompt: what the model reads. answer: what it should say; for a classification task the text of its label.
    references: further texts that count as right. Training uses the answer alone, scoring the best of all.
    verbatim: the prompt is whole as it stands, and the answer follows it at once; else an objective's template goes
    around it. messages: (role, content) of each turn of a conversation, the last one the assistant's and `answer`;
    `prompt` is then empty. where: the file and line that it came from, for messages.
    ValueError for half of a character in any of them.
    """

    prompt: str
    answer: str
    references: tuple[str, ...] = ()
    verbatim: bool = False
    messages: tuple[tuple[str, str], ...] = ()
    where: str = field(default="", compare=False)

    def __post_init__(self) -> None:
        check_text(self.prompt, "its text")
        for answer in (self.answer, *self.references):
            check_text(answer, "its answer")
        for number, (role, content) in enumerate(self.messages, start=1):
            check_text(role, f"the role of message {number}")
            check_text(content, f"message {number}")

    @property
    def kind(self) -> str:
        """What it is made of: "messages", "prompt and answer" (verbatim) or "text" (for a template)."""
        return "messages" if self.messages else "prompt and answer" if self.verbatim else "text"


@dataclass(frozen=True)
class ImageRow(Row):
    """One image; its prompt is empty.

    pixels: levels from 0 to 255, row after row, channel after channel. shape: (channels, height, width).
    """

    pixels: bytes = b""
    shape: tuple[int, int, int] = (1, 0, 0)

    def __post_init__(self) -> None:
        super().__post_init__()
        channels, height, width = self.shape
        if not self.pixels or channels * height * width != len(self.pixels):
            raise ValueError(f"an image of shape {self.shape} cannot have {len(self.pixels)} pixels")


@dataclass(frozen=True)
class Task:
    """One task of a stream.

    labels: the texts that an answer can be, in a fixed order; empty for free-form tasks.
    instruction: a line that a causal LM sees before the prompt; it must not leak the task's name.
    metric: "accuracy" (the right label ranks first; free-form: the answer is given), "exact_match" (of the generated
    text, case and punctuation aside), "rouge_l" (F1 of the generated text), "first_letter" (of the generated text, the
    letter of an answer to choose), "code_similarity" (of the generated line) or "sari" (of the generated text, the
    prompt's in simpler words).
    """

    name: str
    train: tuple[Row, ...]
    validation: tuple[Row, ...]
    test: tuple[Row, ...]
    labels: tuple[str, ...] = ()
    instruction: str = ""
    metric: str = "accuracy"

    def __post_init__(self) -> None:
        if self.metric not in METRICS:
            raise ValueError(f"task {self.name!r}: unknown metric {self.metric!r}; choose one of {', '.join(METRICS)}")
        for split in ("train", "test"):
            if not getattr(self, split):
                raise ValueError(f"task {self.name!r} has no {split} rows; add some or leave the task out")
        check_text(self.name, f"the name of task {self.name!r}")
        check_text(self.instruction, f"task {self.name!r}: its instruction")
        rows = (*self.train, *self.validation, *self.test)
        if other := next((row for row in rows if row.kind != self.kind), None):
            raise ValueError(
                f"task {self.name!r} mixes rows of {self.kind} ({rows[0].where or 'its first one'}) and of "
                f"{other.kind} ({other.where or 'a later one'}); write all of them in one way"
            )
        if self.instruction and self.kind != "text":
            raise ValueError(
                f"task {self.name!r} has an instruction, which rows of {self.kind} have no place for: write it into "
                "the rows, and remove instruction.txt"
            )
        if self.metric == "sari" and self.kind == "messages":
            raise ValueError(f"task {self.name!r} has messages, and sari compares with a prompt: choose another metric")
        if not self.labels:
            return
        if len(set(self.labels)) != len(self.labels):
            raise ValueError(f"task {self.name!r} lists a label twice: {list(self.labels)}")
        known = set(self.labels)
        for split in ("train", "validation", "test"):
            unknown = sorted({row.answer for row in getattr(self, split)} - known)
            if unknown:
                raise ValueError(
                    f"task {self.name!r}, {split}: label {unknown[0]!r} is not among its labels {list(self.labels)}; "
                    "add it to the labels or correct the row"
                )

    @property
    def kind(self) -> str:
        """That of its rows, which are all of one."""
        return self.train[0].kind


@dataclass(frozen=True)
class Stream:
    """An ordered sequence of tasks with distinct names."""

    name: str
    tasks: tuple[Task, ...]

    def __post_init__(self) -> None:
        if not self.tasks:
            raise ValueError(f"stream {self.name!r} has no tasks")
        names = [task.name for task in self.tasks]
        if len(set(names)) != len(names):
            raise ValueError(f"stream {self.name!r} has two tasks of one name: {names}")

    @property
    def rows(self) -> Iterable[Row]:
        """Every row of every task."""
        return (row for task in self.tasks for row in (*task.train, *task.validation, *task.test))

    @property
    def labels(self) -> tuple[str, ...]:
        """Every label of every task, each once, in order of first appearance."""
        return tuple(dict.fromkeys(label for task in self.tasks for label in task.labels))

    @property
    def metric(self) -> str:
        """The metric of its tasks; where they have several, the names of all, the most frequent one first."""
        return ", ".join(name for name, _ in Counter(task.metric for task in self.tasks).most_common())

    def shuffled(self, seed: int) -> Stream:
        """The same tasks in an order drawn from `seed`."""
        tasks = list(self.tasks)
        random.Random(seed).shuffle(tasks)
        return replace(self, tasks=tuple(tasks))

    def limited(
        self, rows: int | None = None, fraction: float | None = None, seed: int = 0, test: int | None = None
    ) -> Stream:
        """At most `rows` training rows a task, or a `fraction` of them, and at most `test` test rows, from `seed`."""
        for limit in (rows, test):
            if limit is not None and limit < 1:
                raise ValueError(f"rows must be at least 1, not {limit}")
        if fraction is not None and not 0 < fraction <= 1:
            raise ValueError(f"fraction must lie in (0, 1], not {fraction}")

        def drawn(rows: tuple[Row, ...], count: int, name: str) -> tuple[Row, ...]:
            if count >= len(rows):
                return rows
            picked = sorted(random.Random(f"{seed}/{name}").sample(range(len(rows)), count))
            return tuple(rows[i] for i in picked)

        def keep(task: Task) -> Task:
            count = len(task.train) if fraction is None else max(1, round(fraction * len(task.train)))
            count = count if rows is None else min(count, rows)
            tested = task.test if test is None else drawn(task.test, test, f"test/{task.name}")
            return replace(task, train=drawn(task.train, count, task.name), test=tested)

        return replace(self, tasks=tuple(keep(task) for task in self.tasks))


def carve_validation(train: Sequence[Row], fraction: float, seed: int) -> tuple[tuple[Row, ...], tuple[Row, ...]]:
    """Split `train` into (train, validation) by `seed`; at least one row stays in train."""
    if not 0 <= fraction < 1:
        raise ValueError(f"the validation fraction must lie in [0, 1), not {fraction}")
    order = list(range(len(train)))
    random.Random(seed).shuffle(order)
    held = set(order[: min(int(fraction * len(train)), len(train) - 1)]) if train else set()
    return (
        tuple(row for i, row in enumerate(train) if i not in held),
        tuple(row for i, row in enumerate(train) if i in held),
    )


@dataclass
class Splits:
    """Rows on their way into a `Task`."""

    train: list[Row] = field(default_factory=list)
    validation: list[Row] = field(default_factory=list)
    test: list[Row] = field(default_factory=list)

    def task(self, name: str, labels: Iterable[str] = (), instruction: str = "", metric: str = "accuracy") -> Task:
        return Task(
            name, tuple(self.train), tuple(self.validation), tuple(self.test), tuple(labels), instruction, metric
        )
