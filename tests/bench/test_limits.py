"""bench/limits.py: what is interrupted still writes its files; what does not end is killed with all that it started."""

from __future__ import annotations

import importlib.util
import os
import signal
import subprocess
import sys
import threading
import time
from xml.etree import ElementTree

import limits
import pytest

SLOW = """
import time
import pytest

def test_quick():
    pass

@pytest.mark.parametrize("i", range(60))
def test_slow(i):
    time.sleep(1)
"""


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def test_what_ends_in_time_is_left_alone():
    assert limits.run(python("raise SystemExit(7)"), 60) == limits.Ended(7)


@pytest.mark.exhaustive
@pytest.mark.skipif(importlib.util.find_spec("xdist") is None, reason="pytest-xdist is not installed")
def test_pytest_is_interrupted_and_writes_its_report(tmp_path):
    """Its workers too."""
    (tmp_path / "test_slow.py").write_text(SLOW)
    report = tmp_path / "report.xml"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={report}", str(tmp_path)]
    command += ["-n", "2"]
    seconds = 12.0  # pytest has to have begun on a busy machine
    started = time.monotonic()
    ended = limits.run(command, seconds, grace=20, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    assert ended.status != 0
    assert ended.stopped == "interrupted after 12 s"
    assert time.monotonic() - started < seconds + 20
    names = {case.get("name") for case in ElementTree.parse(report).getroot().iter("testcase")}
    assert "test_quick" in names
    assert len(names) < 61


STUBBORN = """
import signal, subprocess, sys, time
signal.signal(signal.SIGINT, signal.SIG_IGN)
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
open(sys.argv[1], "w").write(str(child.pid))
time.sleep(60)
"""


def gone(pid: int) -> bool:
    """Whether there is no such process, or only what is left of one until its parent has asked."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="asks Linux for the child")
def test_what_does_not_end_is_killed_with_its_children(tmp_path):
    told = tmp_path / "child"
    ended = limits.run([*python(STUBBORN), str(told)], 3, grace=0.5)
    assert ended == limits.Ended(-signal.SIGKILL, "interrupted after 3 s")
    child = int(told.read_text())
    for _ in range(100):
        if gone(child):
            break
        time.sleep(0.05)
    assert gone(child)


def test_an_interrupt_of_ours_is_passed_on(tmp_path):
    began, written = tmp_path / "began", tmp_path / "written"
    code = f"""
import time
try:
    open({str(began)!r}, "w").close()
    time.sleep(60)
except KeyboardInterrupt:
    open({str(written)!r}, "w").close()
"""

    def interrupt() -> None:
        while not began.exists():
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt, daemon=True).start()
    assert limits.run(python(code), 60) == limits.Ended(1, "interrupted", interrupted=True)
    assert written.exists()
