"""What a user, a disk or the machine can do to `slao`: one line and exit code 2, and nothing is written."""

from __future__ import annotations

import errno
import os
import pickle
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors import SafetensorError

from slao import checkpoint, failures, places
from slao.cli import main


@pytest.fixture
def command(saved_bert, stream_folder, tmp_path) -> list[str]:
    base = ["run", "--model", str(saved_bert), "--stream", "jsonl", "--stream-path", str(stream_folder)]
    return [*base, "--methods", "seqlora", "--seeds", "0", "--rank", "2", "--set", "train.max_steps=1"]


def places_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    (tmp_path / "nowhere").symlink_to(tmp_path / "absent")
    (tmp_path / "study.yaml").mkdir()
    (tmp_path / "latin.yaml").write_bytes("# café\nname: x\n".encode("latin-1"))
    (tmp_path / "empty.yaml").write_text("")
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked" / "state").symlink_to(tmp_path)
    (tmp_path / "deep.yaml").write_text("[" * 5000)


# name -> (flags, with {} for the folder; what the line says)
BAD: dict[str, tuple[list[str], str]] = {
    "--runs is a file": (["--runs", "{}/file"], "{}/file is no folder"),
    "--runs below a file": (["--runs", "{}/file/deep/er"], "{}/file is no folder"),
    "a link to nothing": (["--runs", "{}/nowhere"], "{}/nowhere is no folder"),
    "a long name": (["--runs", "{}/runs", "--name", "n" * 300], "a name of 300 bytes, 'nnn"),
    "a long name in letters of two bytes": (["--runs", "{}/runs", "--name", "ä" * 130], "a name of 260 bytes"),
    "up": (["--runs", "{}/runs", "--name", "../x"], "name must be that of a folder below --runs, not '../x'"),
    "absolute": (["--runs", "{}/runs", "--name", "/tmp/x"], "name must be that of a folder below --runs"),
    "blank": (["--runs", "{}/runs", "--name", " "], "name must be that of a folder below --runs, not ' '"),
    "half a character": (["--runs", "{}/runs", "--name", "\udc80"], "half of a character"),
    "a long label": (["--runs", "{}/runs", "--set", f"methods.{'x' * 300}={{method: slao}}"], "a folder's name of 302"),
    "a linked state": (["--runs", "{}", "--name", "linked", "--overwrite"], "is a link, which a run does not follow"),
    "settings are a folder": (["{}/study.yaml"], "{}/study.yaml is a folder where a file is expected"),
    "settings in latin-1": (["{}/latin.yaml"], "{}/latin.yaml, line 1: not UTF-8 (byte 5); save it as UTF-8"),
    "settings are empty": (["{}/empty.yaml"], "{}/empty.yaml must be a mapping of settings, not an empty file"),
    "settings without end": (["{}/deep.yaml"], "{}/deep.yaml is nested too deeply"),
    "a key twice": (["--runs", "{}/runs", "--set", "lora={r: 1, r: 2}"], "the key 'r' stands twice"),
    "an empty key": (["--runs", "{}/runs", "--set", "=1"], "cannot set ''"),
    "a stream that is a list": (["--runs", "{}/runs", "--set", "stream=[1]"], "setting 'stream'"),
    "no whole number of jobs": (["--jobs", "two"], "--jobs takes a whole number; got 'two'"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_one_line(case, command, tmp_path, capsys):
    places_made(tmp_path)
    before = sorted(str(path) for path in tmp_path.rglob("*"))
    flags, message = BAD[case]
    capsys.readouterr()
    assert main([*command, *(flag.replace("{}", str(tmp_path), 1) for flag in flags)]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("slao: ")
    assert err.count("\n") == 1, err
    assert message.replace("{}", str(tmp_path)) in err
    assert sorted(str(path) for path in tmp_path.rglob("*")) == before


def test_no_permission(command, stream_folder, tmp_path, capsys, monkeypatch):
    """Of root too, which may do anything."""
    (tmp_path / "closed").mkdir()
    monkeypatch.setattr(places.os, "access", lambda path, mode: Path(path) != tmp_path / "closed")
    assert main([*command, "--runs", str(tmp_path / "closed" / "deep")]) == 2
    assert f"{tmp_path / 'closed'} may not be written into: change its permissions" in capsys.readouterr().err
    data = shutil.copytree(stream_folder, tmp_path / "data")
    denied = PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    def read(path: Path) -> bytes:
        raise denied

    monkeypatch.setattr(Path, "read_bytes", read)
    assert main([*command, "--runs", str(tmp_path / "runs"), "--stream-path", str(data)]) == 2
    err = capsys.readouterr().err
    assert "cannot be read: Permission denied" in err
    assert str(data) in err
    assert not (tmp_path / "runs").exists()


@pytest.mark.exhaustive
@pytest.mark.skipif(os.name == "nt", reason="no ulimit")
def test_files_that_may_not_grow(command, tmp_path):
    """A limit on the size of files, as a full disk or quota is: safetensors' own error is no OSError."""
    words = " ".join(f"'{word}'" for word in [sys.executable, "-m", "slao.cli", *command, "--runs", str(tmp_path)])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    limited = ["bash", "-c", f"ulimit -f 12; {words}"]
    done = subprocess.run(limited, capture_output=True, text=True, env=environment, check=False)
    said = [line for line in done.stderr.splitlines() if line.startswith("slao: ")]
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    assert len(said) == 1
    assert re.search(r"cannot write \S+: File too large; what was there before is whole; a limit on the size", said[0])


RUST = "Error while serializing: I/O error: No space left on device (os error 28)"  # as safetensors has it


@pytest.mark.skipif(os.name == "nt", reason="os errors are numbered otherwise")
@pytest.mark.parametrize("error", [SafetensorError(RUST), OSError(errno.ENOSPC, "No space left on device")], ids=repr)
def test_a_full_disk_is_said_once(error, tmp_path):
    """Through a process of --jobs, and twice through our own hands."""

    def write(temporary: Path) -> None:
        raise error

    with pytest.raises(OSError, match="cannot write") as caught:
        checkpoint.write_atomically(tmp_path / "x", write)
    again = checkpoint.cannot_write(tmp_path, pickle.loads(pickle.dumps(caught.value)))
    expected = f"cannot write {tmp_path / 'x'}: No space left on device; what was there before is whole"
    assert failures.explain(again) == f"{expected}; free some space, then continue a run with --resume"
    assert not list(tmp_path.iterdir())


EXPLAINED = {
    OSError(errno.ENOSPC, "No space left on device", "x"): "x: No space left on device; free some space, then",
    OSError(errno.EROFS, "Read-only file system", "x"): "the disk is read-only",
    OSError("a text"): "a text",
    MemoryError(): "the memory is full (MemoryError): lower train.batch_size",
    RuntimeError("CUDA out of memory. Tried to allocate\nmore"): "the memory is full (CUDA out of memory. Tried",
    ValueError(""): "ValueError",
    RuntimeError("a fault of ours"): None,
    TypeError("x"): None,
}


@pytest.mark.parametrize("error", EXPLAINED, ids=repr)
def test_what_is_explained(error):
    line, expected = failures.explain(error), EXPLAINED[error]
    assert line is None if expected is None else expected in line


def test_a_reader_that_goes(tmp_path):
    """`slao doctor | head -0`."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        ["bash", "-c", f"'{sys.executable}' -m slao.cli doctor | true"],
        capture_output=True, text=True, env=environment, check=False,
    )  # fmt: skip
    assert "Traceback" not in done.stderr
    assert "BrokenPipe" not in done.stderr
