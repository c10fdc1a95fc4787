"""bench/gpu.py where there is no GPU: what it says, what it would record, and how it reads pytest's reports."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from datetime import datetime, timedelta, timezone
from pathlib import Path

import gpu
import pytest
import torch

from slao_kernels import dispatch

HIDDEN = {"CUDA_VISIBLE_DEVICES": "", "HIP_VISIBLE_DEVICES": "", "ROCR_VISIBLE_DEVICES": ""}


def script(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(gpu.ROOT / "bench" / "gpu.py"), *arguments]
    return subprocess.run(command, env=os.environ | HIDDEN | environment, capture_output=True, text=True, timeout=120)


def test_without_a_gpu_it_is_one_line_and_status_2(tmp_path):
    out = tmp_path / "gpu.json"
    done = script("--out", str(out), "--", "-x")
    assert done.returncode == 2
    assert done.stdout == ""
    assert re.fullmatch(
        rf"make gpu: no CUDA or ROCm device here \(torch {re.escape(torch.__version__)}.*\)\n", done.stderr
    )
    assert not out.exists()


def test_an_unknown_part_is_named():
    done = script("step")
    assert done.returncode == 2
    assert done.stderr == "make gpu: unknown part step; choose from tests, layers, steps, rest\n"


def test_a_look_costs_nothing(tmp_path):
    """Before anything is installed: no package of this environment, nor torch, is read, and it is over at once."""
    bare = {"PATH": str(tmp_path)}  # no nvidia-smi
    command = [sys.executable, "-I", "-S", str(gpu.ROOT / "bench" / "gpu.py")]
    done = subprocess.run([*command, "--look"], env=bare, capture_output=True, text=True, timeout=60)
    if any(Path(file).exists() for file in gpu.DEVICE_FILES):
        assert (done.returncode, done.stderr) == (0, "")
    else:
        assert done.returncode == 2
        assert re.fullmatch(r"make gpu: no CUDA or ROCm device here \(no driver of one: .*\)\n", done.stderr)
    done = subprocess.run([*command, "step", "--look"], env=bare, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert done.stderr == "make gpu: unknown part step; choose from tests, layers, steps, rest\n"


@pytest.mark.skipif(shutil.which("make") is None, reason="no make")
def test_make_gpu_without_a_gpu_installs_nothing(tmp_path):
    if gpu.why_never([]) is None:
        pytest.skip("there is a GPU's driver here")
    command = ["make", "gpu", f"VENV={tmp_path / 'venv'}", f"PYTHON={sys.executable}"]
    # As in a shell of its own: a make around these tests would have its directory printed.
    env = {name: value for name, value in os.environ.items() if name not in ("MAKEFLAGS", "MFLAGS", "MAKELEVEL")}
    done = subprocess.run(command, cwd=gpu.ROOT, env=env, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (2, "")
    said, make = done.stderr.splitlines()  # make has a line of its own for whatever fails
    assert said.startswith("make gpu: no CUDA or ROCm device here")
    assert make.startswith("make: ***")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("sign", ["a device file", "nvidia-smi"])
def test_a_look_finds_a_driver(sign, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(gpu, "DEVICE_FILES", (str(tmp_path / "kfd"),))
    assert gpu.main(["--look"]) == 2
    program = tmp_path / ("kfd" if sign == "a device file" else "nvidia-smi")
    program.write_text("#!/bin/sh\nexit 0\n")
    program.chmod(0o755)
    capsys.readouterr()
    assert gpu.main(["--look"]) == 0
    assert capsys.readouterr() == ("", "")


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setitem(gpu.NEEDED, "layers", ("peft",))
    monkeypatch.setitem(gpu.NEEDED, "steps", ("peft", "no_such_package"))
    assert gpu.why_not(["layers"]) is None
    assert "no_such_package not installed" in gpu.why_not(["layers", "steps"])


def test_every_bench_belongs_to_a_part():
    """A bench that is written later has to be put into one."""
    called = {Path(call[0]).name for calls in gpu.PARTS.values() for call in calls} - {"tests"}
    assert called == {path.name for path in (gpu.ROOT / "bench").glob("bench_*.py")}


def test_environment():
    found = gpu.environment()
    assert found["versions"]["torch"] == torch.__version__
    assert set(found["versions"]) == set(gpu.PACKAGES)
    assert found["versions"]["pytest-benchmark"] is not None
    assert abs(datetime.fromisoformat(found["date"]) - datetime.now(timezone.utc)) < timedelta(minutes=1)
    assert (found["device"] is None) == (not torch.cuda.is_available())
    if gpu.git("rev-parse", "HEAD") is not None:  # not so in an unpacked archive
        assert re.fullmatch("[0-9a-f]{40}", found["commit"])
        assert found["changed since"] in (True, False)
    assert gpu.environment("abc")["commit"] == "abc"
    json.dumps(found)


def test_the_card_is_read_and_left_alone(tmp_path, monkeypatch):
    """Through a program of that name which answers as the real one does, and writes down what it was asked."""
    asked = tmp_path / "asked"
    program = tmp_path / "nvidia-smi"
    answer = "580.159.04, 345 MHz, 2619 MHz, 1980 MHz, 2619 MHz, 700.00 W, 31, Enabled, 0 %"
    program.write_text(f'#!/bin/sh\necho "$@" > {asked}\necho "{answer}"\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    found = gpu.card()
    assert len(found) == len(gpu.ASKED)
    assert found["driver_version"] == "580.159.04"
    assert found["clocks.sm"] == "345 MHz"
    assert found["utilization.gpu"] == "0 %"
    assert asked.read_text().split() == ["--id=0", f"--query-gpu={','.join(gpu.ASKED)}", "--format=csv,noheader"]
    program.write_text("#!/bin/sh\nexit 9\n")
    assert gpu.card() is None


THREE = """
import pytest

