"""`make gpu`: everything that needs a GPU, in one command: the tests marked `gpu` and all benches on CUDA.

python bench/gpu.py [PART ...] [--out FILE] [--commit HASH] [--look] [-- arguments of pytest]

A part is tests, layers, steps or rest; without any, all of them. Each takes minutes, so that one fits into a short
loan of a machine; FILE (build/gpu.json) keeps the parts of earlier runs. A part carries the environment that it ran
in: device, driver, clocks as found before and after, versions, date, commit. FILE is written after every file of
benches, so that what was measured survives an interruption. Nothing of the card's settings is changed.
--look: only whether it is worth installing torch here to ask it; for any Python, and at once.

Where nothing can be installed: `python setup.py build_ext --inplace` builds the compiled core in the checkout, and
this file, called by its path, runs from there.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parents[1]
# Part -> what pytest is called with, one call after another.
PARTS = {
    "tests": [["tests", "-m", "gpu"]],
    "layers": [["bench/bench_lora_kernels.py"], ["bench/bench_lora_linear.py"]],
    "steps": [["bench/bench_training_step.py"]],
    "rest": [
        [f"bench/bench_{name}.py"]
        for name in ("orthogonal_init", "scaled_merge", "fold", "transition", "interference", "weighted_merge")
    ],
}
# What a part cannot do without, beside torch; hypothesis is what some of the tests are written with.
NEEDED = {"tests": ("pytest", "peft", "transformers", "triton", "hypothesis")}
NEEDED |= dict.fromkeys(("layers", "steps", "rest"), ("pytest", "pytest_benchmark", "peft", "transformers", "triton"))
PACKAGES = ("torch", "triton", "transformers", "peft", "accelerate", "numpy", "pytest-benchmark", "axolotl", "unsloth")
# Where a driver is loaded: NVIDIA's, its boards', AMD's, and WSL's for either.
DEVICE_FILES = ("/dev/nvidiactl", "/dev/nvhost-gpu", "/dev/nvgpu", "/dev/kfd", "/dev/dxg")
ASKED = ("driver_version", "clocks.sm", "clocks.mem", "clocks.max.sm", "clocks.max.mem", "power.limit")
ASKED += ("temperature.gpu", "persistence_mode", "utilization.gpu")


def main(arguments: list[str]) -> int:
    """0 if all went well, 1 if a test or a bench failed, 2 if nothing could be run."""
    cut = arguments.index("--") if "--" in arguments else len(arguments)
    parser = argparse.ArgumentParser(prog="bench/gpu.py", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)} (default: all)")
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "gpu.json")
    parser.add_argument("--commit", default=None, help="where there is no git: the commit that this is")
    parser.add_argument("--look", action="store_true", help="run nothing: is there a driver of a GPU at all?")
    options = parser.parse_args(arguments[:cut])
    parts = options.parts or list(PARTS)
    refusal = why_never(parts) if options.look else why_not(parts)
    if refusal is not None:
        print(f"make gpu: {refusal}", file=sys.stderr)
        return 2
    if options.look:
        return 0
    found = json.loads(options.out.read_text(encoding="utf-8")) if options.out.is_file() else {"parts": {}}
    failed = False
    for part in parts:
        failed |= run(part, found, options.out, options.commit, arguments[cut + 1 :]) != 0
    print(f"make gpu: {', '.join(parts)}: {'something FAILED' if failed else 'all passed'}; figures in {options.out}")
    return int(failed)


def unknown(parts: list[str]) -> str | None:
    wrong = [part for part in parts if part not in PARTS]
    return f"unknown part {', '.join(wrong)}; choose from {', '.join(PARTS)}" if wrong else None


def why_never(parts: list[str]) -> str | None:
    """Why no install would make this machine run `parts`, in one line; None if one might."""
    if wrong := unknown(parts):
        return wrong
    if not any(os.path.exists(file) for file in DEVICE_FILES) and said("nvidia-smi", "-L") is None:
        return "no CUDA or ROCm device here (no driver of one: no nvidia-smi, nor its device files, nor AMD's)"
    return None


def why_not(parts: list[str]) -> str | None:
    """Why this machine cannot run `parts`, in one line; None if it can."""
    if wrong := unknown(parts):
        return wrong
    if importlib.util.find_spec("torch") is None:
        return "torch is not installed"
    import torch

    if not torch.cuda.is_available():
        return f"no CUDA or ROCm device here (torch {torch.__version__} sees none)"
    missing = {name for part in parts for name in NEEDED[part] if importlib.util.find_spec(name) is None}
    if missing:
        return f"{', '.join(sorted(missing))} not installed: pip install -e '.[dev]', or choose other parts"
    return None


def run(part: str, found: dict[str, Any], out: Path, commit: str | None, extra: list[str]) -> int:
    """Run one part, put it into `found` and that into `out`; returns the worst exit status."""
    here: dict[str, Any] = {"environment": environment(commit), "exit": 0}
    found["parts"][part] = here
    for call in PARTS[part]:
        with tempfile.TemporaryDirectory() as folder:
            report, figures = Path(folder, "report.xml"), Path(folder, "figures.json")
            command = [sys.executable, "-m", "pytest", *call, f"--junitxml={report}", *extra]
            command += [] if part == "tests" else ["--device=cuda", f"--benchmark-json={figures}"]
            started = time.monotonic()
            status = subprocess.run(command, cwd=ROOT, env=importing_from_here()).returncode
            done = {"seconds": round(time.monotonic() - started, 1), "exit": status, **outcomes(report)}
            here.setdefault("calls", {})[call[0]] = done
            found_here, how = benchmarks(figures)
            here.setdefault("benchmarks", []).extend(found_here)
            if how is not None:
                here["slao_kernels"] = how
        here["exit"] = max(here["exit"], status)
        here["after"] = card()
        write(out, found)
    return int(here["exit"])


def importing_from_here() -> dict[str, str]:
    """The environment of a process that finds this checkout's packages, installed or not."""
    paths = [str(ROOT), str(ROOT / "python"), os.environ.get("PYTHONPATH", "")]
    return os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}


