"""Half the time of a tiny run goes into the layout and the pixels of its figures."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from matplotlib.figure import Figure

drawn = Figure.savefig


def savefig(figure: Any, *args: Any, **kwargs: Any) -> None:
    """As matplotlib's, laid out as it comes and with few pixels."""
    figure.set_layout_engine("none")
    drawn(figure, *args, **kwargs | {"dpi": 50})


def figures(put: Callable[[Any, str, Any], object] = setattr) -> None:
    """From now on figures are drawn so; put: pytest's monkeypatch.setattr, say."""
    put(Figure, "savefig", savefig)
