"""bench/gpu.py where there is no GPU: what it says, what it would record, and how it reads pytest's reports."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
from datetime import datetime, timedelta, timezone
from pathlib import Path

import environment
import gpu
import limits
import parts
import pytest
import reports
import torch

from slao_kernels import dispatch, native

HIDDEN = {"CUDA_VISIBLE_DEVICES": "", "HIP_VISIBLE_DEVICES": "", "ROCR_VISIBLE_DEVICES": ""}


def script(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(gpu.ROOT / "bench" / "gpu.py"), *arguments]
    return subprocess.run(command, env=os.environ | HIDDEN | variables, capture_output=True, text=True, timeout=120)


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
    assert done.stderr == f"make gpu: unknown part step; choose from {', '.join(parts.WHOLE)}\n"


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
    assert done.stderr == f"make gpu: unknown part step; choose from {', '.join(parts.WHOLE)}\n"


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


def test_a_part_that_lacks_a_package_is_left_out_and_said(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setitem(gpu.NEEDED, "layers", ("peft",))
    monkeypatch.setitem(gpu.NEEDED, "steps", ("peft", "no_such_package"))
    assert gpu.why_not(["layers", "steps"]) is None
    assert "no_such_package not installed" in gpu.why_not(["steps"])
    run = []
    monkeypatch.setattr(gpu.Run, "part", lambda self, name, calls: run.append(name))
    assert gpu.main(["layers", "steps", "--out", str(tmp_path / "gpu.json")]) == 1
    assert run == ["layers"]
    assert "steps: left out, no_such_package not installed" in capsys.readouterr().out


@pytest.mark.parametrize("missing", ["the extension was not built", "the extension was built without CUDA"])
def test_what_runs_the_cuda_kernels_is_refused_without_them(missing, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(native, "why_not", lambda device: missing if device == "cuda" else None)
    assert gpu.main(["layers", "tests", "rest"]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith(f"make gpu: {missing}, and tests, rest would not run it: `python setup.py build_ext")
    assert said.err.count("\n") == 1
    assert gpu.why_not(["kernels", "layers", "steps", "host"]) is None
    assert gpu.why_not(["tests"], without_core=True) is None
    monkeypatch.setattr(torch.version, "hip", "6.4")  # Triton's kernels serve there
    assert gpu.why_not(["tests", "rest"]) is None
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(native, "why_not", lambda device: None)
    assert gpu.why_not(["tests", "rest"]) is None


def test_every_bench_belongs_to_a_part():
    """A bench that is written later has to be put into one."""
    words = [word for calls in parts.WHOLE.values() for call in calls for word in call.words]
    called = {Path(word).name for word in words if word.startswith("bench/bench_")}
    assert called == {path.name for path in (gpu.ROOT / "bench").glob("bench_*.py")}


def test_every_way_has_every_part():
    assert list(parts.QUICK) == list(parts.DRY) == list(parts.WHOLE)
    assert set(parts.NEEDED) == set(parts.WHOLE)
    assert set(parts.OF_THE_CORE) | set(parts.ON_REQUEST) < set(parts.WHOLE)
    for call in (call for way in (parts.WHOLE, parts.QUICK, parts.DRY) for calls in way.values() for call in calls):
        named = [word.partition("::")[0] for word in call.words if word.startswith(("bench/", "tests"))]
        assert all((gpu.ROOT / word).exists() for word in named)
        assert "-n" not in call.words  # gpu.py adds it, to tests alone


def test_a_quick_run_fits_into_eight_minutes():
    """Those that bench/first_gpu.sh names; a build and the tuner's own way to an end come on top."""
    named = (gpu.ROOT / "bench" / "first_gpu.sh").read_text()
    (listed,) = re.findall(r"PARTS:=(.*?)}", named)
    assert sum(call.seconds for part in listed.split() for call in parts.QUICK[part]) <= 480