def write(out: Path, found: dict[str, Any]) -> None:
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = out.with_name(out.name + ".new")
    temporary.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    temporary.replace(out)


def outcomes(report: Path) -> dict[str, Any]:
    """Counts of a JUnit file, and the names of what failed; nothing where pytest did not get as far as writing it."""
    if not report.is_file():
        return {}
    suites = list(ElementTree.parse(report).getroot().iter("testsuite"))
    total, skipped, bad = (
        sum(int(suite.get(name, 0)) for suite in suites for name in names)
        for names in (("tests",), ("skipped",), ("failures", "errors"))
    )
    cases = [case for suite in suites for case in suite.iter("testcase")]
    names = [case.get("name") for case in cases if case.find("failure") is not None or case.find("error") is not None]
    return {"passed": total - skipped - bad, "skipped": skipped, "failed": bad, "failures": names}


def benchmarks(figures: Path) -> tuple[list[dict[str, Any]], dict[str, Any] | None]:
    """What counts of pytest-benchmark's file: names, parameters, our own figures, its median; and how they were run."""
    if not figures.is_file() or not figures.stat().st_size:  # no bench ran
        return [], None
    whole = json.loads(figures.read_text(encoding="utf-8"))
    keep = ("name", "fullname", "params", "extra_info")
    listed = [{key: bench[key] for key in keep} | {"lap_s": bench["stats"]["median"]} for bench in whole["benchmarks"]]
    return listed, whole["machine_info"].get("slao_kernels")


def environment(commit: str | None = None) -> dict[str, Any]:
    """What a figure means nothing without. Values that cannot be had here are None."""
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": commit or git("rev-parse", "HEAD"),
        "changed since": None if (changed := git("status", "--porcelain")) is None else bool(changed),
        "python": platform.python_version(),
        "versions": {package: version(package) for package in PACKAGES},
        "device": device(),
        "as found": card(),
    }


def version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def device() -> dict[str, Any] | None:
    """The first GPU as torch sees it; None where there is none."""
    import torch

    if not torch.cuda.is_available():
        return None
    seen = torch.cuda.get_device_properties(0)
    return {
        "name": seen.name,
        "count": torch.cuda.device_count(),
        "capability": f"{seen.major}.{seen.minor}",
        "multiprocessors": seen.multi_processor_count,
        "memory": seen.total_memory,
        "CUDA": torch.version.cuda,
        "ROCm": torch.version.hip,
    }


def card() -> dict[str, str] | None:
    """Driver, clocks and the like of the first GPU, as they are now; None without nvidia-smi. Reads only."""
    answer = said("nvidia-smi", "--id=0", f"--query-gpu={','.join(ASKED)}", "--format=csv,noheader")
    return None if answer is None else dict(zip(ASKED, (cell.strip() for cell in answer.split(",")), strict=False))


def git(*command: str) -> str | None:
    return said("git", "-C", str(ROOT), *command)


def said(*command: str) -> str | None:
    """What a command prints; None if there is no such command, or it fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
