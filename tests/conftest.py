"""What every test sees: fixed seeds, one thread, no hub, and a GPU marker that skips with its reason.

SLAO_SHARE=K/N: of the exhaustive tests the K-th of N parts alone, chosen by their names: .ci/run takes another one with
each commit.
"""

from __future__ import annotations

import importlib.util
import os
import zlib
from pathlib import Path
from types import ModuleType

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # a test that needs the network is a mistake; fail at once
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch

torch.set_num_threads(1)  # tiny tensors: a second thread only waits (a whole file took 64 s with two, 7 s with one)


def _share() -> tuple[int, int]:
    """(K, N)."""
    given = os.environ.get("SLAO_SHARE", "0/1")
    part, _, parts = given.partition("/")
    if not (part.isdigit() and parts.isdigit() and int(part) < int(parts)):
        raise pytest.UsageError(f"SLAO_SHARE must be K/N with 0 <= K < N, not {given!r}")
    return int(part), int(parts)


def pytest_report_header() -> str:
    part, parts = _share()
    return f"exhaustive tests: {'all' if parts == 1 else f'part {part} of {parts} (SLAO_SHARE)'}"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    part, parts = _share()
    others = [
        item
        for item in items
        if item.get_closest_marker("exhaustive") and zlib.crc32(item.nodeid.encode()) % parts != part
    ]
    if others:
        config.hook.pytest_deselected(items=others)
        left = set(map(id, others))
        items[:] = [item for item in items if id(item) not in left]
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="no CUDA or ROCm device here")
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(skip)


@pytest.fixture(autouse=True)
def _fixed_seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def tiny() -> ModuleType:
    """tests/slao/tiny.py (test folders are no packages, so it cannot be imported by name)."""
    path = Path(__file__).with_name("slao") / "tiny.py"
    spec = importlib.util.spec_from_file_location("slao_tests_tiny", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
