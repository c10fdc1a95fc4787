"""What the tests of one op's backends share."""

from __future__ import annotations

import importlib.util
import os
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))  # on_triton, test_lora_linear


@pytest.hookimpl(tryfirst=True)  # before -m is looked at
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Under Triton's slow interpreter a sixth of each test's cases is not exhaustive, of an init's a twelfth."""
    seen: set[tuple[str, str]] = set()
    here = [item for item in items if item.path.parent == Path(__file__).parent]
    for item in here if os.environ.get("TRITON_INTERPRET") == "1" else []:
        test = str(item.path), item.name.partition("[")[0]
        share = 12 if item.path.stem == "test_orthogonal_init" else 6
        if test in seen and zlib.crc32(item.name.encode()) % share:
            item.add_marker(pytest.mark.exhaustive)
        seen.add(test)


@pytest.fixture
def ops(request: pytest.FixtureRequest) -> Any:
    """Where the ops on lists run; see on_lists.py, whose `at` chooses."""
    place = request.param
    if str(place) == "emulated":
        place.core = request.getfixturevalue("emulated")
    elif (missing := place.why_not()) is not None:
        pytest.skip(missing)
    return place


@pytest.fixture
def poisoned() -> Iterator[None]:
    """Every fresh tensor is NaN: what a kernel does not write shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.empty(4).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def fresh_tables() -> Iterator[None]:
    """What is remembered of the devices' tables is forgotten, before and after."""
    from slao_kernels.ops.lora_linear import tiles

    remembered = [tiles.rows, tiles.find]
    if importlib.util.find_spec("triton"):
        from slao_kernels.ops.lora_linear import gemm

        remembered.append(gemm.chosen)
    for function in remembered:
        function.cache_clear()
    yield
    for function in remembered:
        function.cache_clear()


@pytest.fixture
def gemm_runs(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The layout of each product that the GEMM with the rank-r term computes."""
    from slao_kernels.ops.lora_linear import gemm

    seen, run = [], gemm.run

    def watched(tile, out, P, Q, T, S, alpha, bias=None):
        seen.append(gemm.layout_of(out, P, Q, T, S, bias))
        run(tile, out, P, Q, T, S, alpha, bias)

    monkeypatch.setattr(gemm, "run", watched)
    return seen
