"""Task after task over transformers' Trainer: train, end the task, score every task, keep the score matrix."""

from __future__ import annotations

import contextlib
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from slao_kernels import sharding

from . import checkpoint, digests, stopping
from .methods import Method
from .methods.base import STATE_FILE
from .objectives import Objective
from .objectives.base import Features, heard, in_batches, positions
from .replay import Replay, size
from .result import Result, Score
from .retention import cross_entropy, windows
from .similarity import Similarity
from .streams import Stream


@dataclass
class TrainConfig:
    """How every task is trained. Each task gets a fresh optimiser and schedule, as in the papers.

    max_steps: optimiser steps a task, instead of epochs, when positive. batch_size: rows a step and device, before
    accumulation. group_by_length: batches of rows of similar length, so that less of them is padding (transformers
    does it where a task has at least eight batches). evaluate: "all" scores every task of the stream after each task
    (forward transfer needs it), "seen" only those trained so far. score_on: "test" rows, or "validation" rows to
    choose settings by. trainer: "transformers", or "trl" for TRL's
    SFTTrainer (causal language models). arguments: anything else that transformers.TrainingArguments takes, or
    trl.SFTConfig. ask: a text as in a row of the first task (causal language models): what the merged model says to it
    before training and after each task is kept in the result's `answers`. replay_rows: so many rows of all tasks before
    are trained again beside each task's own, as in `slao.replay.Replay`; InfLoRA observes them too, and EWC's Fisher
    counts them. replay_fraction: instead, that part of the rows of every task before. replay_from: "per_task" keeps as
    many rows of each task, "reservoir" each row of all with the same chance.
    retention: "python" (the help topics that every Python carries) or a file of text, whose cross-entropy under a
    causal language model is measured where tasks are scored and kept in the result's `cross_entropy`.
    """

    epochs: float = 1.0
    max_steps: int = -1
    batch_size: int = 32
    eval_batch_size: int = 64
    learning_rate: float = 1e-3
    lr_scheduler: str = "linear"
    weight_decay: float = 0.0
    gradient_accumulation: int = 1
    gradient_checkpointing: bool = False
    group_by_length: bool = True
    bf16: bool = False
    report_to: str = "none"
    evaluate: str = "all"
    score_on: str = "test"
    trainer: str = "transformers"
    arguments: dict[str, Any] = field(default_factory=dict)
    ask: str = ""
    replay_rows: int = 0
    replay_fraction: float = 0.0
    replay_from: str = "per_task"
    retention: str = ""

    def __post_init__(self) -> None:
        if self.evaluate not in ("all", "seen"):
            raise ValueError(f"unknown evaluate {self.evaluate!r}; choose all or seen")
        if self.score_on not in ("test", "validation"):
            raise ValueError(f"unknown score_on {self.score_on!r}; choose test or validation")
        if self.trainer not in ("transformers", "trl"):
            raise ValueError(f"unknown trainer {self.trainer!r}; choose transformers or trl")
        for name in ("batch_size", "eval_batch_size", "gradient_accumulation"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        if self.max_steps <= 0 and not self.epochs > 0:
            raise ValueError(f"epochs must be positive, not {self.epochs} (or give max_steps)")
        clash = sorted(set(self.arguments) & {*(f.name for f in fields(self)), *_OURS})
        if clash:
            raise ValueError(f"set {', '.join(clash)} through TrainConfig's own fields, not through arguments")
        _ = self.replay  # which says what is wrong

    @property
    def replay(self) -> Replay | None:
        """What is kept of the tasks before; None where nothing is."""
        if not (self.replay_rows or self.replay_fraction):
            return None
        return Replay(self.replay_rows or None, self.replay_fraction or None, self.replay_from)


# TrainingArguments that this loop sets itself.
_OURS = (
    "output_dir",
    "save_strategy",
    "seed",
    "data_seed",
    "num_train_epochs",
    "per_device_train_batch_size",
    "lr_scheduler_type",
    "gradient_accumulation_steps",
    "remove_unused_columns",
    "dataloader_pin_memory",
    "use_cpu",
)


def train(
    model: nn.Module,
    method: Method,
    stream: Stream,
    objective: Objective,
    config: TrainConfig | None = None,
    *,
    seed: int = 0,
    state_dir: str | Path | None = None,
    callbacks: Sequence[Any] = (),
    on_start: Callable[[Result], None] | None = None,
    on_score: Callable[[int, float], None] | None = None,
    on_task: Callable[[int, Result], None] | None = None,
    similarity: Similarity | None = None,
) -> Result:
    """Train `model` on every task of `stream` in order, with `method` around each, and score it after each.

    model: carries the adapter that `method` was built on; patch it first for speed. objective: built before training.
    seed: of the data order and of whatever draws random numbers; each task starts from (seed, its index) alone.
    state_dir: after every task the whole state is written there (atomically); a call that finds one continues after
    its last finished task and ends bit-identical to an uninterrupted run, on the same machine with as many threads
    (torch's own sums depend on both). callbacks: further TrainerCallbacks.
    With several processes each trains on batch_size rows of its own a step, and scores all rows; rank 0 writes.
    on_start(result) is called before the first task that is trained, on_task(index, result) after each, and, while the
    tasks are scored, on_score(index, part of it that is done). Scores use the merged weights.
    similarity: a new `Similarity`, which records what each task trained, and beside the state too.
    Raises ValueError, with nothing changed, for a state of another stream, seed, settings or rows, or of a run without
    similarity, and for a task without rows to score.
    """
    config = config or TrainConfig()
    check_objective_takes(config, type(objective))
    if empty := [task.name for task in stream.tasks if not getattr(task, config.score_on)]:
        raise ValueError(f"task {empty[0]!r} has no {config.score_on} rows to score; set score_on to the other split")
    other = windows(config.retention, objective.tokenizer, positions(model)) if config.retention else []
    replay = None if method.together else config.replay
    result = Result([task.name for task in stream.tasks])
    trained_with = {} if state_dir is None else _trained_with(stream, config)
    if similarity is not None and similarity.tasks:
        raise ValueError(f"this Similarity holds {len(similarity.tasks)} tasks of another run; give a new one")
    saved = None if state_dir is None else sharding.on_first(lambda: _saved(Path(state_dir) / STATE_FILE))
    if state_dir is not None and saved is not None:
        if saved.get("seed") != seed or saved.get("result", {}).get("tasks") != result.tasks:
            raise ValueError(f"the state in {state_dir} belongs to another stream or seed; choose another folder")
        before = saved.get("trained with", trained_with)
        if odd := [key for key in before | trained_with if before.get(key) != trained_with.get(key)]:
            told = ", ".join(odd[:4])
            raise ValueError(f"the state in {state_dir} is of other settings or rows ({told}); choose another folder")
        recorded = None
        if similarity is not None:
            recorded = sharding.on_first(lambda: Similarity.read(state_dir, saved.get("similarity")))
        result = Result(**method.load(state_dir)["result"])
        if similarity is not None and recorded is not None:
            similarity.take(recorded)
    earlier = len(method.lambdas) - len(result.lambdas)  # tasks that the method had before this run
    from .logits import labelled_only
    from .trainer import make_trainer, own_forward
    from .watching import Watch

    reset_peak_memory()
    names = tuple(result.tasks)
    objective.running = objective.seen = ()

    def scores(trained: int, config: TrainConfig = config) -> list[Score]:
        started = time.perf_counter()
        found = _scores(model, method, objective, stream, trained, config, on_score)
        with method.merged() if config.ask or other else contextlib.nullcontext():
            if config.ask:
                result.answers.append(objective.answer(model, stream.tasks[0], config.ask))
            if other:
                result.cross_entropy.append(cross_entropy(model, other))
        result.score_seconds += time.perf_counter() - started
        return found

    if not result.zero_shot:
        result.zero_shot = scores(0)
    if on_start is not None:
        on_start(result)
    stages = [("joint", stream.tasks)] if method.together else [(task.name, (task,)) for task in stream.tasks]
    if method.together and config.max_steps > 0:
        config = replace(config, max_steps=config.max_steps * len(stream.tasks))
    for index in stopping.one_by_one(range(len(stages) if result.finished else len(result.matrix), len(stages))):
        name, tasks = stages[index]
        again = [] if replay is None else replay.kept(stream.tasks[:index], seed)
        objective.running = tuple(dict.fromkeys(task.name for task in (*tasks, *(task for task, _ in again))))
        objective.seen = names if method.together else names[: index + 1]
        seed_everything(seed * 10_007 + index)
        features = [row for task in tasks for row in objective.features(task, task.train)]
        features += [one for task, row in again for one in objective.features(task, [row])]
        started = time.perf_counter()
        _observe(model, method, objective, features, config)
        method.begin_task(name)
        result.merge_seconds += time.perf_counter() - started
        trainer = make_trainer(model, method, objective, config, features, seed * 10_007 + index, callbacks)
        trainer.add_callback(Watch(method))
        started = time.perf_counter()
        with own_forward(model), labelled_only(model):
            trainer.train()
        if trainer.state.global_step < trainer.state.max_steps:
            stopping.check()  # the task begins anew when the run is resumed
        result.train_seconds += time.perf_counter() - started
        result.tokens += _over_ranks(trainer.tokens(), model)
        result.losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
        if similarity is not None:
            similarity.record(method)
        started = time.perf_counter()
        _observe(model, method, objective, features, config)
        method.end_task()
        result.merge_seconds += time.perf_counter() - started
        result.lambdas = method.lambdas[earlier:]
        result.matrix += [[None] * len(stream.tasks) for _ in tasks[1:]]  # the scores that there never were
        result.matrix.append(scores(len(result.matrix) + 1))
        kept = [] if replay is None else replay.kept(stream.tasks[: index + 1], seed)
        result.state_mb.append((method.state_bytes() + size(kept)) / 2**20)
        result.peak_memory_mb = max(result.peak_memory_mb, peak_memory_mb())
        if state_dir is not None:
            extra: dict[str, Any] = {"seed": seed, "result": vars(result), "trained with": trained_with}
            if similarity is not None:
                extra["similarity"] = similarity.save(state_dir)
            method.save(state_dir, extra)
        if on_task is not None:
            on_task(index, result)
    return result


def check_objective_takes(config: TrainConfig, kind: type[Objective]) -> None:
    """ValueError for a question to a model that says nothing, or that has no probability for a text."""
    for name in ("ask", "retention"):
        if getattr(config, name) and not kind.answers:
            raise ValueError(f"train.{name} would do nothing: {kind.name} scores, and generates no text; leave it out")


def _saved(path: Path) -> dict[str, Any] | None:
    """What was saved beside the method's state; None where there is none."""
    return dict(checkpoint.read_state(path)[1]["extra"]) if path.exists() else None


def _trained_with(stream: Stream, config: TrainConfig) -> dict[str, str]:
    """What a state must agree on to go on: settings that bear on what is computed, but defaults, and the rows."""
    usual, free = TrainConfig(), ("report_to", "eval_batch_size")
    settings = {one.name: (getattr(config, one.name), getattr(usual, one.name)) for one in fields(config)}
    told = {name: repr(value) for name, (value, default) in settings.items() if value != default and name not in free}
    return told | {
        f"rows of task {task.name!r}": digests.of_texts(part for pair in digests.of_task(task) for part in pair)
        for task in stream.tasks
    }


def _over_ranks(count: int, model: nn.Module) -> int:
    total = torch.tensor(count, device=next(model.parameters()).device)
    sharding.add_over_ranks([total])
    return int(total)


def _observe(model: nn.Module, method: Method, objective: Objective, features: Features, config: TrainConfig) -> None:
    if method.observes:
        device = next(model.parameters()).device
        features = features[sharding.rank() :: sharding.ranks()]
        method.observe(batch for _, batch in in_batches(features, config.eval_batch_size, objective.collate, device))


def _scores(
    model: nn.Module,
    method: Method,
    objective: Objective,
    stream: Stream,
    trained: int,
    config: TrainConfig,
    on_score: Callable[[int, float], None] | None,
) -> list[Score]:
    """After the first `trained` tasks; the zero-shot row, after none, is whole."""
    scored = trained if trained and config.evaluate == "seen" else len(stream.tasks)
    found: list[Score] = [None] * len(stream.tasks)
    with method.merged():
        for i, task in enumerate(stream.tasks[:scored]):
            with heard(None if on_score is None else partial(on_score, i)):
                found[i] = objective.score(model, task, getattr(task, config.score_on), config.eval_batch_size)
    return found


def seed_everything(seed: int) -> None:
    """Python's, NumPy's and torch's generators."""
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002 (libraries draw from the global one)
    torch.manual_seed(seed)


def reset_peak_memory() -> None:
    """Start a new measurement of `peak_memory_mb`, where the platform can (CUDA, Linux)."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # proc(5): resets the peak resident set size


def peak_memory_mb() -> float:
    """Peak since `reset_peak_memory`, in MiB: allocated on the GPU where there is one, else the resident memory."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) / 2**10
    with contextlib.suppress(ImportError):  # Windows
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
    return 0.0
