"""What a run will do, said before its first step: its sizes, and the first row of each task as the model sees it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from torch import nn

from .methods import Method
from .objectives import Objective
from .prepare import Prepared
from .progress import Work
from .streams import Stream
from .sweep import Job

_LOOKED_AT = 200  # rows a task whose tokens are counted
_COPIES = 4  # of what is trained: itself, its gradient, and Adam's two moments


def block(
    prepared: Prepared, job: Job, built: tuple[nn.Module, Method, Objective], jobs: Sequence[Job], folder: Path
) -> str:
    """The lines about the first of `jobs`, which `built` is for. Tokens are counted on up to 200 rows a task; memory is
    what is sure to be needed: activations come on top."""
    model, method, objective = built
    stream, config = prepared.ordered(job.seed, job.order), prepared.config_of(job.method)
    work = Work.of(stream, config, method.together)
    parameters = list(model.parameters())
    trained = [p for p in parameters if p.requires_grad]
    count, learns = sum(p.numel() for p in parameters), sum(p.numel() for p in trained)
    first = parameters[0]
    others = f", the first of {len(jobs)} trainings" if len(jobs) > 1 else ""
    lines = [
        ("training", f"{job.title}{others}; objective {objective.name}"),
        ("model", f"{prepared.settings['model']}: {count:,} parameters, {first.dtype} on {first.device}"),
        ("patched", prepared.report),
        ("adapter", f"{learns:,} parameters that are trained"),
        ("rows", _rows(stream, config.score_on)),
        ("steps", _steps(work)),
    ]
    tokens, longest = _tokens(stream, objective)
    if tokens:
        lines.append(("tokens", f"about {tokens:,.0f} in one pass over the training rows; longest row {longest:,}"))
    parts = {
        "model": sum(p.numel() * p.element_size() for p in parameters),
        "gradients and Adam": sum(p.numel() * p.element_size() for p in trained) * (_COPIES - 1),
        "logits and their gradient": 8 * objective.outputs(model, config.batch_size, longest),
    }
    told = ", ".join(f"{name} {_size(size)}" for name, size in parts.items() if size)
    lines += [
        ("memory", f"at least {_size(sum(parts.values()))} ({told}), and a step's activations"),
        ("results", f"{folder / 'results.json'}, after every task"),
    ]
    return "\n".join(f"{name:<9} {text.replace(chr(10), chr(10) + ' ' * 10)}" for name, text in lines)


def first_rows(stream: Stream, objective: Objective) -> str:
    """The first training row of each task, with what is learned told from what is only read."""
    told = []
    for task in stream.tasks:
        row = task.train[0]
        (features,) = objective.features(task, [row])
        parts = objective.shown(task, features)
        width = max(len(name) for name, _ in parts)
        told.append(f"task {task.name}, its first row{f' ({row.where})' if row.where else ''}:")
        told += [f"  {name:<{width}}  {text}" for name, text in parts]
    return "\n".join(told)


def _rows(stream: Stream, scored: str) -> str:
    told = [f"{task.name} {len(task.train):,} + {len(getattr(task, scored)):,}" for task in stream.tasks]
    apart = sum(len(task.validation) for task in stream.tasks) if scored == "test" else 0
    kept = f"; {apart:,} kept apart for validation" if apart else ""
    return f"trained + scored ({scored}): {', '.join(told)}{kept}"


def _steps(work: Work) -> str:
    alike = len(set(work.steps)) == 1
    each = f"{work.steps[0]:,} a task" if alike else ", ".join(f"{steps:,}" for steps in work.steps)
    return f"{sum(work.steps):,} of at most {work.batch} rows ({each}); {len(work.rows)} rounds of scoring"


def _tokens(stream: Stream, objective: Objective) -> tuple[float, int]:
    """Tokens of all training rows, and the longest row, both by a part of the rows; zeros for images."""
    total, longest = 0.0, 0
    for task in stream.tasks:
        rows = task.train[:: -(-len(task.train) // _LOOKED_AT)]
        lengths = [len(row.get("input_ids", ())) for row in objective.features(task, rows)]
        total += sum(lengths) / len(rows) * len(task.train)
        longest = max(longest, *lengths)
    return total, longest


def _size(size: float) -> str:
    return f"{size / 2**30:,.2f} GiB" if size >= 2**28 else f"{size / 2**20:,.1f} MiB"
