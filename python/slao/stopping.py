"""Ctrl-C and SIGTERM: a task that is being ended or saved is finished first, and the command ends with one line."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, TypeVar

Item = TypeVar("Item")
_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_held = False
_asked: int | None = None
_event: Any = None  # of the process that started this one


class Stopped(KeyboardInterrupt):
    """A signal asked for the end; `number` is its own. No Exception, so that nothing takes it for a failure."""

    def __init__(self, number: int = signal.SIGTERM) -> None:
        super().__init__(number)
        self.number = number
        self.advice = ""

    @property
    def exit_code(self) -> int:
        return 128 + self.number

    def __str__(self) -> str:
        return f"stopped by {signal.Signals(self.number).name}{self.advice}"


@contextmanager
def listening() -> Iterator[None]:
    """Within the block SIGINT and SIGTERM raise `Stopped`: at once, or, in `one_by_one`, where that says. Where another
    than the main thread enters it nothing changes."""
    global _asked
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = [signal.signal(number, _heard) for number in _SIGNALS]
    _asked = None
    try:
        yield
    finally:
        for number, handler in zip(_SIGNALS, before, strict=True):
            signal.signal(number, handler)


@contextmanager
def resumable(folder: Path) -> Iterator[None]:
    """What stops the block says that the run in `folder` can be resumed."""
    try:
        yield
    except Stopped as stop:
        stop.advice = f"; {folder} keeps every finished task: the same command with --resume goes on from there"
        raise


def obey(event: Any) -> None:
    """In a process that another one started: stop when it sets `event`, or on SIGTERM. Ctrl-C is for the other one."""
    global _event
    _event = event
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, _heard)


def asked() -> bool:
    """Whether the end was asked for."""
    return _asked is not None or (_event is not None and _event.is_set())


def check() -> None:
    """`Stopped` where the end was asked for."""
    if asked():
        raise Stopped(_asked or signal.SIGTERM)


def one_by_one(items: Iterable[Item]) -> Iterator[Item]:
    """Each item; a signal that comes while it is worked on is kept for `asked`, and `Stopped` raised before the next
    one. A second signal raises at once."""
    global _held
    for item in items:
        check()
        _held = True
        try:
            yield item
        finally:
            _held = False
        check()


def _heard(number: int, frame: FrameType | None) -> None:
    global _asked
    again, _asked = asked(), number
    if again or not _held:
        raise Stopped(number)
