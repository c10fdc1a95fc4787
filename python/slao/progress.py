"""What a person sees of a run: one bar over training and scoring of all tasks, and a line after each task."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import fmean
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback

from slao_kernels import sharding

from .result import Result
from .streams import Stream

if TYPE_CHECKING:
    from .train import TrainConfig

_DRAWN_EVERY = 0.5  # seconds
_TRAINED = 3  # forward passes that a trained row is taken for (its backward is two), until both paces are measured


@dataclass(frozen=True)
class Work:
    """What a training of a stream has before it. tasks: what is trained, one after another ("joint" is one).

    steps: of each. batch: rows a step. rows: for every round of scoring, that before the first task included, the rows
    of each task that is scored. names: of the tasks that are scored.
    """

    tasks: list[str]
    steps: list[int]
    batch: int
    rows: list[list[int]]
    names: list[str]

    @staticmethod
    def of(stream: Stream, config: TrainConfig, together: bool = False) -> Work:
        tested = [len(getattr(task, config.score_on)) for task in stream.tasks]
        count = len(tested)
        later = (
            [tested] if together else [tested[: t + 1] if config.evaluate == "seen" else tested for t in range(count)]
        )
        trained = [len(task.train) for task in stream.tasks]
        if config.replay is not None and not together:
            again = [len(config.replay.drawn(trained[:t], 0)) for t in range(count)]
            trained = [own + kept for own, kept in zip(trained, again, strict=True)]
        names = [task.name for task in stream.tasks]
        steps = [steps_of(sum(trained), config) * (count if config.max_steps > 0 else 1)] if together else []
        batch = config.batch_size * config.gradient_accumulation * sharding.ranks()
        return Work(
            ["joint"] if together else names,
            steps or [steps_of(rows, config) for rows in trained],
            batch,
            [tested, *later],
            names,
        )


def steps_of(rows: int, config: TrainConfig) -> int:
    """Optimiser steps of a task, as transformers' Trainer counts them."""
    if config.max_steps > 0:
        return config.max_steps
    batches = math.ceil(rows / (config.batch_size * sharding.ranks()))
    return math.ceil(config.epochs * math.ceil(batches / config.gradient_accumulation))


