"""Figures in the README: copied out of bench/results/ and bench/experiments/ between markers, so that nobody types one.

<!-- bench:cpu headline -->     the newest result of a CPU (or gpu), and of it what a reader asks first; "summary": a
<!-- /bench -->                 line for each bench; a bench's name: its ratios. Empty without a result.
<!-- bench:experiment NAME -->  of bench/experiments/NAME.json accuracy, forgetting and memory of some methods; of
<!-- /bench -->                 NAME,NAME,... of all methods, side by side.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from statistics import mean, median
from typing import Any

import numpy as np
import results
import tables
from cases import Case
from results import Run

BLOCK = re.compile(r"(<!-- bench:(\S+) (\S+) -->\n)(.*?)(<!-- /bench -->)", re.DOTALL)
MARKER = re.compile(r"<!-- /?bench\b")
HEADLINE = {  # bench and test: what it is, and whose time is divided by ours
    ("training_step", "step"): ("a training step (MiniLM, a small Llama)", "PEFT"),
    ("language_model", "step"): ("a training step of Gemma 3 270M's shapes, with its loss", "PEFT"),
    ("lora_linear", "layer"): ("a LoRA layer, forward, or with its backward", "PEFT"),
    ("orthogonal_init", "orthogonal_init"): ("A re-based in all layers", "qr loop"),
    ("scaled_merge", "scaled_merge"): ("B merged in all layers", "_foreach_lerp_"),
    ("fold", "fold"): ("adapters folded into all weights", "PEFT merge"),
}
SHOWN = ("seqlora", "slao", "slao adaptive", "slao product", "incslao", "inclora", "joint")


def filled(readme: str, folder: Path, link: str) -> str:
    """`readme` with every block as the results in `folder` have it; link: from the README's place to that folder.

    ValueError of one line where a marker is misspelt or alone, or asks for what there is not.
    """
    blocks = list(BLOCK.finditer(readme))
    if not blocks or len(MARKER.findall(readme)) != 2 * len(blocks):
        raise ValueError(
            "markers are pairs of lines, <!-- bench:cpu summary --> and <!-- /bench -->, at least one pair"
        )
    for block in blocks:
        if MARKER.search(block[4]):
            raise ValueError(f"{block[1].strip()} has no <!-- /bench --> of its own")
    return BLOCK.sub(lambda block: block[1] + text(block[2], block[3], folder, link) + block[5], readme)


def text(kind: str, what: str, folder: Path, link: str) -> str:
    """What stands in one block, with the line break at its end; "" if no result is of this kind."""
    if kind == "experiment":
        kept = {name: _kept(name, folder.parent / "experiments") for name in what.split(",")}
        return side_by_side(kept) if len(kept) > 1 else experiment(kept[what])
    if kind not in ("cpu", "gpu"):
        raise ValueError(f"<!-- bench:{kind} {what} -->: cpu, gpu or experiment is expected, not {kind}")
    found = newest(kind, folder)
    if found is None:
        return ""
    path, runs = found
    benches = tables.by_bench(case for run in runs for case in run.cases)
    if what not in ("headline", "summary", *benches):
        raise ValueError(f"<!-- bench:{kind} {what} -->: {path.name} has headline, summary, {', '.join(benches)}")
    tests = {"headline": headline, "summary": summary}
    table = tests[what](benches) if what in tests else ratios(benches[what])
    source = f"[{runs[0].device}, {runs[0].date}]({link}/{path.stem}.md)"
    return f"{table}\n\n{source}: ratios of medians of one interleaved run.\n"


def newest(kind: str, folder: Path) -> tuple[Path, list[Run]] | None:
    """The latest result of a kind, by the date that file names begin with."""
    for path in sorted(folder.glob("*.json"), reverse=True):
        runs = [run for run in results.read(path) if run.gpu == (kind == "gpu") and run.cases]
        if runs:
            return path, runs
    return None


def ratios(cases: list[Case]) -> str:
    """Everybody's time in multiples of ours, by case."""
    return tables.of_dictionary(cases, lambda case: case.over_ours | tables.ours_of(case), tables.digits)


