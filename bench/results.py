"""Reads what `make bench` and `make gpu` wrote: figures, and the environments that they were measured in.

Two kinds of file: pytest-benchmark's own, with this project's figures in extra_info, and bench/gpu.py's, whose parts
carry an environment each.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cases import AGAIN, Case, case, need


@dataclass(frozen=True)
class Run:
    """Cases that ran in one environment. about: (what, text) lines that say which."""

    part: str | None  # of `make gpu`
    device: str
    gpu: bool
    date: str
    about: list[tuple[str, str]]
    cases: list[Case]
    left_out: dict[str, str]


def read(path: Path) -> list[Run]:
    """The runs of a file, one for `make bench`, one a part for `make gpu`. ValueError of one line if it is neither."""
    return parse(load(path), str(path))


def load(path: Path) -> dict[str, Any]:
    """The object in a file; ValueError of one line if there is none."""
    try:
        whole = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"there is no file {path}: `make bench` and `make gpu` write one under build/") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} cannot be read as JSON ({' '.join(str(error).split())}): {AGAIN}") from None
    if not isinstance(whole, dict):
        raise ValueError(f"{path}: an object is expected, this is a {type(whole).__name__}: {AGAIN}")
    return whole


def parse(whole: dict[str, Any], path: str) -> list[Run]:
    """The same for the object of such a file; path: for the error's line."""
    if "parts" in whole:
        made = f"{path} (of bench/gpu.py)"
        runs = [_gpu_run(name, part, made) for name, part in need(whole, "parts", made, dict).items()]
    elif "benchmarks" in whole or "machine_info" in whole:
        runs = [_bench_run(whole, f"{path} (of pytest-benchmark {whole.get('version', 'without a version')})")]
    else:
        raise ValueError(
            f"{path} is neither pytest-benchmark's (lacks 'benchmarks' and 'machine_info') nor bench/gpu.py's "
            f"(lacks 'parts'): {AGAIN}"
        )
    if not any(run.cases for run in runs):
        raise ValueError(f"{path} has no figures: no bench ran")
    return runs


def _bench_run(whole: dict[str, Any], where: str) -> Run:
    machine = need(whole, "machine_info", where, dict)
    benches = need(whole, "benchmarks", where, list)
    commit = need(whole, "commit_info", where, dict)
    cpu = machine.get("cpu") or {}
    extra = [bench.get("extra_info") or {} for bench in benches if isinstance(bench, dict)]
    gpus = sorted({str(info["device"]) for info in extra if info.get("device", "cpu") != "cpu"})
    name = gpus[0] if gpus else str(cpu.get("brand_raw") or machine.get("machine") or "unknown CPU")
    about = [("device", ", ".join(gpus))] if gpus else []
    cores = f", {cpu['count']} logical cores" if cpu.get("count") else ""
    clock = f", {cpu['hz_advertised_friendly']} as it says" if cpu.get("hz_advertised_friendly") else ""
    about += [("CPU", f"{cpu.get('brand_raw') or machine.get('machine')}{cores}{clock}")]
    about += _how(machine.get("slao_kernels") or {}, extra)
    about += [("Python", str(machine.get("python_version")))]
    date = str(need(whole, "datetime", where))
    about += [("date", date[:10]), ("commit", _commit(commit.get("id"), commit.get("dirty")))]
    cases, left_out = _cases(benches, where)
    return Run(None, name, bool(gpus), date[:10], about, cases, left_out)


def _gpu_run(part: str, found: Any, where: str) -> Run:
    where = f"{where}: part {part}"
    here = need(found, "environment", where, dict)
    device = here.get("device") or {}
    benches = need(found, "benchmarks", where, list)
    about = [
        ("device", f"{device.get('count', '?')} × {device.get('name')}, compute capability {device.get('capability')}")
    ]
    card = here.get("as found") or {}
    asked = [f"{key} {value}" for key, value in card.items()]
    about += [("as found", ", ".join(asked) or "no nvidia-smi")]
    later = [f"{key} {value}" for key, value in (found.get("after") or {}).items() if value != card.get(key)]
    about += [("after", ", ".join(later) or "the same")]
    extra = [bench.get("extra_info") or {} for bench in benches if isinstance(bench, dict)]
    about += _how({"versions": here.get("versions")} | (found.get("slao_kernels") or {}), extra)
    about += [("CUDA, ROCm", f"{device.get('CUDA') or '–'}, {device.get('ROCm') or '–'}")]
    date = str(need(here, "date", f"{where}: environment"))
    about += [("Python", str(here.get("python"))), ("date", date[:10])]
    about += [("commit", _commit(here.get("commit"), here.get("changed since")))]
    for call, done in (found.get("calls") or {}).items():
        counts = ", ".join(f"{done[key]} {key}" for key in ("passed", "skipped", "failed") if key in done)
        about += [(call, f"{counts or 'nothing'}, exit {done.get('exit')}")]
        about += [("failed", name) for name in done.get("failures") or []]
    cases, left_out = _cases(benches, where)
    return Run(part, str(device.get("name") or "unknown GPU"), True, date[:10], about, cases, left_out)


def _how(how: dict[str, Any], extra: list[dict[str, Any]]) -> list[tuple[str, str]]:
    """Lines for versions, options and backends; threads as the benches found them."""
    found = []
    threads = sorted({info["threads"] for info in extra if "threads" in info})
    if threads:
        found.append(("threads", ", ".join(map(str, threads))))
    options = how.get("options") or {}
    if options.get("model"):
        found.append(("geometry of whole-model benches", str(options["model"])))
    if options.get("rounds"):
        found.append(
            ("rounds", f"at most {options['rounds']}: this shows that all works, the figures are worth little")
        )
    if (options.get("best-of") or 1) > 1:
        found.append(("races", f"the best of {options['best-of']}"))
    backends = [f"{op} {name}" for op, name in (how.get("backends") or {}).items()]
    if how.get("instruction set"):
        backends.append(f"compiled core: {how['instruction set']}")
    if backends:
        found.append(("backends", ", ".join(backends)))
    versions = [f"{name} {version}" for name, version in (how.get("versions") or {}).items() if version]
    found.append(("versions", ", ".join(versions) or "not recorded"))
    return found


def _commit(commit: Any, changed: Any) -> str:
    return f"{commit or 'unknown'}{', with changes that are not in it' if changed else ''}"


def _cases(benches: list[Any], where: str) -> tuple[list[Case], dict[str, str]]:
    """Those that count, and what is left out: contestants, and benches in which ours computed something else."""
    left_out: dict[str, str] = {}
    found = []
    for bench in benches:
        info = need(bench, "extra_info", f"{where}: a benchmark", dict)
        left_out |= info.get("left out") or {}
        name = bench.get("name", "a benchmark")
        if wrong := info.get("wrong"):
            left_out[name] = "; ".join(f"{contestant} {what}" for contestant, what in wrong.items())
        else:
            found.append(case(bench, f"{where}: {name}"))
    return found, left_out
