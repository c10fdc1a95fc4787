"""Cosines and overlaps of the trained A and B: by hand, through training, after a resume, and drawn."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from slao import SLAO, Joint, SeqLoRA
from slao.report.figures_similarity import layer_order, similarity
from slao.similarity import Similarity, by_layer, chance, summary
from slao.train import TrainConfig

E = torch.eye(6, dtype=torch.float64)


def record(tasks: list[dict[str, tuple[torch.Tensor, torch.Tensor]]]) -> Similarity:
    """Of a method whose "training" is to write these A (2, 5) and B (6, 2) of the layers "0" and "1"."""
    config = LoraConfig(r=2, target_modules=["0", "1"])
    model = get_peft_model(nn.Sequential(nn.Linear(5, 6), nn.Linear(5, 6)), config).double()
    method, similarity = SeqLoRA(model), Similarity()
    for index, weights in enumerate(tasks):
        method.begin_task(f"t{index}")
        for pair in method.pairs:
            for live, new in zip((pair.A, pair.B), weights[pair.name.rpartition(".")[2]], strict=True):
                live.copy_(new)
        similarity.record(method)
        method.end_task()
    return similarity


def test_hand_made_factors_have_the_cosines_and_overlaps_that_the_hand_computes():
    rows = E[:5, :5]
    first = (rows[:2], torch.stack([E[0], 2 * E[0]], 1))  # B of rank 1
    swapped = (rows[[1, 0]], E[:, :2])  # the same space in another basis
    half = (rows[[0, 2]], torch.zeros(6, 2).double())
    table = record([{"0": x, "1": y} for x, y in ((first, half), (swapped, half), (half, first))]).table()
    assert table["tasks"] == ["t0", "t1", "t2"]
    assert [name[-1] for name in table["layers"]] == ["0", "1"]
    assert table["shapes"] == {"A": [[2, 5], [2, 5]], "B": [[6, 2], [6, 2]]}
    one = 1 / (5**0.5 * 2**0.5)  # <B_0, B_1> = 1
    expected = {
        ("cosine", "A"): [[1, 0, 0.5], [0, 1, 0], [0.5, 0, 1]],
        ("overlap", "A"): [[1, 1, 0.5], [1, 1, 0.5], [0.5, 0.5, 1]],
        ("cosine", "B"): [[1, one, None], [one, 1, None], [None] * 3],
        ("overlap", "B"): [[1, 0.5, None], [0.5, 1, None], [None] * 3],
    }
    for (measure, factor), matrix in expected.items():
        for found, wanted in zip(table[measure][factor][0], matrix, strict=True):
            assert found == [None if w is None else pytest.approx(w, abs=1e-12) for w in wanted], (measure, factor)
    assert table["cosine"]["B"][1] == [[None, None, None], [None, None, None], [None, None, pytest.approx(1)]]
    assert json.loads(json.dumps(table, allow_nan=False)) == table
    # Means over the pairs (0, 1), (1, 2), and with (0, 2); what is None is left out.
    assert by_layer(table, "overlap", "A")["consecutive"][0] == pytest.approx(0.75)
    assert by_layer(table, "overlap", "A")["all"][0] == pytest.approx(2 / 3)
    assert by_layer(table, "overlap", "B")["all"] == [pytest.approx(0.5), None]
    assert chance(table, "A") == [0.4, 0.4]
    assert chance(table, "B") == [pytest.approx(1 / 3)] * 2
    assert summary(table)["overlap"]["B"] == {
        "consecutive": pytest.approx(0.5),
        "all": pytest.approx(0.5),
        "chance": pytest.approx(1 / 3),
    }


def test_a_change_of_basis_moves_the_cosine_but_not_the_overlap():
    g = torch.Generator().manual_seed(3)
    A, B, M, other = (torch.randn(*shape, generator=g).double() for shape in ((2, 5), (6, 2), (2, 2), (2, 5)))
    same, mixed = (A, B), (M @ A, B @ torch.linalg.inv(M))
    table = record([{"0": w, "1": (other, B)} for w in (same, mixed)]).table()
    for factor in "AB":
        assert table["overlap"][factor][0][0][1] == pytest.approx(1.0, abs=1e-12)
        assert abs(table["cosine"][factor][0][0][1]) < 0.9
    # And it is the formula that the docstring has, of any two matrices.
    crossed = record([{"0": w, "1": w} for w in (same, (other, B))]).table()
    left, right = (torch.linalg.qr(w.T).Q for w in (A, other))
    assert crossed["overlap"]["A"][0][0][1] == pytest.approx(float((left.T @ right).square().sum() / 2), abs=1e-12)
    cosine = float((A * other).sum() / (A.norm() * other.norm()))
    assert crossed["cosine"]["A"][0][0][1] == pytest.approx(cosine, abs=1e-12)


CONFIG = TrainConfig(batch_size=4, learning_rate=1e-2)


@pytest.mark.parametrize("method", [SLAO, SeqLoRA])
def test_it_is_what_training_left_before_the_merge(tiny, method):
    """The A and B that an on_task callback reads; SLAO's merge replaces none of them."""
    similarity, seen = Similarity(), []
    job = tiny.Job(method=method)
    job.train(
        CONFIG,
        similarity=similarity,
        on_task=lambda index, result: seen.append([(p.A.clone(), p.B.clone()) for p in job.method.pairs]),
    )
    assert similarity.layers == [pair.name for pair in job.method.pairs]
    table = similarity.table()
    assert table["tasks"] == ["first", "second", "third"]
    for layer in range(len(similarity.layers)):
        for which, factor in enumerate("AB"):
            flat = [task[layer][which].double().flatten() for task in seen]
            if all(weight.any() for weight in flat):  # the pooler's B, which the loss does not reach, stays zero
                for i, j in ((0, 1), (1, 2), (0, 2)):
                    cosine = float(flat[i] @ flat[j] / (flat[i].norm() * flat[j].norm()))
                    assert table["cosine"][factor][layer][i][j] == pytest.approx(cosine, abs=1e-12)
    assert sum(value is None for value in by_layer(table, "cosine", "B")["all"]) == 1
    # Training without it ends the same, bit for bit.
    plain = tiny.Job(method=method)
    plain.train(CONFIG)
    assert tiny.differing(plain.weights(), job.weights()) == []


