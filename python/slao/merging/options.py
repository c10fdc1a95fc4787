"""The methods of `merge_adapters` and their options, completed and checked."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from ..schedules import make_schedule

# method -> the options it takes; and what an adapter weighs if nothing is said, of T adapters.
METHODS = {
    "slao": ("schedule",),
    "linear": ("weights",),
    "svd": ("weights", "rank"),
    "ties": ("weights", "density"),
    "dare_ties": ("weights", "density", "seed"),
    "magmax": ("weights", "rank"),
    "opcm": ("weights", "rank"),
    "knots": ("weights", "rank", "density"),
}
_USUAL_WEIGHT: dict[str, Callable[[int], float]] = {
    "linear": lambda count: 1 / count,
    "svd": lambda count: 1 / count,
    "magmax": lambda count: 0.5,  # the paper's scale
}
_DENSITY = 0.2  # TIES keeps the top 20 %
ONE_RANK, CUT = ("slao", "linear", "ties", "dare_ties"), ("svd", "magmax", "opcm", "knots")


def completed(
    method: str,
    weights: Sequence[float] | None,
    rank: int | None,
    density: float | None,
    schedule: str | float | None,
    seed: int | None,
    count: int,
) -> dict[str, Any]:
    """The options of `method`, with what was not said. ValueError for those that it does not take."""
    if method not in METHODS:
        raise ValueError(f"unknown method {method!r}; choose one of {', '.join(METHODS)}")
    given = {"weights": weights, "rank": rank, "density": density, "schedule": schedule, "seed": seed}
    for option, value in given.items():
        if value is not None and option not in METHODS[method]:
            others = ", ".join(name for name, options in METHODS.items() if option in options)
            raise ValueError(
                f"{method} takes no {option}, which {others} take; its options are {', '.join(METHODS[method])}"
            )
    if count < 2 and method != "svd":  # which cuts one adapter to a rank
        raise ValueError(f"{method} merges two adapters or more; got {count}")
    if not count:
        raise ValueError("svd needs an adapter; got none")
    if weights is not None and len(weights) != count:
        raise ValueError(f"weights are {len(weights)} numbers for {count} adapters")
    if weights is not None and not all(math.isfinite(weight) for weight in weights):
        raise ValueError(f"weights must be finite, not {list(weights)}")
    if density is not None and not 0 < density <= 1:
        raise ValueError(f"density must lie in (0, 1], not {density}")
    if rank is not None and rank < 1:
        raise ValueError(f"rank must be at least 1, not {rank}")
    if method == "slao":
        make_schedule("inv_sqrt" if schedule is None else schedule)
        return {"schedule": "inv_sqrt" if schedule is None else schedule}
    usual = _USUAL_WEIGHT.get(method, lambda count: 1.0)(count)
    found: dict[str, Any] = {"weights": [usual] * count if weights is None else [float(w) for w in weights]}
    if "density" in METHODS[method]:
        found["density"] = _DENSITY if density is None else density
    if "seed" in METHODS[method]:
        found["seed"] = 0 if seed is None else seed
    return found
