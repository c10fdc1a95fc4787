"""ImageMatching against its formulas, single images at a time; the candidates of a class-incremental run."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
import transformers as hf
from peft import LoraConfig

import slao_kernels
from slao.methods import CLoRA, Joint, SeqLoRA
from slao.objectives import CausalLM, ImageMatching, LabelMatching
from slao.objectives.simplex import simplex_directions
from slao.streams import ImageRow, Stream, Task
from slao.train import train


def vit(seed: int = 0, size: int = 4, channels: int = 1) -> hf.ViTModel:
    config = hf.ViTConfig(
        image_size=size,
        patch_size=2,
        num_channels=channels,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        initializer_range=0.3,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return hf.ViTModel(config, add_pooling_layer=False).eval()


def adapted(seed: int = 0) -> hf.ViTModel:
    model = vit(seed)
    torch.manual_seed(seed)
    slao_kernels.patch(model, LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj", "v_proj"]))
    return model


def image(label: str, k: int, size: int = 4, channels: int = 1) -> ImageRow:
    """A stripe at a place of the label's own, on noise of `k`."""
    g = torch.Generator().manual_seed(k)
    pixels = torch.randint(0, 60, (channels, size, size), generator=g)
    pixels[:, (ord(label) - ord("a")) % size] += 180
    return ImageRow("", label, pixels=bytes(pixels.flatten().tolist()), shape=(channels, size, size))


def stream(count: int = 6, **form: int) -> Stream:
    tasks = []
    for name, labels in (("first", "ab"), ("second", "cd"), ("third", "ef")):
        rows = [[image(label, 10 * i + s, **form) for i in range(count) for label in labels] for s in (0, 1)]
        tasks.append(Task(name, tuple(rows[0]), (), tuple(rows[1]), tuple(labels)))
    return Stream("stripes", tuple(tasks))


def embedded(model: torch.nn.Module, row: ImageRow) -> torch.Tensor:
    pixels = torch.tensor(list(row.pixels), dtype=torch.float32).view(1, *row.shape) / 255 * 2 - 1
    with torch.no_grad():
        return F.normalize(model(pixel_values=pixels).last_hidden_state[0].mean(0), dim=0)


# Directions


@pytest.mark.parametrize(("count", "width"), [(2, 2), (10, 64), (37, 64), (64, 64)])
def test_a_simplex_is_equiangular(count, width):
    table = simplex_directions(count, width, seed=3)
    assert table.shape == (count, width)
    cosines = table.double() @ table.double().T
    expected = torch.full((count, count), -1 / (count - 1), dtype=torch.float64).fill_diagonal_(1.0)
    assert (cosines - expected).abs().max() < 1e-6  # fp32 entries
    assert table.sum(0).abs().max() < 1e-6
    assert torch.equal(table, simplex_directions(count, width, seed=3))
    assert not torch.equal(table, simplex_directions(count, width, seed=4))


@pytest.mark.parametrize(("count", "width"), [(1, 8), (9, 8)])
def test_a_simplex_needs_room(count, width):
    with pytest.raises(ValueError, match=f"a simplex of {count} directions .* got {width}"):
        simplex_directions(count, width)


def test_means_are_those_of_the_training_images():
    model, content = vit(), stream()
    objective = ImageMatching(model, None, content)
    for i, label in enumerate(objective.labels):
        rows = [row for task in content.tasks for row in task.train if row.answer == label]
        expected = F.normalize(torch.stack([embedded(model, row) for row in rows]).mean(0), dim=0)
        assert (objective._table[i] - expected).abs().max() < 1e-6


def test_directions_belong_to_labels_not_to_places():
    model, content = vit(), stream()
    turned = replace(content, tasks=content.tasks[::-1])
    for directions in ("means", "simplex"):
        one, two = (ImageMatching(model, None, s, directions=directions) for s in (content, turned))
        assert one.labels != two.labels
        for label in one.labels:
            found, other = one._table[one._index[label]], two._table[two._index[label]]
            assert (found - other).abs().max() < 1e-6


def test_directions_stay_when_the_model_changes():
    model = vit()
    objective = ImageMatching(model, None, stream())
    before = objective._table.clone()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1
    assert torch.equal(objective._table, before)
    assert not objective._table.requires_grad


# Loss and score


@pytest.mark.parametrize("directions", ["means", "simplex"])
@pytest.mark.parametrize("candidates", ["own", "all", "running"])
def test_loss_is_the_written_formula(candidates, directions):
    model, content = vit(), stream()
    objective = ImageMatching(model, None, content, train_candidates=candidates, directions=directions, temperature=0.2)
    objective.running = ("first", "second")
    allowed = {"own": [2, 3], "all": range(6), "running": range(4)}[candidates]
    task = content.tasks[1]
    logits = torch.stack([embedded(model, row) for row in task.train]) @ objective._table.T / 0.2
    targets = torch.tensor([list(allowed).index("abcdef".index(row.answer)) for row in task.train])
    expected = F.cross_entropy(logits[:, list(allowed)], targets).item()
    loss = objective.loss(model, objective.collate(objective.features(task, task.train)))
    assert loss.item() == pytest.approx(expected, rel=1e-5)  # fp32 in other batches


