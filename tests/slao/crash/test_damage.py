"""Every file of a run folder, cut short and with flipped bits: refused in one line, or written anew; never loaded."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from slao.checkpoint import read_state
from slao.cli import main
from slao.folders import read_adapter
from slao.merging.source import Source
from slao.report import load
from slao.sums import SUMS, is_whole

BITS = [pytest.param(1, id="one bit"), pytest.param(8, id="every bit", marks=pytest.mark.exhaustive)]


def cuts(content: bytes) -> Iterator[bytes]:
    """`content` at every length below its own."""
    return (content[:length] for length in range(len(content)))


def flips(content: bytes, bits: int) -> Iterator[bytes]:
    """One bit of every byte, or each of its eight, the other way round."""
    generator = random.Random(len(content))
    for place in range(len(content)):
        for bit in generator.sample(range(8), bits):
            flipped = bytearray(content)
            flipped[place] ^= 1 << bit
            yield bytes(flipped)


def accepted(path: Path, damaged: Iterator[bytes], read: Callable[[], Any]) -> tuple[int, list[Any]]:
    """(how many were refused, what was read of the others). A refusal is one line with the file's name."""
    good, refused, read_after_all = path.read_bytes(), 0, []
    try:
        for content in damaged:
            path.write_bytes(content)
            try:
                read_after_all.append(read())
            except ValueError as error:
                refused += 1
                assert str(path) in str(error) or str(path.parent) in str(error), error
                assert len(str(error).splitlines()) == 1, error
    finally:
        path.write_bytes(good)
    return refused, read_after_all


STATES = ["state/slao-0/slao_state.safetensors", "state/seqlora-0/trained/0002.safetensors"]


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("name", STATES)
def test_states(whole, tmp_path, name, bits):
    path = Path(shutil.copy(whole / name, tmp_path / "state.safetensors"))
    size = path.stat().st_size
    assert accepted(path, cuts(path.read_bytes()), lambda: read_state(path)) == (size, [])
    assert accepted(path, flips(path.read_bytes(), bits), lambda: read_state(path)) == (bits * size, [])


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("name", ["adapter_model.safetensors", "adapter_config.json", SUMS])
def test_adapters(whole, tmp_path, name, bits):
    """Read by `slao interference` and `slao merge`, and looked at when a run is resumed."""
    folder = tmp_path / "adapter"
    shutil.copytree(whole / "adapters" / "slao-0", folder)
    path = folder / name
    good = path.read_bytes()
    assert is_whole(folder)
    for damaged in (lambda: cuts(good), lambda: flips(good, bits)):
        count = sum(1 for _ in damaged())
        spared = 0
        if name == SUMS and next(damaged()) == b"":
            spared = 1  # the newline at its end
        for read in (lambda: read_adapter(folder), lambda: Source(folder)):
            refused, others = accepted(path, damaged(), read)
            assert (refused, len(others)) == (count - spared, spared)
        _, answers = accepted(path, damaged(), lambda: is_whole(folder))
        assert (answers.count(False), answers.count(True)) == (count - spared, spared)


@pytest.mark.parametrize("bits", BITS)
def test_results(whole, tmp_path, bits):
    """A few flips say the same (1e-05 and 1E-05), and six bytes are the checksum's own name: what is read is the run's
    results whenever anything is."""
    path = Path(shutil.copy(whole / "results.json", tmp_path / "results.json"))
    content, good = path.read_bytes(), load(tmp_path)
    assert accepted(path, cuts(content[:-1]), lambda: load(tmp_path)) == (len(content) - 1, [])
    refused, others = accepted(path, flips(content, bits), lambda: load(tmp_path))
    assert refused + len(others) == bits * len(content)
    assert len(others) <= 6 * bits + content.count(b"e-") * 1
    assert all({key: other.get(key) for key in good} == good for other in others)


def damage(path: Path, how: str) -> None:
    content = bytearray(path.read_bytes())
    if how == "flipped":
        content[len(content) // 2] ^= 4
    path.write_bytes({"empty": b"", "half": content[: len(content) // 2], "flipped": content}[how])


@pytest.mark.parametrize("how", ["empty", "half", "flipped"])
@pytest.mark.parametrize("name", ["settings.json", *STATES])
def test_a_run_is_not_resumed_from_damage(small, tools, whole, tmp_path, name, how):
    folder = tmp_path / "tiny"
    shutil.copytree(whole, folder)
    damage(folder / name, how)
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    line = tools.complaint(small.run(folder, "--resume"))
    assert ("has other settings" if (name, how) == ("settings.json", "flipped") else str(folder / name)) in line
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("how", ["empty", "half", "flipped", "absent"])
def test_what_is_derived_is_written_anew(small, tools, whole, tmp_path, how):
    """Adapters, results and report come from the states."""
    folder = tmp_path / "tiny"
    shutil.copytree(whole, folder)
    derived = [path for path in folder.rglob("*") if path.is_file() and "state" not in path.parts]
    derived.remove(folder / "settings.json")
    assert {path.parent.name for path in derived} == {"tiny", "report", "slao-0", "seqlora-0"}
    pictures = {path: path.read_bytes() for path in derived if path.suffix == ".png"}
    assert len(pictures) == 7
    for path in derived:
        damage(path, how) if how != "absent" else path.unlink()
    answer = small.run(folder, "--resume")
    assert answer["code"] == 0, answer["err"]
    assert tools.changed(folder, whole) == []
    assert {path: path.read_bytes() for path in pictures} == pictures
    assert (folder / "report.html").read_bytes() == (whole / "report.html").read_bytes()


@pytest.mark.parametrize("command", ["report", "report --markdown", "interference", "merge"])
def test_commands_on_damage(whole, tmp_path, capsys, command):
    for name in ("results.json", "adapters"):
        source = whole / name
        shutil.copytree(source, tmp_path / name) if source.is_dir() else shutil.copy(source, tmp_path / name)
    text = (tmp_path / "results.json").read_text()
    number = json.loads(text)["methods"]["slao"]["AA"][0]
    (tmp_path / "results.json").write_text(text.replace(str(number), str(number / 2)))
    damage(tmp_path / "adapters" / "slao-0" / "adapter_model.safetensors", "flipped")
    folders = [str(tmp_path / "adapters" / name) for name in ("seqlora-0", "slao-0")]
    arguments = {"interference": folders, "merge": [*folders, "-o", str(tmp_path / "out")]}
    words = [*command.split(), *arguments.get(command, [str(tmp_path)])]
    before = sorted(tmp_path.rglob("*"))
    capsys.readouterr()
    assert main(words) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert len(printed.err.splitlines()) == 1
    assert "is damaged: its checksum" in printed.err
    assert sorted(tmp_path.rglob("*")) == before
