"""What all figures of a report share: their look in light and dark, and how they become SVG files."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import Any, ParamSpec, TypeVar
from urllib.parse import quote

import numpy as np

from .. import checkpoint
from .results import Method

_P = ParamSpec("_P")
_R = TypeVar("_R")
INK, SOFT, GRID, CARD = "#1c1e21", "#5b6169", "#d9dce0", "#ffffff"
COLOURS = ("#0072b2", "#c74e00", "#00805c", "#a8508a", "#8a6100", "#6a4fb3", "#4a4f57")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
# The same in the dark, each at least 3 to 1 against its background, as the light ones are against theirs.
DARK = {
    INK: "#e6e8eb", SOFT: "#a3aab3", GRID: "#363b42", CARD: "#1e2125",
    **dict(zip(COLOURS, ("#56b4e9", "#f08a3c", "#3ccfa0", "#e29ac6", "#e6b84a", "#b3a0f0", "#c0c5cc"), strict=True)),
}  # fmt: skip
STYLE = {
    "font.size": 10,
    "font.sans-serif": ["DejaVu Sans"],
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.facecolor": "none",
    "axes.edgecolor": SOFT,
    "axes.labelcolor": INK,
    "axes.titlecolor": SOFT,
    "text.color": INK,
    "xtick.color": SOFT,
    "ytick.color": SOFT,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "figure.facecolor": CARD,
    "grid.color": GRID,
    "svg.fonttype": "none",  # texts stay texts: small, sharp, and found by a search
    "svg.hashsalt": "slao",  # the same results give the same bytes
}
WIDTH = 5.2  # inches; two stand side by side on a wide page, and one still reads on a telephone


@dataclass(frozen=True)
class Plot:
    """One figure. alt: what it shows, with its numbers. caption: how it is read."""

    name: str
    title: str
    caption: str
    alt: str
    svg: str

    @property
    def address(self) -> str:
        """As a data URL, fit for an HTML attribute: nine tenths of its length in base64."""
        return "data:image/svg+xml," + quote(self.svg.strip(), safe=" <>=:;,'()!@*+?[]{}|")

    def write(self, folder: Path) -> None:
        """As folder/name.svg, atomically."""
        path = folder / f"{self.name}.svg"
        checkpoint.write_atomically(path, lambda temporary: temporary.write_text(self.svg, encoding="utf-8"))


def styled(draw: Callable[_P, _R]) -> Callable[_P, _R]:
    """`draw` in the look of a report, whatever the reader's own matplotlibrc says. ImportError without matplotlib."""

    @wraps(draw)
    def drawn(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        try:
            from matplotlib import style
        except ImportError as error:
            raise ImportError("the report needs matplotlib: pip install 'slao_kernels[train]'") from error
        with style.context(["default", STYLE]):
            return draw(*args, **kwargs)

    return drawn


def new_figure(height: float) -> Any:
    """An empty figure, WIDTH × `height` inches."""
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    FigureCanvasSVG(figure)
    return figure


def to_svg(figure: Any) -> str:
    """An SVG document of one line, which needs nothing from elsewhere and takes the reader's font and colours."""
    buffer = io.StringIO()
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    figure.savefig(buffer, format="svg", metadata=nothing)
    text = re.sub(r"<\?xml.*?\?>|<!DOCTYPE.*?>|<metadata>.*?</metadata>|<!--.*?-->", "", buffer.getvalue(), flags=re.S)
    text = re.sub(r"<[^>]*>", lambda tag: _shorter(tag[0]), text)
    text = re.sub(r"\s+", " ", text).replace("> <", "><").strip()
    return text.replace("<defs>", f"<style>{_colours(text)}</style><defs>", 1) + "\n"


def _shorter(tag: str) -> str:
    """A tag of matplotlib's without a group's name, a turn by zero, and thousandths of a point."""
    tag = re.sub(r'(?<=<g) id="[^"]*"| transform="rotate\(-?0 [^"]*"', "", tag)
    return re.sub(r"\d+\.\d{3,}", lambda found: f"{float(found[0]):.2f}", tag)


def _colours(text: str) -> str:
    """The style sheet of an SVG: each of its colours as it is in the dark."""
    rules = "".join(
        f'[style*="{part}: {light}"]{{{part}:{dark} !important}}'
        for light, dark in DARK.items()
        for part in ("fill", "stroke")
        if f"{part}: {light}" in text
    )
    return (
        f"text{{font-family:system-ui,sans-serif !important}}@media screen and (prefers-color-scheme:dark){{{rules}}}"
    )


def label(text: str, limit: int = 26) -> str:
    """Text for a figure: one line, at most `limit` characters (what is cut is near the end), never maths."""
    text = " ".join(text.split())
    if len(text) > limit:
        tail = limit // 3
        text = f"{text[: limit - tail - 1]}…{text[-tail:]}"
    return text.replace("$", r"\$")


def looks(methods: Sequence[Method]) -> list[dict[str, Any]]:
    """How each method's line is drawn: a colour and a marker for what it is called, dashes for the run that it is of
    (and for the eighth and later, as there are seven colours)."""
    labels, runs = (
        {name: k for k, name in enumerate(dict.fromkeys(x))}
        for x in zip(*((m.label, m.run) for m in methods), strict=True)
    )
    rounds = 1 + (len(labels) - 1) // len(COLOURS)
    found = []
    for method in methods:
        index = labels[method.label]
        way = runs[method.run] * rounds + index // len(COLOURS)
        style = {"color": COLOURS[index % len(COLOURS)], "marker": MARKERS[index % len(MARKERS)], "markersize": 4}
        style |= {"linestyle": ("-", "--", ":", "-.")[way % 4], "fillstyle": ("full", "none", "left", "right")[way % 4]}
        found.append(style)
    return found


def legend(figure: Any, *panels: Any) -> None:
    """Below the panels, where it cannot cover a line: what is drawn in them by name, if that is more than one. What
    several panels have stands there once."""
    handles: list[Any] = []
    names: list[str] = []
    for axes in panels:
        there = set(names)  # not of this panel: two of one panel may be cut to the same name
        for handle, name in zip(*axes.get_legend_handles_labels(), strict=True):
            if name not in there:
                handles.append(handle)
                names.append(name)
    if len(names) > 1:
        columns = 3 if max(map(len, names)) < 14 else 2
        figure.legend(handles, names, loc="outside lower left", ncols=columns, frameon=False, fontsize=9)
        rows = -(-len(names) // columns)
        figure.set_figheight(figure.get_figheight() + 0.2 * rows)


def runs_of(methods: Sequence[Method]) -> str:
    """Of how many runs the points of a figure are, after the name of the only method, which no legend says."""
    counts = {len(m.seeds) for m in methods}
    text = "mean over runs"
    if len(counts) == 1:
        text = "one run" if counts == {1} else f"mean over {counts.pop()} runs"
    return f"{label(methods[0].name)}, {text}" if len(methods) == 1 else text


def spread(values: np.ndarray) -> np.ndarray:
    """Sample standard deviation over runs (axis 0); zero for one run."""
    return values.std(axis=0, ddof=1) if len(values) > 1 else np.zeros(values.shape[1:])


def plus_minus(values: np.ndarray, digits: int) -> str:
    """ "0.753 ± 0.021" of the finite values of several runs, without ± of one, "no value" of none."""
    values = values[np.isfinite(values)]
    if not len(values):
        return "no value"
    return f"{values.mean():,.{digits}f}" + (f" ± {values.std(ddof=1):,.{digits}f}" if len(values) > 1 else "")
