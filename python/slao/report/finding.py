"""What the results say, in words: which method ends highest, above what, and whether that is more than noise."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .results import Method, score_digits
from .tables import Table, number

# Student's t, 97.5 %, for 1 to 9 degrees of freedom; from ten on its expansion in 1/n about the normal distribution's.
_T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
_Z = (1.95996, 2.37227, 2.82250, 2.55585)
_SAME = 1e-9  # differences that are no further apart are the same number, rounded

HOW = (
    "Differences are paired: run by run, at the same seed and task order. Behind ± stands the 95 % interval of their "
    "mean by Student's t; a difference is “within noise” where that interval holds zero. Runs that share a seed or an "
    "order count as independent, and nothing corrects for the best of several methods having been picked afterwards."
)


@dataclass(frozen=True)
class Difference:
    """One score of a method less that of another, over the runs of the same seed and order of tasks.

    mean: without such a pair the difference of the two means. margin: half of the 95 % interval; None where there is
    no telling: below two pairs, or where all pairs differ by the same amount.
    """

    pairs: int
    mean: float
    margin: float | None

    @property
    def verdict(self) -> str:
        if self.margin is None:
            return "equal" if self.pairs > 1 and abs(self.mean) < _SAME else "noise unknown"
        return "clear" if abs(self.mean) > self.margin else "within noise"


def t_quantile(freedom: int) -> float:
    """The 97.5 % quantile of Student's t, to three decimals."""
    return _T[freedom - 1] if freedom <= len(_T) else sum(c / freedom**k for k, c in enumerate(_Z))


def difference(method: Method, other: Method, key: str) -> Difference:
    """Of one of `Method.values`, such as AA or BWT."""
    theirs = _by_run(other, key)
    found = np.array([value - theirs[run] for run, value in _by_run(method, key).items() if run in theirs])
    if not len(found):
        return Difference(0, method.mean(key) - other.mean(key), None)
    if len(found) == 1 or np.ptp(found) < _SAME:
        return Difference(len(found), float(found.mean()), None)
    margin = t_quantile(len(found) - 1) * float(found.std(ddof=1)) / math.sqrt(len(found))
    return Difference(len(found), float(found.mean()), margin)


def _by_run(method: Method, key: str) -> dict[tuple[str, ...], float]:
    runs = zip(method.seeds, method.tasks, method.values[key], strict=True)
    # By the tasks as they came, not by what their order was called: "0" and "0/0" may be the same. Where two orders of
    # a seed are, the name tells them apart.
    found: dict[tuple[str, ...], float] = {}
    for seed, tasks, value in runs:
        if np.isfinite(value):
            run: tuple[str, ...] = (seed.partition("/")[0], *tasks)
            found[(*run, seed) if run in found else run] = float(value)
    return found


def best(methods: Sequence[Method]) -> Method | None:
    """The highest AA of what has one; of methods that train all tasks together only where there is no other."""
    scored = [m for m in methods if np.isfinite(m.values["AA"]).any()]
    in_turn = [m for m in scored if not m.together]
    return max(in_turn or scored, key=lambda m: m.mean("AA"), default=None)


def rival(method: Method, methods: Sequence[Method]) -> Method | None:
    """What the best method is held against: the same method of another run where runs are compared, else plain
    fine-tuning (SeqLoRA; of the same run and swept values if there is one), else the next best."""
    others = [m for m in methods if m is not method and not m.together and np.isfinite(m.values["AA"]).any()]
    elsewhere = [m for m in others if m.label == method.label and m.run != method.run]
    plain = [m for m in others if m.kind == "seqlora" and method.kind != "seqlora"]
    near = [m for m in plain if (m.run, m.variant) == (method.run, method.variant)]
    return best(elsewhere or near or plain or others)


