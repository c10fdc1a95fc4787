"""A run folder that is resumed as another run, or by two processes at once."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from slao import places, sums
from slao.cli import main
from slao.identity import differences, fingerprint

FIRST = "holds another run; choose another --name, or --overwrite it:"


@pytest.fixture(scope="module")
def made(tiny, tmp_path_factory) -> tuple[Path, list[str]]:
    """A finished run's parent folder, and its command. Its data and model are its own; change them, and change back."""
    home = tmp_path_factory.mktemp("identity")
    tiny.write_stream(tiny.stream(tasks=2), home / "data")
    tiny.save("bert", home / "model")
    command = ["run", "--model", str(home / "model"), "--stream", "jsonl", "--stream-path", str(home / "data")]
    command += ["--runs", str(home / "runs"), "--name", "x", "--methods", "seqlora", "--seeds", "0", "--rank", "2"]
    command += ["--set", "train.max_steps=1"]
    assert main(command) == 0
    return home, command


def rows(home: Path) -> None:
    file = home / "data" / "second" / "test.jsonl"
    file.write_text(file.read_text().replace('"text": "a', '"text": "b', 1))


def labels(home: Path) -> None:
    file = home / "data" / "first" / "labels.json"
    file.write_text(json.dumps([*json.loads(file.read_text()), "another"]))


def weights(home: Path) -> None:
    """One weight of all of them, by one bit."""
    file = home / "model" / "model.safetensors"
    tensors = load_file(file)
    tensors[min(tensors)].view(torch.uint8).view(-1)[0] ^= 1
    save_file(tensors, file, metadata={"format": "pt"})


# what is changed -> (change of the files, further flags, the lines but the first)
CHANGES: dict[str, tuple[Callable[[Path], None] | None, list[str], list[str]]] = {
    "method": (None, ["--methods", "magmax"], ["methods.magmax: nothing there, {} now", "methods.seqlora: {} there"]),
    "option": (None, ["--set", "methods.seqlora.learning_rate=0.5"], ["methods.seqlora.learning_rate: nothing there"]),
    "alpha": (None, ["--alpha", "3"], ["lora.lora_alpha: 16 there, 3 now"]),
    "scaling": (None, ["--set", "lora.use_rslora=true"], ["lora.use_rslora: nothing there, True now"]),
    "precision": (None, ["--precision", "adapter"], ["precision: 'base' there, 'adapter' now"]),
    "rows": (rows, [], ["task 'second', test rows: '"]),
    "fewer rows": (None, ["--train-rows", "4"], ["train_rows: nothing there, 4 now"]),
    "labels": (labels, [], ["task 'first', labels: '"]),
    "base": (weights, [], ["base model: '"]),
}  # fmt: skip


@pytest.mark.parametrize("case", CHANGES)
def test_another_run_is_refused_and_says_what_differs(case, made, capsys):
    home, command = made
    change, flags, parts = CHANGES[case]
    before = {path: path.read_bytes() for path in home.rglob("*") if path.is_file()}
    if change is not None:
        change(home)
    run = {path: data for path, data in before.items() if path.is_relative_to(home / "runs")}
    capsys.readouterr()
    try:
        assert main([*command, *flags, "--resume"]) == 2
        out, err = capsys.readouterr()
        assert out == ""
        first, *lines = err.splitlines()
        assert first == f"slao: {home / 'runs' / 'x'} {FIRST}"
        assert [part for part in parts if not any(line.strip().startswith(part) for line in lines)] == [], err
        assert {path: path.read_bytes() for path in run} == run, "the run was written into"
    finally:
        for path, data in before.items():
            path.write_bytes(data)


def test_other_versions_are_said(made, capsys):
    home, command = made
    file = home / "runs" / "x" / "identity.json"
    content = sums.unsealed(json.loads(file.read_text()), file)
    content["versions"]["torch"] = "1.0"
    file.write_text(json.dumps(sums.sealed(content)))
    assert main([*command, "--resume"]) == 0
    said = "another version, results may differ in their last bits: torch: '1.0' there"
    assert capsys.readouterr().out.count(said) == 1
    for text in ("{", "[]", '{"settings": 3}'):
        file.write_text(text)
        code = main([*command, "--resume"])
        assert (code, capsys.readouterr().err.count("\n")) == (2, 1)
    file.unlink()  # of a run that died before it was written: its settings are compared
    assert main([*command, "--precision", "adapter", "--resume"]) == 2
    assert "precision: 'base' there" in capsys.readouterr().err
    assert main([*command, "--resume"]) == 0


def test_many_differences_are_counted():
    now = {"settings": dict.fromkeys(map(str, range(40)), 1), "versions": {"torch": "2"}}
    lines, versions = differences({"settings": {}, "versions": {"torch": "1"}}, now)
    assert lines[-1] == "and 28 more"
    assert versions == ["torch: '1' there, '2' now"]
    assert differences(json.loads(json.dumps(now)), now) == ([], [])


def test_a_fingerprint_is_of_every_weight(tiny):
    model = tiny.bert()
    before = fingerprint(model)
    assert before == fingerprint(tiny.bert())
    for tensor in (next(iter(model.parameters())), list(model.parameters())[-1]):
        with torch.no_grad():
            tensor.view(-1)[-1] += 1
        assert fingerprint(model) != before
        before = fingerprint(model)


HOLD = """
import sys, pathlib
from slao import places
with places.locked(pathlib.Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def holder(tmp_path):
    """Another process with the lock of tmp_path / "x"; it ends when the test does, or is killed by it."""
    command = [sys.executable, "-c", HOLD, str(tmp_path / "x")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


def test_two_processes_in_one_folder(holder, saved_bert, stream_folder, tmp_path, capsys, monkeypatch):
    command = ["run", "--model", str(saved_bert), "--stream", "jsonl", "--stream-path", str(stream_folder)]
    command += ["--runs", str(tmp_path), "--name", "x", "--methods", "seqlora", "--seeds", "0", "--rank", "2"]
    command += ["--set", "train.max_steps=1"]
    before = sorted(path.name for path in (tmp_path / "x").iterdir())
    monkeypatch.setattr("slao.run.Prepared", lambda settings: pytest.fail("before the lock was asked for"))
    for flags in ([], ["--resume"], ["--overwrite"]):
        assert main([*command, *flags]) == 2
        out, err = capsys.readouterr()
        assert err.startswith(f"slao: process {holder.pid} on ")
        assert f"is at work in {tmp_path / 'x'}: wait for its end" in err
        assert err.count("\n") == 1
        assert out == ""
    monkeypatch.undo()
    assert sorted(path.name for path in (tmp_path / "x").iterdir()) == before == [places.LOCK]
    holder.kill()  # what it left says that it holds the folder, and means nothing
    holder.wait()
    assert str(holder.pid) in (tmp_path / "x" / places.LOCK).read_text()
    assert main(command) == 0
    assert json.loads((tmp_path / "x" / places.LOCK).read_text())["pid"] == os.getpid()
    assert main([*command, "--overwrite"]) == 0, "our own lock is free again"


@pytest.mark.parametrize("text", ["", "{", "[]", '{"pid": 1}', "\0" * 50])
def test_whatever_a_lock_says_it_is_taken_over(text, tmp_path):
    (tmp_path / places.LOCK).write_text(text)
    with places.locked(tmp_path):
        said: Any = json.loads((tmp_path / places.LOCK).read_text())
        assert said["pid"] == os.getpid()
        with pytest.raises(ValueError, match="is at work in"), places.locked(tmp_path):
            pass
    with places.locked(tmp_path):
        pass
