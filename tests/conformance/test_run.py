"""The conformance runner on a suite of four tests: it finds what patch breaks, and fails where nothing ran fused."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

RUN = Path(__file__).with_name("run.py")
HEAD = """
import peft, pytest, torch
from peft.tuners.lora.layer import Linear
from torch import nn

def net(**options):
    config = peft.LoraConfig(target_modules=["0"], **options)
    return peft.get_peft_model(nn.Sequential(nn.Linear(4, 3)), config)
"""
TESTS = """
@pytest.mark.parametrize("config_cls", [peft.LoraConfig, peft.IA3Config])
def test_parametrized(config_cls):
    assert config_cls is peft.LoraConfig, "other methods' tests are left out"

def test_twice():
    model = net()
    model(torch.ones(2, 4)) + model(torch.ones(2, 4))

def test_fails_anyway():
    raise OSError("Couldn't reach the Hub")

def test_breaks():
    assert all(type(m) is Linear for m in net().modules() if hasattr(m, "lora_A"))
"""


@pytest.fixture(scope="module")
def main():
    spec = importlib.util.spec_from_file_location("conformance_run", RUN)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main


@pytest.mark.exhaustive
def test_runner(tmp_path, main, capsys):
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "test_small.py").write_text(HEAD + TESTS)
    out = tmp_path / "out"
    arguments = [str(tmp_path), "--workers", "0", "--out", str(out)]
    assert main(arguments) == 1
    summary = json.loads((out / "summary.json").read_text())
    assert summary["plain"] == {"passed": 3, "failed": 1}
    assert summary["patched"] == {"passed": 2, "failed": 2}
    assert summary["fused"] == {"tests": 1, "forwards": 2, "tests by file": {"test_small.py": 1}}
    assert summary["tests with a patched layer"] == 2
    assert summary["waiting for the hub"] == {"test_small.py": 1}
    assert list(summary["broken"]) == ["tests/test_small.py::test_breaks"]
    assert "BROKEN tests/test_small.py::test_breaks" in capsys.readouterr().out

    # The same results without that test: a run left out is read from its file.
    results = {run: json.loads((out / f"{run}.json").read_text()) for run in ("plain", "patched")}

    def again() -> int:
        for run, result in results.items():
            (out / f"{run}.json").write_text(json.dumps(result))
        return main([*arguments, "--runs"])

    for result in results.values():
        del result["tests"]["tests/test_small.py::test_breaks"]
    assert again() == 0
    # Nothing ran fused: nothing was tested.
    results["patched"]["tests"]["tests/test_small.py::test_twice"][2] = 0
    assert again() == 1
    assert "no test ran a fused layer" in capsys.readouterr().out
    # A test that is in the plain run only.
    results["patched"]["tests"]["tests/test_small.py::test_twice"][2] = 2
    del results["patched"]["tests"]["tests/test_small.py::test_parametrized[LoraConfig]"]
    assert again() == 1
    assert "missing" in capsys.readouterr().out


def test_runner_without_a_checkout(tmp_path):
    done = subprocess.run([sys.executable, str(RUN), str(tmp_path)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert "has no tests folder; name a checkout of PEFT's repository" in done.stderr