def test_a_resumed_run_has_the_same_table(tiny, tmp_path):
    whole, options = Similarity(), {"lora": {"lora_dropout": 0.1}}
    tiny.Job(**options).train(CONFIG, similarity=whole)

    def stop(index: int, result: Any) -> None:
        if index == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tiny.Job(**options).train(CONFIG, state_dir=tmp_path, similarity=Similarity(), on_task=stop)
    files = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*.safetensors"))
    assert files == ["slao_state.safetensors", "trained/0001.safetensors", "trained/0002.safetensors"]
    for _ in ("goes on", "was finished"):
        resumed = Similarity()
        tiny.Job(**options).train(CONFIG, state_dir=tmp_path, similarity=resumed)
        assert resumed.table() == whole.table()


def test_a_state_without_the_trained_weights_is_refused_unread(tiny, tmp_path):
    config = TrainConfig(max_steps=1, batch_size=4)
    without, with_it = tmp_path / "without", tmp_path / "with"
    tiny.Job().train(config, state_dir=without)
    tiny.Job().train(config, state_dir=with_it, similarity=Similarity())
    (with_it / "trained" / "0002.safetensors").unlink()
    for folder, message in ((without, "was written without similarity"), (with_it, "no saved state at .*0002")):
        job, similarity = tiny.Job(), Similarity()
        before = job.weights()
        with pytest.raises(ValueError, match=message):
            job.train(config, state_dir=folder, similarity=similarity)
        assert (job.method.task, similarity.tasks) == (0, [])
        assert tiny.differing(job.weights(), before) == []
    (with_it / "trained" / "0001.safetensors").rename(with_it / "trained" / "0002.safetensors")
    (with_it / "trained" / "0003.safetensors").rename(with_it / "trained" / "0001.safetensors")
    with pytest.raises(ValueError, match="0001.safetensors is of task 'third', the state says 'first'"):
        tiny.Job().train(config, state_dir=with_it, similarity=Similarity())
    used = Similarity()
    tiny.Job().train(config, similarity=used)
    with pytest.raises(ValueError, match="holds 3 tasks of another run; give a new one"):
        tiny.Job().train(config, similarity=used)


