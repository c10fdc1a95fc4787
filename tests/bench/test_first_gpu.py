"""bench/first_gpu.sh without a GPU: every part starts, keeps to its limit, leaves its files; none after the budget."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import gpu
import limits
import parts
import pytest

pytestmark = pytest.mark.skipif(shutil.which("bash") is None, reason="no bash")
NAMED = ["tests", "kernels", "layers", "steps", "rest", "tune"]


def run(out: Path, budget: int, **more: str) -> subprocess.CompletedProcess[str]:
    settings = {"OUT": str(out), "BUDGET": str(budget), "DRY": "1", "PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}
    settings |= more
    env = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")} | settings
    command = ["bash", str(gpu.ROOT / "bench" / "first_gpu.sh")]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=580)


@pytest.mark.exhaustive
def test_a_dry_run(tmp_path):
    """Of one part of each kind; the benches of the others are run in test_gpu_script.py."""
    done = run(tmp_path / "out", 500, PARTS="tests rest tune")
    assert done.returncode == 0, done.stdout + done.stderr + (tmp_path / "out" / "log").read_text()[-4000:]
    found = json.loads((tmp_path / "out" / "gpu.json").read_text())["parts"]
    assert list(found) == ["tests", "rest", "tune"]
    for name, part in found.items():
        (call,) = part["calls"].values()
        assert (call["exit"], "stopped" in call) == (0, False)
        assert call["limit"] == parts.DRY[name][0].seconds
        assert call["seconds"] <= call["limit"] + limits.GRACE
    assert found["tests"]["calls"]["tests/slao_kernels/test_cuda.py"]["skipped"] > 0  # so pytest's report was read
    benches = [bench["name"] for part in found.values() for bench in part["benchmarks"]]
    assert {name.partition("[")[0] for name in benches} == {"test_orthogonal_init", "test_scaled_merge", "test_fold"}
    table = json.loads((tmp_path / "out" / "gpu-tiles.json").read_text())
    assert table["tiles"]
    assert table["gemm"]
    files = {path.name for path in (tmp_path / "out").iterdir()}
    assert files == {"gpu.json", "gpu.jsonl", "gpu-tests.xml", "gpu-tiles.json", "log"}
    last = done.stdout[done.stdout.index("tests: tests/") :].splitlines()
    assert len(last) <= 61


def test_nothing_begins_after_the_budget(tmp_path):
    done = run(tmp_path / "out", 1)
    assert done.returncode == 1
    found = json.loads((tmp_path / "out" / "gpu.json").read_text())["parts"]
    assert list(found) == NAMED
    stopped = [call["stopped"] for part in found.values() for call in part["calls"].values()]
    assert stopped == ["no time was left"] * len(NAMED)