def summary(benches: dict[str, list[Case]]) -> str:
    """A line for each test of each bench."""
    body = []
    for bench, cases in benches.items():
        tests = dict.fromkeys(case.test for case in cases)
        for test in tests:
            own = [case for case in cases if case.test == test]
            name = f"`{bench}`" + (f", {test.replace('_', ' ')}" if len(tests) > 1 else "")
            body += [[name, peers(own), roof(own), str(len(own))]]
    head = ["", "time in multiples of ours: median (lowest to highest)", "ours, % of the roof", "cases"]
    return tables.markdown(head, body, text=3)


def headline(benches: dict[str, list[Case]]) -> str:
    """Of each operation its time in multiples of ours by the one peer that users have today."""
    body = []
    for (bench, test), (words, peer) in HEADLINE.items():
        values = [
            case.over_ours[peer] for case in benches.get(bench, ()) if case.test == test and peer in case.over_ours
        ]
        if values:
            body.append([words, f"`{peer}`" if peer != "PEFT" else peer, spread(values), str(len(values))])
    return tables.markdown(["", "against", "its time / ours: median (range)", "cases"], body, text=2)


def experiment(kept: dict[str, Any]) -> str:
    """Mean ± deviation over runs, and what is kept after the last task, of the methods of `SHOWN` that it has."""
    body = []
    for label in (label for label in SHOWN if label in kept["methods"]):
        of = kept["methods"][label]
        body.append([f"`{label}`", _mean(of["AA"]), _mean(of["BWT"]), f"{_memory(of)[-1]:.2f}", str(len(of["AA"]))])
    return tables.markdown(["", "final accuracy (AA)", "backward transfer (BWT)", "kept, MB", "runs"], body) + "\n"


def side_by_side(kept: dict[str, dict[str, Any]]) -> str:
    """The same of all methods of several runs, in the order of their files, in which they appear first."""
    labels = dict.fromkeys(label for one in kept.values() for label in one["methods"])
    body = []
    for label in labels:
        row = [f"`{label}`"]
        for one in kept.values():
            of = one["methods"].get(label)
            if of is None:
                row += [tables.NONE] * 3
                continue
            sizes = dict.fromkeys(f"{size:.2f}" for size in _memory(of))
            row += [_mean(of["AA"]), _mean(of["BWT"]), " → ".join(sizes)]
        body.append(row)
    head = [f"{name}: {what}" for name in kept for what in ("AA", "BWT", "kept, MB")]
    return tables.markdown(["", *head], body) + "\n"


def _kept(name: str, folder: Path) -> dict[str, Any]:
    path = folder / f"{name}.json"
    if not path.is_file():
        raise ValueError(f"<!-- bench:experiment {name} -->: there is no {path.name} in bench/experiments/")
    content: dict[str, Any] = json.loads(path.read_text("utf-8"))
    return content


def _memory(method: dict[str, Any]) -> tuple[float, float]:
    """MB after the first task and after the last, mean over runs."""
    first, last = (mean(run[at] for run in method["state_mb"]) for at in (0, -1))
    return first, last


def _mean(values: list[float | None]) -> str:
    found = np.array([value for value in values if value is not None])
    if not len(found):
        return tables.NONE
    # numpy's mean, as in the report's tables: where the digit that is rounded is a 5, both go one way.
    return f"{found.mean():.3f}" + (f" ± {found.std(ddof=1):.3f}" if len(found) > 1 else "")


def peers(cases: list[Case]) -> str:
    found = []
    for name in tables.contestants(cases, lambda case: case.over_ours):
        values = [case.over_ours[name] for case in cases if name in case.over_ours]
        found.append(f"{name} {spread(values)}")
    return "; ".join(found) or tables.NONE


def spread(values: list[float]) -> str:
    middle = tables.digits(median(values))
    if len(values) == 1:
        return middle
    return f"{middle} ({tables.digits(min(values))} to {tables.digits(max(values))})"


def roof(cases: list[Case]) -> str:
    values = [case.roof["ours"] for case in cases if "ours" in case.roof]
    if not values:
        return tables.NONE
    ends = dict.fromkeys(f"{value:.0f}" for value in (min(values), max(values)))
    return f"{' to '.join(ends)} % ({cases[0].floor or 'copy or GEMM'})"
