"""Checksums of what has none of its own: a JSON object carries one, a folder has a file SHA256SUMS (`sha256sum -c`)."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from . import checkpoint

SUMS = "SHA256SUMS"
_KEY = "sha256"


def sealed(content: dict[str, Any]) -> dict[str, Any]:
    """JSON-able `content` with a checksum over the rest of it."""
    return {**content, _KEY: _digest(content)}


def unsealed(content: Any, path: Path, always: bool = False) -> Any:
    """`content`, read from `path`, without its checksum, if it has one. ValueError where that does not match.

    always: it was never written without one, so that is damage too.
    """
    if not isinstance(content, dict) or _KEY not in content:
        if always:
            raise ValueError(f"{path} is damaged: it has no checksum")
        return content
    rest = {key: value for key, value in content.items() if key != _KEY}
    if _digest(rest) != content[_KEY]:
        raise ValueError(f"{path} is damaged: its checksum does not match; write it again with `slao run --resume`")
    return rest


def _digest(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def write_sums(folder: Path, known: Mapping[str, str] | None = None) -> None:
    """SHA256SUMS of all files that lie in `folder` itself. known: name -> checksum of those whose writer made it."""
    found = known or {}
    lines = "".join(f"{found.get(name) or _of_file(folder / name)}  {name}\n" for name in _names(folder))
    checkpoint.write_atomically(folder / SUMS, lambda temporary: temporary.write_text(lines, encoding="utf-8"))


def is_whole(folder: Path) -> bool:
    """Whether `folder` has a SHA256SUMS, and of all that lies in it what that lists, unchanged."""
    try:
        listed = _listed(folder)
        return _names(folder) == sorted(listed) and all(_of_file(folder / name) == listed[name] for name in listed)
    except (OSError, ValueError):
        return False


def check(folder: Path, names: Sequence[str]) -> None:
    """ValueError where `folder` has a SHA256SUMS with which one of the files `names` does not agree."""
    try:
        listed = _listed(folder)
    except (FileNotFoundError, NotADirectoryError):
        return
    for name in names:
        if (folder / name).is_file() and listed.get(name) != _of_file(folder / name):
            raise ValueError(
                f"{folder / name} is damaged: its checksum in {SUMS} does not match; export it again, or remove "
                f"{SUMS} if you changed it yourself"
            )


def _listed(folder: Path) -> dict[str, str]:
    """File name -> checksum. ValueError for what is no such list."""
    text = (folder / SUMS).read_bytes().decode("utf-8", errors="replace")
    found = {}
    for line in text.removesuffix("\n").split("\n"):
        digest, two_spaces, name = line[:64], line[64:66], line[66:]
        if two_spaces != "  " or not name or Path(name).name != name:
            raise ValueError(f"{folder / SUMS} is damaged: no checksum and file name in {line!r}; remove it")
        found[name] = digest
    return found


def _names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.is_file() and path.name != SUMS)


def _of_file(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
