"""The experiments' results as they are kept: what `slao report` needs of each run, and one Markdown page of tables.

    python bench/experiments.py keep runs/clinc150 runs/python_docs ...   # into bench/experiments/<name>.json
    python bench/experiments.py keep runs/a runs/a2 --as a                # further seeds or orders of one experiment
    python bench/experiments.py page                                      # tables and figures of the page anew
    python bench/experiments.py --check                                   # do the tables say what the files say?

A file of merge_lab.py's scores (scores_test.json) is copied into bench/experiments/ by hand.

In the page a table stands between `<!-- name -->` and `<!-- end -->`, with the report's figure of what accuracy costs
(bench/experiments/name.svg) where methods of SIZES memories are compared. Between `<!-- name against method -->` and
`<!-- end -->` stands how far the other methods are from that one, paired. Everything else is written by hand.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from slao.report import load, markdown, parse
from slao.report.figures_scores import trade
from slao.report.finding import differences
from slao.report.tables import tabulated

HERE = Path(__file__).parent
KEPT = HERE / "experiments"
PAGE = HERE / "experiments.md"
# What tables and figures do without: losses of every tenth step, and tables of every layer and pair of tasks.
DROPPED = ("losses", "similarity")
CAPTION = "Accuracy against kept memory and forgetting"
SIZES = 4  # so many different amounts of kept memory make a figure of them worth its room
MARK = re.compile(r"(<!-- ([\w-]+)(?: against ([\w ]+))? -->\n).*?(<!-- end -->)", re.S)


def reduced(results: dict[str, Any]) -> dict[str, Any]:
    """A run's results without paths and without what takes most of their room."""
    methods = {}
    for name, entry in results["methods"].items():
        methods[name] = {key: _rounded(value) for key, value in entry.items() if key not in DROPPED}
    settings = json.loads(json.dumps(results["settings"]))
    settings["stream"].pop("path", None)
    return {**results, "methods": methods, "settings": settings}


def _rounded(value: Any) -> Any:
    if isinstance(value, list):
        return [_rounded(entry) for entry in value]
    return round(value, 4) if isinstance(value, float) else value


def keep(folders: list[Path], name: str | None = None) -> Path:
    """Store the results of the runs in `folders`, one experiment together; returns the file."""
    KEPT.mkdir(exist_ok=True)
    path = KEPT / f"{name or folders[0].name}.json"
    content = joined([reduced(load(folder)) for folder in folders])
    path.write_text(json.dumps(content, separators=(",", ":"), ensure_ascii=False) + "\n", "utf-8")
    return path


def joined(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Runs of other seeds, orders or methods as one. ValueError for another setting, or a training done twice."""
    whole, *others = runs
    free = ("name", "seeds", "orders", "methods")
    for other in others:
        mine, theirs = ({k: v for k, v in one["settings"].items() if k not in free} for one in (whole, other))
        odd = [key for key in ("stream", "model", "metric") if whole[key] != other[key]]
        odd += [f"settings.{key}" for key in sorted(mine | theirs) if mine.get(key) != theirs.get(key)]
        if odd:
            raise ValueError(f"these runs are no one experiment: {', '.join(odd)} differ")
        for key in ("seeds", "orders"):
            both = (whole["settings"][key] or []) + (other["settings"][key] or [])
            whole["settings"][key] = list(dict.fromkeys(both)) or None
        whole["settings"]["methods"] |= other["settings"]["methods"]
        for name, entry in other["methods"].items():
            before = whole["methods"].setdefault(name, {key: [] for key in entry})
            trained = [list(zip(one["seeds"], one.get("orders", one["seeds"]), strict=True)) for one in (before, entry)]
            if set(trained[0]) & set(trained[1]):
                raise ValueError(f"{name} was trained twice at one seed and order")
            whole["methods"][name] = {key: before[key] + values for key, values in entry.items()}
    return whole


def page(text: str, draw: bool = False) -> str:
    """`text` with every table written anew from its file. draw: the figures too. ValueError for a table without one."""

    def block(found: re.Match[str]) -> str:
        path = KEPT / f"{found[2]}.json"
        if not path.is_file():
            raise ValueError(f"the page has a table {found[2]!r}, but there is no {path.name} in {KEPT.name}/")
        content = json.loads(path.read_text("utf-8"))
        if found[3]:
            return f"{found[1]}{_against(found[3], content)}\n{found[4]}"
        shown = ""
        if compares_sizes(content):
            shown = f"\n![{CAPTION}]({KEPT.name}/{path.stem}.svg)\n"
            plot = trade(parse(content), str(content["metric"])) if draw else None
            if plot is not None:
                replace(plot, name=path.stem).write(KEPT)
        return f"{found[1]}{_table(content)}\n{shown}{found[4]}"

    return MARK.sub(block, text)


def compares_sizes(content: Any) -> bool:
    """Whether the methods of a run keep enough different amounts of memory for a figure of what accuracy costs."""
    methods = parse(content) if isinstance(content, dict) else []
    sizes = {round(float(method.state[:, 1].mean()), 2) for method in methods if method.state is not None}
    return len(sizes) >= SIZES


def _table(content: Any) -> str:
    """Of a run's results, or of what merge_lab.py scored."""
    if isinstance(content, dict):
        return markdown(content)
    import merge_lab

    return merge_lab.table(content)


def _against(name: str, content: Any) -> str:
    """How far the other methods of a run are from the one called `name`."""
    methods = parse(content)
    anchor = next((method for method in methods if method.name == name), None)
    if anchor is None:
        raise ValueError(f"a table of differences to {name!r}: the run has {', '.join(m.name for m in methods)}")
    told = differences(methods, anchor)
    assert told is not None
    return tabulated(told[1])


def main() -> int:
    """Entry point; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="status 1 if a table is not what its file says")
    commands = parser.add_subparsers(dest="command")
    keeping = commands.add_parser("keep")
    keeping.add_argument("folders", nargs="+", type=Path)
    keeping.add_argument("--as", dest="name", help="all of them together, as one experiment of this name")
    commands.add_parser("page")
    options = parser.parse_args()
    if options.command == "keep":
        for folders in [options.folders] if options.name else [[folder] for folder in options.folders]:
            print(keep(folders, options.name))
        return 0
    before = PAGE.read_text("utf-8")
    after = page(before)
    if options.check:
        print("the tables say what the files say" if after == before else "run: python bench/experiments.py page")
        return int(after != before)
    for stale in KEPT.glob("*.svg"):
        stale.unlink()
    PAGE.write_text(page(before, draw=True), "utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
