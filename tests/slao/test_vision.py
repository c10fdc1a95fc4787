"""The model "digits-vit": its letters, its training, and a run of `slao run` on it."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import LoraConfig

import slao_kernels
from slao.cli import main
from slao.methods import METHODS, make_method
from slao.models import default_objective, load_model, load_tokenizer, model_path
from slao.objectives import ImageMatching
from slao.streams import make_stream
from slao.train import TrainConfig, train
from slao.vision import digits_vit, letters
from slao.vision.pretrained import Recipe, pretrain

# Seconds instead of a minute.
SMALL = Recipe(steps=150, batch_size=64, layers=1, learning_rate=5e-3)


@pytest.fixture(scope="module")
def glyphs():
    return letters.glyphs()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SLAO_CACHE", str(tmp_path_factory.mktemp("cache")))
        return digits_vit(SMALL)


def test_no_digit_is_among_the_letters(glyphs):
    assert all(character.isascii() and character.isalpha() for character in letters.CHARACTERS)
    ink, kinds = glyphs
    digits = letters.glyphs("0123456789")[0].view(len(letters.FONTS), 10, -1)
    drawn = ink.view(len(letters.FONTS), len(letters.CHARACTERS), -1)
    # Font by font: the mean difference of a pixel. 0.02 is twenty of 1,024; l and 1, O and 0 are the nearest.
    distance = (drawn.unsqueeze(2) - digits.unsqueeze(1)).abs().mean(-1)
    assert distance.min() > 0.02
    assert kinds.tolist() == [*range(len(letters.CHARACTERS))] * len(letters.FONTS)


def test_every_font_has_every_letter(glyphs):
    """A glyph that a font lacks is drawn as a box, the same for all that it lacks."""
    drawn = glyphs[0].view(len(letters.FONTS), len(letters.CHARACTERS), -1)
    for font in drawn:
        distance = torch.cdist(font, font, p=1) / font.shape[1]
        assert distance[~torch.eye(len(font), dtype=torch.bool)].min() > 0.01
    ink = glyphs[0]
    assert ink[:, 0].amax(1).min() > 0.2
    assert ink[:, -1].amax(1).min() > 0.2


def test_bent_letters_are_counts_of_blocks(glyphs):
    ink = glyphs[0]
    one, again, other = (letters.bent(ink, torch.Generator().manual_seed(seed)) for seed in (0, 0, 1))
    assert one.shape == (len(ink), 1, 8, 8)
    assert torch.equal(one, again)
    assert not torch.equal(one, other)
    assert torch.equal(one * 16, (one * 16).round())
    assert one.min() == 0
    assert one.max() == 1
    assert (one.flatten(1).amax(1) > 0.3).all(), "an empty image"


def test_training_is_deterministic_and_learns():
    state = torch.get_rng_state()
    (one, accuracy), (two, _) = (pretrain(SMALL) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), two.state_dict().values(), strict=True))
    assert accuracy > 5 / len(letters.CHARACTERS)  # five times chance
    assert not one.training


def test_it_is_trained_once(folder, monkeypatch):
    monkeypatch.setenv("SLAO_CACHE", str(folder.parent))
    weights = folder / "model.safetensors"
    before = weights.stat().st_mtime_ns
    assert digits_vit(SMALL) == folder
    assert weights.stat().st_mtime_ns == before
    assert [entry.name for entry in folder.parent.iterdir()] == [folder.name], "something temporary was left"
    assert digits_vit(replace(SMALL, steps=1)) != folder


def test_it_loads_as_a_model_of_images(folder):
    assert model_path(str(folder)) == str(folder)
    assert default_objective(str(folder)) == "image_matching"
    assert load_tokenizer(str(folder)) is None
    model = load_model(str(folder), "image_matching", "float32", "cpu")
    assert model(pixel_values=torch.zeros(2, 1, 8, 8)).last_hidden_state.shape == (2, 17, 64)


def test_a_cache_that_cannot_be_written_is_named(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("SLAO_CACHE", str(tmp_path / "file"))
    with pytest.raises(ValueError, match=r"digits-vit cannot be kept in .*file .*: name a folder by SLAO_CACHE"):
        model_path("digits-vit")


def command(folder: Path, runs: Path, *more: str) -> list[str]:
    small = ["--train-rows", "8", "--epochs", "1", "--seeds", "0", "--methods", "clora,joint"]
    return ["run", "--preset", "digits", "--model", str(folder), "--runs", str(runs), *small, *more]


@pytest.fixture(scope="module")
def finished(folder, tmp_path_factory) -> Path:
    """A finished run. Look, do not touch."""
    runs = tmp_path_factory.mktemp("runs")
    assert main(command(folder, runs)) == 0
    return runs / "digits"


def test_a_run_from_the_command_line(finished):
    content = json.loads((finished / "results.json").read_text())
    assert content["settings"]["objective"]["name"] == "image_matching"
    for label, method in content["methods"].items():
        matrix = method["matrix"][0]
        assert method["AA"] == [pytest.approx(sum(matrix[-1]) / 5)]
        if label == "joint":
            assert method["Inc-Acc"] == [None]
            continue
        assert [[score is None for score in row] for row in matrix] == [[i > t for i in range(5)] for t in range(5)]
        after = [sum(matrix[t][: t + 1]) / (t + 1) for t in range(5)]
        assert method["Inc-Acc"] == [pytest.approx(sum(after) / 5)]
        assert method["FWT"] == [None]
        # One task: two labels to choose from, of which the nearest mean of even a poor model knows more than chance.
        assert matrix[0][0] > 0.6
    assert len({tuple(method["zero_shot"][0]) for method in content["methods"].values()}) == 1
    report = (finished / "report.html").read_text()
    assert "digits 0, 1" in report


def test_a_resumed_run_is_the_same(folder, finished, tmp_path):
    """As if it had died after C-LoRA's last task: that state is read, joint training is done again."""
    cut = tmp_path / "digits"
    shutil.copytree(finished, cut)
    (cut / "results.json").unlink()
    shutil.rmtree(cut / "state" / "joint-0")
    assert main(command(folder, tmp_path, "--resume")) == 0
    before, after = (json.loads((run / "results.json").read_text())["methods"] for run in (finished, cut))
    for label in before:
        for key in ("matrix", "zero_shot", "losses"):
            assert before[label][key] == after[label][key]


def test_every_method_takes_the_model_of_images(folder):
    """One step of each on two sessions."""
    content = make_stream("digits").limited(rows=8)
    content = replace(content, tasks=tuple(replace(task, test=task.test[:20]) for task in content.tasks[:2]))
    config = TrainConfig(max_steps=1, evaluate="seen")
    for name in METHODS:
        model = load_model(str(folder), "image_matching", "float32", "cpu")
        slao_kernels.patch(model, LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
        method = make_method(name, model)
        result = train(model, method, content, ImageMatching(model, None, content), config)
        assert result.finished
        assert all(0 <= score <= 1 for score in result.matrix[-1])
