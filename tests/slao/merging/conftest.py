"""Fixtures of the tests of `slao merge` and `slao fold`."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest


@pytest.fixture(scope="session")
def folds() -> ModuleType:
    """folds.py beside this file (test folders are no packages, so it cannot be imported by name)."""
    spec = importlib.util.spec_from_file_location("folds", Path(__file__).with_name("folds.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
