"""PEFT's own test suite twice, as it is and with every LoRA model patched: what passes must go on passing.

    python tests/conformance/run.py CHECKOUT [--files test_custom_models.py ...] [--out build/conformance]

CHECKOUT: PEFT's repository at the release that is installed (its tests are not part of a wheel). Needs pytest-xdist,
pytest-timeout, parameterized, scipy and datasets, and no network: tests that want the hub fail in both runs and are
counted by file. Exit status 1 if a test passes plain and not patched, or if no test ran a fused layer.
Into --out: plain.json, patched.json (each run in full) and summary.json.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
RUNS = ("plain", "patched")
# What an attempt to reach the hub says, whichever library makes it.
_HUB = re.compile(
    "offline|huggingface.co|LocalEntryNotFound|couldn't connect|Couldn't reach|Can't load|"
    "Can't find 'adapter_config|not fully cached|max retries",
    re.IGNORECASE,
)
_ON_GPU = ("test_common_gpu.py", "test_gpu_examples.py", "test_gptqmodel.py")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("checkout", type=Path)
    parser.add_argument("--files", nargs="*", default=[], help="of its tests folder; default: all that need no GPU")
    parser.add_argument("--out", type=Path, default=Path("build/conformance"))
    parser.add_argument("--runs", nargs="*", choices=RUNS, default=RUNS, help="a run left out is read from --out")
    parser.add_argument("--workers", type=int, default=2, help="0: without pytest-xdist")
    parser.add_argument("-k", default="", help="as pytest's")
    options = parser.parse_args(arguments)
    tests = options.checkout.resolve() / "tests"
    if not tests.is_dir():
        parser.error(f"{options.checkout} has no tests folder; name a checkout of PEFT's repository")
    version = _check_version(options.checkout, parser)
    files = options.files or sorted(path.name for path in tests.glob("test_*.py"))
    files = [name for name in files if name in options.files or name not in _ON_GPU]
    options.out.mkdir(parents=True, exist_ok=True)
    for run in options.runs:
        _pytest(run, tests, files, options)
    results = {run: json.loads((options.out / f"{run}.json").read_text()) for run in RUNS}
    skipped = [name for name in _ON_GPU if name not in files]
    summary = {"peft": version, "files": files, "need a GPU": skipped, **compare(**results)}
    (options.out / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
    print(describe(summary))
    return 0 if summary["fused"]["forwards"] and not summary["broken"] else 1


def _check_version(checkout: Path, parser: argparse.ArgumentParser) -> str:
    import peft

    source = checkout / "src" / "peft" / "__init__.py"
    found = re.search(r'^__version__ = "(.+)"', source.read_text(), re.MULTILINE) if source.exists() else None
    if found and found[1] != peft.__version__:
        parser.error(f"{checkout} is PEFT {found[1]}, installed is {peft.__version__}: pip install peft=={found[1]}")
    return peft.__version__


def _pytest(run: str, tests: Path, files: list[str], options: argparse.Namespace) -> None:
    out = (options.out / f"{run}.json").resolve()
    out.unlink(missing_ok=True)
    command = [sys.executable, "-m", "pytest", *(f"tests/{name}" for name in files), "-c", os.devnull]
    command += [f"--rootdir={tests.parent}", "-p", "conformance_plugin", f"--conform={run}", f"--conform-out={out}"]
    command += ["-p", "no:cacheprovider", "-q", "--durations=15", "-W", "ignore"]
    command += ["--continue-on-collection-errors", "--timeout=120", "--timeout-method=signal"]
    command += ["-k", options.k] if options.k else []
    command += ["-n", str(options.workers), "--dist", "load"] if options.workers else []
    paths = [str(HERE), str(HERE.parents[1]), os.environ.get("PYTHONPATH", "")]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(path for path in paths if path),
        "PYTHONDONTWRITEBYTECODE": "1",  # the checkout stays as it is
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
    }
    log = options.out / f"{run}.log"
    print(f"{run}: {len(files)} files (log: {log})", flush=True)
    with log.open("w") as stream:
        done = subprocess.run(command, cwd=tests.parent, env=environment, stdout=stream, stderr=subprocess.STDOUT)
    if not out.exists() or done.returncode not in (0, 1):
        raise SystemExit(f"pytest ended with {done.returncode} in the {run} run:\n" + log.read_text()[-2000:])


def compare(plain: dict[str, Any], patched: dict[str, Any]) -> dict[str, Any]:
    """Counts of both runs; broken: what passed plain and did not patched, with how it failed."""
    before, after = plain["tests"], patched["tests"]
    good = [name for name, (outcome, *_) in before.items() if outcome == "passed"]
    ends = {name: after.get(name, ["missing", 0, 0, ""]) for name in good}
    broken = {name: f"{outcome}: {why}" for name, (outcome, _, _, why) in ends.items() if outcome != "passed"}
    fused = {name: forwards for name, (_, _, forwards, _) in after.items() if forwards}
    failed = {name: why for name, (outcome, *_, why) in before.items() if outcome == "failed"}
    hub = Counter(_file(name) for name, why in failed.items() if _HUB.search(why))
    return {
        "plain": dict(Counter(outcome for outcome, *_ in before.values())),
        "patched": dict(Counter(outcome for outcome, *_ in after.values())),
        "tests with a patched layer": sum(layers > 0 for _, layers, *_ in after.values()),
        "fused": {
            "tests": len(fused),
            "forwards": sum(fused.values()),
            "tests by file": dict(Counter(_file(name) for name in fused)),
        },
        "broken": broken,
        "waiting for the hub": dict(hub),
        "failed plain for another reason": {name: why for name, why in failed.items() if not _HUB.search(why)},
        "files that could not be collected": plain["errors"] | patched["errors"],
    }


def _file(test: str) -> str:
    return test.partition("::")[0].rpartition("/")[2]


def describe(summary: dict[str, Any]) -> str:
    counts = [f"{run}: " + ", ".join(f"{n} {outcome}" for outcome, n in summary[run].items()) for run in RUNS]
    fused, hub, other = summary["fused"], summary["waiting for the hub"], summary["failed plain for another reason"]
    lines = [f"PEFT {summary['peft']}, {len(summary['files'])} files", *counts]
    lines += [
        f"with a patched layer: {summary['tests with a patched layer']} tests; through its fused forward: "
        f"{fused['tests']} tests, {fused['forwards']} fused forwards"
    ]
    if summary["need a GPU"]:
        lines += ["left out, they need a GPU: " + ", ".join(summary["need a GPU"])]
    if hub:
        lines += ["left out, they wait for the hub: " + ", ".join(f"{file} {n}" for file, n in hub.items())]
    for file, why in summary["files that could not be collected"].items():
        lines += [f"left out, not collected: {file}: {why.strip().splitlines()[-1][:160]}"]
    lines += [f"failed without us too: {len(other)}"] if other else []
    lines += [f"BROKEN {name}\n    {why}" for name, why in summary["broken"].items()]
    if not fused["forwards"]:
        lines += ["FAILED: no test ran a fused layer, so nothing was tested"]
    return "\n".join([*lines, f"passes plain, not patched: {len(summary['broken'])}"])


if __name__ == "__main__":
    sys.exit(main())