def test_good():
    pass

def test_bad():
    assert False

@pytest.mark.skip(reason="for the count")
def test_left_out():
    pass
"""


def test_a_part_is_run_and_written(tmp_path, monkeypatch):
    """pytest's counts and the environment, into a file that keeps the other parts."""
    (tmp_path / "test_three.py").write_text(THREE)
    monkeypatch.setitem(gpu.PARTS, "tests", [[str(tmp_path / "test_three.py")]])
    out = tmp_path / "deep" / "gpu.json"
    found = {"parts": {"steps": {"exit": 0}}}
    assert gpu.run("tests", found, out, "abc", ["-q", "-p", "no:cacheprovider"]) == 1
    written = json.loads(out.read_text())
    assert written["parts"]["steps"] == {"exit": 0}
    part = written["parts"]["tests"]
    assert (part["exit"], part["environment"]["commit"]) == (1, "abc")
    (call,) = part["calls"].values()
    assert (call["passed"], call["failed"], call["skipped"], call["failures"]) == (1, 1, 1, ["test_bad"])
    assert call["seconds"] > 0
    assert [path.name for path in out.parent.iterdir()] == ["gpu.json"]


@pytest.mark.slow
def test_benches_run_and_their_figures_are_read(tmp_path):
    """One small case of each bench on the CPU: none has rotted, and what gpu.py keeps of them is there."""
    figures = tmp_path / "figures.json"
    wanted = "minilm-2x16-bf16 or (test_layer and 32x384x384-bf16) or shrink-1024x384-bf16-16 or grad_t-1024x384-fp32-8"
    wanted += " or test_fold or test_transition or (test_scaled_merge and fp32) or (test_orthogonal_init and 16)"
    wanted += " or test_interference or test_weighted_merge"
    command = [sys.executable, "-m", "pytest", "bench", "-q", "-k", wanted, "--device=cpu", "--model=minilm"]
    command += ["--rounds=1", "--threads=1", f"--benchmark-json={figures}", "-p", "no:cacheprovider"]
    done = subprocess.run(command, cwd=gpu.ROOT, env=gpu.importing_from_here(), capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    listed, how = gpu.benchmarks(figures)
    assert how["options"] == {"model": "minilm", "rounds": 1, "threads": 1, "best-of": 1, "compile": False}
    assert how["versions"]["torch"] == torch.__version__
    assert set(how["backends"]) == set(dispatch.OPS)
    found = {bench["name"]: bench for bench in listed}
    core = dispatch.why_not("lora_linear", "native", "cpu") is None  # without it nothing of bench_lora_kernels runs
    assert len({name.partition("[")[0] for name in found}) == 8 + core
    assert all(bench["lap_s"] > 0 and bench["extra_info"] for bench in found.values())
    step = found["test_step[minilm-2x16-bf16]"]["extra_info"]
    assert step["ours share"] == (step["ours ms"] - step["frozen ms"]) / (step["PEFT ms"] - step["frozen ms"])
    if core:
        (row,) = found["test_product[shrink-1024x384-bf16-16]"]["extra_info"]["rows"]
        assert row["us"] > 0
        assert row["% roof"] == pytest.approx(max(row["% copy"], row["% GEMM"]))
        assert "% roof" in done.stdout
