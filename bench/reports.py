"""What tests and benches left in their files, and all of it again in few lines.

A bench's line, which bench/conftest.py writes as it ends: name, fullname, params, outcome, why (where it did not pass),
seconds, extra_info as far as it had come, lap_s where it was measured. A session's first line says how it ran.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

MOST = 60  # lines of `brief`
_FAILURES = 15  # of these at most
KEPT = ("name", "fullname", "params", "extra_info", "lap_s")


def outcomes(report: Path) -> dict[str, Any]:
    """Counts of a JUnit file, and what failed and why; nothing where pytest did not get as far as writing it."""
    if not report.is_file():
        return {}
    suites = list(ElementTree.parse(report).getroot().iter("testsuite"))
    total, skipped, bad = (
        sum(int(suite.get(name, 0)) for suite in suites for name in names)
        for names in (("tests",), ("skipped",), ("failures", "errors"))
    )
    failures, reasons = [], {}
    for case in (case for suite in suites for case in suite.iter("testcase")):
        problem = next((found for kind in ("failure", "error") if (found := case.find(kind)) is not None), None)
        if problem is not None:
            failures.append(str(case.get("name")))
            reasons[failures[-1]] = first_line(problem.get("message") or "")
    return {"passed": total - skipped - bad, "skipped": skipped, "failed": bad, "failures": failures} | (
        {"reasons": reasons} if reasons else {}
    )


def benchmarks(lines: Path, start: int = 0) -> tuple[list[dict[str, Any]], dict[str, Any], dict[str, Any] | None]:
    """From byte `start` on: the benches that were measured, counts as of `outcomes` with the wrong answers, and how."""
    measured, how = [], None
    counts: dict[str, Any] = {"passed": 0, "skipped": 0, "failed": 0, "failures": [], "reasons": {}, "wrong": {}}
    for line in _read(lines, start):
        if "name" not in line:
            how = line
            continue
        counts[line["outcome"]] += 1
        if line["outcome"] == "failed":
            counts["failures"].append(line["name"])
            counts["reasons"][line["name"]] = line["why"]
        for contestant, what in (line["extra_info"].get("wrong") or {}).items():
            counts["wrong"][f"{line['name']}: {contestant}"] = what
        if "ours_ms" in line["extra_info"]:
            measured.append({key: line.get(key) for key in KEPT})
    return measured, counts, how


def _read(lines: Path, start: int) -> list[dict[str, Any]]:
    if not lines.is_file():
        return []
    with lines.open("rb") as file:
        file.seek(start)
        # The last line of a process that was killed may be a part of one.
        return [json.loads(line) for line in file if line.endswith(b"\n")]


def first_line(text: str) -> str:
    return next((line.strip() for line in text.splitlines() if line.strip()), "")


def brief(found: dict[str, Any], most: int = MOST) -> list[str]:
    """What a file of `make gpu` says, in that many lines: how each part ended, what failed or is wrong, tables."""
    parts: dict[str, Any] = found.get("parts") or {}
    lines = [f"{name}: {ended(call, done)}" for name, part in parts.items() for call, done in _calls(part)]
    bad = [line for name, part in parts.items() for line in _bad(name, part)]
    lines += bad[:_FAILURES] + ([f"... and {len(bad) - _FAILURES} more that failed"] if len(bad) > _FAILURES else [])
    for part in parts.values():
        lines += tables_of(part.get("benchmarks") or [])
    return lines if len(lines) <= most else [*lines[: most - 1], f"... and {len(lines) - most + 1} lines more"]


def _calls(part: dict[str, Any]) -> Iterable[tuple[str, dict[str, Any]]]:
    return (part.get("calls") or {}).items()


def ended(call: str, done: dict[str, Any]) -> str:
    counts = [f"{done[key]} {key}" for key in ("passed", "skipped", "failed") if key in done]
    took = f"exit {done.get('exit')} after {done.get('seconds', 0):.0f} s of {done.get('limit', 0)}"
    return ", ".join([call, *counts, took, *([done["stopped"]] if "stopped" in done else [])])


def _bad(name: str, part: dict[str, Any]) -> Iterable[str]:
    for _, done in _calls(part):
        reasons = done.get("reasons") or {}
        yield from (f"FAILED {name}: {case}: {reasons.get(case, '')[:120]}" for case in done.get("failures") or [])
        yield from (f"WRONG {name}: {case} {what}" for case, what in (done.get("wrong") or {}).items())


def tables_of(benches: Sequence[dict[str, Any]]) -> list[str]:
    """A line for every bench; those with the same columns share a table. Its first cell says what its ratios are to."""
    tables: dict[tuple[str, ...], list[list[str]]] = {}
    for bench in benches:
        info = bench["extra_info"]
        ratios = "x frozen" if "frozen ms" in info else "" if "rows" in info else "x ours"
        row = {ratios: bench["name"].removeprefix("test_"), **columns(info)}
        tables.setdefault(tuple(row), []).append([cell(value) for value in row.values()])
    return [line for head, body in tables.items() for line in aligned(head, body)]


def columns(info: dict[str, Any]) -> dict[str, Any]:
    """What a reader asks first of a bench: of a product its share of the roof, else ratios. The rest is in the file."""
    rows = info.get("rows") or [{}]
    if "us" in rows[0]:
        return {key: rows[0][key] for key in ("us", "torch us", "torch / ours", "% roof")}
    if "frozen ms" in info:
        found = {"frozen ms": info["frozen ms"]}
        for key, value in info.items():
            name, over, rest = key.rpartition(" / frozen")
            if not over or rest or ", base dtype" in name or name in ("frozen, graph", "mm+addmm_"):
                continue
            # A graph's ratio is to the frozen layer's graph.
            found[name] = info.get(f"{key}, graph") if name.endswith(", graph") else value
        others = {"overhead left": "ours share", "memory / PEFT": "ours memory / PEFT"}
        return found | {name: info[key] for name, key in others.items() if key in info}
    found = {"ours ms": info["ours_ms"]}
    found |= {"graph ms": info["ours, graph ms"]} if "ours, graph ms" in info else {}
    # How many times ours the others take; those replayed from a graph, the graph of ours.
    return found | {key.split(" / ")[0]: value for key, value in info.items() if " / ours" in key}


def cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) < 1e4 else f"{value:,.0f}"
    return "" if value is None else str(value)


def aligned(head: Sequence[str], body: list[list[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(head, *body, strict=True)]
    lines = []
    for row in (head, *body):
        first, *rest = (cell.rjust(width) for cell, width in zip(row, widths, strict=True))
        lines.append("  ".join([row[0].ljust(len(first)), *rest]))
    return lines