def test_scores_are_over_the_labels_seen_so_far():
    model, content = vit(), stream()
    objective = ImageMatching(model, None, content, directions="simplex")
    shares = []
    for seen in ((), ("first",), ("first", "second"), ("first", "second", "third")):
        objective.seen = seen
        for t, task in enumerate(content.tasks):
            allowed = range(6) if not seen else sorted({*range(2 * len(seen)), 2 * t, 2 * t + 1})
            logits = torch.stack([embedded(model, row) for row in task.test]) @ objective._table[list(allowed)].T
            guesses = ["abcdef"[list(allowed)[k]] for k in logits.argmax(1).tolist()]
            share = sum(guess == row.answer for guess, row in zip(guesses, task.test, strict=True)) / len(task.test)
            assert objective.score(model, task, task.test, 4) == share
            shares.append(share)
    assert len(set(shares)) > 2, "the candidates made no difference"


def test_train_says_what_is_running_and_seen():
    told = []

    class Listening(ImageMatching):
        def loss(self, model, batch):
            told.append(("loss", self.running, self.seen))
            return super().loss(model, batch)

        def score(self, model, task, rows, batch_size):
            told.append(("score", self.running, self.seen))
            return super().score(model, task, rows, batch_size)

    names = ("first", "second", "third")
    expected = {
        SeqLoRA: [((), ()), *(((name,), names[: i + 1]) for i, name in enumerate(names))],
        Joint: [((), ()), (names, names)],
    }
    for kind, steps in expected.items():
        told.clear()
        model = adapted()
        train(model, kind(model), stream(), Listening(model, None, stream()))
        assert [key for key, _ in itertools.groupby(entry[1:] for entry in told)] == steps
        assert told[0] == ("score", (), ())


def test_gradients_reach_the_lora_alone():
    model, content = adapted(), stream()
    objective = ImageMatching(model, None, content, train_candidates="all")
    for pair in SeqLoRA(model).pairs:
        with torch.no_grad():
            pair.B.copy_(torch.randn_like(pair.B))
    task = content.tasks[0]
    objective.loss(model, objective.collate(objective.features(task, task.train))).backward()
    trained = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert trained == {name for name, _ in model.named_parameters() if "lora_" in name}
    assert len(trained) == 4
    assert all(parameter.grad.abs().max() > 1e-6 for _, parameter in model.named_parameters() if "lora_" in _)


def test_c_loras_first_step_moves_the_core_and_the_second_all():
    model, content = adapted(), stream()
    method = CLoRA(model, orthogonality_weight=0.0)
    objective = ImageMatching(model, None, content)
    method.begin_task("first")
    batch = objective.collate(objective.features(content.tasks[0], content.tasks[0].train))
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    sizes = []
    for _ in range(2):
        model.zero_grad()
        objective.loss(model, batch).backward()
        sizes.append({name: p.grad.abs().max().item() for name, p in parameters.items()})
        torch.optim.SGD(parameters.values(), lr=0.1).step()
    assert {name: size > 0 for name, size in sizes[0].items()} == {name: "core" in name for name in parameters}
    assert all(size > 0 for size in sizes[1].values())


# What the model takes


def test_images_are_brought_to_the_models_size_and_channels():
    model, content = vit(size=8, channels=3), stream()
    objective = ImageMatching(model, None, content, directions="simplex")
    pixels = objective.features(content.tasks[0], content.tasks[0].train[:1])[0]["pixel_values"]
    row = torch.tensor(list(content.tasks[0].train[0].pixels), dtype=torch.float32).view(1, 1, 4, 4) / 255
    expected = F.interpolate(row, (8, 8), mode="bilinear", antialias=True)[0] * 2 - 1
    assert pixels.shape == (3, 8, 8)
    for channel in pixels:
        torch.testing.assert_close(channel, expected[0])
    assert objective.tokens({"pixel_values": pixels[None].expand(5, -1, -1, -1)}) == 5 * 16


def test_what_does_not_fit_is_named(tiny):
    model, content = vit(), stream()
    with pytest.raises(ValueError, match=r"image_matching reads images; task 'first' has texts"):
        ImageMatching(model, None, tiny.stream())
    for kind, which in (("bert", LabelMatching), ("llama", CausalLM)):
        with pytest.raises(ValueError, match=rf"{which.name} reads texts; task 'first' has images \(use image_match"):
            which(tiny.base(kind), tiny.tokenizer(kind), content)
    with pytest.raises(ValueError, match=r"needs a model of images, with config.image_size; got BertModel"):
        ImageMatching(tiny.bert(), None, content)
    with pytest.raises(ValueError, match="the model takes 1 channels, an image has 3"):
        ImageMatching(model, None, stream(channels=3))
    lacking = replace(content.tasks[0], train=tuple(row for row in content.tasks[0].train if row.answer == "a"))
    with pytest.raises(ValueError, match="no training image has the label 'b'"):
        ImageMatching(model, None, replace(content, tasks=(lacking, *content.tasks[1:])))
    for option, message in {
        "directions": "unknown directions 'x'; choose one of means, simplex",
        "train_candidates": "unknown train_candidates 'x'; choose one of own, all, running",
        "eval_candidates": "unknown eval_candidates 'x'; choose one of own, all, seen",
    }.items():
        with pytest.raises(ValueError, match=message):
            ImageMatching(model, None, content, **{option: "x"})
