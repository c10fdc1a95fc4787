"""What a results.json says, checked: the results of each method as arrays over its runs."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .. import metrics, sums

MEASURED = (
    "AA", "BWT", "forgetting", "FWT", "CE_rise",
    "tokens_per_second", "train_seconds", "score_seconds", "merge_seconds", "peak_memory_mb",
)  # fmt: skip
LATER = ("score_seconds", "merge_seconds", "CE_rise")  # results of earlier versions have none


@dataclass(frozen=True)
class Method:
    """The checked results of one method over S runs (seeds × orders) and T tasks; NaN where a number is missing.

    label: what it is called in its run. kind, variant: the method that it is, and the swept values. run: the run that
    it is of, where several are compared. seeds: what the S runs are called, "seed/order" where orders were chosen apart
    from seeds. values: for each key of MEASURED, inc_acc, zero_shot and seconds_per_task, (S,); MOPD and AOPD one for
    each seed that ran in several orders. matrices: (S, T, T), [s, t, i] = score on task i after task t. tasks: S lists
    of T names in training order. lambdas: (S, T) for a method that merges, else None. state: (S, 2), MiB that the
    method keeps after the first and the last task, or None. cross_entropy: (S, T + 1), or (S, 2) of joint training, or
    None. losses: for each run one array a trained task, of the losses that were logged (joint training: one in all).
    """

    name: str
    seeds: list[str]
    values: dict[str, np.ndarray]
    matrices: np.ndarray
    tasks: list[list[str]]
    lambdas: np.ndarray | None
    state: np.ndarray | None
    cross_entropy: np.ndarray | None
    losses: list[list[np.ndarray]]
    label: str
    kind: str
    variant: str
    run: str

    @property
    def same_order(self) -> bool:
        """Whether every run trains on the tasks in the same order."""
        return all(order == self.tasks[0] for order in self.tasks)

    @property
    def together(self) -> bool:
        """Whether it trains all tasks at once, so that there are scores after the last one alone."""
        there = np.isfinite(self.matrices)
        return len(self.tasks[0]) > 1 and bool(there[:, -1].any()) and not there[:, :-1].any()

    def task_labels(self) -> list[str]:
        """The T task names if every run trains in the same order, else "task 1", "task 2", ..."""
        if self.same_order:
            return self.tasks[0]
        return [f"task {k + 1}" for k in range(len(self.tasks[0]))]

    def mean(self, key: str) -> float:
        """Of one of `values`, over the runs that have it; NaN where none has."""
        present = self.values[key][np.isfinite(self.values[key])]
        return float(present.mean()) if len(present) else float("nan")

    def deviation(self, key: str) -> float:
        """The sample standard deviation of one of `values`, over the runs that have it; NaN below two."""
        present = self.values[key][np.isfinite(self.values[key])]
        return float(present.std(ddof=1)) if len(present) > 1 else float("nan")


def score_digits(methods: Sequence[Method]) -> int:
    """Decimals of a score: three on a 0..1 scale, one on a percent scale."""
    largest = max((np.nanmax(np.abs(m.matrices), initial=0.0) for m in methods), default=0.0)
    return 3 if largest <= 1.0 else 1


def kind_of(label: str, settings: Any) -> tuple[str, str]:
    """(method, variant) of the label that a run gave its results: of "fast (r=2)" the kind of "fast", and "r=2"."""
    known = settings.get("methods") if isinstance(settings, Mapping) else None
    known = known if isinstance(known, Mapping) else {}
    own = max((key for key in known if label == key or label.startswith(f"{key} (")), key=len, default=label)
    options = known.get(own)
    kind = options.get("method", own) if isinstance(options, Mapping) else own
    return str(kind), label[len(own) :].strip(" ()")


def parse(results: Any) -> list[Method]:
    """The methods of a `results.json` object, checked; ValueError of one line that names what is wrong."""
    for key in ("stream", "model", "metric"):
        _need(results, key, "the results")
    for key in ("versions", "settings", "failed", "unfinished"):
        if not isinstance(results.get(key) or {}, Mapping):
            raise ValueError(f"{key} must be an object")
    entries = _need(results, "methods", "the results")
    if not isinstance(entries, Mapping) or not entries:
        raise ValueError("methods must be an object with at least one method")
    return [_method(str(name), entry, results.get("settings")) for name, entry in entries.items()]


def numbers(results: Mapping[str, Any]) -> dict[str, dict[str, list[Any]]]:
    """Method -> "runs", what they are called (seeds, or "seed/order"), and for each key of `Method.values` a number a
    run, of MOPD and AOPD a number a seed; NaN where one is missing. `state_mb`: MiB kept after the first and last task.
    """
    return {
        method.name: {"runs": method.seeds}
        | {key: values.tolist() for key, values in method.values.items()}
        | ({} if method.state is None else {"state_mb": method.state.tolist()})
        for method in parse(results)
    }


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


def _need(mapping: Any, key: str, where: str) -> Any:
    if not isinstance(mapping, Mapping):
        raise ValueError(f"{where} must be an object, got {type(mapping).__name__}")
    if key not in mapping:
        raise ValueError(f"{where} lacks {key!r}")
    return mapping[key]


def _lists(entry: Any, where: str, count: int) -> Callable[[str], list[Any]]:
    """What gives the `count` items, one a run, of a key; None `count` times where the key is None."""

    def found(key: str) -> list[Any]:
        value = _need(entry, key, where)
        if value is None:
            return [None] * count
        if not isinstance(value, list | tuple) or len(value) != count:
            raise ValueError(f"{where}.{key} must be a list with one entry for each of the {count} seeds")
        return list(value)

    return found


def _method(name: str, entry: Any, settings: Any) -> Method:
    where = f"methods.{name}"
    seeds = _need(entry, "seeds", where)
    if not isinstance(seeds, list | tuple) or not seeds:
        raise ValueError(f"{where}.seeds must be a list of at least one seed")
    lists = _lists(entry, where, len(seeds))
    matrices = [metrics.as_matrix(m, f"{where}.matrix[{s}]") for s, m in enumerate(lists("matrix"))]
    size = len(matrices[0])
    tasks = _tasks(lists("tasks"), matrices, where)
    values = {
        key: metrics.as_vector(
            [None] * len(seeds) if key in LATER and key not in entry else lists(key), where + f".{key}"
        )
        for key in MEASURED
    }
    values["inc_acc"] = metrics.as_vector([metrics.incremental_accuracy(m.tolist()) for m in matrices])
    values["seconds_per_task"] = (values["train_seconds"] + np.nan_to_num(values["merge_seconds"])) / size
    zero_shot = [[None] * size if row is None else row for row in lists("zero_shot")]
    values["zero_shot"] = _rows(zero_shot, f"{where}.zero_shot", size).mean(axis=1)
    lambdas = None if entry.get("lambdas") is None else _rows(lists("lambdas"), f"{where}.lambdas", size)
    if lambdas is not None and not np.isfinite(lambdas).all():
        raise ValueError(f"{where}.lambdas must be finite numbers")
    orders = lists("orders") if entry.get("orders") is not None else [None] * len(seeds)
    values |= _order_deviations(seeds, orders, tasks, matrices)
    given = entry.get("of") or {}  # of a run that is compared with another
    kind, variant = (given["kind"], given["variant"]) if given else kind_of(name, settings)
    return Method(
        name=name,
        seeds=[str(seed) if order is None else f"{seed}/{order}" for seed, order in zip(seeds, orders, strict=True)],
        values=values,
        matrices=np.stack(matrices),
        tasks=tasks,
        lambdas=lambdas,
        state=_state(lists("state_mb")) if entry.get("state_mb") is not None else None,
        cross_entropy=_text(lists("cross_entropy"), where, size) if entry.get("cross_entropy") is not None else None,
        losses=_losses(lists("losses"), where) if entry.get("losses") is not None else [[] for _ in seeds],
        label=given.get("label", name),
        kind=kind,
        variant=variant,
        run=given.get("run", ""),
    )


def _tasks(orders: list[Any], matrices: list[np.ndarray], where: str) -> list[list[str]]:
    size = len(matrices[0])
    for s, (matrix, order) in enumerate(zip(matrices, orders, strict=True)):
        if len(matrix) != size:
            raise ValueError(f"{where}.matrix[{s}] has {len(matrix)} tasks, matrix[0] has {size}")
        if not isinstance(order, list | tuple) or len(order) != size:
            raise ValueError(f"{where}.tasks[{s}] must name the {size} tasks of its matrix")
    return [[str(task) for task in order] for order in orders]


def _rows(rows: list[Any], where: str, size: int) -> np.ndarray:
    """(S, size) of one list a run."""
    found = [metrics.as_vector(row, f"{where}[{s}]") for s, row in enumerate(rows)]
    for s, row in enumerate(found):
        if len(row) != size:
            raise ValueError(f"{where}[{s}] has {len(row)} entries for {size} tasks")
    return np.stack(found)


def _text(rows: list[Any], where: str, size: int) -> np.ndarray:
    found = [metrics.as_vector(row, f"{where}.cross_entropy[{s}]") for s, row in enumerate(rows)]
    for s, row in enumerate(found):
        if len(row) not in (2, size + 1) or len(row) != len(found[0]):
            raise ValueError(f"{where}.cross_entropy[{s}] has {len(row)} entries for {size} tasks and before them")
    return np.stack(found)


def _losses(runs: list[Any], where: str) -> list[list[np.ndarray]]:
    for s, run in enumerate(runs):
        if not isinstance(run, list | tuple | None):
            raise ValueError(f"{where}.losses[{s}] must be a list with one entry for each trained task")
    return [
        [metrics.as_vector(task, f"{where}.losses[{s}][{t}]") for t, task in enumerate(run or [])]
        for s, run in enumerate(runs)
    ]


def _state(kept: list[Any]) -> np.ndarray | None:
    return np.array([[own[0], own[-1]] for own in kept]) if all(kept) else None


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
