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
    for bench in getattr(session, "benchmarks", []):
        info = bench.extra_info
        cells = [f"ours {info['ours_ms']:.2f} ms"]
        for key, value in info.items():
            if key.endswith(" / ours"):
                peer = key.removesuffix(" / ours")
                cells.append(f"{peer} {info[f'{peer} ms']:.2f} ms = {value:.2f}x")
        terminalreporter.write_line(f"{bench.name}: " + ", ".join(cells))
