"""Files from outside: text, JSON and YAML, read in one way everywhere. A ValueError of one line names file and line."""

from __future__ import annotations

import json
import os
from functools import cache
from pathlib import Path
from typing import Any

_NODES = 100_000  # what a YAML file may hold, its aliases written out


def read_text(path: Path) -> str:
    """The text of a UTF-8 file, with or without a byte order mark."""
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise ValueError(f"there is no file {path}") from None
    except IsADirectoryError:
        raise ValueError(f"{path} is a folder where a file is expected") from None
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror or error}") from None
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ValueError(f"{path}, line {line}: not UTF-8 (byte {error.start}); save it as UTF-8") from None


def read_json(path: Path) -> Any:
    """What the file holds."""
    return parse_json(read_text(path), str(path))


def parse_json(text: str, where: str, line: int | None = None) -> Any:
    """What the text says; no object may have one key twice. line: of the file, where the text is one line of it."""
    try:
        return json.loads(text, object_pairs_hook=_unique)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}, line {line or error.lineno}: not JSON ({error.msg})") from None
    except RecursionError:
        raise ValueError(f"{_at(where, line)}: nested too deeply") from None
    except ValueError as error:  # a key that stands twice, a number of thousands of digits
        raise ValueError(f"{_at(where, line)}: {error}") from None


def _at(where: str, line: int | None) -> str:
    return where if line is None else f"{where}, line {line}"


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the key {twice!r} stands twice in one object; remove one")
    return found


def parse_yaml(text: str, where: str) -> Any:
    """What the text says, in plain values: dates stay texts. A key that is empty, no text or number, or stands twice in
    one mapping is an error, and so are tags, cycles and aliases that blow up."""
    import yaml

    try:
        content = yaml.load(text, Loader=_loader())
        _counted(content, where, [_NODES])
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f", line {mark.line + 1}," if mark and "\n" in text.strip() else ""
        raise ValueError(
            f"{where}{line} is not YAML: {' '.join(str(error.problem or error.context).split())}"
        ) from None
    except yaml.YAMLError as error:
        raise ValueError(f"{where} is not YAML: {' '.join(str(error).split())}") from None
    except RecursionError:
        raise ValueError(f"{where} is nested too deeply, or contains itself") from None
    except (ValueError, TypeError, OverflowError) as error:
        raise ValueError(str(error) if str(error).startswith(where) else f"{where}, {error}") from None
    return content


def _counted(value: Any, where: str, left: list[int]) -> None:
    left[0] -= 1
    if left[0] < 0:
        raise ValueError(f"{where} holds more than {_NODES} values, its aliases written out")
    if isinstance(value, str):
        check_text(value, where)
    parts = [*value.keys(), *value.values()] if isinstance(value, dict) else value if isinstance(value, list) else []
    for part in parts:
        _counted(part, where, left)


@cache
def _loader() -> Any:
    """A SafeLoader for which keys are texts, each once; made on first use, since YAML is an optional package."""
    import yaml

    prefix = "tag:yaml.org,2002:"

    class Loader(yaml.SafeLoader):
        def compose_mapping_node(self, anchor: Any) -> Any:
            node = super().compose_mapping_node(anchor)
            seen: dict[str, int] = {}
            for key, _ in node.value:
                if key.tag == f"{prefix}merge":
                    continue
                problem = None
                if not isinstance(key, yaml.ScalarNode):
                    problem = "a key is a list or a mapping, where a name is expected"
                elif key.tag == f"{prefix}null" or not key.value.strip():
                    problem = "a key is empty"
                elif key.value in seen:
                    problem = f"the key {key.value!r} stands twice (also in line {seen[key.value]}); remove one"
                if problem:
                    raise ValueError(f"line {key.start_mark.line + 1}: {problem}")
                key.tag = f"{prefix}str"
                seen[key.value] = key.start_mark.line + 1
            return node

    Loader.yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in found if tag != f"{prefix}timestamp"]
        for first, found in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }
    plain = {f"{prefix}{kind}" for kind in ("null", "bool", "int", "float", "str", "seq", "map")}
    Loader.yaml_constructors = {
        tag: make for tag, make in yaml.SafeLoader.yaml_constructors.items() if tag in plain or tag is None
    }
    return Loader


def check_text(text: str, where: str) -> None:
    """ValueError for what is no text, or half of a character (a lone surrogate, as cut texts have it), which no
    tokenizer takes."""
    if not isinstance(text, str):
        raise ValueError(f"{where} must be a text, not {text!r:.60}")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        found = f"\\u{ord(text[error.start]):04x}"
        raise ValueError(
            f"{where} has half of a character ({found}, place {error.start}); remove it or write it whole"
        ) from None


def inside(path: Path, folder: Path) -> Path:
    """`path`, unless it leads out of `folder` through a link or "..": that is a ValueError.

    A snapshot of the hub's cache may link to the blobs of its own repository.
    """
    real, root = Path(os.path.realpath(path)), Path(os.path.realpath(folder))
    blobs = root.parent.parent / "blobs"
    if real.is_relative_to(root) or (root.parent.name == "snapshots" and real.is_relative_to(blobs)):
        return path
    raise ValueError(f"{path} leads out of its folder, to {real}; put the file itself there")
