"""`make report`: tables and plots of what `make bench` or `make gpu` measured, and its way into the repository.

python bench/report.py [FILE]          its page (.md) beside it, its plots in a folder of its name (build/bench.json)
python bench/report.py --keep [FILE]   the same in bench/results/, of a copy without host, user and paths, and --readme
python bench/report.py --readme        write the blocks of README and docs, and the results' pages, again
python bench/report.py --check         change nothing; status 1 if a block or a page is not what the JSON there says
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import plots
import quote
import results
import scrub
import tables

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "bench" / "results"
# Files with blocks of figures (quote.py), and the way from their place to the results.
QUOTING = {
    ROOT / "README.md": "bench/results",
    ROOT / "docs" / "testing.md": "../bench/results",
    ROOT / "docs" / "methods.md": "../bench/results",
}


def main(arguments: list[str]) -> int:
    """0 if all went well, 1 if --check found a difference, 2 with one line on stderr if something cannot be read."""
    parser = argparse.ArgumentParser(prog="bench/report.py", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("file", nargs="?", type=Path, default=ROOT / "build" / "bench.json")
    does = parser.add_mutually_exclusive_group()
    does.add_argument("--keep", action="store_true", help="put FILE into bench/results/")
    does.add_argument("--readme", action="store_true", help="fill the blocks of README.md and docs/")
    does.add_argument("--check", action="store_true", help="do they, and the pages, say what the results say?")
    parser.add_argument("--device", default=None, help="with --keep: the device's name in the file's")
    parser.add_argument("--no-plots", action="store_true")
    options = parser.parse_args(arguments)
    try:
        if options.check:
            return check()
        if not options.readme:
            path = scrub.keep(options.file, RESULTS, options.device) if options.keep else options.file
            write(path, not options.no_plots)
        if options.readme or options.keep:
            for file, text in expected().items():
                file.write_text(text, encoding="utf-8")
    except ValueError as error:
        print(f"report: {error}", file=sys.stderr)
        return 2
    return 0


def write(path: Path, with_plots: bool = True) -> None:
    """The page and the plots of one JSON file, beside it."""
    runs = results.read(path)
    try:
        for bench, cases in tables.by_bench(case for run in runs for case in run.cases).items() if with_plots else ():
            plots.draw(bench, cases, path.with_suffix(""))
    except ImportError as error:
        print(f"report: without plots: {error}", file=sys.stderr)
    target = path.with_suffix(".md")
    target.write_text(page(path), encoding="utf-8")
    print(f"report: {target}")


def page(path: Path) -> str:
    """The Markdown page of a JSON file, with those plots that lie in the folder of its name."""
    runs = results.read(path)
    parts = [
        f"# {runs[0].device}, {min(run.date for run in runs)}",
        f"Written by `bench/report.py` from `{path.name}`.",
    ]
    for run in runs:
        parts.append(tables.head(run))
        for bench, cases in tables.by_bench(run.cases).items():
            files = [path.with_suffix("") / f"{bench}-{kind.stem}.png" for kind in plots.KINDS]
            images = [
                (f"{bench}: {kind.title}", f"{path.stem}/{file.name}")
                for kind, file in zip(plots.KINDS, files, strict=True)
                if file.is_file()
            ]
            parts.append(tables.section(bench, cases, images))
    return "\n\n".join(parts) + "\n"


def expected() -> dict[Path, str]:
    """What README.md, the documentation and the pages of all results have to say, by file."""
    quoting = {file: quote.filled(file.read_text(encoding="utf-8"), RESULTS, link) for file, link in QUOTING.items()}
    return quoting | {path.with_suffix(".md"): page(path) for path in sorted(RESULTS.glob("*.json"))}


def check() -> int:
    differ = [
        file for file, text in expected().items() if not file.is_file() or file.read_text(encoding="utf-8") != text
    ]
    for file in differ:
        print(f"report: {file.name} is not what bench/results/ says: python bench/report.py --readme", file=sys.stderr)
    return int(bool(differ))


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
