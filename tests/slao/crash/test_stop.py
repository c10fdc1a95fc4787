"""Ctrl-C and SIGTERM: the step, or the task that is being ended, is finished; one line; and the run can go on."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from slao.checkpoint import read_state

GO_ON = "the same command with --resume goes on from there"
CODES = {"SIGINT": 130, "SIGTERM": 143}


def place(events: list[str], name: str, count: int) -> int:
    """The number of the event that is the `count`-th of its name."""
    return [n for n, event in enumerate(events, 1) if event == name][count - 1]


def finished_tasks(folder: Path) -> dict[str, int]:
    found = folder.glob("state/*/slao_state.safetensors")
    return {path.parent.name: len(read_state(path)[1]["lambdas"]) for path in found}


# Signal, event, which of that name -> tasks that are finished, and steps and ends of tasks begun and ended.
CASES = {
    "within a task": ("SIGTERM", "step before", 3, {"seqlora-0": 1}, (3, 3, 1)),
    "in the first task": ("SIGINT", "step before", 1, {}, (1, 1, 0)),
    "in the last step": ("SIGINT", "step before", 4, {"seqlora-0": 2}, (4, 4, 2)),
    "at a task's end": ("SIGTERM", "end_task before", 3, {"seqlora-0": 2, "slao-0": 1}, (6, 6, 3)),
    "while it saves": ("SIGINT", "save before", 1, {"seqlora-0": 1}, (2, 2, 1)),
    "while it exports": ("SIGTERM", "save_pretrained before", 1, {"seqlora-0": 2}, (4, 4, 2)),
    "while it draws": ("SIGTERM", "figure before", 2, {"seqlora-0": 2, "slao-0": 2}, (8, 8, 4)),
}


@pytest.mark.parametrize("case", CASES)
def test_it_stops_and_goes_on(small, tools, whole, events, tmp_path, case):
    name, event, count, tasks, steps = CASES[case]
    folder = tmp_path / "tiny"
    answer = small.run(folder, at=place(events, event, count), how=name)
    line = tools.complaint(answer, CODES[name])
    assert line == f"slao: stopped by {name}; {folder} keeps every finished task: {GO_ON}"
    assert finished_tasks(folder) == tasks
    seen = [answer["events"].count(each) for each in ("step before", "step after", "end_task after")]
    assert tuple(seen) == steps
    answer = small.run(folder, "--resume")
    assert answer["code"] == 0, answer["err"]
    assert tools.changed(folder, whole) == []


@pytest.mark.parametrize("name", CODES)
def test_before_anything_is_written(small, tools, tmp_path, name):
    folder = tmp_path / "tiny"
    assert tools.complaint(small.run(folder, at=1, how=name), CODES[name]) == f"slao: stopped by {name}"
    assert not folder.exists()


def test_a_second_signal_does_not_wait(small, tools, whole, events, tmp_path):
    folder = tmp_path / "tiny"
    answer = small.run(folder, at=place(events, "end_task before", 2), how="SIGTERM+SIGINT")
    assert "stopped by SIGINT; " in tools.complaint(answer, 130)
    assert answer["events"][-1] == "end_task before"
    assert finished_tasks(folder) == {"seqlora-0": 1}
    assert small.run(folder, "--resume")["code"] == 0
    assert tools.changed(folder, whole) == []


def test_a_merge_leaves_nothing(small, tools, whole, tmp_path):
    adapters = [str(whole / "adapters" / name) for name in ("seqlora-0", "slao-0")]
    words = ["merge", *adapters, "-o", str(tmp_path / "out")]
    answer = small.server.run(words, tmp_path / "log", at=3, how="SIGTERM")
    assert tools.complaint(answer, 143) == "slao: stopped by SIGTERM"
    assert os.listdir(tmp_path) == ["log"]


def wait(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 300
    while not condition():
        assert time.monotonic() < deadline, "it never happened"
        time.sleep(0.02)


def alive(pid: int) -> bool:
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False


@pytest.mark.exhaustive
@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="finds the training processes in /proc")
@pytest.mark.parametrize("name", ["SIGTERM", "SIGKILL"])
def test_trainings_in_processes_end_too(small, tools, whole, tmp_path, name):
    """A killed run's children would meet the resumed one in its folder."""
    folder = tmp_path / "tiny"
    words = [*small.argv, "--jobs", "2", "--runs", str(tmp_path), "--name", "tiny"]
    with open(tmp_path / "err", "w+") as err:
        run = subprocess.Popen([sys.executable, "-m", "slao.cli", *words], stdout=subprocess.DEVNULL, stderr=err)
        wait(lambda: bool(finished_tasks(folder)) or run.poll() is not None)
        assert run.poll() is None
        children = [int(n) for n in Path(f"/proc/{run.pid}/task/{run.pid}/children").read_text().split()]
        assert len(children) >= 2
        run.send_signal(getattr(signal, name))
        assert run.wait(300) == (-9 if name == "SIGKILL" else 143)
        wait(lambda: not any(map(alive, children)))
        err.seek(0)
        lines = [line for line in err.read().splitlines() if line.startswith("slao: ")]
    assert len(lines) == (name == "SIGTERM")
    answer = small.run(folder, "--resume")
    assert answer["code"] == 0, answer["err"]
    assert tools.changed(folder, whole) == []
