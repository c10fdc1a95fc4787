"""What may be published of a file of figures: nothing of it says who measured, on which host, or where its files lie.

Of pytest-benchmark's file only what is named here is kept; of any other text, paths and the host's name are cut out.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from results import load, parse

MACHINE = ("machine", "system", "python_version", "python_implementation", "slao_kernels")
CPU = ("brand_raw", "arch", "count", "hz_advertised_friendly", "family", "model", "stepping", "flags")
FLAGS = ("avx", "amx", "fma", "f16c", "sve", "asimd", "neon", "bf16", "i8mm")  # what the kernels choose by
COMMIT = ("id", "time", "dirty")
BENCH = ("name", "fullname", "params", "extra_info", "stats")
STATS = ("median", "min", "rounds", "iterations")
WHOLE = ("machine_info", "commit_info", "benchmarks", "datetime", "version", "parts")

# An absolute path of any system, in quotes with blanks too. "GB/s" and "PEFT / ours" are none.
PATHS = re.compile(
    r"""(['"])(?:~?/|[A-Za-z]:\\|\\\\)[^'"]+\1"""
    r"""|(?<![\w./])~?/[\w.@+~-]+(?:/[\w.@+~-]*)*|(?<!\w)[A-Za-z]:\\[^\s'"]+|\\\\[^\s'"]+"""
)


def scrub(whole: dict[str, Any]) -> dict[str, Any]:
    """The publishable copy of what `make bench` or `make gpu` wrote; of such a copy, the same."""
    host = (whole.get("machine_info") or {}).get("node")
    kept = _only(whole, WHOLE)
    if "machine_info" in kept:
        cpu = _only(kept["machine_info"].get("cpu") or {}, CPU)
        cpu["flags"] = [flag for flag in cpu.get("flags", ()) if flag.startswith(FLAGS)]
        kept["machine_info"] = _only(kept["machine_info"], MACHINE) | {"cpu": cpu}
        kept["commit_info"] = _only(kept.get("commit_info") or {}, COMMIT)
        kept["benchmarks"] = [_bench(bench) for bench in kept.get("benchmarks") or []]
    return _strings(kept, str(host) if host else None)


def _only(mapping: dict[str, Any], keys: tuple[str, ...]) -> dict[str, Any]:
    return {key: mapping[key] for key in keys if key in mapping}


def _bench(bench: dict[str, Any]) -> dict[str, Any]:
    kept = _only(bench, BENCH)
    file, colons, rest = kept["fullname"].partition("::")
    kept["fullname"] = f"bench/{Path(file).name}{colons}{rest}"
    kept["stats"] = _only(kept.get("stats") or {}, STATS)
    return kept


def _strings(value: Any, host: str | None) -> Any:
    if isinstance(value, dict):
        return {key: _strings(inner, host) for key, inner in value.items()}
    if isinstance(value, list):
        return [_strings(inner, host) for inner in value]
    if isinstance(value, float):
        return float(f"{value:.6g}")  # a clock gives no more
    if not isinstance(value, str):
        return value
    value = PATHS.sub("<path>", value)
    return re.sub(rf"(?<![\w-]){re.escape(host)}(?![\w-])", "<host>", value) if host else value


def device_word(device: str) -> str:
    """A device's name for a file's: "Intel(R) Xeon(R) Platinum 8480C CPU @ 2.00GHz" -> "intel-xeon-platinum-8480c"."""
    bare = re.sub(r"\((R|TM)\)|\b(CPU|Processor)\b|@.*", " ", device, flags=re.IGNORECASE)
    return re.sub(r"[^a-z0-9]+", "-", bare.lower()).strip("-")


def keep(path: Path, folder: Path, device: str | None = None) -> Path:
    """Write what may be published of `path` into `folder`, as <date>-<device>.json; returns that file's path.

    ValueError of one line for what cannot be read, for figures of a run that only showed that all works (--rounds),
    and where there is such a file already: nothing measured is written over.
    """
    whole = load(path)
    runs = parse(whole, str(path))
    if any(what == "rounds" for run in runs for what, _ in run.about):
        raise ValueError(f"{path} ran with --rounds: its figures are worth little; measure again without it")
    target = folder / f"{min(run.date for run in runs)}-{device_word(device or runs[0].device)}.json"
    if target.exists():
        raise ValueError(f"{target} exists: remove it, or give this one another name with --device")
    folder.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps(scrub(whole), indent=1) + "\n", encoding="utf-8")
    return target
