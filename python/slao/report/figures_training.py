"""The figures of training: losses along the stream, λ and the weights of the final merge, where the time goes."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from .. import metrics
from .canvas import (
    CARD,
    COLOURS,
    INK,
    Plot,
    label,
    legend,
    looks,
    new_figure,
    plus_minus,
    runs_of,
    spread,
    styled,
    to_svg,
)
from .results import Method

_POINTS = 16  # of a task's losses, whose number differs from task to task and run to run


@styled
def losses(methods: Sequence[Method]) -> Plot | None:
    """The training loss along the stream, of methods whose runs have logged it more than once a task."""
    lines = [(m, look, *_loss_line(m)) for m, look in zip(methods, looks(methods), strict=True)]
    lines = [line for line in lines if np.isfinite(line[-1]).any()]
    if not lines:
        return None
    figure = new_figure(3.2)
    axes = figure.subplots()
    told, size = [], max(m.matrices.shape[1] for m in methods)
    for method, look, x, y in lines:
        axes.plot(x, y, label=label(method.name), linewidth=1.2, **look | {"marker": ""})
        there = y[np.isfinite(y)]
        told.append(f"{method.name}: from {there[0]:.3g} to {there[-1]:.3g}")
    for task in range(1, size):
        axes.axvline(task, color=COLOURS[-1], linewidth=0.5, alpha=0.4)
    axes.set_xticks(range(0, size + 1, 1 + size // 16))
    axes.set(xlabel="tasks trained so far", ylabel="training loss")
    axes.set_title(runs_of([line[0] for line in lines]), fontsize=9)
    legend(figure, axes)
    caption = (
        "As the Trainer logged it, every task's steps drawn over the same width. Joint training sees all tasks at "
        "once, so its line runs over the whole width."
    )
    return Plot("losses", "Training loss, task after task", caption, "; ".join(told), to_svg(figure))


def _loss_line(method: Method) -> tuple[np.ndarray, np.ndarray]:
    """x in tasks, and the mean over the runs, with a gap (NaN) after each task."""
    size = method.matrices.shape[1]
    parts = max((len(run) for run in method.losses), default=0)
    width = size if method.together else 1
    place = (np.arange(_POINTS) + 0.5) / _POINTS
    x, y = [np.zeros(0)], [np.zeros(0)]
    for part in range(parts):
        # One value is no curve.
        found = [run[part] for run in method.losses if len(run) > part and np.isfinite(run[part]).sum() > 1]
        curves = [np.interp(place, (np.arange(len(f)) + 0.5) / len(f), f) for f in found]
        x.append(np.append((part + place) * width, np.nan))
        y.append(np.append(np.mean(curves, axis=0) if curves else np.full(_POINTS, np.nan), np.nan))
    return np.concatenate(x), np.concatenate(y)


@styled
def weights(methods: Sequence[Method]) -> Plot | None:
    """λ by task, and each task's share in the final merge, of methods that keep a running average."""
    known = [m for m in methods if m.lambdas is not None]
    if not known:
        return None
    figure = new_figure(4.4)
    top, bottom = figure.subplots(2, 1, sharex=True)
    width, size, told = 0.8 / len(known), max(m.matrices.shape[1] for m in known), []
    drawn = [
        (m.name, m.lambdas, look) for m, look in zip(methods, looks(methods), strict=True) if m.lambdas is not None
    ]
    for place, (name, lambdas, look) in enumerate(drawn):
        shares = np.array([metrics.merge_weights(row.tolist()) for row in lambdas])
        x = np.arange(1, shares.shape[1] + 1)
        top.errorbar(x, lambdas.mean(axis=0), spread(lambdas), capsize=2, label=label(name), **look)
        at = x + (place - (len(known) - 1) / 2) * width
        faint = {} if look["linestyle"] == "-" else {"alpha": 0.5}
        error = {"elinewidth": 1, "ecolor": INK}
        mean, std = shares.mean(axis=0), spread(shares)
        bars = bottom.bar(at, mean, width * 0.92, yerr=std, color=look["color"], error_kw=error, **faint)
        if len(known) == 1 and size <= 12:
            bottom.bar_label(bars, fmt="%.2f", padding=2, fontsize=8)
        own = ", ".join(f"{value:.3f}" for value in lambdas.mean(axis=0))
        share = ", ".join(f"{value:.3f}" for value in shares.mean(axis=0))
        told.append(f"{name}: λ {own}; weights {share}")
    orders = [m.task_labels() for m in known]
    same = all(order == orders[0] for order in orders)
    names = orders[0] if same else [f"task {k}" for k in range(1, size + 1)]
    bottom.set_xticks(
        range(1, size + 1), [label(t, 18) for t in names], rotation=40, ha="right", rotation_mode="anchor"
    )
    top.set(ylabel="λ", ylim=(0, None))
    bottom.set(ylabel="weight at the end")
    bottom.margins(y=0.14)
    top.set_title(runs_of(known), fontsize=9)
    for axes in (top, bottom):
        axes.grid(False, axis="x")
    legend(figure, top)
    title = "λ by task, and each task's weight in the final merge"
    caption = (
        "λ: the share that a task gets when it is merged. The weight of task j is λ_j · Π_{k>j} (1 − λ_k): what is "
        "left of that after the last merge."
    )
    return Plot("weights", title, caption, "; ".join(told), to_svg(figure))


_PARTS = (("train_seconds", "training"), ("score_seconds", "scoring"), ("merge_seconds", "merging"))


@styled
def times(methods: Sequence[Method]) -> Plot | None:
    """Seconds of a run in training steps, in scoring and around the tasks, as far as they are known."""
    if not any(np.isfinite(m.values["train_seconds"]).any() for m in methods):
        return None
    figure = new_figure(1.3 + 0.3 * len(methods))
    axes = figure.subplots()
    left, told = np.zeros(len(methods)), [f"{m.name}:" for m in methods]
    for (key, title), colour in zip(_PARTS, COLOURS, strict=False):
        means = [m.mean(key) for m in methods]
        if np.isfinite(means).any():
            widths = np.nan_to_num(means)
            axes.barh(
                range(len(methods)), widths, left=left, height=0.65,
                color=colour, edgecolor=CARD, linewidth=0, label=title,
            )  # fmt: skip
            left = left + widths
            told = [f"{text} {title} {plus_minus(m.values[key], 1)} s," for text, m in zip(told, methods, strict=True)]
    for k, (total, method) in enumerate(zip(left, methods, strict=True)):
        speed = method.mean("tokens_per_second")
        text = f"{total:,.0f} s" if total >= 100 else f"{total:.1f} s"
        text += f", {speed:,.0f} tokens/s" if np.isfinite(speed) else ""
        axes.annotate(text, (total, k), (4, 0), textcoords="offset points", va="center", fontsize=8)
    axes.set_yticks(range(len(methods)), [label(m.name, 22) for m in methods])
    axes.set(xlabel="seconds of a run", xlim=(0, max(left.max(), 1e-9) * 1.6), ylim=(len(methods) - 0.5, -0.5))
    axes.grid(False, axis="y")
    axes.set_title(runs_of(methods), fontsize=9)
    legend(figure, axes)
    caption = (
        "Merging: what a method does before and after its tasks. Behind the bars the total, and the training speed."
    )
    told = [text.rstrip(",") for text in told]
    return Plot("times", "Where the time of a run goes", caption, "; ".join(told), to_svg(figure))
