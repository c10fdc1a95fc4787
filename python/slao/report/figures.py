"""The figures of a report, in its order."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from .canvas import Plot
from .figures_scores import averages, ends, retention, trade
from .figures_similarity import similarity
from .figures_training import losses, times, weights
from .results import Method


def draw(results: Mapping[str, Any], methods: Sequence[Method]) -> list[Plot]:
    """What of these can be drawn: ends, averages, trade, losses, weights (λ), times, retention, and
    similarity_<method> of each method whose factors were kept. ImportError without matplotlib.
    """
    metric = str(results["metric"])
    found = [
        ends(methods, metric), averages(methods, metric), trade(methods, metric), losses(methods),
        weights(methods), times(methods), retention(methods),
        *(similarity(name, entry.get("similarity") or []) for name, entry in results["methods"].items()),
    ]  # fmt: skip
    plots: dict[str, Plot] = {}
    for plot in filter(None, found):
        name = next(n for k in range(len(found)) if (n := f"{plot.name}_{k}" if k else plot.name) not in plots)
        plots[name] = replace(plot, name=name)
    return list(plots.values())
