"""The figures of a report: score matrices, average score over the stream, merge weights, speed."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from . import checkpoint, metrics

if TYPE_CHECKING:
    from .report import Method

# Okabe-Ito without its yellow, which is too faint for a line on white. Markers tell the lines apart in print.
GREY = "#5b6169"
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
STYLE = {
    "font.size": 10,
    "axes.titlesize": 12,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e3e5e8",
}


@dataclass(frozen=True)
class Plot:
    """One PNG file with the title in it and the sentence to print under it."""

    path: Path
    title: str
    caption: str


def _label(text: str, limit: int = 26) -> str:
    """Text for a figure: one line, at most `limit` characters (what is cut is near the end), never maths."""
    text = " ".join(text.split())
    if len(text) > limit:
        tail = limit // 4
        text = f"{text[: limit - tail - 1]}…{text[-tail:]}"
    return text.replace("$", r"\$")


def _figure(width: float, height: float) -> Any:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def _title(figure: Any, title: str, about: str) -> None:
    """What is shown, and under it in grey of how many runs."""
    figure.suptitle(title, x=0.012, ha="left", fontsize=12)
    figure.axes[0].set_title(about, fontsize=9, color=GREY)


def _seeds(*methods: Method) -> str:
    counts = {len(m.seeds) for m in methods}
    if counts == {1}:
        return "one seed"
    return f"mean over {counts.pop()} seeds" if len(counts) == 1 else "mean over seeds"


def _named(methods: Sequence[Method]) -> str:
    """`_seeds` after the name of the method if it is the only one, for then no legend says it."""
    return (f"{_label(methods[0].name)}, " if len(methods) == 1 else "") + _seeds(*methods)


def _spread(values: np.ndarray) -> np.ndarray:
    """Sample standard deviation over seeds (axis 0); zero for one seed."""
    return values.std(axis=0, ddof=1) if len(values) > 1 else np.zeros(values.shape[1:])


def _legend(figure: Any, axes: Any, count: int) -> None:
    """Method names right of the axes, where they cannot cover a line."""
    if count > 1:
        figure.legend(*axes.get_legend_handles_labels(), loc="outside right upper", frameon=False)


def _matrix(method: Method, metric: str, limits: tuple[float, float], title: str) -> Any:
    from matplotlib.patheffects import withStroke

    scores = method.matrices.mean(axis=0)
    size = len(scores)
    figure = _figure(max(7.0, 3.6 + 0.62 * size), 2.8 + 0.5 * size)
    axes = figure.subplots()
    image = axes.imshow(np.ma.masked_invalid(scores), cmap="viridis", vmin=limits[0], vmax=limits[1], aspect="auto")
    axes.set_facecolor("#e3e5e8")
    percent = limits[1] > 1.0
    middle = (limits[0] + limits[1]) / 2
    for t, i in np.ndindex(size, size):
        score = scores[t, i]
        if np.isnan(score):
            axes.text(i, t, "–", ha="center", va="center", color=GREY)
            continue
        text = f"{score:.1f}" if percent else f"{score:.2f}"
        axes.text(i, t, text, ha="center", va="center", fontsize=9, color="white" if score < middle else "black")
    # Seen tasks lie left of this staircase: row t has trained columns 0..t.
    steps = [(k // 2 + 0.5, (k + 1) // 2 - 0.5) for k in range(2 * size - 1)]
    axes.plot(
        *zip(*steps, strict=True),
        color="white",
        linewidth=2.5,
        path_effects=[withStroke(linewidth=5, foreground="black")],
        solid_joinstyle="miter",
    )
    labels = [_label(task) for task in method.task_labels()]
    axes.set_xticks(range(size), labels, rotation=40, ha="right", rotation_mode="anchor")
    axes.set_yticks(range(size), labels)
    axes.set(xlim=(-0.5, size - 0.5), ylim=(size - 0.5, -0.5), xlabel="score on", ylabel="after training")
    axes.grid(False)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    figure.colorbar(image, ax=axes, label=_label(metric), shrink=0.9).outline.set_visible(False)
    _title(figure, title, f"{_seeds(method)}; left of the line the task has been trained, right of it not yet")
    return figure


def _averages(methods: Sequence[Method], metric: str, title: str) -> Any:
    figure = _figure(8.5, 4.4)
    axes = figure.subplots()
    band = any(len(m.seeds) > 1 for m in methods)
    for k, method in enumerate(methods):
        after = np.stack([metrics.as_vector(metrics.average_after_each(m.tolist())) for m in method.matrices])
        x = np.arange(1, after.shape[1] + 1)
        mean, std = after.mean(axis=0), _spread(after)
        colour = COLOURS[k % len(COLOURS)]
        axes.plot(
            x,
            mean,
            color=colour,
            marker=MARKERS[k % len(MARKERS)],
            markersize=5,
            linestyle="-" if k < len(COLOURS) else "--",
            label=_label(method.name),
        )
        if len(after) > 1:
            axes.fill_between(x, mean - std, mean + std, color=colour, alpha=0.18, linewidth=0)
    axes.set_xticks(range(1, max(m.matrices.shape[1] for m in methods) + 1))
    axes.set(xlabel="tasks trained so far", ylabel=f"mean {_label(metric)} over them")
    _title(figure, title, _named(methods) + ("; band: ± one standard deviation" if band else ""))
    _legend(figure, axes, len(methods))
    return figure


def _retention(methods: Sequence[Method], title: str) -> Any:
    figure = _figure(8.5, 4.4)
    axes = figure.subplots()
    most = 0
    for k, method in enumerate(methods):
        assert method.cross_entropy is not None
        rise = method.cross_entropy - method.cross_entropy[:, :1]
        x = np.linspace(0, method.matrices.shape[1], rise.shape[1])  # joint training: before and after all
        most = max(most, method.matrices.shape[1])
        style = {"color": COLOURS[k % len(COLOURS)], "marker": MARKERS[k % len(MARKERS)]}
        style["linestyle"] = "-" if k < len(COLOURS) else "--"
        axes.errorbar(x, rise.mean(axis=0), _spread(rise), capsize=2, markersize=5, label=_label(method.name), **style)
    axes.set_xticks(range(most + 1))
    axes.set(xlabel="tasks trained so far", ylabel="rise, nats a token")
    _title(figure, title, _named(methods))
    _legend(figure, axes, len(methods))
    return figure


def _costs(methods: Sequence[Method], title: str) -> Any:
    """AA against what is kept after the last task, and against BWT."""
    figure = _figure(9.5, 4.4)
    left, right = figure.subplots(1, 2, sharey=True)
    for k, method in enumerate(methods):
        assert method.state is not None
        aa, bwt = method.values["AA"], method.values["BWT"]
        style = {"color": COLOURS[k % len(COLOURS)], "marker": MARKERS[k % len(MARKERS)], "linestyle": "none"}
        if k >= len(COLOURS):
            style["markerfacecolor"] = "white"
        left.errorbar(method.state[:, 1].mean(), aa.mean(), _spread(aa), label=_label(method.name), **style)
        if np.isfinite(bwt).all():
            right.errorbar(bwt.mean(), aa.mean(), _spread(aa), _spread(bwt), **style)
    left.set_xscale("log", base=2)
    left.xaxis.set_major_formatter("{x:g}")
    left.set(xlabel="MB kept after the last task", ylabel="AA")
    right.set(xlabel="BWT")
    _title(figure, title, _named(methods))
    _legend(figure, left, len(methods))
    return figure


def _weights(methods: Sequence[Method], title: str) -> Any:
    size = max(m.matrices.shape[1] for m in methods)
    figure = _figure(max(7.0, 3.5 + 0.55 * size), 6.0)
    top, bottom = figure.subplots(2, 1, sharex=True)
    width = 0.8 / len(methods)
    for k, method in enumerate(methods):
        assert method.lambdas is not None
        weights = np.array([metrics.merge_weights(row.tolist()) for row in method.lambdas])
        x = np.arange(1, weights.shape[1] + 1)
        colour = COLOURS[k % len(COLOURS)]
        top.errorbar(
            x,
            method.lambdas.mean(axis=0),
            yerr=_spread(method.lambdas),
            color=colour,
            capsize=2,
            marker=MARKERS[k % len(MARKERS)],
            markersize=5,
            label=_label(method.name),
        )
        at = x + (k - (len(methods) - 1) / 2) * width
        bars = bottom.bar(
            at,
            weights.mean(axis=0),
            width * 0.92,
            yerr=_spread(weights),
            color=colour,
            error_kw={"elinewidth": 1},
        )
        if len(methods) == 1:
            bottom.bar_label(bars, fmt="%.3f", padding=2, fontsize=8)
    orders = [m.task_labels() for m in methods]
    same = all(order == orders[0] for order in orders)
    labels = orders[0] if same else [f"task {k}" for k in range(1, size + 1)]
    bottom.set_xticks(range(1, size + 1), [_label(t) for t in labels], rotation=40, ha="right", rotation_mode="anchor")
    top.set(ylabel="λ when it is merged", ylim=(0, None))
    bottom.set(ylabel="weight in the final merge")
    bottom.margins(y=0.12)
    _title(figure, title, _named(methods))
    for axes in (top, bottom):
        axes.grid(False, axis="x")
    _legend(figure, top, len(methods))
    return figure


def _speed(methods: Sequence[Method], title: str) -> Any:
    figure = _figure(8.0, 1.8 + 0.42 * len(methods))
    axes = figure.subplots()
    present = [v[np.isfinite(v)] for v in (m.values["tokens_per_second"] for m in methods)]
    means = [float(v.mean()) for v in present]
    band = any(len(v) > 1 for v in present)
    bars = axes.barh(
        range(len(methods)),
        means,
        color=COLOURS[0],
        height=0.65,
        xerr=[float(_spread(v)) for v in present],
    )
    axes.bar_label(bars, labels=[f"{mean:,.0f}" if mean >= 100 else f"{mean:.2f}" for mean in means], padding=5)
    axes.set_yticks(range(len(methods)), [_label(m.name) for m in methods])
    axes.invert_yaxis()
    axes.margins(x=0.12)
    axes.grid(False, axis="y")
    axes.tick_params(axis="y", length=0)
    axes.set_xlabel("tokens per second of training")
    axes.xaxis.set_major_formatter("{x:,.0f}" if max(means) >= 10 else "{x:g}")
    _title(figure, title, _seeds(*methods) + ("; line: ± one standard deviation" if band else ""))
    return figure


def write_png(figure: Any, path: Path) -> None:
    """`figure` as a PNG file, atomically."""
    checkpoint.write_atomically(path, lambda temporary: figure.savefig(temporary, dpi=130, format="png"))


def draw(methods: Sequence[Method], metric: str, out_dir: Path) -> list[Plot]:
    """Write the figures of S-seed, T-task results as PNG files into out_dir (made if absent).

    averages.png, one score matrix a method (matrix_<method>.png), weights.png if a method has lambdas, retention.png if
    one was asked about another text, costs.png if several have a state, speed.png if one has a speed. Returns them in
    the order of a report. ImportError without matplotlib.
    """
    try:
        from matplotlib import style
    except ImportError as error:
        raise ImportError("the report needs matplotlib: pip install 'slao_kernels[train]'") from error

    out_dir.mkdir(parents=True, exist_ok=True)
    plots: list[Plot] = []

    def save(stem: str, title: str, caption: str, make: Callable[..., Any], *arguments: Any) -> None:
        path = out_dir / f"{stem}.png"
        # The reader's own matplotlibrc must not change what a report looks like.
        with style.context(["default", STYLE]):
            write_png(make(*arguments, title), path)
        plots.append(Plot(path, title, caption))

    what = _label(metric)
    title = f"Mean {what} over the tasks seen so far"
    caption = "Each point averages the scores on the tasks trained until then, right after the latest of them."
    save("averages", title, caption, _averages, methods, metric)
    shown = np.concatenate([m.matrices.mean(axis=0).ravel() for m in methods])
    shown = shown[np.isfinite(shown)]
    # One colour scale for every method, or the pictures could not be compared.
    limits = (float(shown.min()), float(shown.max())) if len(shown) else (0.0, 1.0)
    stems: set[str] = set()
    for method in methods:
        base = "matrix_" + re.sub(r"[^A-Za-z0-9_-]+", "_", method.name)[:60]
        stem = next(s for n in range(len(methods)) if (s := f"{base}_{n}" if n else base) not in stems)
        stems.add(stem)
        title = f"{_label(method.name)}: {what} on each task after each training task"
        caption = (
            f"{method.name}. Rows: after training which task; columns: score on which task. A dash was not "
            "evaluated. The colour scale is the same for all methods."
        )
        if not method.same_order:
            caption += " Seeds train in different orders: task k is the k-th task of each seed."
        save(stem, title, caption, _matrix, method, metric, limits)
    if merging := [m for m in methods if m.lambdas is not None]:
        title = "λ of each merge, and the weight of each task in the final merge"
        caption = "The weight of task j is λ_j · Π_{k>j} (1 − λ_k): its share of the adapter after the last merge."
        save("weights", title, caption, _weights, merging)
    if retained := [m for m in methods if m.cross_entropy is not None]:
        title = "How much less likely a text that no task is about has become"
        caption = "Cross-entropy of the retention text under the merged adapter, less that before the first task."
        save("retention", title, caption, _retention, retained)
    costs = [m for m in methods if m.state is not None and np.isfinite(m.values["AA"]).all()]
    if len(costs) > 1:
        title = f"What {what} at the end costs: memory, and forgetting"
        caption = "AA against what a method keeps after the last task (adapter and state), and against BWT."
        save("costs", title, caption, _costs, costs)
    if timed := [m for m in methods if np.isfinite(m.values["tokens_per_second"]).any()]:
        save("speed", "Training speed of each method", "Tokens of training data per second of training.", _speed, timed)
    return plots
