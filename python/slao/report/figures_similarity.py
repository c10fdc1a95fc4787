"""The figure of `similarity.Similarity`: layer by layer, how alike the A and the B of different tasks are."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from ..similarity import FACTORS, MEASURES, by_layer, chance, summary
from .canvas import COLOURS, SOFT, Plot, label, legend, new_figure, styled, to_svg

_NAMES = {"cosine": "cosine of the factors", "overlap": "overlap of their subspaces"}
_LINES = {"consecutive": ("-", "next task"), "all": ("--", "all pairs")}
_GAP = 1.0  # between the kinds of layers on the axis


@styled
def similarity(name: str, tables: Sequence[dict[str, Any]]) -> Plot | None:
    """The figure of one method, of one `Similarity.table` a run, over which is averaged; None below two tasks.

    Two panels, the cosine and the overlap, over the layers in groups of one kind (q_proj, v_proj); A and B as lines of
    two colours, tasks in a row solid, all pairs dashed; dotted the overlap that random subspaces would have. ValueError
    where runs have other layers.
    """
    if not tables or len(tables[0]["tasks"]) < 2:
        return None
    if any(table["layers"] != tables[0]["layers"] for table in tables):
        raise ValueError(f"{name}: the tables of its seeds are of other layers, so they have no common axis")
    caption = (
        "A and B as each task trained them, before any merge. The cosine depends on the basis in which an adapter is "
        "written; the overlap of the spaces that A reads and B writes does not. Dotted: that of random subspaces."
    )
    title = f"{name}: how alike the factors of different tasks are"
    found = [summary(table) for table in tables]
    told = [
        f"mean {_NAMES[measure]} over layers, all pairs of tasks: "
        + " and ".join(
            f"{factor} {_mean([[one[measure][factor]['all']] for one in found])[0]:.3f}" for factor in FACTORS
        )
        for measure in MEASURES
    ]
    stem = "similarity_" + re.sub(r"[^A-Za-z0-9_-]+", "_", name)[:60]
    return Plot(stem, title, caption, "; ".join(told), to_svg(_panels(tables)))


def layer_order(layers: Sequence[str]) -> list[tuple[str, list[int]]]:
    """(kind, indices): layers that differ in the numbers of their names only are one kind, in the model's order."""
    groups: dict[str, list[int]] = {}
    for index, name in enumerate(layers):
        groups.setdefault(re.sub(r"(?<![^.])\d+(?![^.])", "*", name), []).append(index)
    ends = [kind.rpartition(".")[2] for kind in groups]
    # The last part of a name is enough where it is no other kind's.
    return [
        (end if ends.count(end) == 1 else kind, found) for end, (kind, found) in zip(ends, groups.items(), strict=True)
    ]


def _panels(tables: Sequence[dict[str, Any]]) -> Any:
    layers, tasks = tables[0]["layers"], len(tables[0]["tasks"])
    groups = layer_order(layers)
    figure = new_figure(5.0)
    panels = figure.subplots(2, 1, sharex=True)
    for axes, measure in zip(panels, MEASURES, strict=True):
        for factor, colour in zip(FACTORS, COLOURS, strict=False):
            seeds = [by_layer(table, measure, factor) for table in tables]
            for pairs, (line, what) in _LINES.items():
                # Two tasks are one pair: the second line would lie on the first.
                if pairs == "consecutive" or tasks > 2:
                    values = _mean([seed[pairs] for seed in seeds])
                    marker = "o" if factor == "A" else "s"
                    text = f"{factor}, {what if tasks > 2 else 'both tasks'}"
                    _line(axes, groups, values, text, color=colour, linestyle=line, marker=marker)
            if measure == "overlap":
                random = np.array(chance(tables[0], factor))
                _line(axes, groups, random, f"{factor}, random", color=colour, linestyle=":", linewidth=1.2)
        low = min(0.0, *(axes.get_ylim()[0],)) if measure == "cosine" else 0.0
        axes.set(ylabel=_NAMES[measure], ylim=(low, 1.05))
        axes.grid(False, axis="x")
    _name_layers(panels[1], groups)
    about = f"{tasks} tasks, mean over their pairs" + (f" and {len(tables)} runs" if len(tables) > 1 else ", one run")
    panels[0].set_title(about, fontsize=9)
    legend(figure, panels[1])
    return figure


def _places(groups: Sequence[tuple[str, list[int]]]) -> list[np.ndarray]:
    """Where the layers of each group stand on the axis."""
    starts = np.cumsum([0.0, *(len(found) + _GAP for _, found in groups)])
    return [start + np.arange(len(found)) for start, (_, found) in zip(starts, groups, strict=False)]


def _line(axes: Any, groups: Sequence[tuple[str, list[int]]], values: np.ndarray, text: str, **style: Any) -> None:
    """A line a group, so that none leads from one kind of layer to the next; one entry in the legend."""
    for k, (x, (_, found)) in enumerate(zip(_places(groups), groups, strict=True)):
        # A marker for what is too short for a line.
        short = {} if len(found) < 3 else {"marker": ""}
        axes.plot(x, values[found], markersize=3, label=text if k == 0 else None, **style | short)


def _name_layers(axes: Any, groups: Sequence[tuple[str, list[int]]]) -> None:
    """Below the axis the number of the layer within its kind, and under it the kind."""
    places = _places(groups)
    step = max(1, round(sum(len(x) for x in places) / 24))
    ticks = [(at, str(k)) for x in places for k, at in enumerate(x) if k % step == 0]
    axes.set_xticks([at for at, _ in ticks], [text for _, text in ticks], fontsize=8)
    many = len(groups) > 4
    for x, (kind, _) in zip(places, groups, strict=True):
        axes.annotate(
            label(kind),
            (float(x.mean()), 0),
            xycoords=("data", "axes fraction"),
            xytext=(0, -20),
            textcoords="offset points",
            ha="right" if many else "center",
            va="top",
            rotation=30 if many else 0,
            rotation_mode="anchor",
            fontsize=9,
            color=SOFT,
        )


def _mean(rows: Sequence[Sequence[float | None]]) -> np.ndarray:
    """(L,) of S rows, leaving out what is None; NaN, which no line shows, where all are."""
    values = np.ma.masked_invalid(np.array(rows, dtype=float))
    return np.asarray(values.mean(axis=0).filled(np.nan))
