"""Figures as Markdown: a head that says where they were measured, and a table for each bench file."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from cases import Case, is_floor, order
from results import Run

NONE = "–"
SHARED = (
    "Others may have used the machine meanwhile: quote the ratios, which come from one interleaved run, and no "
    "milliseconds."
)


def markdown(head: Sequence[str], body: Iterable[Sequence[str]], text: int = 1) -> str:
    """A Markdown table; the first `text` columns are text, the others numbers."""
    rows = [head, ["---"] * text + ["---:"] * (len(head) - text), *body]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows)


def digits(value: float) -> str:
    """Three figures, but no fewer than stand before the point."""
    return f"{value:,.0f}" if abs(value) >= 99.95 else f"{value:#.3g}"


def percent(value: float) -> str:
    return f"{value:.0f} %"


def by_bench(cases: Iterable[Case]) -> dict[str, list[Case]]:
    """Bench -> its cases, both in the order of the file."""
    found: dict[str, list[Case]] = {}
    for case in cases:
        found.setdefault(case.bench, []).append(case)
    return found


def contestants(cases: Iterable[Case], of: Callable[[Case], Iterable[str]] = lambda case: case.ms) -> list[str]:
    """Everybody who takes part in any of them, in the order of every table, legend and plot."""
    return sorted({name for case in cases for name in of(case)}, key=order)


def names(cases: Sequence[Case]) -> list[str]:
    """A label a case; with its test's name where the bench has several."""
    several = len({case.test for case in cases}) > 1
    return [f"{case.test.replace('_', ' ')}: {case.label}" if several else case.label for case in cases]


def of_times(cases: Sequence[Case]) -> str:
    """Milliseconds, with the ratio that the bench recorded in brackets, and per cent of the roof."""
    found = contestants(cases)
    roofs = contestants(cases, lambda case: case.roof) if any(case.floor != "frozen" for case in cases) else []

    def cell(case: Case, name: str) -> str:
        if name not in case.ms:
            return NONE
        ratios = case.over_floor if case.floor == "frozen" else case.over_ours | ours_of(case)
        return digits(case.ms[name]) + (f" ({digits(ratios[name])})" if name in ratios else "")

    def roof(case: Case, name: str) -> str:
        return percent(case.roof[name]) if name in case.roof else NONE

    head = ["", *found, *(f"% roof, {name}" for name in roofs)]
    body = [
        [label, *(cell(case, name) for name in found), *(roof(case, name) for name in roofs)]
        for label, case in zip(names(cases), cases, strict=True)
    ]
    return markdown(head, body)


def ours_of(case: Case) -> dict[str, float]:
    """The floor's time in multiples of ours, where the floor is none of a frozen layer."""
    return {case.floor: 1 / case.over_floor["ours"]} if case.floor is not None else {}


def of_dictionary(cases: Sequence[Case], of: Callable[[Case], dict[str, float]], text: Callable[[float], str]) -> str:
    """A table of one figure by contestant; "" where no case has it."""
    cases = [case for case in cases if of(case)]
    found = contestants(cases, of)
    body = [
        [label, *(text(of(case)[name]) if name in of(case) else NONE for name in found)]
        for label, case in zip(names(cases), cases, strict=True)
    ]
    return markdown(["", *found], body) if found else ""


def section(bench: str, cases: Sequence[Case], images: Sequence[tuple[str, str]]) -> str:
    """What is known of one bench; images: (alternative text, link)."""
    floors = contestants(cases, lambda case: filter(is_floor, case.ms))
    if floors and floors[0].startswith("frozen"):
        about = "Medians in ms; in brackets multiples of the time of `frozen`, of graphs that of `frozen, graph`."
    else:
        about = "Medians in ms; in brackets multiples of the time of `ours`: above 1, ours is faster."
        about += f" The roof is `{floors[0]}`." if floors else " The roof is the nearer of a copy and a bare GEMM."
    parts = [f"## {bench}", f"`bench/bench_{bench}.py`. {about}", of_times(cases)]
    for title, table in (
        (
            "What is left of PEFT's overhead over `frozen`:",
            of_dictionary(cases, lambda c: c.share, lambda v: percent(100 * v)),
        ),
        (
            "GB that a step takes at its peak, beyond what lies there between steps:",
            of_dictionary(cases, lambda c: c.memory, digits),
        ),
    ):
        parts += [title, table] if table else []
    parts += [f"![{text}]({link})" for text, link in images]
    return "\n\n".join(parts)


def head(run: Run) -> str:
    """Where it was measured, as a table, and what may not be read out of it."""
    parts = [markdown([f"`make gpu`, {run.part}" if run.part else "measured on", ""], run.about, text=2)]
    if run.left_out:
        parts += ["Left out: " + "; ".join(f"{name}: {why}" for name, why in run.left_out.items()) + "."]
    return "\n\n".join(parts if run.gpu else [*parts, f"**{SHARED}**"])
