"""The report of a run, or of several side by side: tables, figures, and one HTML file that begins with the finding."""

from __future__ import annotations

import re
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .. import checkpoint
from .compare import load_all
from .figures import draw
from .finding import title
from .page import page
from .results import load, numbers, parse
from .tables import about, markdown, per_method, table

__all__ = [
    "about",
    "finding_of",
    "load",
    "load_all",
    "markdown",
    "numbers",
    "parse",
    "per_method",
    "table",
    "write_report",
]


def finding_of(results: Mapping[str, Any]) -> str:
    """What the page begins with, one sentence: which method ends highest, above what, and how sure that is."""
    return title(results, parse(results))


def write_report(*run_dirs: str | Path) -> Path:
    """Write the report of the results.json in one folder or more; returns the HTML's path.

    Of one run: report.html, and report/*.svg, in its folder. Of several: compare_<names>.html beside the first one's
    folder. The HTML carries its figures and needs no network. ValueError of one line where a folder has no readable
    results, they lack a key, or runs cannot be compared; ImportError if matplotlib is not installed.
    """
    results = load_all(run_dirs)
    methods = parse(results)
    plots = draw(results, methods)
    first = Path(run_dirs[0])
    path = first / "report.html"
    if len(run_dirs) > 1:
        path = first.resolve().parent / f"compare_{_file_name(list(results['runs']))}.html"
    else:
        (first / "report").mkdir(exist_ok=True)
        for plot in plots:
            plot.write(first / "report")
    text = page(results, methods, plots)
    checkpoint.write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))
    return path


def _file_name(runs: list[str]) -> str:
    """Of these runs alone: where a name cannot stand as it is, or they are too long together, with a checksum."""
    plain = "_".join(re.sub(r"[^A-Za-z0-9.=+,-]+", "_", name) for name in runs)[:120]
    return plain if plain == "_".join(runs) else f"{plain}_{zlib.crc32(repr(runs).encode()):08x}"
