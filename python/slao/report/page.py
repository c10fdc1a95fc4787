"""The HTML page of a report: one file with its figures and style inside, readable offline, light or dark."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jinja2
import numpy as np

from . import finding
from .canvas import Plot
from .compare import settings_table
from .results import Method, score_digits
from .tables import COSTS, SCORES, Table, number, per_method, per_run, present, unfinished

# Viridis at nine places: from the lowest score of all matrices to the highest.
_HEAT = ("#440154", "#472d7b", "#3b528b", "#2c728e", "#21918c", "#28ae80", "#5ec962", "#addc30", "#fde725")
_BRIGHT = 4  # from here on black is read better than white


@dataclass(frozen=True)
class Matrix:
    """A score matrix as a table. rows: (task just trained, cells), those without a score left out; a cell is its text,
    its step of _HEAT (−1: no score), and whether its task has been trained by then. Two decimals of a score on a 0..1
    scale, so that ten tasks fit."""

    name: str
    note: str
    tasks: list[str]
    rows: list[tuple[str, list[tuple[str, int, bool]]]]


def page(results: Mapping[str, Any], methods: Sequence[Method], plots: Sequence[Plot]) -> str:
    """The whole document as text. Everything that comes from outside is escaped.

    results: a run's, or several joined by `compare.load_all`. methods: what `parse` finds in them.
    """
    templates = jinja2.Environment(
        keep_trailing_newline=True,
        loader=jinja2.PackageLoader("slao.report", "."), autoescape=True, trim_blocks=True, lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )  # fmt: skip
    runs = results.get("runs") or {"value": results}
    orders = [[m.name, seed, " → ".join(m.tasks[s])] for m in methods for s, seed in enumerate(m.seeds)]
    shown = present(methods, SCORES + COSTS)
    return templates.get_template("page.html").render(
        heat_style=_heat_style(),
        title=finding.title(results, methods),
        about=f"{finding.runner_up(methods)} Model: {results['model']}. Score: {results['metric']}.".strip(),
        notes=[
            *unfinished(results),
            *(f"failed: {name}: {why}" for name, why in (results.get("failed") or {}).items()),
        ],
        differing=settings_table(runs, differing=True) if len(runs) > 1 else None,
        scores=per_method(methods, SCORES),
        costs=per_method(methods, COSTS),
        differences=finding.differences(methods),
        how=finding.HOW,
        plots=[plot for plot in plots if not plot.name.startswith("similarity")],
        similar=[plot for plot in plots if plot.name.startswith("similarity")],
        matrices=[_matrix(m, *_limits(methods), score_digits(methods)) for m in methods],
        runs=per_run(methods),
        glossary=[(column.title, column.meaning) for column in shown],
        settings=settings_table(runs),
        orders=Table(["method", "seed", "order"], orders),
    )


def _limits(methods: Sequence[Method]) -> tuple[float, float]:
    """One colour scale for every method, or the matrices could not be compared."""
    shown = np.concatenate([m.matrices.mean(axis=0).ravel() for m in methods])
    shown = shown[np.isfinite(shown)]
    return (float(shown.min()), float(shown.max())) if len(shown) else (0.0, 1.0)


def _matrix(method: Method, low: float, high: float, digits: int) -> Matrix:
    scores = method.matrices.mean(axis=0)
    some = np.isfinite(scores).any(axis=1)  # joint training has a last row alone
    steps = len(_HEAT) - 1
    labels = method.task_labels()
    tasks = [f"{t + 1} {name}" for t, name in enumerate(labels)] if method.same_order else labels
    rows: list[tuple[str, list[tuple[str, int, bool]]]] = []
    for t in np.flatnonzero(some) if some.any() else range(len(tasks)):
        cells = []
        for i, score in enumerate(scores[t]):
            heat = round(steps * (score - low) / (high - low)) if np.isfinite(score) and high > low else -1
            cells.append((number(float(score), min(digits, 2)), heat, bool(i <= t)))
        rows.append((tasks[t], cells))
    note = "" if method.same_order else " Runs train in different orders: task k is the k-th of each run."
    return Matrix(method.name, note, tasks, rows)


def _heat_style() -> str:
    """A class of the style sheet for every step."""
    return "".join(
        f".h{k}{{background:{colour};color:{'#000000' if k >= _BRIGHT else '#ffffff'}}}"
        for k, colour in enumerate(_HEAT)
    )
