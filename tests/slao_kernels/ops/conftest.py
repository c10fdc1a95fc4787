"""Lets the tests of one op's backends share helpers, and a fixture that makes unwritten memory show."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))  # on_triton, test_lora_linear


@pytest.fixture
def poisoned() -> Iterator[None]:
    """Every fresh tensor is NaN: what a kernel does not write shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.empty(4).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)
