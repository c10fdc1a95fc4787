"""Where a run writes: its folder, which must be possible, and which one process at a time may work in."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime, timezone
from pathlib import Path, PurePath
from typing import IO, Any

from .reading import check_text

LOCK = ".lock"
_LONGEST = 255  # bytes of a file name, on every usual file system
_LONGEST_LABEL = 200  # of a part's, to which more is added


def check_name(name: str) -> None:
    """ValueError unless `name` is one of a folder below --runs."""
    check_text(name, "name")
    if not name.strip() or "\0" in name or PurePath(name).is_absolute() or ".." in PurePath(name).parts:
        raise ValueError(f"name must be that of a folder below --runs, not {name!r:.100}")


def check_label(label: str) -> None:
    """ValueError for what is too long for a folder's name."""
    if (length := len(os.fsencode(label))) > _LONGEST_LABEL:
        raise ValueError(
            f"the label {label[:40]!r}… makes a folder's name of {length} bytes, at most {_LONGEST_LABEL} fit: shorten "
            "the method's label, or name the sweep's values (a mapping of names to values)"
        )


def check_folder(folder: Path) -> None:
    """ValueError where `folder` cannot be made, or not be written into."""
    for part in folder.parts:
        if len(os.fsencode(part)) > _LONGEST:
            raise ValueError(f"a name of {len(os.fsencode(part))} bytes, {part[:40]!r}…: choose a shorter --name")
    there = next(path for path in (folder, *folder.absolute().parents) if os.path.lexists(path))
    if not there.is_dir():
        raise ValueError(f"{there} is no folder, so {folder} cannot be one: choose another --runs or --name")
    if not os.access(there, os.W_OK | os.X_OK):
        raise ValueError(f"{there} may not be written into: change its permissions, or choose another --runs")
    for part in ("state", "adapters", "report"):
        if (folder / part).is_symlink():
            raise ValueError(
                f"{folder / part} is a link, which a run does not follow: put a folder there, or remove it"
            )


@contextmanager
def locked(folder: Path, keep: bool = True) -> Iterator[None]:
    """Within the block no other process is in a block of its own with `folder`, which is made where it is absent.

    The lock is the operating system's: it ends with the process, however that ends, and what the file says of a process
    that is gone means nothing. ValueError that names the process that has it. keep: else the lock is only asked for,
    beside others that ask, and the file stays what it is.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / LOCK, "a+", encoding="utf-8") as file:
        if not _take(file, keep):
            raise ValueError(
                f"{_owner(file)} is at work in {folder}: wait for its end, or choose another --name (it is stopped "
                "with Ctrl-C)"
            )
        if keep:
            file.truncate(0)
            json.dump({"pid": os.getpid(), "host": socket.gethostname(), "since": _now()}, file)
            file.flush()
        yield


def check_free(folder: Path) -> None:
    """ValueError, as `locked` raises it, where another process is at work in `folder` now; nothing is made."""
    if (folder / LOCK).is_file():
        with locked(folder, keep=False):
            pass


def _take(file: IO[str], keep: bool) -> bool:
    """Whether the lock was free; it is ours then, until the file is closed."""
    try:
        import fcntl
    except ImportError:  # Windows
        import msvcrt

        windows: Any = msvcrt
        try:
            file.seek(1 << 20)  # beyond the text, which stays readable
            windows.locking(file.fileno(), windows.LK_NBLCK, 1)
        except OSError:
            return False
        return True
    try:
        fcntl.flock(file, (fcntl.LOCK_EX if keep else fcntl.LOCK_SH) | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks
        return True
    return True


def _owner(file: IO[str]) -> str:
    file.seek(0)
    try:
        said = json.loads(file.read())
        return f"process {said['pid']} on {said['host']}, since {said['since']},"
    except (ValueError, KeyError, TypeError):  # it has only just come
        return "another process"


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")
