"""The results as tables of text: one row a method, or one row a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .results import Method, parse, score_digits

MISSING = "–"
OVER_SEEDS = ("MOPD", "AOPD")  # one number over several runs
SPLIT = ("train_seconds", "score_seconds", "merge_seconds")


@dataclass(frozen=True)
class Column:
    """One of `Method.values`, or "kept". score: printed in the score's own scale."""

    key: str
    title: str
    meaning: str
    score: bool = False


SCORES = (
    Column("AA", "AA", "mean score over all tasks after the last one; higher is better", True),
    Column("inc_acc", "Inc-Acc", "mean, over the tasks in turn, of the mean score over those trained until then", True),
    Column("BWT", "BWT", "mean change of a task's score from its own training to the end; negative: forgotten", True),
    Column("forgetting", "forgetting", "mean drop from a task's best earlier score to the end; lower is better", True),
    Column("FWT", "FWT", "mean gain over zero-shot on a task just before it is trained", True),
    Column("zero_shot", "zero-shot", "mean score over all tasks before any training", True),
    Column("CE_rise", "CE rise", "how much less likely a text that no task is about has become, nats a token"),
    Column("MOPD", "MOPD", "largest range of a task's final score over task orders, at one seed", True),
    Column("AOPD", "AOPD", "mean range of a task's final score over task orders, at one seed", True),
)
COSTS = (
    Column("tokens_per_second", "tokens/s", "tokens of training data per second of training steps"),
    Column("train_seconds", "train s", "seconds of a run in training steps"),
    Column("score_seconds", "score s", "seconds of a run in scoring"),
    Column("merge_seconds", "merge s", "seconds of a run before and after its tasks (merging)"),
    Column("seconds_per_task", "s/task", "training and merging seconds over the number of tasks"),
    Column("peak_memory_mb", "peak MB", "most memory of the process, in MiB; the largest of the runs"),
    Column("kept", "kept MB", "MiB of the adapter and what else the method keeps, after the first and the last task"),
)


@dataclass(frozen=True)
class Table:
    """Column titles, and rows of as many cells; the first cell names the row."""

    header: list[str]
    rows: list[list[str]]


def per_method(methods: Sequence[Method], columns: Sequence[Column] = SCORES + COSTS) -> Table:
    """mean ± sample standard deviation over runs; a column that no method has a value for is left out."""
    shown = present(methods, columns)
    digits = {column: _decimals(column, methods) for column in shown}
    rows = [[m.name, str(len(m.seeds)), *(_summary(m, c, digits[c]) for c in shown)] for m in methods]
    return Table(["method", "runs", *(column.title for column in shown)], rows)


def per_run(methods: Sequence[Method]) -> Table:
    """One row a run, with everything that is measured for each."""
    shown = [c for c in present(methods, SCORES + COSTS) if c.key not in (*OVER_SEEDS, "kept")]
    digits = {column: _decimals(column, methods) for column in shown}
    rows = [
        [m.name, seed, *(number(float(m.values[c.key][s]), digits[c]) for c in shown)]
        for m in methods
        for s, seed in enumerate(m.seeds)
    ]
    chosen = any("/" in seed for m in methods for seed in m.seeds)
    return Table(["method", "seed/order" if chosen else "seed", *(column.title for column in shown)], rows)


def present(methods: Sequence[Method], columns: Sequence[Column]) -> list[Column]:
    """The columns that some method has a value for; without scoring times none of the three parts of the time."""

    def has(key: str) -> bool:
        return any(m.state is not None if key == "kept" else np.isfinite(m.values[key]).any() for m in methods)

    split = has("score_seconds")
    return [column for column in columns if has(column.key) and (split or column.key not in SPLIT)]


def number(value: float, digits: int) -> str:
    return f"{value:,.{digits}f}" if np.isfinite(value) else MISSING


def _decimals(column: Column, methods: Sequence[Method]) -> int:
    """Of a speed, a time or a size none where one of them has three figures before the point anyway."""
    if column.score:
        return score_digits(methods)
    if column.key in ("CE_rise", "kept"):
        return 3 if column.key == "CE_rise" else 2
    return 0 if max(np.nanmax(np.abs(m.values[column.key]), initial=0.0) for m in methods) >= 100 else 2


def _summary(method: Method, column: Column, digits: int) -> str:
    """One cell; says of how many runs it is where some have no value."""
    if column.key == "kept":
        return _kept(method, digits)
    values = method.values[column.key]
    count = int(np.isfinite(values).sum())
    if column.key == "peak_memory_mb" or not count:
        return number(float(np.nanmax(values, initial=-np.inf)), digits)
    text = number(method.mean(column.key), digits)
    if count > 1:
        text += f" ± {number(method.deviation(column.key), digits)}"
    return text if count == len(values) else f"{text} ({count} of {len(values)} runs)"


def _kept(method: Method, digits: int) -> str:
    """What the method keeps after the first task and, where that differs, after the last."""
    if method.state is None:
        return MISSING
    first, last = (number(float(value), digits) for value in method.state.mean(axis=0))
    return first if first == last else f"{first} → {last}"


def table(results: Mapping[str, Any]) -> str:
    """The results as plain text: one row per method with AA, BWT, forgetting, ..., speed, memory.

    Scores and speeds are mean ± sample standard deviation over runs (seeds, or seeds × orders; MOPD and AOPD over
    seeds), peak memory the maximum; "–" is a value that no run has. ValueError of one line for results that lack a
    key or do not fit together.
    """
    found = per_method(parse(results))
    lines = [found.header, *found.rows]
    widths = [max(len(row[c]) for row in lines) for c in range(len(found.header))]
    text = ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in lines]
    text.insert(1, "  ".join("-" * w for w in widths))
    return "\n".join([*about(results), "", *text])


def about(results: Mapping[str, Any]) -> list[str]:
    """The lines above the table: what was run, and what of it is missing."""
    what = f"{results['stream']} · {results['model']} · {results['metric']} · mean ± std over runs"
    return [what, *unfinished(results)]


def markdown(results: Mapping[str, Any]) -> str:
    """The rows and columns of `table` as a Markdown table."""
    return tabulated(per_method(parse(results)))


def tabulated(found: Table) -> str:
    """A table in Markdown."""
    lines = [found.header, ["---", *["---:"] * (len(found.header) - 1)], *found.rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def unfinished(results: Mapping[str, Any]) -> list[str]:
    """One line that says what of the run is still to come, where something is."""
    told = [
        f"{title} ({done} of {total} tasks)" if done else f"{title} (not begun)"
        for title, (done, total) in (results.get("unfinished") or {}).items()
    ]
    return [f"unfinished: {', '.join(told)}; scores over all tasks are missing until a run's end"] if told else []
