"""One progress bar over all tasks of a run, fed by the Trainer's steps."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback


class RunProgress(TrainerCallback):
    """Counts optimiser steps over tasks; shows the running task. Silent on all processes but the first."""

    def __init__(self, title: str, tasks: list[str], done: int = 0) -> None:
        self.title, self.tasks, self.index = title, tasks, done
        self.bar: Any = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        from tqdm.auto import tqdm

        if self.bar is None and state.is_world_process_zero:
            # Later tasks may have other row counts; the total is corrected as they begin.
            total = state.max_steps * (len(self.tasks) - self.index)
            # disable=None: no bar where nobody watches (a pipe, a log file).
            self.bar = tqdm(total=total, desc=self.title, unit="step", leave=False, mininterval=0.5, disable=None)
        elif self.bar is not None:
            self.bar.total = self.bar.n + state.max_steps * (len(self.tasks) - self.index)
        if self.bar is not None and self.index < len(self.tasks):
            self.bar.set_description(f"{self.title} task {self.index + 1}/{len(self.tasks)} {self.tasks[self.index]}")
        self.index += 1

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.bar is not None:
            self.bar.update(1)

    def close(self) -> None:
        """Remove the bar."""
        if self.bar is not None:
            self.bar.close()
            self.bar = None
