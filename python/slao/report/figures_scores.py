"""The figures of scores: AA and BWT, the mean score along the stream, what accuracy costs, another text's fate."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from .. import metrics
from .canvas import COLOURS, Plot, label, legend, looks, new_figure, plus_minus, runs_of, spread, styled, to_svg
from .results import Method, score_digits


@styled
def ends(methods: Sequence[Method], metric: str) -> Plot:
    """AA, and BWT where some method has one: a row a method, with every run."""
    panels = [key for key in ("AA", "BWT") if any(np.isfinite(m.values[key]).any() for m in methods)] or ["AA"]
    figure = new_figure(1.1 + 0.3 * len(methods))
    several = any(len(m.seeds) > 1 for m in methods)
    for axes, key in zip(np.atleast_1d(figure.subplots(1, len(panels), sharey=True)), panels, strict=True):
        for k, method in enumerate(methods):
            values = method.values[key][np.isfinite(method.values[key])]
            if len(values):
                colour = COLOURS[0 if not method.together else -1]
                axes.plot(values, np.full(len(values), k), "|", color=colour, markersize=9, alpha=0.6)
                axes.errorbar(values.mean(), k, xerr=spread(values), fmt="o", color=colour, markersize=5, capsize=3)
        if key == "BWT":
            axes.axvline(0, color=COLOURS[-1], linewidth=0.8)
        axes.set_xlabel(f"AA, {label(metric)}" if key == "AA" else f"BWT, change of {label(metric, 16)}")
        axes.margins(x=0.12)
        axes.grid(False, axis="y")
        axes.locator_params(axis="x", nbins=4)
    axes.set_yticks(range(len(methods)), [label(m.name, 22) for m in methods])
    axes.set_ylim(len(methods) - 0.5, -0.5)
    figure.axes[0].set_title("● mean, — one standard deviation, | a run" if several else "one run a method", fontsize=9)
    digits = score_digits(methods)
    alt = "; ".join(
        f"{m.name}: " + ", ".join(f"{key} {plus_minus(m.values[key], digits)}" for key in panels) for m in methods
    )
    caption = (
        "AA: mean score over all tasks after the last one. BWT: mean change of a task's score from its own training to "
        "the end; left of zero the method has forgotten."
    )
    return Plot("ends", "Where each method ends, and what it forgets", caption, alt, to_svg(figure))


@styled
def averages(methods: Sequence[Method], metric: str) -> Plot:
    """The mean score over the tasks seen so far, after each task."""
    figure = new_figure(3.2)
    axes = figure.subplots()
    digits, told = score_digits(methods), []
    for method, look in zip(methods, looks(methods), strict=True):
        after = np.stack([metrics.as_vector(metrics.average_after_each(m.tolist())) for m in method.matrices])
        x = np.arange(1, after.shape[1] + 1)
        mean, std = after.mean(axis=0), spread(after)
        axes.plot(x, mean, label=label(method.name), **look)
        if len(after) > 1:
            axes.fill_between(x, mean - std, mean + std, color=look["color"], alpha=0.15, linewidth=0)
        there = np.flatnonzero(np.isfinite(mean))
        points = dict.fromkeys([*there[:1], *there[-1:]])
        told.append(
            f"{method.name}: " + (", ".join(f"{mean[t]:.{digits}f} after task {t + 1}" for t in points) or "none")
        )
    _task_axis(axes, methods, first=1)
    axes.set_ylabel(f"mean {label(metric)} over them")
    band = any(len(m.seeds) > 1 for m in methods)
    axes.set_title(runs_of(methods) + ("; band: ± one standard deviation" if band else ""), fontsize=9)
    legend(figure, axes)
    caption = "Each point averages the scores on the tasks trained until then, right after the latest of them."
    title = f"Mean {label(metric)} over the tasks seen so far"
    return Plot("averages", title, caption, "; ".join(told), to_svg(figure))


@styled
def trade(methods: Sequence[Method], metric: str) -> Plot | None:
    """AA against what is kept after the last task, and against BWT: of each where two methods have both."""
    sides = {
        "kept": [m for m in methods if m.state is not None and np.isfinite(m.values["AA"]).all()],
        "BWT": [m for m in methods if np.isfinite(m.values["BWT"]).all() and np.isfinite(m.values["AA"]).all()],
    }
    sides = {side: known for side, known in sides.items() if len(known) > 1}
    if not sides:
        return None
    figure = new_figure(3.2)
    panels = np.atleast_1d(figure.subplots(1, len(sides), sharey=True))
    digits, told = score_digits(methods), []
    for method, look in zip(methods, looks(methods), strict=True):
        look |= {"linestyle": "none", "markersize": 6}
        aa, said = method.values["AA"], [f"AA {plus_minus(method.values['AA'], digits)}"]
        for axes, (side, known) in zip(panels, sides.items(), strict=True):
            if method not in known:
                continue
            x = method.state[:, 1] if side == "kept" and method.state is not None else method.values["BWT"]
            wide = spread(x) if side == "BWT" else None
            axes.errorbar(
                x.mean(), aa.mean(), spread(aa), wide, capsize=2, elinewidth=0.8, label=label(method.name), **look
            )
            said.append(f"{x.mean():.2f} MB" if side == "kept" else f"BWT {plus_minus(x, digits)}")
        if len(said) > 1:
            told.append(f"{method.name}: {', '.join(said)}")
    for axes, side in zip(panels, sides, strict=True):
        axes.margins(x=0.1)
        low, high = axes.dataLim.intervalx
        if side == "kept" and high >= 4 * low > 0:
            axes.set_xscale("log", base=2)
            axes.xaxis.set_major_formatter("{x:g}")
            axes.set_xlabel("MB kept at the end (log scale)")
        else:
            axes.locator_params(axis="x", nbins=4)
            axes.set_xlabel("MB kept at the end" if side == "kept" else "BWT (left of 0: forgotten)")
    panels[0].set_ylabel(f"AA, {label(metric)}")
    bars = any(len(m.seeds) > 1 for known in sides.values() for m in known)
    panels[0].set_title(runs_of(methods) + ("; bars: ± one std" if bars else ""), fontsize=9)
    legend(figure, *panels)
    captions = {
        "kept": "What a method keeps: its adapter, whatever else it carries from task to task, and rows for replay.",
        "BWT": "BWT: mean change of a task's score from its own training to the end.",
    }
    caption = " ".join(captions[side] for side in sides)
    title = (
        "Accuracy against kept memory and forgetting"
        if len(sides) > 1
        else (f"Accuracy against {'kept memory' if 'kept' in sides else 'forgetting'}")
    )
    return Plot("trade", title, caption, "; ".join(told), to_svg(figure))


@styled
def retention(methods: Sequence[Method]) -> Plot | None:
    """How the cross-entropy of a text that no task is about rises, of methods that were asked."""
    known = [m for m in methods if m.cross_entropy is not None]
    if not known:
        return None
    figure = new_figure(3.2)
    axes = figure.subplots()
    told = []
    for method, look in zip(methods, looks(methods), strict=True):
        if method.cross_entropy is None:
            continue
        rise = method.cross_entropy - method.cross_entropy[:, :1]
        x = np.linspace(0, method.matrices.shape[1], rise.shape[1])  # joint training: before and after all
        axes.errorbar(x, rise.mean(axis=0), spread(rise), capsize=2, label=label(method.name), **look)
        told.append(f"{method.name}: {plus_minus(rise[:, -1], 3)} nats a token at the end")
    _task_axis(axes, known, first=0)
    axes.set_ylabel("rise, nats a token")
    axes.set_title(runs_of(known), fontsize=9)
    legend(figure, axes)
    caption = "Cross-entropy of the retention text under the merged adapter, less that before the first task."
    title = "How much less likely a text that no task is about has become"
    return Plot("retention", title, caption, "; ".join(told), to_svg(figure))


def _task_axis(axes: Any, methods: Sequence[Method], first: int) -> None:
    most = max(m.matrices.shape[1] for m in methods)
    axes.set_xticks(range(first, most + 1, 1 + most // 16))
    axes.set_xlabel("tasks trained so far")
