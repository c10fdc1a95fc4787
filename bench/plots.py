"""Figures of a bench as PNG files: time against size, each peer's ratio to ours, per cent of the roof."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cases import Case, is_floor, order, times

SIZE = re.compile(r"\d+(?:x\d+)+")  # 2048x4096x4096, and of minilm-2x16 the 2x16
COLUMNS = 4


@dataclass(frozen=True)
class Kind:
    """One figure a bench: what is drawn of a case, by contestant."""

    stem: str
    title: str
    of: Callable[[Case], dict[str, float]]
    log: bool
    line: float | None  # what all are compared with


KINDS = (
    Kind("time", "ms, median", lambda case: case.ms, True, None),
    Kind("ratio", "time in multiples of ours (above 1, ours is faster)", lambda case: case.over_ours, False, 1.0),
    Kind("roof", "% of the speed that the roof allows", lambda case: case.roof, False, 100.0),
)


@dataclass(frozen=True)
class Place:
    """Where a case is drawn: its panel, what stands under it, and its size; None for one that has no size."""

    panel: str
    tick: str
    size: int | None


def place(case: Case) -> Place:
    """Rank r is the size, else a product of numbers like 2048x4096x4096; the other parameters choose the panel."""
    params = case.shown
    axis = "r" if "r" in params else next((name for name, value in params.items() if SIZE.search(str(value))), None)
    if axis is None:
        return Place(case.test.replace("_", " "), case.label, None)
    rest = ", ".join(str(value) for name, value in params.items() if name != axis)
    panel = ": ".join(filter(None, [case.test.replace("_", " "), times(rest)]))
    if axis == "r":
        return Place(panel, f"r {params['r']}", int(params["r"]))
    text = str(params[axis])
    match = SIZE.search(text)
    assert match is not None
    return Place(panel, times(text), math.prod(map(int, match[0].split("x"))))


def draw(bench: str, cases: Sequence[Case], folder: Path) -> list[Path]:
    """Write <bench>-time.png, -ratio.png and -roof.png into folder (made if absent); one without figures is left out.

    ImportError of one line where there is no matplotlib.
    """
    try:
        from matplotlib import style
    except ImportError as error:
        raise ImportError("plots need matplotlib: pip install matplotlib, or leave them out (--no-plots)") from error
    folder.mkdir(parents=True, exist_ok=True)
    found = []
    for kind in KINDS:
        shown = [case for case in cases if kind.of(case)]
        if not shown:
            continue
        path = folder / f"{bench}-{kind.stem}.png"
        with style.context("default"):  # the reader's own matplotlibrc must not change what a report looks like
            save(figure(bench, shown, kind), path)
        found.append(path)
    return found


def save(drawn: Any, path: Path) -> None:
    """With a palette: a third of the size, for files that lie in the repository."""
    from PIL import Image  # matplotlib needs it too

    whole = io.BytesIO()
    drawn.savefig(whole, dpi=80)
    Image.open(whole).convert("RGB").quantize(64).save(path, optimize=True)


def figure(bench: str, cases: Sequence[Case], kind: Kind) -> Any:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    panels: dict[str, list[tuple[Place, Case]]] = {}
    for case in cases:
        where = place(case)
        panels.setdefault(where.panel, []).append((where, case))
    columns = min(COLUMNS, len(panels))
    rows = -(-len(panels) // columns)
    found = Figure(figsize=(max(7.5, 3.4 * columns), 1.0 + 2.9 * rows), layout="constrained", facecolor="white")
    FigureCanvasAgg(found)
    found.suptitle(f"{bench}: {kind.title}", x=0.012, ha="left", fontsize=11)
    grid = found.subplots(rows, columns, squeeze=False).ravel()
    # All who take part, so that everybody has one colour in all figures of a bench.
    names = sorted({name for case in cases for name in case.ms}, key=order)
    for axes, (panel, placed) in zip(grid, panels.items(), strict=False):
        fill(axes, panel, placed, kind, names)
    for axes in grid[len(panels) :]:
        axes.remove()
    drawn = {line.get_label(): line for axes in found.axes for line in axes.get_lines()}
    names = [name for name in names if name in drawn]
    found.legend([drawn[name] for name in names], names, loc="outside right upper", frameon=False, fontsize=8)
    return found


def fill(axes: Any, panel: str, placed: list[tuple[Place, Case]], kind: Kind, names: Sequence[str]) -> None:
    """One panel; a contestant's colour is that of its place in `names`, so the same in all of them."""
    sized = all(where.size is not None for where, _ in placed)
    if sized:
        placed = sorted(placed, key=lambda pair: pair[0].size or 0)
    xs = [float(where.size or 1) if sized else float(k) for k, (where, _) in enumerate(placed)]
    for k, name in enumerate(names):
        points = [(x, kind.of(case)[name]) for x, (_, case) in zip(xs, placed, strict=True) if name in kind.of(case)]
        if points:
            ours = name.split(",")[0] == "ours"
            axes.plot(
                *zip(*points, strict=True),
                label=name,
                color="0.45" if is_floor(name) else f"C{k % 10}",
                marker="os^vDPX<>*"[k % 10],
                markersize=6 if ours else 4,
                linewidth=2 if ours else 1,
                linestyle=("-" if sized else "") if not is_floor(name) else ("--" if sized else ""),
            )
    if kind.line is not None:
        axes.axhline(kind.line, color="black", linewidth=0.8, linestyle=":")
    if sized:
        axes.set_xscale("log")
    else:
        axes.set_xlim(-0.5, len(placed) - 0.5)
    if kind.log:
        axes.set_yscale("log")
        plain_numbers(axes.yaxis)
    else:
        axes.set_ylim(0, 1.04 * axes.get_ylim()[1])
    axes.set_xticks(xs, [where.tick for where, _ in placed], rotation=25, ha="right", fontsize=7)
    axes.set_xticks([], minor=True)
    axes.tick_params(axis="y", which="both", labelsize=7)
    axes.set_title(panel, fontsize=8)
    axes.grid(alpha=0.25)


def plain_numbers(axis: Any) -> None:
    """0.5, 1, 2 and 5 rather than powers of ten, of which a panel may show none."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
