"""The report of one run: a plain-text table, the figures as PNG files, and one HTML file that has it all."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from . import checkpoint, metrics, plots, report_html, sums
from .plots_similarity import draw_similarity

# Result key, column title, and whether it is a score (printed in the score's own scale).
COLUMNS = (
    ("AA", "AA", True),
    ("inc_acc", "Inc-Acc", True),
    ("BWT", "BWT", True),
    ("forgetting", "forgetting", True),
    ("FWT", "FWT", True),
    ("zero_shot", "zero-shot", True),
    ("CE_rise", "CE rise", False),
    ("MOPD", "MOPD", True),
    ("AOPD", "AOPD", True),
    ("tokens_per_second", "tokens/s", False),
    ("train_seconds", "train s", False),
    ("score_seconds", "score s", False),
    ("merge_seconds", "merge s", False),
    ("seconds_per_task", "s/task", False),
    ("peak_memory_mb", "peak MB", False),
)
# Worked out here; and what is one number over several runs, or only another form of one that is there.
DERIVED = ("inc_acc", "zero_shot", "MOPD", "AOPD", "seconds_per_task")
OVER_RUNS = ("MOPD", "AOPD")
SPLIT = ("train_seconds", "score_seconds", "merge_seconds")
LATER = (*SPLIT[1:], "CE_rise")  # results of earlier versions have none
MISSING = "–"


@dataclass(frozen=True)
class Method:
    """The checked results of one method over S runs (seeds × orders) and T tasks; NaN where a number is missing.

    seeds: what the S runs are called, "seed/order" where orders were chosen apart from seeds.
    values: for each key of COLUMNS, (S,); MOPD and AOPD one for each seed that ran in several orders.
    matrices: (S, T, T), [s, t, i] = score on task i after task t. tasks: S lists of T names in training order.
    lambdas: (S, T) for a method that merges, else None. state: (S, 2), MiB that the method keeps after the first and
    the last task, or None. cross_entropy: (S, T + 1), or (S, 2) of joint training, or None.
    """

    name: str
    seeds: list[Any]
    values: dict[str, np.ndarray]
    matrices: np.ndarray
    tasks: list[list[str]]
    lambdas: np.ndarray | None
    state: np.ndarray | None = None
    cross_entropy: np.ndarray | None = None

    @property
    def same_order(self) -> bool:
        """Whether every seed trains on the tasks in the same order."""
        return all(order == self.tasks[0] for order in self.tasks)

    def task_labels(self) -> list[str]:
        """The T task names if every seed trains in the same order, else "task 1", "task 2", ..."""
        if self.same_order:
            return self.tasks[0]
        return [f"task {k + 1}" for k in range(len(self.tasks[0]))]


def _need(mapping: Any, key: str, where: str) -> Any:
    if not isinstance(mapping, Mapping):
        raise ValueError(f"{where} must be an object, got {type(mapping).__name__}")
    if key not in mapping:
        raise ValueError(f"{where} lacks {key!r}")
    return mapping[key]


def _seed_lists(entry: Any, key: str, where: str, count: int) -> list[Any]:
    """The `count` per-seed items of one key."""
    value = _need(entry, key, where)
    if not isinstance(value, list | tuple) or len(value) != count:
        raise ValueError(f"{where}.{key} must be a list with one entry for each of the {count} seeds")
    return list(value)


def _method(name: str, entry: Any) -> Method:
    where = f"methods.{name}"
    seeds = _need(entry, "seeds", where)
    if not isinstance(seeds, list | tuple) or not seeds:
        raise ValueError(f"{where}.seeds must be a list of at least one seed")
    count = len(seeds)

    def lists(key: str, optional: bool = False) -> list[Any]:
        if optional and _need(entry, key, where) is None:
            return [None] * count
        return _seed_lists(entry, key, where, count)

    matrices = [metrics.as_matrix(m, f"{where}.matrix[{s}]") for s, m in enumerate(lists("matrix"))]
    size = len(matrices[0])

    def vectors(key: str, optional: bool = False) -> np.ndarray:
        rows = [[None] * size if row is None and optional else row for row in lists(key, optional)]
        found = [metrics.as_vector(row, f"{where}.{key}[{s}]") for s, row in enumerate(rows)]
        for s, row in enumerate(found):
            if len(row) != size:
                raise ValueError(f"{where}.{key}[{s}] has {len(row)} entries for {size} tasks")
        return np.stack(found)

    for s, (matrix, order) in enumerate(zip(matrices, lists("tasks"), strict=True)):
        if len(matrix) != size:
            raise ValueError(f"{where}.matrix[{s}] has {len(matrix)} tasks, matrix[0] has {size}")
        if not isinstance(order, list | tuple) or len(order) != size:
            raise ValueError(f"{where}.tasks[{s}] must name the {size} tasks of its matrix")
    values = {
        key: metrics.as_vector([None] * count if late else lists(key, optional=True), f"{where}.{key}")
        for key, late in ((key, key in LATER and key not in entry) for key, _, _ in COLUMNS if key not in DERIVED)
    }
    values["inc_acc"] = metrics.as_vector([metrics.incremental_accuracy(m.tolist()) for m in matrices])
    values["seconds_per_task"] = (values["train_seconds"] + np.nan_to_num(values["merge_seconds"])) / size
    values["zero_shot"] = vectors("zero_shot", optional=True).mean(axis=1)
    lambdas = vectors("lambdas") if entry.get("lambdas") is not None else None
    if lambdas is not None and not np.isfinite(lambdas).all():
        raise ValueError(f"{where}.lambdas must be finite numbers")
    tasks = [[str(task) for task in order] for order in entry["tasks"]]
    orders = lists("orders") if entry.get("orders") is not None else [None] * count
    values |= _order_deviations(seeds, orders, tasks, matrices)
    names = [seed if order is None else f"{seed}/{order}" for seed, order in zip(seeds, orders, strict=True)]
    text = _text(lists("cross_entropy"), where, size) if entry.get("cross_entropy") is not None else None
    return Method(name, names, values, np.stack(matrices), tasks, lambdas, _state(lists, entry), text)


def _text(rows: list[Any], where: str, size: int) -> np.ndarray:
    found = [metrics.as_vector(row, f"{where}.cross_entropy[{s}]") for s, row in enumerate(rows)]
    for s, row in enumerate(found):
        if len(row) not in (2, size + 1) or len(row) != len(found[0]):
            raise ValueError(f"{where}.cross_entropy[{s}] has {len(row)} entries for {size} tasks and before them")
    return np.stack(found)


def _order_deviations(
    seeds: Sequence[Any], orders: Sequence[Any], tasks: list[list[str]], matrices: list[np.ndarray]
) -> dict[str, np.ndarray]:
    """MOPD and AOPD of each seed that ran in more than one chosen order."""
    finals: dict[Any, list[dict[str, float | None]]] = {}
    for seed, order, names, matrix in zip(seeds, orders, tasks, matrices, strict=True):
        if order is not None:
            last = [None if np.isnan(score) else float(score) for score in matrix[-1]]
            finals.setdefault(seed, []).append(dict(zip(names, last, strict=True)))
    found = [metrics.order_deviation(runs) for runs in finals.values() if len(runs) > 1]
    return {
        "MOPD": metrics.as_vector([deviation.maximum for deviation in found]),
        "AOPD": metrics.as_vector([deviation.mean for deviation in found]),
    }


def _state(lists: Any, entry: Mapping[str, Any]) -> np.ndarray | None:
    if entry.get("state_mb") is None:
        return None
    kept = lists("state_mb")
    return np.array([[own[0], own[-1]] for own in kept]) if all(kept) else None


def parse(results: Any) -> list[Method]:
    """The methods of a `results.json` object, checked; ValueError of one line that names what is wrong."""
    for key in ("stream", "model", "metric"):
        _need(results, key, "the results")
    if not isinstance(results.get("versions") or {}, Mapping):
        raise ValueError("versions must be an object")
    entries = _need(results, "methods", "the results")
    if not isinstance(entries, Mapping) or not entries:
        raise ValueError("methods must be an object with at least one method")
    return [_method(str(name), entry) for name, entry in entries.items()]


def _digits(methods: Iterable[Method]) -> int:
    """Decimals of a score: three on a 0..1 scale, one on a percent scale."""
    largest = max((np.nanmax(np.abs(m.matrices), initial=0.0) for m in methods), default=0.0)
    return 3 if largest <= 1.0 else 1


def _number(value: float, digits: int) -> str:
    return f"{value:,.{digits}f}" if np.isfinite(value) else MISSING


def _plain_digits(values: np.ndarray) -> int:
    """Decimals of a speed, a time or a size: none where there are three figures before the point anyway."""
    return 0 if np.nanmax(np.abs(values), initial=0.0) >= 100 else 2


def _decimals(key: str, is_score: bool, score: int, values: np.ndarray) -> int:
    return 3 if key == "CE_rise" else score if is_score else _plain_digits(values)


def _summary(method: Method, key: str, digits: int) -> str:
    """mean ± std of one column; says on how many seeds it is where some have no value."""
    values = method.values[key]
    present = values[np.isfinite(values)]
    if not len(present):
        return MISSING
    if key == "peak_memory_mb":
        return _number(float(present.max()), digits)
    text = _number(float(present.mean()), digits)
    if len(present) > 1:
        text += f" ± {_number(float(present.std(ddof=1)), digits)}"
    return text if len(present) == len(values) else f"{text} ({len(present)} of {len(values)} runs)"


def _headline(methods: Sequence[Method]) -> tuple[list[str], list[list[str]]]:
    """Header and one row per method, as text; a column that no method has a value for is left out."""
    score = _digits(methods)
    split = any(np.isfinite(m.values["score_seconds"]).any() for m in methods)
    shown = [
        column
        for column in COLUMNS
        if (split or column[0] not in SPLIT) and any(np.isfinite(m.values[column[0]]).any() for m in methods)
    ]
    kept = any(m.state is not None for m in methods)
    rows = [
        [m.name, str(len(m.seeds))]
        + [_summary(m, key, _decimals(key, is_score, score, m.values[key])) for key, _, is_score in shown]
        + ([_kept(m)] if kept else [])
        for m in methods
    ]
    return ["method", "runs", *(title for _, title, _ in shown), *(["kept MB"] if kept else [])], rows


def _kept(method: Method) -> str:
    """What the method keeps after the first task and, where that differs, after the last."""
    if method.state is None:
        return MISSING
    first, last = (f"{value:.2f}" for value in method.state.mean(axis=0))
    return first if first == last else f"{first} → {last}"


def _per_seed(methods: Sequence[Method]) -> tuple[list[str], list[list[str]]]:
    score = _digits(methods)
    shown = [
        column
        for column in COLUMNS
        if column[0] not in (*OVER_RUNS, *LATER) or any(np.isfinite(m.values[column[0]]).any() for m in methods)
    ]
    shown = [column for column in shown if column[0] not in OVER_RUNS]
    rows = [
        [m.name, str(seed)]
        + [
            _number(float(m.values[key][s]), _decimals(key, is_score, score, m.values[key]))
            for key, _, is_score in shown
        ]
        for m in methods
        for s, seed in enumerate(m.seeds)
    ]
    chosen = any("/" in str(seed) for m in methods for seed in m.seeds)
    return ["method", "seed/order" if chosen else "seed", *(title for _, title, _ in shown)], rows


def table(results: Mapping[str, Any]) -> str:
    """The results as plain text: one row per method with AA, BWT, forgetting, ..., speed, memory.

    Scores and speeds are mean ± sample standard deviation over runs (seeds, or seeds × orders; MOPD and AOPD over
    seeds), peak memory the maximum; "–" is a value that no run has. ValueError of one line for results that lack a
    key or do not fit together.
    """
    header, rows = _headline(parse(results))
    widths = [max(len(row[c]) for row in [header, *rows]) for c in range(len(header))]
    lines = ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in [header, *rows]]
    lines.insert(1, "  ".join("-" * w for w in widths))
    about = f"{results['stream']} · {results['model']} · {results['metric']} · mean ± std over runs"
    return "\n".join([about, *unfinished(results), "", *lines])


def unfinished(results: Mapping[str, Any]) -> list[str]:
    """One line that says what of the run is still to come, where something is."""
    missing = results.get("unfinished") or {}
    if not isinstance(missing, Mapping):
        raise ValueError("unfinished must be an object")
    told = [
        f"{title} ({done} of {total} tasks)" if done else f"{title} (not begun)"
        for title, (done, total) in missing.items()
    ]
    return [f"unfinished: {', '.join(told)}; scores over all tasks are missing until a run's end"] if told else []


def markdown(results: Mapping[str, Any]) -> str:
    """The rows and columns of `table` as a Markdown table."""
    header, rows = _headline(parse(results))
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def load(run_dir: Path) -> Any:
    """The object in run_dir/results.json."""
    path = run_dir / "results.json"
    if not run_dir.is_dir():
        raise ValueError(f"there is no directory {run_dir}: give the output directory of a `slao run`")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(
            f"{run_dir} has no results.json: let its `slao run` finish a task, then report again"
        ) from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{path} cannot be read ({reason}): write it again with `slao run`") from None
    return sums.unsealed(content, path)


def write_report(run_dir: str | Path) -> Path:
    """Write run_dir/report.html and run_dir/report/*.png from run_dir/results.json; returns the HTML's path.

    The HTML carries its images and needs no network. ValueError of one line if run_dir has no readable
    results, or they lack a key; ImportError if matplotlib is not installed.
    """
    run_dir = Path(run_dir)
    results = load(run_dir)
    try:
        methods = parse(results)
    except ValueError as error:
        raise ValueError(f"{run_dir / 'results.json'}: {error}; write it again with `slao run`") from None
    figures = plots.draw(methods, str(results["metric"]), run_dir / "report")
    tables = {name: entry["similarity"] for name, entry in results["methods"].items() if entry.get("similarity")}
    figures += draw_similarity(tables, run_dir / "report")
    page = run_dir / "report.html"
    orders = [[m.name, str(seed), " → ".join(m.tasks[s])] for m in methods for s, seed in enumerate(m.seeds)]
    notes = unfinished(results)
    text = report_html.page(results, _headline(methods), _per_seed(methods), orders, figures, notes)
    checkpoint.write_atomically(page, lambda temporary: temporary.write_text(text, encoding="utf-8"))
    return page
