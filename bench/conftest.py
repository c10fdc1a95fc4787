"""Options of the benches, and their table: `pytest bench/bench_fold.py --device cpu --model llama-3-8b`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))  # shapes, race


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda")
    parser.addoption("--model", default="llama-3-8b", help="geometry, see bench/shapes.py")
    parser.addoption("--threads", default=None, type=int, help="CPU threads (default: torch's)")
    parser.addoption("--best-of", default=1, type=int, help="repeat the races against a frozen base, take the best")
    parser.addoption("--compile", action="store_true", help="lora_linear: PEFT under torch.compile too (slow to start)")


@pytest.fixture
def device(request: pytest.FixtureRequest) -> str:
    threads = request.config.getoption("--threads")
    if threads:
        torch.set_num_threads(threads)
    return str(request.config.getoption("--device"))


@pytest.fixture
def layers(request: pytest.FixtureRequest) -> list[tuple[int, int]]:
    """(out_features, in_features) of every linear layer of the chosen model."""
    from shapes import GEOMETRIES

    return GEOMETRIES[request.config.getoption("--model")].all_layers()


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    session = getattr(config, "_benchmarksession", None)
    against_frozen = []
    for bench in getattr(session, "benchmarks", []):
        info = bench.extra_info
        if "frozen ms" in info:
            against_frozen.append((bench.name, info))
            continue
        cells = [f"ours {info['ours_ms']:.2f} ms"]
        for key, value in info.items():
            if key.endswith(" / ours"):
                peer = key.removesuffix(" / ours")
                cells.append(f"{peer} {info[f'{peer} ms']:.2f} ms = {value:.2f}x")
        terminalreporter.write_line(f"{bench.name}: " + ", ".join(cells))
    for line in frozen_table(against_frozen):
        terminalreporter.write_line(line)


def frozen_table(rows: list[tuple[str, dict[str, Any]]]) -> list[str]:
    """Lines of benches against a frozen base: a contestant's ms and its ratio to frozen, then other figures of ours."""
    tables: dict[tuple[str, ...], list[list[str]]] = {}
    for name, info in rows:
        cells = {"ms (x frozen)": name}
        for key, value in info.items():
            peer = key.removesuffix(" ms")
            if key == "frozen ms":
                cells[peer] = f"{value:.3f}"
            elif peer != key:
                cells[peer] = f"{value:.3f} ({info[f'{peer} / frozen']:.2f})"
            elif key.startswith("ours") and not key.endswith(("_ms", " / frozen")):
                cells[key] = f"{value:.2f}"
        tables.setdefault(tuple(cells), []).append(list(cells.values()))
    lines: list[str] = []
    for head, body in tables.items():
        widths = [max(map(len, column)) for column in zip(head, *body, strict=True)]
        for row in (head, *body):
            first, *rest = (cell.rjust(width) for cell, width in zip(row, widths, strict=True))
            lines.append("  ".join([row[0].ljust(len(first)), *rest]))
    return lines
