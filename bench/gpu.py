"""`make gpu`: everything that needs a GPU, in one command: the tests marked `gpu` and all benches on CUDA.

python bench/gpu.py [PART ...] [--out FILE] [--deadline SECONDS] [--quick] [--log FILE] [-- arguments of pytest]

A part is tests, kernels, layers, steps or rest (without any, these), host or tune; parts.py says what each runs. Every
process of a part has a limit and is interrupted at it; after --deadline nothing begins any more. --quick takes the
headline figures of each part in minutes, for a machine on loan.

FILE (build/gpu.json) keeps the parts of earlier runs and is written after every process. Beside it: FILE's .jsonl with
a line for every bench as it ends, the tests' report (.xml), the tuner's table. At the end a table of at most 60 lines
is printed from FILE; --table prints it alone. A part carries the environment that it ran in: device, driver, clocks as
found before and after, versions, date, commit. Nothing of the card's settings is changed.

--look: only whether it is worth installing torch here to ask it; for any Python, and at once.
--dry: tiny runs on the CPU, to see that every part starts, keeps to its limit and writes its files.

Where nothing can be installed this file, called by its path, runs from the checkout, in which
`python setup.py build_ext --inplace` builds the compiled core; what runs its CUDA kernels is refused without it.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import signal
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))  # an isolated Python (-I) does not look there

import limits
from environment import ROOT, card, environment, said
from parts import DRY, NEEDED, OF_THE_CORE, ON_REQUEST, QUICK, TABLE, WHOLE, Call, workers
from reports import benchmarks, brief, outcomes

# Where a driver is loaded: NVIDIA's, its boards', AMD's, and WSL's for either.
DEVICE_FILES = ("/dev/nvidiactl", "/dev/nvhost-gpu", "/dev/nvgpu", "/dev/kfd", "/dev/dxg")
_LEAST = 8.0  # seconds in which a process can still do something


def main(arguments: list[str]) -> int:
    """0 if all went well; 1 if something failed, is wrong, or did not end in time; 2 if nothing could be run."""
    cut = arguments.index("--") if "--" in arguments else len(arguments)
    parser = argparse.ArgumentParser(prog="bench/gpu.py", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(WHOLE)}")
    parser.add_argument("--out", type=Path, default=None, help="default: build/gpu.json, build/gpu-dry.json")
    parser.add_argument("--log", type=Path, default=None, help="where the processes' output goes, not to the terminal")
    parser.add_argument("--deadline", type=float, default=None, metavar="SECONDS", help="of all parts together")
    parser.add_argument("--quick", action="store_true", help="the headline figures alone")
    parser.add_argument("--dry", action="store_true", help="tiny, without a GPU")
    parser.add_argument("--without-core", action="store_true", help="even where the CUDA kernels are missing")
    parser.add_argument("--commit", default=None, help="where there is no git: the commit that this is")
    parser.add_argument("--table", action="store_true", help="run nothing: print the table of FILE")
    parser.add_argument("--look", action="store_true", help="run nothing: is there a driver of a GPU at all?")
    options = parser.parse_args(arguments[:cut])
    parts = options.parts or [part for part in WHOLE if part not in ON_REQUEST]
    out = options.out or ROOT / "build" / ("gpu-dry.json" if options.dry else "gpu.json")
    if options.table:
        return table(out)
    refusal = why_never(parts) if options.look else why_not(parts, options.dry, options.without_core)
    if refusal is not None:
        print(f"make gpu: {refusal}", file=sys.stderr)
        return 2
    if options.look:
        return 0
    calls = DRY if options.dry else QUICK if options.quick else WHOLE
    # A shell's background job is born deaf to it, and hands that on: what runs out of time could not write its files.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    run = Run(out, options.commit, options.deadline, options.log, arguments[cut + 1 :])
    for part in parts:
        if lacking := missing(part):
            run.left_out(part, lacking)
        elif not run.interrupted:
            run.part(part, calls[part])
    table(out)
    print(f"make gpu: {', '.join(parts)}: {'something FAILED' if run.failed else 'all passed'}; figures in {out}")
    return int(run.failed)


def unknown(parts: list[str]) -> str | None:
    wrong = [part for part in parts if part not in WHOLE]
    return f"unknown part {', '.join(wrong)}; choose from {', '.join(WHOLE)}" if wrong else None


def why_never(parts: list[str]) -> str | None:
    """Why no install would make this machine run `parts`, in one line; None if one might."""
    if wrong := unknown(parts):
        return wrong
    if not any(os.path.exists(file) for file in DEVICE_FILES) and said("nvidia-smi", "-L") is None:
        return "no CUDA or ROCm device here (no driver of one: no nvidia-smi, nor its device files, nor AMD's)"
    return None


def why_not(parts: list[str], dry: bool = False, without_core: bool = False) -> str | None:
    """Why this machine cannot run `parts`, in one line; None if it can."""
    if wrong := unknown(parts):
        return wrong
    if importlib.util.find_spec("torch") is None:
        return "torch is not installed"
    import torch

    if not (dry or torch.cuda.is_available()):
        return f"no CUDA or ROCm device here (torch {torch.__version__} sees none)"
    lacking = [missing(part) for part in parts]
    if all(lacking):
        names = sorted({name for one in lacking for name in one})
        return f"{', '.join(names)} not installed: pip install -e '.[dev]', or choose other parts"
    of_the_core = [part for part in parts if part in OF_THE_CORE]
    if of_the_core and not (dry or without_core) and torch.version.hip is None:
        return no_cuda_kernels(of_the_core)
    return None


def missing(part: str) -> list[str]:
    """The packages that a part needs and that are not here."""
    return [name for name in NEEDED[part] if importlib.util.find_spec(name) is None]


def no_cuda_kernels(parts: list[str]) -> str | None:
    """Why `parts` would not run the CUDA kernels: as a rule the checkout, which comes first, has none built."""
    sys.path[:0] = [str(ROOT)]
    try:
        from slao_kernels import native

        missing = native.why_not("cuda")
    finally:
        sys.path.remove(str(ROOT))
    if missing is None:
        return None
    return (
        f"{missing}, and {', '.join(parts)} would not run it: `python setup.py build_ext --inplace` where nvcc is, "
        "in this checkout and with this Python; or choose other parts, or --without-core"
    )


class Run:
    """Runs parts and keeps what they found in FILE; what a process prints goes to the terminal, or to `log`."""

    def __init__(
        self, out: Path, commit: str | None, deadline: float | None, log: Path | None, extra: list[str]
    ) -> None:
        self.out, self.commit, self.log, self.extra = out.resolve(), commit, log, extra
        self.found = json.loads(out.read_text(encoding="utf-8")) if out.is_file() else {"parts": {}}
        self.ends = None if deadline is None else time.monotonic() + deadline
        self.failed = self.interrupted = False
        self.out.parent.mkdir(parents=True, exist_ok=True)

    def left_out(self, name: str, lacking: list[str]) -> None:
        self._tell(f"{name}: left out, {', '.join(lacking)} not installed")
        self.failed = True

    def part(self, name: str, calls: list[Call]) -> None:
        here: dict[str, Any] = {"environment": environment(self.commit), "exit": 0, "calls": {}, "benchmarks": []}
        self.found["parts"][name] = here
        for call in calls:
            if self.interrupted:
                break
            done = here["calls"][call.words[0]] = self._call(name, call, here)
            here["exit"] |= int(done["exit"] != 0)
            here["after"] = card()
            write(self.out, self.found)
        self.failed |= here["exit"] != 0

    def _call(self, part: str, call: Call, here: dict[str, Any]) -> dict[str, Any]:
        """How it ended, with the counts; what benches measured goes into `here`."""
        seconds = self._seconds(call)
        if seconds < _LEAST:
            self._tell(f"{part}: no time was left")
            return {"exit": 1, "stopped": "no time was left"}
        report, lines = self.out.with_name(f"{self.out.stem}-{part}.xml"), self.out.with_suffix(".jsonl")
        report.unlink(missing_ok=True)
        before = lines.stat().st_size if lines.is_file() else 0
        started = time.monotonic()
        with nullcontext() if self.log is None else self.log.open("a", encoding="utf-8") as output:
            where = {"cwd": ROOT, "env": importing_from_here() | call.environment, "stdout": output, "stderr": output}
            ended = limits.run(self._command(call, report, lines), seconds, **where)
        took = time.monotonic() - started
        done: dict[str, Any] = {"seconds": round(took, 1), "limit": round(seconds), "exit": ended.status}
        done |= {"stopped": ended.stopped} if ended.stopped else {}
        if call.kind == "bench":
            measured, counts, how = benchmarks(lines, before)
            here["benchmarks"].extend(measured)
            here |= {"slao_kernels": how} if how is not None else {}
            done |= counts | {"exit": ended.status or int(bool(counts["wrong"]))}
        else:
            done |= outcomes(report)
        self._tell(f"{part}: exit {ended.status} after {took:.0f} s of at most {seconds:.0f}")
        self.interrupted = ended.interrupted
        return done

    def _seconds(self, call: Call) -> float:
        """What a process may take: its own limit, or what is left, less the time to end it in."""
        if self.ends is None:
            return call.seconds
        return min(call.seconds, self.ends - time.monotonic() - limits.GRACE)

    def _command(self, call: Call, report: Path, lines: Path) -> list[str]:
        table = str(self.out.with_name(f"{self.out.stem}-tiles.json"))
        words = [table if word == TABLE else word for word in call.words]
        if call.kind == "script":
            return [sys.executable, *words]
        own = [f"--junitxml={report}", *workers()]
        if call.kind == "bench":
            own = [f"--device={call.device}", f"--lines={lines}"]
        return [sys.executable, "-m", "pytest", *words, *own, *self.extra]

    def _tell(self, line: str) -> None:
        print(f"== {line}", flush=True)
        if self.log is not None:
            with self.log.open("a", encoding="utf-8") as log:
                log.write(f"== {line}\n")


def importing_from_here() -> dict[str, str]:
    """The environment of a process that finds this checkout's packages, installed or not.

    Without that of a pytest-xdist worker, in which pytest-benchmark would measure nothing.
    """
    paths = [str(ROOT), str(ROOT / "python"), os.environ.get("PYTHONPATH", "")]
    mine = {key: value for key, value in os.environ.items() if not key.startswith("PYTEST_XDIST")}
    return mine | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}


def write(out: Path, found: dict[str, Any]) -> None:
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = out.with_name(out.name + ".new")
    temporary.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    temporary.replace(out)


def table(out: Path) -> int:
    """Print what FILE says in few lines; 2 if there is none."""
    if not out.is_file():
        print(f"make gpu: there is no file {out}", file=sys.stderr)
        return 2
    print("\n".join(brief(json.loads(out.read_text(encoding="utf-8")))))
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
