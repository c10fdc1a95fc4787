"""The module lab.py as a fixture."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # the modules beside this one


@pytest.fixture(scope="session")
def lab() -> ModuleType:
    """tests/slao/methods/lab.py (test folders are no packages, so it cannot be imported by name)."""
    spec = importlib.util.spec_from_file_location("slao_tests_lab", Path(__file__).with_name("lab.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
