"""Fixtures of the tests of `slao_kernels`: the module twins.py, one thread for tiny models, and what was logged."""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch


@pytest.fixture(scope="session")
def twins() -> ModuleType:
    """tests/slao_kernels/twins.py (test folders are no packages, so it cannot be imported by name)."""
    path = Path(__file__).with_name("twins.py")
    spec = importlib.util.spec_from_file_location("slao_kernels_tests_twins", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Nothing tiny is large enough for two threads: on a busy machine the second one only makes the first wait."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def told(caplog) -> Callable[[], list[str]]:
    """What slao_kernels has logged in this test, as if no reason had been logged before."""
    from slao_kernels import layers

    layers._logged.clear()
    caplog.set_level(logging.WARNING, logger="slao_kernels")
    return lambda: [record.getMessage() for record in caplog.records if record.name == "slao_kernels"]