def test_refusals_keep_nothing(tiny):
    job, similarity = tiny.Job(), Similarity()
    with pytest.raises(ValueError, match="no task is running"):
        similarity.record(job.method)
    job.method.begin_task("a")
    similarity.record(job.method)
    other = tiny.Job(lora={"r": 2})
    other.method.begin_task("b")
    with pytest.raises(ValueError, match="task 'b' has other layers or shapes than 'a'.*query"):
        similarity.record(other.method)
    job.method.pairs[1].B[0, 0] = float("inf")
    with pytest.raises(ValueError, match=f"diverged: NaN or infinite weights in {job.method.pairs[1].name}"):
        similarity.record(job.method)
    assert similarity.tasks == ["a"]


def test_the_figure_is_drawn_for_methods_with_two_tasks(tiny, tmp_path):
    tables = {}
    for name, method, tasks in (("slao", SLAO, 3), ("seq lora", SeqLoRA, 2), ("joint", Joint, 2)):
        recorded = Similarity()
        tiny.Job(method=method, tasks=tiny.stream(tasks=tasks)).train(CONFIG, similarity=recorded)
        tables[name] = [recorded.table()] * 2
    assert similarity("joint", tables["joint"]) is None  # one task
    assert similarity("none", []) is None
    assert similarity("slao", tables["slao"][:1]).name == "similarity_slao"
    plot = similarity("seq lora", tables["seq lora"])
    plot.write(tmp_path)
    assert (tmp_path / "similarity_seq_lora.svg").read_text(encoding="utf-8").count("<text") > 10
    found = summary(tables["seq lora"][0])
    for measure in ("cosine", "overlap"):
        assert " and ".join(f"{factor} {found[measure][factor]['all']:.3f}" for factor in "AB") in plot.alt
    other = {**tables["slao"][0], "layers": ["x"]}
    with pytest.raises(ValueError, match="slao: the tables of its seeds are of other layers"):
        similarity("slao", [tables["slao"][0], other])


def test_the_lines_of_the_figure_are_the_means_by_layer(monkeypatch):
    from matplotlib.figure import Figure

    g = torch.Generator().manual_seed(0)
    recorded = Similarity()
    layers = [f"model.layers.{i}.attn.{kind}_proj" for i in range(3) for kind in "qv"]
    for task in "abc":
        weights = [(torch.randn(2, 9, generator=g), torch.randn(8, 2, generator=g)) for _ in layers]
        recorded._append(task, layers, weights)
    table, drawn = recorded.table(), []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *args, **options: drawn.append(figure))
    similarity("slao", [table])
    assert layer_order(layers) == [("q_proj", [0, 2, 4]), ("v_proj", [1, 3, 5])]
    for axes, measure in zip(drawn[0].axes, ("cosine", "overlap"), strict=True):
        found = {}
        for first, second in zip(axes.lines[::2], axes.lines[1::2], strict=True):  # a line a kind of layer
            assert first.get_xdata()[-1] < second.get_xdata()[0]
            found[first.get_label()] = np.array([first.get_ydata(), second.get_ydata()]).T.ravel().tolist()
        for factor in "AB":
            means = by_layer(table, measure, factor)
            assert found[f"{factor}, next task"] == pytest.approx(means["consecutive"])
            assert found[f"{factor}, all pairs"] == pytest.approx(means["all"])
        assert ("A, random" in found) == (measure == "overlap")
    assert found["B, random"] == pytest.approx([0.25] * 6)


def test_layers_of_one_last_name_keep_their_whole_names():
    names = ["enc.0.attn.q", "dec.0.attn.q", "dec.1.attn.q", "head2"]
    assert layer_order(names) == [("enc.*.attn.q", [0]), ("dec.*.attn.q", [1, 2]), ("head2", [3])]
