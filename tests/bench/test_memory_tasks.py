"""26 tasks take the memory of two with SLAO and C-LoRA, with IncLoRA a pair more a task; the bench runs fifty."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import memory_tasks
import pytest

MB = 2**20
TASKS, FURTHER = 26, 24
pytestmark = pytest.mark.exhaustive


@pytest.fixture(scope="module")
def figures() -> dict[str, dict[str, Any]]:
    return {name: memory_tasks.in_a_fresh_process(name, TASKS) for name in ("slao", "clora", "inclora")}


def growth(figures: dict[str, Any], key: str) -> float:
    return figures["last"][key] - figures["first"][key]


@pytest.mark.parametrize("name", ["slao", "clora"])
def test_tensors_and_file_do_not_grow(figures, name):
    """To the byte: every tensor that is alive, between tasks and within one, and the tensors of the saved state."""
    found = figures[name]
    assert [growth(found, key) for key in ("between", "within", "file tensors")] == [0, 0, 0]
    held = {"slao": found["adapter"], "clora": 2 * 4 * 64**2 * 4}[name]  # another A and B; R_old and R_δ of 4 layers
    before = found["before"] + (held if name == "slao" else 0)  # C-LoRA's are there from the start
    assert found["last"]["between"] == before
    # SLAO's file has A, B and the merged B: A stands for its own merge.
    assert found["last"]["file tensors"] == found["adapter"] + (found["adapter"] // 2 if name == "slao" else held)
    # What the header has more are the names and λ (1/√i: up to 20 digits) of the tasks, cosines of none.
    assert 0 < growth(found, "file header") <= 48 * FURTHER
    assert growth(found, "python") <= 200 * 1024  # measured 50 to 75 KiB: free lists of torch, and the tasks' names


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="resident memory is read from /proc")
@pytest.mark.parametrize("name", ["slao", "clora"])
def test_resident_memory_does_not_grow(figures, name):
    """Measured 1 to 5 MiB, which seqlora has too (allocator); further pairs would be 24 MiB."""
    assert growth(figures[name], "rss") <= 12
    assert growth(figures[name], "peak") <= 12


def test_inclora_grows_by_a_pair_a_task(figures):
    found = figures["inclora"]
    assert found["adapter"] == MB
    assert [growth(found, key) / MB for key in ("between", "within", "file tensors")] == [FURTHER] * 3
    assert found["last"]["file tensors"] == TASKS * MB
    if found["last"]["rss"] is not None:
        assert growth(found, "rss") >= FURTHER  # so the bound above can fail


def test_inclora_of_so_many_pairs_does_not_grow_once_it_has_them():
    """Full after its third task: two finished pairs and the one that trains."""
    found = memory_tasks.in_a_fresh_process("inclora:max_pairs=2", 8, first=3)
    assert [growth(found, key) for key in ("between", "within", "file tensors")] == [0, 0, 0]
    assert found["last"]["file tensors"] == 3 * MB
    assert found["last"]["seconds"] > 0
