"""What ends with a lost GPU, by a stand-in for torch's wait: a worker, or the session; and nothing with less."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

CONFTEST = f"""
import sys
import types

errors = []  # of the next waits; the last one stays

def synchronize():
    if errors:
        raise RuntimeError(errors.pop(0) if len(errors) > 1 or errors[0] == "once" else errors[0])

torch = sys.modules["torch"] = types.ModuleType("torch")  # torch itself takes seconds in every process
torch.cuda = types.SimpleNamespace(is_available=lambda: True, synchronize=synchronize, errors=errors)
sys.path.insert(0, {str(Path(__file__).parent)!r})
from accelerator import _wait_for_the_accelerator
"""

TESTS = """
import pytest
import torch

def test_first():
    torch.cuda.errors.append("not a GPU's test: nobody waits")
    torch.cuda.errors.clear()

@pytest.mark.gpu
def test_fails_alone():
    torch.cuda.errors.append("once")

@pytest.mark.gpu
def test_loses_the_device():
    torch.cuda.errors.append("CUDA error: an illegal memory access")

@pytest.mark.gpu
def test_after():
    torch.cuda.synchronize()
"""


def outcomes(folder: Path, *options: str) -> tuple[int, dict[str, str], str]:
    """(exit status, test -> passed, failure or error, output) of those tests in a process of their own."""
    (folder / "conftest.py").write_text(CONFTEST)
    (folder / "test_four.py").write_text(TESTS)
    report = folder / "report.xml"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={report}", *options]
    env = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    done = subprocess.run([*command, str(folder)], cwd=folder, env=env, capture_output=True, text=True, timeout=200)
    found: dict[str, str] = {}
    for case in ElementTree.parse(report).getroot().iter("testcase"):
        kinds = [child.tag for child in case if child.tag in ("failure", "error")]
        found[str(case.get("name"))] = kinds[0] if kinds else found.get(str(case.get("name")), "passed")
    return done.returncode, found, done.stdout + done.stderr


def test_a_session_of_one_process_ends_with_its_files(tmp_path):
    status, found, output = outcomes(tmp_path)
    assert status == 3
    assert "test_loses_the_device: CUDA error: an illegal memory access: the device is lost" in output
    assert found.pop("test_fails_alone") == "error"
    assert found.pop("test_first") == "passed"
    assert "test_after" not in found


@pytest.mark.skipif(importlib.util.find_spec("xdist") is None, reason="pytest-xdist is not installed")
def test_a_worker_is_replaced_and_the_others_go_on(tmp_path):
    status, found, output = outcomes(tmp_path, "-n", "1")
    assert status == 1
    assert found["test_first"] == found["test_after"] == "passed", output
    assert found["test_fails_alone"] == "error"
    assert found["test_loses_the_device"] in ("failure", "error")
