"""Fixtures of the tests of `slao`: the module tiny.py, and folders with a saved tiny model or stream."""

from __future__ import annotations

import gc
import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

sys.path.append(str(Path(__file__).parent))  # fuzz_twins, by name


@pytest.fixture(scope="session")
def tiny() -> ModuleType:
    """tests/slao/tiny.py (test folders are no packages, so it cannot be imported by name)."""
    path = Path(__file__).with_name("tiny.py")
    spec = importlib.util.spec_from_file_location("slao_tests_tiny", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def saved_bert(tiny, tmp_path_factory) -> Path:
    return tiny.save("bert", tmp_path_factory.mktemp("models") / "bert")


@pytest.fixture(scope="session")
def saved_llama(tiny, tmp_path_factory) -> Path:
    return tiny.save("llama", tmp_path_factory.mktemp("models") / "llama")


@pytest.fixture(scope="session")
def stream_folder(tiny, tmp_path_factory) -> Path:
    """Two tasks, eight training rows each, for --stream jsonl."""
    return tiny.write_stream(tiny.stream(tasks=2), tmp_path_factory.mktemp("streams") / "tiny")


@pytest.fixture(autouse=True, scope="session")
def _light() -> Iterator[None]:
    """One thread: nothing here is large enough for two, and on a busy machine the second only makes the first wait.
    And what the imports made is never looked at again by the collector, which transformers' Trainer runs once a task.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()
    torch.set_num_threads(before)