def title(results: Mapping[str, Any], methods: Sequence[Method]) -> str:
    """One sentence: "slao ends at 0.753 ± 0.021 after 10 tasks, 0.041 above seqlora, and forgets 0.052 less; ..."."""
    count = len(methods[0].tasks[0])
    tasks = f"{count} tasks" if count > 1 else "one task"
    end = f"; {results['stream']}" + (", unfinished" if results.get("unfinished") else "")
    method = best(methods)
    if method is None:
        return f"No method has a score on all of its {tasks}{end}"
    digits = score_digits(methods)
    text = f"{method.name} ends at {_spread(method, 'AA', digits)} after {tasks}"
    other = rival(method, methods)
    if other is not None:
        text += f", {_above(difference(method, other, 'AA'), other.name, digits)}"
        text += _forgets(method, other, digits)
    elif np.isfinite(method.mean("BWT")):
        text += f", with a BWT of {_spread(method, 'BWT', digits)}"
    counts = sorted({int(np.isfinite(m.values["AA"]).sum()) for m in methods} - {0})
    if counts == [1]:
        return f"{text}{end}, one run a method, so noise is unknown"
    runs = f"{counts[0]} runs" if len(counts) == 1 else f"{counts[0]} to {counts[-1]} runs"
    return f"{text}{end}, {runs} a method"


def runner_up(methods: Sequence[Method]) -> str:
    """A sentence on the next best method, where the title does not name it; else empty."""
    method = best(methods)
    other = None if method is None else rival(method, methods)
    after = best([m for m in methods if m is not method and not m.together])
    if method is None or after is None or after is other:
        return ""
    return f"Next is {after.name}, {_above(difference(after, method, 'AA'), method.name, score_digits(methods))}."


def _spread(method: Method, key: str, digits: int) -> str:
    deviation = method.deviation(key)
    return number(method.mean(key), digits) + (f" ± {number(deviation, digits)}" if np.isfinite(deviation) else "")


def _above(found: Difference, name: str, digits: int) -> str:
    if found.verdict == "equal":
        return f"as {name} does in every run of both"
    size = number(abs(found.mean), digits)
    if size == number(0.0, digits):
        return f"level with {name}{_doubt(found)}"
    where = f"{size} {'above' if found.mean >= 0 else 'below'}"
    if found.verdict == "within noise":
        return f"within noise of {name} ({where})"
    return f"{where} {name}{_doubt(found)}"


def _forgets(method: Method, other: Method, digits: int) -> str:
    """The second half of the sentence, by BWT: what is less negative forgets less."""
    found = difference(method, other, "BWT")
    if not np.isfinite(found.mean):
        return ""
    both = method.mean("BWT"), other.mean("BWT")
    gains = min(both) >= 0 < max(both)  # neither forgets: earlier tasks gain from later ones
    verb, end = ("gains", " on earlier tasks") if gains else ("forgets", "")
    size = number(abs(found.mean), digits)
    if found.verdict == "equal" or size == number(0.0, digits):
        return f", and {verb} as much{end}"
    more = "more" if (found.mean >= 0) == gains else "less"
    noise = " (within noise)" if found.verdict == "within noise" else _doubt(found)
    return f", and {verb} {size} {more}{end}{noise}"


def _doubt(found: Difference) -> str:
    """What to add where noise cannot be judged, although there are several runs."""
    if found.verdict != "noise unknown" or found.pairs == 1:
        return ""
    return " (by the same amount in every run)" if found.pairs else " (no seed and order in common, so not tested)"


def differences(methods: Sequence[Method], anchor: Method | None = None) -> tuple[str, Table] | None:
    """(the name of `anchor`, unless given the best method, how far every other one is from it); None where there are no
    two to compare."""
    anchor = anchor or best(methods)
    others = [m for m in methods if m is not anchor and np.isfinite(m.values["AA"]).any()]
    if anchor is None or not others:
        return None
    digits = score_digits(methods)
    rows = []
    for method in sorted(others, key=lambda m: -m.mean("AA")):
        both = [difference(method, anchor, key) for key in ("AA", "BWT")]
        rows.append([method.name, str(both[0].pairs), *(cell for each in both for cell in _cells(each, digits))])
    header = ["method", "pairs of runs", "AA, difference", "verdict", "BWT, difference", "verdict"]
    return anchor.name, Table(header, rows)


def _cells(found: Difference, digits: int) -> tuple[str, str]:
    if not np.isfinite(found.mean):
        return number(found.mean, digits), number(found.mean, digits)
    margin = "" if found.margin is None else f" ± {number(found.margin, digits)}"
    return f"{found.mean:+,.{digits}f}{margin}", found.verdict
