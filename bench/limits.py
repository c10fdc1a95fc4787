"""A command within so many seconds. What runs out of time is interrupted, not killed: pytest then writes its files."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Sequence
from contextlib import suppress
from typing import Any, NamedTuple

GRACE = 15.0  # seconds for what an interrupted process still has to write


class Ended(NamedTuple):
    """status: the command's, not 0 where it was stopped. stopped: why it did not end by itself. interrupted: by us."""

    status: int
    stopped: str | None = None
    interrupted: bool = False


def run(command: Sequence[str], seconds: float, grace: float = GRACE, **options: Any) -> Ended:
    """Run `command`; options are those of subprocess.Popen.

    After `seconds`, or when this process is interrupted, it gets SIGINT; after `grace` more, SIGKILL with all that it
    started.
    """
    process = subprocess.Popen(command, start_new_session=True, **options)
    stopped, interrupted = None, False
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        stopped = f"interrupted after {seconds:.0f} s"
    except KeyboardInterrupt:
        stopped, interrupted = "interrupted", True
    if stopped is not None:
        process.send_signal(signal.SIGINT)  # to it alone: its workers end with it
        with suppress(subprocess.TimeoutExpired):
            process.wait(grace)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)  # whoever of its session is left
    status = process.wait()
    return Ended(status if stopped is None else status or 1, stopped, interrupted)
