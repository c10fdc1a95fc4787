"""A disk that is full, or not to be written to: one line, exit code 2, and what was there before is whole."""

from __future__ import annotations

import json
import os
import random
import shutil
from pathlib import Path

import pytest

FULL, BY_DEFAULT = 24, 4
NUMBERS = [pytest.param(n, marks=[] if n < BY_DEFAULT else pytest.mark.exhaustive) for n in range(FULL)]


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.mark.parametrize("number", NUMBERS)
def test_full_at_an_event(small, tools, whole, events, tmp_path, number):
    """At one of the places where the run makes a folder, writes, flushes or renames. Resumed, it ends as ever."""
    places = [n for n, event in enumerate(events, 1) if event.split()[0] in ("fsync", "replace", "mkdir", "write")]
    places = [n for n in places if events[n - 1].endswith("before")]
    part = (number * 5) % FULL
    at = places[int((part + random.Random(number).random()) * len(places) / FULL)]
    folder = tmp_path / "tiny"
    line = tools.complaint(small.run(folder, at=at, how="full"))
    assert "No space left on device" in line
    assert not [path for path in folder.rglob("*") if path.name.endswith(".tmp")]
    answer = small.run(folder, "--resume")
    assert answer["code"] == 0, answer["err"]
    assert tools.changed(folder, whole) == []


# The largest file that the system lets it write -> the first one that does not fit. Real writes, cut by the kernel.
LIMITS = {
    500: "identity.json",
    2000: "state/seqlora-0/slao_state.safetensors",
    2800: "results.json",
    9000: "report/ends.svg",
    60000: "report.html",
}


@pytest.mark.parametrize(
    "limit", [n if n in (500, 2800, 60000) else pytest.param(n, marks=pytest.mark.exhaustive) for n in LIMITS]
)
def test_files_that_do_not_fit(small, tools, whole, tmp_path, limit):
    folder = tmp_path / "tiny"
    line = tools.complaint(small.run(folder, fsize=limit))
    assert f"cannot write {folder / LIMITS[limit]}: " in line
    assert "what was there before is whole" in line
    present = {path.relative_to(folder) for path in folder.rglob("*") if path.is_file()}
    assert present < {path.relative_to(whole) for path in whole.rglob("*") if path.is_file()}
    kept = folder / LIMITS[limit]
    assert not kept.exists() or json.loads(kept.read_text())["unfinished"]  # the results of an earlier task, whole
    answer = small.run(folder, "--resume")
    assert answer["code"] == 0, answer["err"]
    assert tools.changed(folder, whole) == []


def test_a_report_that_does_not_fit_leaves_the_old_one(small, tools, whole, tmp_path):
    folder = tmp_path / "tiny"
    shutil.copytree(whole, folder)
    before = files(folder)
    line = tools.complaint(small.server.run(["report", str(folder)], tmp_path / "log", fsize=60_000))
    assert f"cannot write {folder / 'report.html'}: File too large" in line
    assert files(folder) == before


# command -> (inputs, flags behind -o, the most bytes of a file, the writes at which the disk is full, what it makes)
OFFLINE = {
    "merge": (["{adapters}/seqlora-0", "{adapters}/slao-0"], [], 1000, [3], "adapter_model.safetensors"),
    "compress": (["{adapters}/seqlora-0"], ["--rank", "1"], 1000, [3], "adapter_model.safetensors"),
    "fold": (["{base}", "{adapters}/seqlora-0"], [], 10_000, [2, 4], "model.safetensors"),
}


@pytest.mark.parametrize("command", OFFLINE)
def test_what_does_not_fit_leaves_nothing(command, small, tools, whole, saved_bert, tmp_path):
    given, flags, fsize, full, made = OFFLINE[command]
    adapters, base = tmp_path / "adapters", tmp_path / "base"
    shutil.copytree(whole / "adapters", adapters)
    shutil.copytree(saved_bert, base)
    inputs = [each.format(adapters=adapters, base=base) for each in given]
    before = files(adapters), files(base)
    for out in (tmp_path / "out", tmp_path / "new" / "out"):
        words = [command, *inputs, "-o", str(out), *flags]
        assert "File too large" in tools.complaint(small.server.run(words, tmp_path / "log", fsize=fsize))
        for at in full:
            assert "No space left" in tools.complaint(small.server.run(words, tmp_path / "log", at=at, how="full"))
        assert not out.exists()
        assert not list(out.parent.glob(".*"))
    assert (files(adapters), files(base)) == before
    answer = small.server.run(words, tmp_path / "log")
    assert answer["code"] == 0, answer["err"]
    assert (out / made).is_file()


def locked(folder: Path) -> None:
    """Nobody may write in it or below."""
    for path in [folder, *folder.rglob("*")]:
        path.chmod(0o555 if path.is_dir() else 0o444)


def unlocked(folder: Path) -> None:
    for path in [folder, *folder.rglob("*")]:
        path.chmod(0o755 if path.is_dir() else 0o644)


@pytest.mark.parametrize("command", ["run", "run --resume", "run --overwrite", "report", "merge"])
def test_read_only(small, tools, whole, tmp_path, command):
    place = tmp_path / "place"
    folder = place / "tiny"
    shutil.copytree(whole, folder)
    before = files(place)
    locked(place)
    try:
        if command.startswith("run"):
            target = place / "new" if command == "run" else folder
            answer = small.run(target, *command.split()[1:], modes=True, log=str(tmp_path / "log"))
        elif command == "report":
            answer = small.server.run(["report", str(folder)], tmp_path / "log", modes=True)
        else:
            adapters = [str(folder / "adapters" / name) for name in ("seqlora-0", "slao-0")]
            answer = small.server.run(["merge", *adapters, "-o", str(place / "out")], tmp_path / "log", modes=True)
        said = tools.complaint(answer)
        assert ("may not be written into" if command.startswith("run") else "Permission denied") in said
        assert files(place) == before
        assert os.listdir(place) == ["tiny"]
    finally:
        unlocked(place)
