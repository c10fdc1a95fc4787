"""--json of the commands on saved adapters and models: what the document says is what is in the written folder."""

from __future__ import annotations

import io
import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from slao.cli import main
from slao.export import save_adapter
from slao.folders import read_adapter
from slao.merging.fold import verify


def document(arguments: list[object], capsys: pytest.CaptureFixture[str], code: int = 0) -> dict[str, Any]:
    """What is on standard output: JSON alone, in which no number is NaN."""
    capsys.readouterr()
    assert main([*map(str, arguments), "--json"]) == code
    found: dict[str, Any] = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)
    return found


@pytest.fixture
def two(folds, tmp_path) -> tuple[Path, Path]:
    return tuple(folds.save_lora("llama", tmp_path / name, seed=seed) for seed, name in enumerate(("one", "other")))


def test_interference(two, capsys):
    found = document(["interference", *two], capsys)
    assert [each["name"] for each in found["adapters"]] == ["one", "other"]
    assert [each["beside"] for each in found["adapters"]] == [[], []]
    vectors = []
    for folder in two:
        layers = sorted(read_adapter(folder).items())
        vectors.append(torch.cat([(s * B.double() @ A.double()).flatten() for _, (A, B, s) in layers]))
    for each, vector in zip(found["adapters"], vectors, strict=True):
        assert each["norm"] == pytest.approx(float(vector.norm()), rel=1e-9)
    cosine = float(vectors[0] @ vectors[1] / vectors[0].norm() / vectors[1].norm())
    assert found["cosines"] == [pytest.approx([1, cosine], abs=1e-9), pytest.approx([cosine, 1], abs=1e-9)]


def test_what_interference_does_not_look_at(folds, tmp_path, capsys):
    folds.save_lora("llama", tmp_path / "head", modules_to_save=["lm_head"])
    found = document(["interference", *[tmp_path / "head"] * 2], capsys)
    assert [each["beside"] for each in found["adapters"]] == [["modules_to_save"]] * 2


def test_merge(two, tmp_path, capsys):
    found = document(["merge", *two, "-o", tmp_path / "out", "--method", "svd", "--rank", "3"], capsys)
    assert found.keys() == {"folder", "method", "ranks", "lost", "notes"}
    assert (found["folder"], found["method"], found["notes"]) == (str(tmp_path / "out"), "svd", [])
    written, first, second = (read_adapter(folder) for folder in (tmp_path / "out", *two))
    assert found["ranks"] == dict.fromkeys(written, 3)
    rest = whole = 0.0
    for name, (A, B, _) in written.items():
        mean = sum(s * up.double() @ down.double() for down, up, s in (first[name], second[name])) / 2
        rest, whole = rest + float((mean - B.double() @ A.double()).norm() ** 2), whole + float(mean.norm() ** 2)
    assert found["lost"] == pytest.approx((rest / whole) ** 0.5, rel=1e-4)


def test_fold(folds, two, tmp_path, capsys):
    base = folds.save_base("llama", tmp_path / "base")
    found = document(["fold", base, two[0], "-o", tmp_path / "out"], capsys)
    assert found["folder"] == str(tmp_path / "out")
    before, after = (
        {k: v for f in d.glob("*.safetensors") for k, v in load_file(f).items()} for d in (base, tmp_path / "out")
    )
    assert found["changed"] == sum(not torch.equal(after[name], before[name]) for name in before) == 4
    assert found["bytes"] == sum(tensor.nbytes for tensor in after.values())
    told = {key: found[key] for key in ("method", "lost", "untied", "vocab_size", "other_bases", "verified")}
    assert told == {
        "method": "svd", "lost": None, "untied": None, "vocab_size": None, "other_bases": [], "verified": None
    }  # fmt: skip
    assert found["not_copied"] == {}


def test_a_fold_that_is_verified(saved_llama, tiny, tmp_path, capsys, monkeypatch):
    save_adapter(tiny.adapted("llama", init_lora_weights=False), tmp_path / "adapter")
    command = ["fold", saved_llama, tmp_path / "adapter", "--verify", "red a blue"]
    found = document([*command, "-o", tmp_path / "out"], capsys)["verified"]
    assert found["passed"] is True
    assert 0 <= found["difference"] <= found["allowed"]
    assert found["choice"][0] == found["choice"][1]
    monkeypatch.setattr(verify, "_DRAWN", 0.0)
    monkeypatch.setattr(verify, "_SUMMED", -1.0)  # nothing is near enough
    refused = document([*command, "-o", tmp_path / "again"], capsys, code=1)["verified"]
    assert refused["passed"] is False
    assert refused["difference"] > refused["allowed"]


def test_compress(two, tmp_path, capsys):
    found = document(["compress", two[0], "-o", tmp_path / "out", "--keep", "0.9"], capsys)
    record = json.loads((tmp_path / "out" / "layers.json").read_text())
    assert found == {"folder": str(tmp_path / "out"), **record}
    layers = read_adapter(tmp_path / "out")
    assert found["layers"].keys() == layers.keys()
    assert all(layer["rank"] == len(layers[name][0]) for name, layer in found["layers"].items())
    assert 0 < found["lost"] <= 0.1**0.5


def test_extract(folds, two, tmp_path, capsys):
    base = folds.save_base("llama", tmp_path / "base")
    assert main(["fold", str(base), str(two[0]), "-o", str(tmp_path / "tuned")]) == 0
    found = document(["extract", tmp_path / "tuned", base, "-o", tmp_path / "out", "--rank", "4"], capsys)
    assert {name: layer["rank"] for name, layer in found["layers"].items()} == dict.fromkeys(read_adapter(two[0]), 4)
    for name, (A, B, s) in read_adapter(two[0]).items():
        assert found["layers"][name]["norm"] == pytest.approx(float((s * B @ A).norm()), rel=1e-4)
        assert found["layers"][name]["lost"] <= 1e-5


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("command", ["interference", "compress"])
def test_tables_fit_a_terminal(command, folds, tmp_path, capsys, monkeypatch):
    """Of twelve adapters with a long name, or of layers: 80 columns, and every number of the table in a pipe."""
    folder = str(folds.save_lora("llama", tmp_path / "an_adapter_of_a_name_that_goes_on_and_on_and_on_to_the_end"))

    def arguments(out: str) -> list[str]:
        given = [folder] * 12 if command == "interference" else [folder, "-o", str(tmp_path / out), "--rank", "2"]
        return [command, *given]

    capsys.readouterr()
    assert main(arguments("one")) == 0
    plain = capsys.readouterr().out
    shown = Terminal()
    with monkeypatch.context() as change:
        change.setenv("COLUMNS", "80")
        change.setenv("TERM", "xterm")
        change.setattr(sys, "stdout", shown)
        assert main(arguments("other")) == 0
    lines = re.sub(r"\x1b\[[0-9;]*m", "", shown.getvalue()).splitlines()
    assert max(map(len, plain.splitlines())) > 80
    assert max(len(line) for line in lines if str(tmp_path) not in line) <= 80  # a path is not cut
    number = re.compile(r"(?<!\S)\d+\.\d+%?(?!\S)")
    assert len(number.findall(plain)) > 7
    assert sorted(number.findall("\n".join(lines))) == sorted(number.findall(plain))
