"""The small run that the tests here kill, cut and starve."""

from __future__ import annotations

import json
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

if not hasattr(os, "fork"):
    pytest.skip("these tests fork, and send POSIX signals", allow_module_level=True)


MEASURED = ("tokens_per_second", "train_seconds", "merge_seconds", "score_seconds", "peak_memory_mb")


class Small:
    """A run of two methods on two tasks of two steps each: `argv` without a folder, `server` to run it in forks."""

    def __init__(self, server: Any, model: Path, stream: Path, root: Path) -> None:
        self.server, self.root = server, root
        self.argv = [
            "run", "--model", str(model), "--stream", "jsonl", "--stream-path", str(stream),
            "--methods", "seqlora,slao", "--rank", "2", "--target-modules", "query", "--batch-size", "4",
            "--seeds", "0", "--set", "train.max_steps=2", "--set", "train.arguments.logging_steps=1",
            "--set", "similarity=true",
        ]  # fmt: skip

    def run(self, folder: Path, *more: str, **job: Any) -> dict[str, Any]:
        """Into `folder`; the job is one of `server.run`'s."""
        argv = [*self.argv, "--runs", str(folder.parent), "--name", folder.name, *more]
        return self.server.run(argv, Path(job.pop("log", folder.parent / f"{folder.name}.log")), **job)


@pytest.fixture(scope="session")
def small(server, saved_bert, stream_folder, tmp_path_factory) -> Small:
    return Small(server, saved_bert, stream_folder, tmp_path_factory.mktemp("crash"))


@pytest.fixture(scope="session")
def whole(small) -> Path:
    """The run's folder, uninterrupted; whole.json beside it has what the server answered."""
    folder: Path = small.root / "tiny"
    answer = small.run(folder)
    assert answer["code"] == 0, answer["err"]
    (folder.parent / "whole.json").write_text(json.dumps(answer))
    return folder


@pytest.fixture(scope="session")
def events(whole) -> list[str]:
    found: list[str] = json.loads((whole.parent / "whole.json").read_text())["events"]
    return found


def computed(folder: Path) -> dict[str, Any]:
    """Everything that a run computed, by file, without what its clock and memory said; and the names of all files."""
    from slao.checkpoint import read_state

    found: dict[str, Any] = {"files": sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())}
    for path in folder.rglob("*.safetensors"):
        name = str(path.relative_to(folder))
        if name.startswith("adapters"):
            found[name] = path.read_bytes()
            continue
        tensors, meta = read_state(path)
        result = meta.get("extra", {}).get("result", {})
        for key in MEASURED:
            result.pop(key, None)
        found[name] = meta, {key: (str(t.dtype), tuple(t.shape), t.numpy().tobytes()) for key, t in tensors.items()}
    for path in (folder / "adapters").rglob("adapter_config.json"):
        found[str(path.relative_to(folder))] = path.read_bytes()
    content = json.loads((folder / "results.json").read_text())
    for method in content["methods"].values():
        for key in MEASURED:
            method.pop(key)
    found["results.json"] = {key: value for key, value in content.items() if key not in ("throughput", "sha256")}
    found["settings.json"] = (folder / "settings.json").read_bytes()
    return found


def changed(folder: Path, other: Path) -> list[str]:
    """The files, or "files" for their names, in which two runs computed something else."""
    one, two = computed(folder), computed(other)
    return sorted(key for key in one.keys() | two.keys() if one.get(key) != two.get(key))


def complaint(answer: dict[str, Any], code: int = 2) -> str:
    """The one line with which a command ended; fails where it printed another number of lines, or a traceback."""
    assert answer["code"] == code, (answer["code"], answer["err"], answer["out"][-500:])
    lines = answer["err"].splitlines()
    assert len(lines) == 1, answer["err"]
    assert lines[0].startswith("slao: "), lines[0]
    return lines[0]


@pytest.fixture(scope="session")
def tools() -> Any:
    """`computed`, `changed` and `complaint` (test folders are no packages, so they cannot be imported by name)."""
    return SimpleNamespace(computed=computed, changed=changed, complaint=complaint)
