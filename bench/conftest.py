"""Options of the benches, and their table: `pytest bench/bench_fold.py --device cpu --model llama-3-8b`."""

from __future__ import annotations

import json
import sys
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))  # shapes, race

from reports import aligned, cell


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda")
    parser.addoption("--model", default=None, help="see bench/shapes.py (cuda: llama-3-8b, cpu: llama-3.2-1b)")
    parser.addoption("--threads", default=None, type=int, help="CPU threads (default: torch's)")
    parser.addoption("--best-of", default=1, type=int, help="repeat the races against a frozen base, take the best")
    parser.addoption("--compile", action="store_true", help="PEFT under torch.compile too (slow to start)")
    parser.addoption("--rounds", default=None, type=int, help="at most so many rounds: figures are then worth little")
    parser.addoption("--seconds", default=1.0, type=float, help="of a race on a CPU, if that is three rounds at least")
    parser.addoption("--peft-svd", default="", help="shapes, see bench/bench_weighted_merge.py (slow)")
    parser.addoption("--merge-dtype", default="float32", help="of the adapters on the disk, see bench/disk_merge.py")
    parser.addoption("--blocks", default=None, type=int, help="of the model on the disk, see bench/disk_fold.py")
    parser.addoption("--lines", default=None, help="a file that gets a line of JSON for every bench as it ends")
    parser.addoption("--rivals", default="axolotl,unsloth", help="on a GPU, where installed; see bench/rivals.py")


def pytest_configure(config: pytest.Config) -> None:
    import race

    if config.option.model is None:  # the layers of an 8B model take a CPU minutes
        config.option.model = "llama-3-8b" if config.getoption("--device") == "cuda" else "llama-3.2-1b"
    race.at_most, race.seconds = config.getoption("--rounds"), config.getoption("--seconds")


@pytest.hookimpl(optionalhook=True)  # pytest-benchmark's
def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    """What a figure depends on besides the machine goes into the JSON too."""
    machine_info["slao_kernels"] = how(config)


def how(config: pytest.Config) -> dict[str, Any]:
    """Versions, options and backends of this run."""
    from environment import PACKAGES, version

    from slao_kernels import dispatch, native

    device = config.getoption("--device")

    def chosen(op: str) -> str:
        try:
            return dispatch.choose(op, device)
        except ValueError as error:  # a wish that this op cannot meet; not to lose all figures over it
            return str(error)

    return {
        "versions": {package: version(package) for package in PACKAGES},
        "options": {
            name: config.getoption(f"--{name}") for name in ("model", "rounds", "threads", "best-of", "compile")
        },
        "backends": {op: chosen(op) for op in dispatch.OPS},
        "instruction set": native.instruction_set() if device == "cpu" else None,
    }


# What was measured is written down at once: a run may be killed.


def pytest_collection_finish(session: pytest.Session) -> None:
    write_line(session.config, how(session.config))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if report.when == "call" or report.outcome != "passed":
        benchmark = getattr(item, "funcargs", {}).get("benchmark")
        statistics = getattr(benchmark, "stats", None)
        why = report.longrepr[-1] if isinstance(report.longrepr, tuple) else report.longreprtext
        line = {"name": item.name, "fullname": item.nodeid, "outcome": report.outcome, "seconds": report.duration}
        line["why"] = last_line(why)
        line["params"] = getattr(getattr(item, "callspec", None), "params", None)
        line["extra_info"] = getattr(benchmark, "extra_info", {})
        line["lap_s"] = None if statistics is None else statistics.stats.median
        write_line(item.config, line)
    return report


def last_line(text: str) -> str:
    """The line that says what went wrong: of a traceback the last one marked E."""
    lines = [line for line in text.splitlines() if line.strip()]
    marked = [line[2:] for line in lines if line.startswith("E ")]
    return (marked[:1] or lines[-1:] or [""])[0].strip()


def write_line(config: pytest.Config, line: dict[str, Any]) -> None:
    path = config.getoption("--lines")
    if path is not None:
        with open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps(line, default=str) + "\n")


@pytest.fixture
def device(request: pytest.FixtureRequest) -> str:
    threads = request.config.getoption("--threads")
    if threads:
        torch.set_num_threads(threads)
    return str(request.config.getoption("--device"))


@pytest.fixture
def layers(request: pytest.FixtureRequest) -> list[tuple[int, int]]:
    """(out_features, in_features) of every linear layer of the chosen model."""
    from shapes import GEOMETRIES

    return GEOMETRIES[request.config.getoption("--model")].all_layers()


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    session = getattr(config, "_benchmarksession", None)
    against_frozen, rows, wrong, left_out = [], [], [], {}
    for bench in getattr(session, "benchmarks", []):
        info = bench.extra_info
        left_out |= info.get("left out", {})
        wrong += [f"WRONG: {bench.name}: {who} {what}" for who, what in info.get("wrong", {}).items()]
        if "ours_ms" not in info:  # interrupted, or failed, before its figures were recorded
            continue
        if "rows" in info:
            rows += [{"": bench.name.removeprefix("test_"), **row} for row in info["rows"]]
            continue
        if "frozen ms" in info:
            against_frozen.append((bench.name, info))
            continue
        cells = [f"ours {info['ours_ms']:.2f} ms"]
        for key, value in info.items():
            peer, slash, _ = key.partition(" / ours")  # a graph's is to the graph of ours
            if slash:
                cells.append(f"{peer} {info[f'{peer} ms']:.2f} ms = {value:.2f}x")
        if "worst residual" in info:
            cells.append(f"worst residual {info['worst residual']:.1e}")
        terminalreporter.write_line(f"{bench.name}: " + ", ".join(cells))
    for line in frozen_table(against_frozen) + rows_table(rows) + wrong:
        terminalreporter.write_line(line)
    for name, reason in left_out.items():
        terminalreporter.write_line(f"left out: {name}: {reason}")


def rows_table(rows: list[dict[str, Any]]) -> list[str]:
    """Lines of benches that wrote their own rows; those with the same columns share a table. None is an empty cell."""
    tables: dict[tuple[str, ...], list[list[str]]] = {}
    for row in rows:
        tables.setdefault(tuple(row), []).append([cell(value) for value in row.values()])
    return [line for head, body in tables.items() for line in aligned(head, body)]


def frozen_table(rows: list[tuple[str, dict[str, Any]]]) -> list[str]:
    """Lines of benches against a frozen base: a contestant's ms and its ratio to frozen, then other figures of ours."""
    tables: dict[tuple[str, ...], list[list[str]]] = {}
    for name, info in rows:
        cells = {"ms (x frozen)": name}
        for key, value in info.items():
            peer = key.removesuffix(" ms")
            if key == "frozen ms":
                cells[peer] = f"{value:.3f}"
            elif peer != key:
                cells[peer] = f"{value:.3f} ({info[f'{peer} / frozen']:.2f})"
            elif key.startswith("ours") and not key.endswith(("_ms", " / frozen")):
                cells[key] = f"{value:.2f}"
        tables.setdefault(tuple(cells), []).append(list(cells.values()))
    return [line for head, body in tables.items() for line in aligned(head, body)]