def test_tests_run_in_several_processes_and_benches_never(tmp_path, monkeypatch):
    monkeypatch.setattr(parts.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(os, "cpu_count", lambda: 16)
    run = gpu.Run(tmp_path / "gpu.json", None, None, None, ["-x"])
    commands = {part: run._command(parts.QUICK[part][0], Path("r.xml"), Path("l.jsonl")) for part in parts.QUICK}
    assert commands["tests"][-4:] == ["--junitxml=r.xml", "-n", "12", "-x"]
    assert all("-n" not in command for part, command in commands.items() if part != "tests")
    assert commands["kernels"][-3:] == ["--device=cuda", "--lines=l.jsonl", "-x"]
    assert commands["host"][-3] == "--device=cpu"
    assert commands["tune"][1:4] == ["bench/tune_lora_gemm.py", "--device-json", str(tmp_path / "gpu-tiles.json")]
    monkeypatch.setattr(parts.importlib.util, "find_spec", lambda name: None)
    assert parts.workers() == []


def test_environment():
    found = environment.environment()
    assert found["versions"]["torch"] == torch.__version__
    assert set(found["versions"]) == set(environment.PACKAGES)
    assert found["versions"]["pytest-benchmark"] is not None
    assert abs(datetime.fromisoformat(found["date"]) - datetime.now(timezone.utc)) < timedelta(minutes=1)
    assert (found["device"] is None) == (not torch.cuda.is_available())
    if environment.git("rev-parse", "HEAD") is not None:  # not so in an unpacked archive
        assert re.fullmatch("[0-9a-f]{40}", found["commit"])
        assert found["changed since"] in (True, False)
    assert environment.environment("abc")["commit"] == "abc"
    json.dumps(found)


def test_the_card_is_read_and_left_alone(tmp_path, monkeypatch):
    """Through a program of that name which answers as the real one does, and writes down what it was asked."""
    asked = tmp_path / "asked"
    program = tmp_path / "nvidia-smi"
    answer = "580.159.04, 345 MHz, 2619 MHz, 1980 MHz, 2619 MHz, 700.00 W, 31, Enabled, 0 %"
    program.write_text(f'#!/bin/sh\necho "$@" > {asked}\necho "{answer}"\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    found = environment.card()
    assert len(found) == len(environment.ASKED)
    assert found["driver_version"] == "580.159.04"
    assert found["clocks.sm"] == "345 MHz"
    assert found["utilization.gpu"] == "0 %"
    assert asked.read_text().split() == [
        "--id=0",
        f"--query-gpu={','.join(environment.ASKED)}",
        "--format=csv,noheader",
    ]
    program.write_text("#!/bin/sh\nexit 9\n")
    assert environment.card() is None


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


def test_a_part_is_run_and_written(tmp_path, capfd):
    """pytest's counts and the environment, into a file that keeps the other parts."""
    (tmp_path / "test_three.py").write_text(THREE)
    out = tmp_path / "deep" / "gpu.json"
    out.parent.mkdir()
    out.write_text(json.dumps({"parts": {"steps": {"exit": 0}}}))
    run = gpu.Run(out, "abc", None, None, ["-q", "-p", "no:cacheprovider"])
    run.part("tests", [parts.Call("tests", str(tmp_path / "test_three.py"), 100)])
    assert run.failed
    written = json.loads(out.read_text())
    assert written["parts"]["steps"] == {"exit": 0}
    part = written["parts"]["tests"]
    assert (part["exit"], part["environment"]["commit"]) == (1, "abc")
    (call,) = part["calls"].values()
    assert (call["passed"], call["failed"], call["skipped"], call["failures"]) == (1, 1, 1, ["test_bad"])
    assert call["reasons"] == {"test_bad": "assert False"}
    assert 0 < call["seconds"] < call["limit"] == 100
    assert {path.name for path in out.parent.iterdir()} == {"gpu.json", "gpu-tests.xml"}
    assert "== tests: exit 1 after" in capfd.readouterr().out


HANGS = """
import pytest

def test_measured(benchmark):
    benchmark.pedantic(lambda: None, rounds=1)
    benchmark.extra_info |= {"ours_ms": 1.0, "loop ms": 2.0, "loop / ours": 2.0}

def test_wrong(benchmark):
    benchmark.extra_info |= {"ours_ms": 1.0, "wrong": {"triton": "is off by 1.0e-01"}}

def test_bad(benchmark):
    benchmark.pedantic(lambda: None, rounds=1)
    raise RuntimeError("CUDA error: out of luck")

@pytest.mark.skip(reason="for the count")
def test_left_out(benchmark):
    pass

def test_hangs(benchmark):
    import time
    time.sleep(300)
"""


@pytest.mark.exhaustive
def test_what_was_measured_survives_a_bench_that_hangs(tmp_path, capfd):
    """It is interrupted at the deadline, what is left of the parts does not begin, and the table says all of it."""
    shutil.copy(gpu.ROOT / "bench" / "conftest.py", tmp_path)
    for name in ("race", "reports", "environment"):
        shutil.copy(gpu.ROOT / "bench" / f"{name}.py", tmp_path)
    (tmp_path / "test_five.py").write_text(HANGS)
    out, log = tmp_path / "out" / "gpu.json", tmp_path / "log"
    run = gpu.Run(out, None, limits.GRACE + 25, log, ["-p", "no:cacheprovider"])
    hangs = parts.Call("bench", str(tmp_path / "test_five.py"), 300, "cpu")
    run.part("layers", [hangs, dataclasses.replace(hangs, command=str(tmp_path / "never.py"))])
    run.part("steps", [hangs])
    assert run.failed
    found = json.loads(out.read_text())["parts"]
    call, never = found["layers"]["calls"].values()
    assert call["stopped"] == f"interrupted after {call['limit']} s"
    assert call["limit"] <= 25
    assert (call["passed"], call["failed"], call["skipped"]) == (2, 1, 1)
    assert call["wrong"] == {"test_wrong: triton": "is off by 1.0e-01"}
    assert call["reasons"] == {"test_bad": "RuntimeError: CUDA error: out of luck"}
    assert never == found["steps"]["calls"][hangs.command] == {"exit": 1, "stopped": "no time was left"}
    first, _ = found["layers"]["benchmarks"]
    assert (first["name"], first["extra_info"]["loop / ours"]) == ("test_measured", 2.0)
    assert first["lap_s"] > 0
    assert found["layers"]["slao_kernels"]["options"]["model"] == "llama-3.2-1b"  # a CPU's
    assert "test_measured: ours 1.00 ms, loop 2.00 ms = 2.00x" in log.read_text()  # pytest's own table came too
    capfd.readouterr()
    assert gpu.main(["--table", "--out", str(out)]) == 0
    said = capfd.readouterr().out
    assert "interrupted after" in said
    assert "FAILED layers: test_bad: RuntimeError: CUDA error: out of luck" in said
    assert "WRONG layers: test_wrong: triton is off by 1.0e-01" in said
    assert "no time was left" in said


def test_there_is_no_table_of_nothing(tmp_path, capsys):
    assert gpu.main(["--table", "--out", str(tmp_path / "none.json")]) == 2
    assert "there is no file" in capsys.readouterr().err


@pytest.mark.exhaustive
def test_benches_run_and_their_figures_are_read(measured):
    """One small case of each bench on the CPU: none has rotted, and what gpu.py keeps of them is there."""
    listed, counts, how = reports.benchmarks(measured.with_suffix(".jsonl"))
    assert counts["failed"] == 0
    assert how["options"] == {"model": "minilm", "rounds": 3, "threads": 1, "best-of": 1, "compile": False}
    assert how["versions"]["torch"] == torch.__version__
    assert set(how["backends"]) == set(dispatch.OPS)
    found = {bench["name"]: bench for bench in listed}
    core = dispatch.why_not("lora_linear", "native", "cpu") is None  # without it nothing of bench_lora_kernels runs
    assert len({name.partition("[")[0] for name in found}) == 10 + core
    assert all(bench["lap_s"] > 0 and bench["extra_info"] for bench in found.values())
    step = found["test_step[minilm-2x16-fp32]"]["extra_info"]
    assert step["ours share"] == (step["ours ms"] - step["frozen ms"]) / (step["PEFT ms"] - step["frozen ms"])
    if core:
        (row,) = found["test_product[shrink-1024x384-bf16-16]"]["extra_info"]["rows"]
        assert row["us"] > 0
        assert row["% roof"] == pytest.approx(max(row["% copy"], row["% GEMM"]))
        assert "% roof" in measured.with_suffix(".out").read_text()
