"""Every file of a run folder, cut short and with flipped bits: refused in one line, or written anew; never loaded."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from slao import sums
from slao.checkpoint import read_state
from slao.cli import main
from slao.folders import Source, read_adapter
from slao.places import LOCK
from slao.report import load
from slao.run import Run
from slao.sums import SUMS, is_whole

# Every how many bytes it is cut and flipped; bits that are flipped there, one at a time.
DENSITY = [pytest.param((5, 1), id="some"), pytest.param((2, 2), id="many", marks=pytest.mark.exhaustive)]


def cuts(content: bytes, density: tuple[int, int]) -> list[bytes]:
    """`content` at lengths from 0 to one below its own."""
    return [content[:length] for length in (*range(0, len(content) - 1, density[0]), len(content) - 1)]


def flips(content: bytes, density: tuple[int, int]) -> list[bytes]:
    """`content` with one bit the other way round."""
    generator = random.Random(len(content))
    found = []
    for place in range(0, len(content), density[0]):
        for bit in generator.sample(range(8), density[1]):
            flipped = bytearray(content)
            flipped[place] ^= 1 << bit
            found.append(bytes(flipped))
    return found


def accepted(path: Path, damaged: list[bytes], read: Callable[[], Any]) -> list[Any]:
    """What was read in spite of the damage. All the rest was refused in one line with the file's name."""
    good, texts, found = path.read_bytes(), [], []
    for content in damaged:
        path.write_bytes(content)
        try:
            found.append(read())
        except ValueError as error:
            texts.append(str(error))
    path.write_bytes(good)
    assert len(texts) + len(found) == len(damaged) > 20
    assert [text for text in texts if len(text.splitlines()) > 1 or str(path.parent) not in text] == []
    return found


STATES = ["state/slao-0/slao_state.safetensors", "state/seqlora-0/trained/0002.safetensors"]


@pytest.mark.parametrize("density", DENSITY)
@pytest.mark.parametrize("name", STATES)
def test_states(whole, tmp_path, name, density):
    path = Path(shutil.copy(whole / name, tmp_path / "state.safetensors"))
    for damaged in (cuts, flips):
        assert accepted(path, damaged(path.read_bytes(), density), lambda: read_state(path)) == []


@pytest.mark.parametrize("density", DENSITY)
@pytest.mark.parametrize("name", ["adapter_model.safetensors", "adapter_config.json", SUMS])
def test_adapters(whole, tmp_path, name, density):
    """Read by `slao interference` and `slao merge`, and looked at when a run is resumed."""
    folder = tmp_path / "adapter"
    shutil.copytree(whole / "adapters" / "slao-0", folder)
    path = folder / name
    assert is_whole(folder)
    for damage in (cuts, flips):
        damaged = damage(path.read_bytes(), density)
        spared = int(name == SUMS and damage is cuts)  # the newline at its end
        for read in (read_adapter, Source):
            assert len(accepted(path, damaged, lambda read=read: read(folder))) == spared
        answers = accepted(path, damaged, lambda: is_whole(folder))
        assert (answers.count(False), answers.count(True)) == (len(damaged) - spared, spared)


@pytest.mark.parametrize("density", DENSITY)
def test_results(whole, tmp_path, density):
    """A few flips say the same (1e-05 and 1E-05, a seventeenth digit), and six bytes are the checksum's own name: what
    is read is the run's results whenever anything is."""
    path = Path(shutil.copy(whole / "results.json", tmp_path / "results.json"))
    content, good = path.read_bytes(), load(tmp_path)
    assert accepted(path, cuts(content[:-1], density), lambda: load(tmp_path)) == []
    damaged = flips(content, density)
    others = accepted(path, damaged, lambda: load(tmp_path))
    assert len(others) <= len(b"sha256") * density[1] + len(damaged) // 100
    assert all({key: other.get(key) for key in good} == good for other in others)


@pytest.mark.parametrize("density", DENSITY)
def test_identity(whole, tmp_path, density):
    """What a run is resumed by: every cut and flip is refused."""
    path = Path(shutil.copy(whole / "identity.json", tmp_path / "identity.json"))
    content = path.read_bytes()
    identity = sums.unsealed(json.loads(content), path, always=True)
    (tmp_path / "settings.json").touch()
    run = SimpleNamespace(folder=tmp_path, identity=identity, _resume=True, notes=[])

    def read() -> Any:
        Run._check_same_run(run)
        return json.loads(path.read_text())

    assert read() == sums.sealed(identity)
    assert accepted(path, cuts(content[:-1], density), read) == []
    assert all(sums.unsealed(other, path) == identity for other in accepted(path, flips(content, density), read))


def damage(path: Path, how: str) -> None:
    content = bytearray(path.read_bytes())
    if how == "flipped":
        content[len(content) // 2] ^= 4
    path.write_bytes({"empty": b"", "half": content[: len(content) // 2], "flipped": content}[how])


@pytest.mark.parametrize("how", ["empty", pytest.param("half", marks=pytest.mark.exhaustive), "flipped"])
@pytest.mark.parametrize("name", ["identity.json", *STATES])
def test_a_run_is_not_resumed_from_damage(small, tools, whole, tmp_path, name, how):
    folder = tmp_path / "tiny"
    shutil.copytree(whole, folder)
    damage(folder / name, how)
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    line = tools.complaint(small.run(folder, "--resume"))
    assert str(folder / name) in line
    before[folder / LOCK] = (folder / LOCK).read_bytes()  # says who was here last
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize(
    "how", [*(pytest.param(each, marks=pytest.mark.exhaustive) for each in ("empty", "absent")), "half", "flipped"]
)
def test_what_is_derived_is_written_anew(small, tools, whole, tmp_path, how):
    """Adapters, results and report come from the states."""
    folder = tmp_path / "tiny"
    shutil.copytree(whole, folder)
    derived = [path for path in folder.rglob("*") if path.is_file() and "state" not in path.parts]
    # Without settings a folder is no run's; what they say is in the run's record.
    kept = ("identity.json", LOCK, *(["settings.json"] if how == "absent" else []))
    derived = [path for path in derived if path.name not in kept]
    assert {path.parent.name for path in derived} == {"tiny", "report", "slao-0", "seqlora-0"}
    pictures = {path: path.read_bytes() for path in derived if path.suffix == ".svg"}
    assert len(pictures) == 8
    for path in derived:
        damage(path, how) if how != "absent" else path.unlink()
    answer = small.run(folder, "--resume")
    assert answer["code"] == 0, answer["err"]
    assert tools.changed(folder, whole) == []
    assert {path: path.read_bytes() for path in pictures} == pictures
    for name in ("report.html", "settings.json"):
        assert (folder / name).read_bytes() == (whole / name).read_bytes()


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
