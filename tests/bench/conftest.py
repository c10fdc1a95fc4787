"""The benches import each other by name, as pytest lets them when it runs the folder; so do their tests."""

from __future__ import annotations

import fcntl
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "bench"))

import gpu
import report

WANTED = "test_scaled_merge or test_orthogonal_init or test_transition or (test_layer and 32x384x384-bf16) or test_fold"
WANTED += " or (test_product and 1024x384-bf16) or minilm-2x16-fp32 or test_interference or test_weighted_merge"
WANTED += " or host[layer-fp32-forward] or experts[4x64x32-grouped_mm-fp32]"


@pytest.fixture(scope="session")
def measured(tmp_path_factory):
    """pytest-benchmark's file of a small case or more of every bench with three rounds; run once for all processes."""
    folder = tmp_path_factory.getbasetemp()
    folder = (folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder) / "measured"
    folder.mkdir(exist_ok=True)
    path = folder / "bench.json"
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not path.exists():
            command = [sys.executable, "-m", "pytest", "bench", "-q", "-k", WANTED, "--device=cpu", "--model=minilm"]
            command += ["--rounds=3", "--threads=1", f"--benchmark-json={path}", "-p", "no:cacheprovider"]
            command += [f"--lines={path.with_suffix('.jsonl')}"]
            done = subprocess.run(command, cwd=gpu.ROOT, env=gpu.importing_from_here(), capture_output=True, text=True)
            path.with_suffix(".out").write_text(done.stdout)
            if done.returncode:
                path.unlink(missing_ok=True)
            assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    return path


@pytest.fixture
def whole(measured):
    return json.loads(measured.read_text())


@pytest.fixture
def publishable(whole, tmp_path):
    """The same as if it had run without --rounds."""
    whole["machine_info"]["slao_kernels"]["options"]["rounds"] = None
    path = tmp_path / "measured.json"
    path.write_text(json.dumps(whole))
    return path


@pytest.fixture
def repository(tmp_path, monkeypatch):
    """A README with two blocks, and a folder for results, in place of this repository's."""
    readme, folder = tmp_path / "README.md", tmp_path / "results"
    readme.write_text(
        "# A\n<!-- bench:cpu summary -->\n<!-- /bench -->\nb\n<!-- bench:gpu summary -->\n<!-- /bench -->\n"
    )
    monkeypatch.setattr(report, "QUOTING", {readme: "bench/results"})
    monkeypatch.setattr(report, "RESULTS", folder)
    return readme, folder