class RunProgress(TrainerCallback):
    """Counts optimiser steps and scored rows; shows the running task, how much is done and how long the rest will take.
    Silent on all processes but the first; without a terminal there is no bar, only a line a task.

    say: what such a line is printed with.
    """

    def __init__(self, title: str, work: Work, say: Callable[[str], object] = print) -> None:
        self.title, self.work, self.say = title, work, say
        self.steps = list(work.steps)
        self.task, self.round = 0, 0  # being trained, and being scored
        self.step = 0  # of this task
        self.scored = 0.0  # rows of this round
        self.bar: Any = None
        self._shown = ("", 0.0)  # what the bar said last, and when
        self._pace = {"step": [0.0, 0.0], "row": [0.0, 0.0]}  # seconds, and of how many
        self._since = time.perf_counter()
        self._before = (0, 0.0)  # tokens and seconds of training when the task began

    # What happens

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.steps[self.task] = state.max_steps
        self.step, self._since = 0, time.perf_counter()
        self._show(f"task {self.task + 1}/{len(self.steps)} {self.work.tasks[self.task]}")

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._took("step", 1)
        self.step += 1
        self._show(f"task {self.task + 1}/{len(self.steps)} {self.work.tasks[self.task]}")

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.step = self.steps[self.task]
        self._since = time.perf_counter()

    def on_score(self, index: int, part: float) -> None:
        rows = self.work.rows[self.round]
        scored = sum(rows[:index]) + part * rows[index]
        self._took("row", max(0.0, scored - self.scored))
        self.scored = scored
        when = "before task 1" if self.round == 0 else f"after task {self.round}/{len(self.steps)}"
        self._show(f"scoring {when}: {self.work.names[index]}")

    def on_start(self, result: Result) -> None:
        """Before the first task that is trained here."""
        self.task = min(len(self.steps), len(result.matrix))
        self.round, self.scored = self.task + 1, 0.0
        self._before = (result.tokens, result.train_seconds)
        if not self.task:
            told = [self._scores(result.zero_shot), *_answered(result)]
            self._say(f"{self.title}, before any training: {'; '.join(told)}")

    def on_task(self, index: int, result: Result) -> None:
        """After a task was scored and saved."""
        tokens, seconds = result.tokens - self._before[0], result.train_seconds - self._before[1]
        self._before = (result.tokens, result.train_seconds)
        told = [self._scores(result.matrix[-1])]
        if any(lam != 1.0 for lam in result.lambdas):  # as it is for what keeps no average
            last = result.lambdas[-1]
            told.append(f"λ {fmean(last) if isinstance(last, list) else last:.3f}")
        told.append(f"{tokens / seconds if seconds else 0:,.0f} tokens/s")
        told += _answered(result)
        self._say(f"{self.title}, task {index + 1}/{len(self.steps)} {self.work.tasks[index]}: {'; '.join(told)}")
        self.task, self.step = index + 1, 0
        self.round, self.scored = self.task + 1, 0.0

    def close(self) -> None:
        """Remove the bar."""
        if self.bar is not None:
            self.bar.close()
            self.bar = None

    # What there is to show

    @property
    def done(self) -> float:
        """In rows of a forward pass."""
        step = _TRAINED * self.work.batch
        trained = step * (sum(self.steps[: self.task]) + self.step)
        return trained + sum(map(sum, self.work.rows[: self.round])) + self.scored

    @property
    def total(self) -> float:
        return _TRAINED * self.work.batch * sum(self.steps) + sum(map(sum, self.work.rows))

    def left(self) -> float | None:
        """Seconds, by the pace so far; None before anything has been measured. Of what has not yet been met, training
        or scoring, the pace is taken from the other."""
        steps = sum(self.steps[self.task :]) - self.step
        rows = sum(map(sum, self.work.rows[self.round :])) - self.scored
        (step_time, step_count), (row_time, row_count) = self._pace["step"], self._pace["row"]
        step = step_time / step_count if step_count else None
        row = row_time / row_count if row_count else None
        if step is None and row is None:
            return None
        if step is None:
            step = (row or 0.0) * _TRAINED * self.work.batch
        if row is None:
            row = step / (_TRAINED * self.work.batch)
        return steps * step + rows * row

    def _took(self, kind: str, count: float) -> None:
        now = time.perf_counter()
        self._pace[kind][0] += now - self._since
        self._pace[kind][1] += count
        self._since = now

    def _scores(self, scores: list[float | None]) -> str:
        return ", ".join(
            f"{name} {score:.3f}" for name, score in zip(self.work.names, scores, strict=True) if score is not None
        )

    def _say(self, line: str) -> None:
        if self.bar is not None:
            self.bar.clear()
        self.say(line)
        sys.stdout.flush()  # a log file is read while the run goes on

    def _show(self, what: str) -> None:
        if not sharding.is_first():
            return
        if self.bar is None:
            from tqdm.auto import tqdm

            # disable=None: no bar where nobody watches (a pipe, a log file).
            shape = "{desc}: {percentage:3.0f}%|{bar}| {elapsed}{postfix}"
            self.bar = tqdm(total=1.0, bar_format=shape, leave=False, disable=None)
        if self.bar.disable:
            return
        self.bar.n = self.done / self.total
        now = time.perf_counter()
        if what == self._shown[0] and now - self._shown[1] < _DRAWN_EVERY:
            return
        self._shown, left = (what, now), self.left()
        self.bar.set_description_str(f"{self.title} {what}", refresh=False)
        if left is not None:
            self.bar.set_postfix_str(f"{self.bar.format_interval(left)} left", refresh=False)
        self.bar.refresh()


def _answered(result: Result) -> list[str]:
    """The last answer to TrainConfig.ask, if that was asked."""
    return [f"answers {result.answers[-1]!r}"] if result.answers else []
