"""A run that is killed at any moment, resumed, ends as if nothing had happened: the same bits in every file."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

import pytest

KILLS, BY_DEFAULT = 40, 8
_TIMED = 10  # of these, so many at a time by the clock, the others at events spread over the run
FIRST = [pytest.param(n, marks=[] if n < BY_DEFAULT else pytest.mark.exhaustive) for n in range(KILLS - _TIMED)]


def moment(number: int, count: int) -> int:
    """The event, from 1, at which kill `number` strikes: one drawn from each of as many equal parts of the run. The
    first BY_DEFAULT of them are spread over the whole run too."""
    parts = KILLS - _TIMED
    part = (number * 11) % parts  # 11 and 30 have no common factor
    return 1 + int((part + random.Random(number).random()) * count / parts)


def test_the_moments_are_spread(events):
    moments = sorted(moment(number, len(events)) for number in range(KILLS - _TIMED))
    assert len(set(moments)) == KILLS - _TIMED
    assert moments[0] <= len(events) / 30 + 1
    assert moments[-1] >= len(events) * 29 / 30
    kinds = {event.split()[0] for event in events}
    assert {"step", "begin_task", "end_task", "save", "save_pretrained", "figure", "page"} <= kinds, kinds


def check(small, tools, whole: Path, folder: Path) -> None:
    """Resume, and compare. A run that died before its settings were there is none yet: --resume starts it."""
    answer = small.run(folder, "--resume")
    assert answer["code"] == 0, answer["err"]
    assert tools.changed(folder, whole) == []
    assert (folder / "report.html").read_bytes().endswith(b"</html>\n")


@pytest.mark.parametrize("number", FIRST)
def test_killed_at_an_event(small, tools, whole, events, tmp_path, number):
    folder = tmp_path / "tiny"
    assert small.run(folder, at=moment(number, len(events)))["code"] == -9
    check(small, tools, whole, folder)


@pytest.mark.exhaustive
@pytest.mark.parametrize("number", range(_TIMED))
def test_killed_by_the_clock(small, tools, whole, tmp_path, number):
    """At a part of the time that the whole run took; on a busy machine that is another moment every time. Where it had
    ended before, there is nothing to kill, and less time is tried."""
    seconds = json.loads((whole.parent / "whole.json").read_text())["seconds"]
    part = (number + random.Random(number).random()) / _TIMED
    folder = tmp_path / "tiny"
    for attempt in range(6):
        if small.run(folder, after=seconds * part / 2**attempt)["code"] == -9:
            break
        shutil.rmtree(folder)
    else:
        raise AssertionError("the run always ended before it was killed")
    check(small, tools, whole, folder)


@pytest.mark.parametrize("number", [0, pytest.param(1, marks=pytest.mark.exhaustive)])
def test_killed_three_times(small, tools, whole, events, tmp_path, number):
    """Each attempt is killed at its own moment; the last one ends it."""
    folder = tmp_path / "tiny"
    generator = random.Random(100 + number)
    for attempt in range(3):
        moments = generator.randrange(len(events) // 3) + 5
        code = small.run(folder, *["--resume"][:attempt], at=moments)["code"]
        assert code == -9
    check(small, tools, whole, folder)


@pytest.mark.parametrize("event", [1, 3, 7])
def test_killed_while_an_old_run_is_removed(small, tools, whole, tmp_path, event):
    """--overwrite that dies leaves a folder that --overwrite, and --resume, take."""
    folder = tmp_path / "tiny"
    shutil.copytree(whole, folder)
    answer = small.run(folder, "--overwrite", at=event)
    assert answer["code"] == -9
    again = small.run(folder, "--overwrite" if event == 3 else "--resume")
    assert again["code"] == 0, again["err"]
    assert tools.changed(folder, whole) == []
