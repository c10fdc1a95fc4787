"""Continual-learning metrics of one score matrix.

Everywhere `matrix[t][i]` is the score on task i after training on task t: one row per trained task, one
column per evaluated task, both in training order, T×T. An entry is None (or NaN) where nothing was evaluated.
The formulas write it `a[t, i]`, count from 1, and call the last task T. Higher scores are better.

Every metric is None where one of the entries it needs is missing, never a mean over what happens to be there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from numbers import Real
from typing import Any, NamedTuple

import numpy as np

Scores = Sequence[float | None]
Matrix = Sequence[Scores]


class OrderDeviation(NamedTuple):
    """How much the final scores depend on the task order; see `order_deviation`."""

    per_task: dict[str, float | None]
    maximum: float | None
    mean: float | None


def as_vector(scores: Scores, name: str = "scores") -> np.ndarray:
    """Scores as float64 (len,), None as NaN; ValueError that names the entry if one is not a number."""
    try:
        entries = list(scores)
    except TypeError:
        raise ValueError(f"{name} must be a list of numbers, got {type(scores).__name__}") from None
    for k, entry in enumerate(entries):
        # np.array(..., float) would also parse strings, and True is a Real.
        if entry is not None and (isinstance(entry, bool | np.bool_) or not isinstance(entry, Real)):
            raise ValueError(f"{name}[{k}] must be a number or None, got {entry!r}")
    return np.array([np.nan if entry is None else float(entry) for entry in entries], dtype=np.float64)


def as_matrix(matrix: Matrix, name: str = "matrix") -> np.ndarray:
    """The score matrix as float64 (T, T), None as NaN.

    Raises ValueError, with `name` and the row at fault, for a matrix that is empty, ragged or not square.
    """
    try:
        size = len(matrix)
    except TypeError:
        raise ValueError(f"{name} must be a list of rows, got {type(matrix).__name__}") from None
    if size == 0:
        raise ValueError(f"{name} is empty: it needs one row per task")
    rows = [as_vector(row, f"{name}[{t}]") for t, row in enumerate(matrix)]
    for t, row in enumerate(rows):
        if len(row) != len(rows[0]):
            raise ValueError(
                f"{name} is ragged: row {t} has {len(row)} entries, row 0 has {len(rows[0])}; "
                "write None for a score that was not evaluated"
            )
    if len(rows[0]) != size:
        raise ValueError(f"{name} is not square: {size} rows of {len(rows[0])} entries")
    return np.stack(rows)


def _or_none(value: Any) -> float | None:
    return None if np.isnan(value) else float(value)


def average_accuracy(matrix: Matrix) -> float | None:
    """AA = 1/T Σ_i a[T, i]: the mean of the last row of the T×T matrix.

    Source: Lopez-Paz & Ranzato 2017 (GEM). ValueError for a matrix that is not square.
    """
    return _or_none(as_matrix(matrix)[-1].mean())


def backward_transfer(matrix: Matrix) -> float | None:
    """BWT = 1/(T−1) Σ_{i<T} (a[T, i] − a[i, i]); negative means forgetting. None for T = 1.

    The T−1 variant (Lopez-Paz & Ranzato 2017); some papers divide the same sum by T.
    Needs the diagonal and the last row of the T×T matrix. ValueError for a matrix that is not square.
    """
    a = as_matrix(matrix)
    if len(a) == 1:
        return None
    return _or_none((a[-1, :-1] - a.diagonal()[:-1]).mean())


def forgetting(matrix: Matrix) -> float | None:
    """F = 1/(T−1) Σ_{i<T} (max_{t<T} a[t, i] − a[T, i]). None for T = 1.

    As defined, the maximum also counts scores on task i from before it was trained (t < i), where they were
    evaluated; those may be missing, the ones with i ≤ t ≤ T may not. ValueError for a matrix that is not
    square (T×T). Source: Chaudhry et al. 2018 (RWalk).
    """
    a = as_matrix(matrix)
    if len(a) == 1:
        return None
    earlier = a[:, :-1]  # every task but the last, which nothing has been trained after
    if np.isnan(earlier[np.tri(*earlier.shape, dtype=bool)]).any():
        return None
    # a[i, i] is present for i < T, so no column is all NaN.
    return _or_none((np.nanmax(a[:-1, :-1], axis=0) - a[-1, :-1]).mean())


def forward_transfer(matrix: Matrix, zero_shot: Scores) -> float | None:
    """FWT = 1/(T−1) Σ_{i>1} (a[i−1, i] − zero_shot[i]). None for T = 1.

    zero_shot: (T,) scores of the model before the first task, in training order; its first entry is not used.
    Source: Lopez-Paz & Ranzato 2017 (their baseline is a random initialisation; here it is the
    pretrained model). ValueError for a matrix that is not T×T or a zero_shot that is not T long.
    """
    a, base = as_matrix(matrix), as_vector(zero_shot, "zero_shot")
    if len(base) != len(a):
        raise ValueError(f"zero_shot has {len(base)} scores, the matrix has {len(a)} tasks")
    if len(a) == 1:
        return None
    return _or_none((a.diagonal(offset=1) - base[1:]).mean())


def average_after_each(matrix: Matrix) -> list[float | None]:
    """AA_t = 1/t Σ_{i≤t} a[t, i] for t = 1..T: the mean over the tasks seen so far, after each task.

    Returns T values; one is None where a seen task was not evaluated. Needs the lower triangle of the T×T
    matrix; ValueError if it is not square. Source: Rebuffi et al. 2017 (iCaRL).
    """
    a = as_matrix(matrix)
    return [_or_none(a[t, : t + 1].mean()) for t in range(len(a))]


def incremental_accuracy(matrix: Matrix) -> float | None:
    """Inc-Acc = 1/T Σ_t AA_t, the mean of `average_after_each` over the T sessions.

    Needs the whole lower triangle of the T×T matrix; ValueError if it is not square.
    Source: Rebuffi et al. 2017 (iCaRL).
    """
    return _or_none(as_vector(average_after_each(matrix)).mean())


def order_deviation(runs: Sequence[Mapping[str, float | None]]) -> OrderDeviation:
    """OPD_i = max_o s[o, i] − min_o s[o, i] over orders o; MOPD = max_i OPD_i, AOPD = mean_i OPD_i.

    runs: for each order the final score of every task (the last row of its matrix), keyed by the task's name.
    Returns (per_task {name: OPD_i}, maximum = MOPD, mean = AOPD); a task with a missing score has OPD None,
    and then so have the two summaries, as with fewer than two runs.
    ValueError if the runs are not over the same tasks. Source: Yoon et al. 2020 (APD).
    """
    if not runs or not runs[0]:
        return OrderDeviation({}, None, None)
    names = list(runs[0])
    for k, run in enumerate(runs):
        if set(run) != set(names):
            odd = sorted(set(run) ^ set(names))
            raise ValueError(f"run {k} is not over the tasks of run 0: only one of them has {', '.join(odd)}")
    scores = np.stack([as_vector([run[name] for name in names], f"run {k}") for k, run in enumerate(runs)])
    if len(runs) < 2:
        return OrderDeviation(dict.fromkeys(names), None, None)
    spread = scores.max(axis=0) - scores.min(axis=0)
    per_task = {name: _or_none(value) for name, value in zip(names, spread, strict=True)}
    return OrderDeviation(per_task, _or_none(spread.max()), _or_none(spread.mean()))


def merge_weights(lambdas: Sequence[float]) -> list[float]:
    """Share of each task in the final merge: w_j = λ_j Π_{k>j} (1 − λ_k), for j = 1..T.

    This unrolls `B_merge,i = B_merge,i−1 + λ_i (B_ft,i − B_merge,i−1)` to `B_merge,T = Σ_j w_j B_ft,j`.
    Σ_j w_j = 1 − Π_k (1 − λ_k), which is 1 when λ_1 = 1 (the first task starts the merge).
    lambdas: T finite numbers; returns T. ValueError for anything else. Source: arXiv 2512.23017, the update.
    """
    lam = as_vector(lambdas, "lambdas")
    if not np.isfinite(lam).all():
        k = int(np.flatnonzero(~np.isfinite(lam))[0])
        raise ValueError(f"lambdas[{k}] must be finite, got {lambdas[k]}")
    # Π_{k>j}: a reversed running product, shifted by one; the last task keeps the empty product, 1.
    kept: np.ndarray = np.append(np.cumprod((1.0 - lam)[:0:-1])[::-1], 1.0)
    return [float(w) for w in lam * kept[: len(lam)]]
