"""Methods on a mixture's experts: one A and one B hold those of all, and SLAO treats each expert's own."""

from __future__ import annotations

import math

import pytest
import torch
from method_experts import BOTH, IDS, base, by_expert, model_of, task, train
from peft import LoraConfig, PeftModel
from torch import Tensor

from slao import SLAO
from slao.methods import METHODS
from slao_kernels import interference, weighted_merge
from slao_kernels.adapters import find_pairs

REFUSED = ["inflora", "osf", "slora"]  # which would need the inputs or the weight of each expert
TREATED = sorted(set(METHODS) - set(REFUSED))


@pytest.mark.parametrize("schedule", ["inv_sqrt", "adaptive"])
@pytest.mark.parametrize("kind", ["mixtral", "gpt_oss"])
def test_slao_is_the_papers_for_each_expert(kind, schedule):
    """Algorithm 1 by hand, expert after expert, in fp64."""
    method = SLAO(model_of(kind), schedule=schedule)
    assert [pair.experts for pair in method.pairs] == [1, 4, 4]
    merged: list[list[tuple[Tensor, Tensor]]] = []
    for index in range(1, 4):
        last = [by_expert(pair, pair.A, pair.B) for pair in method.pairs]
        method.begin_task(str(index))
        if index > 1:
            for pair, before in zip(method.pairs, last, strict=True):
                for (A, B), (A_old, B_old) in zip(by_expert(pair, pair.A, pair.B), before, strict=True):
                    Q, R = torch.linalg.qr(A_old.T)
                    assert torch.allclose(A, (Q * R.diagonal().sign()).T, atol=1e-12)
                    assert torch.equal(B, B_old)
        train(method, index)
        now = [by_expert(pair, pair.A, pair.B) for pair in method.pairs]
        method.end_task()
        if index == 1:
            merged = now
            continue
        lambdas = method.lambdas[-1]
        each = lambdas if isinstance(lambdas, list) else [lambdas] * 9
        for (place, own), lam in zip(
            ((i, e) for i, each in enumerate(now) for e in range(len(each))), each, strict=True
        ):
            (A, B), (A_old, B_old) = now[place][own], merged[place][own]
            if schedule == "adaptive":
                left, right = (B @ A).flatten(), (B_old @ A_old).flatten()
                cosine = float(left @ right / (left.norm() * right.norm()))
                assert lam == pytest.approx(min(1.0, max(1 / index, index ** (-(1 + cosine) / 2))), abs=1e-9)
            else:
                assert lam == 1 / math.sqrt(index)
            merged[place][own] = A, B_old + lam * (B - B_old)
        with method.merged():
            shown = [by_expert(pair, *(p.detach() for p in pair.parameters)) for pair in method.pairs]
        for found, expected in zip(shown, merged, strict=True):
            for (A, B), (A_right, B_right) in zip(found, expected, strict=True):
                assert torch.equal(A, A_right)
                assert torch.allclose(B, B_right, atol=1e-12)


@pytest.mark.parametrize("given", [[0.5] * 3, [0.5], [0.5] * 8 + [math.nan], [0.5] * 8 + [1.7]], ids=str)
def test_a_schedule_that_gives_something_else_writes_nothing(given):
    method = SLAO(model_of(), schedule=lambda i, stats: given)
    task(method, 0)
    method.begin_task("1")
    train(method, 1)
    before = {name: tensor.clone() for name, tensor in method._state().items()}
    with pytest.raises(ValueError, match="the schedule"):
        method.end_task()
    assert all(torch.equal(tensor, before[name]) for name, tensor in method._state().items())


def test_preserve_leaves_every_product_as_it_was():
    method = SLAO(model_of(), preserve=True)
    task(method, 0)
    before = [B @ A for pair in method.pairs for A, B in by_expert(pair, pair.A, pair.B)]
    method.begin_task("1")
    after = [B @ A for pair in method.pairs for A, B in by_expert(pair, pair.A, pair.B)]
    assert max((a - b).abs().max().item() for a, b in zip(after, before, strict=True)) <= 1e-12


@pytest.mark.parametrize("name", TREATED)
def test_saved_resumed_and_exported(name, tmp_path):
    model = model_of()
    method = METHODS[name](model)
    for index in range(2):
        task(method, index)
    method.save(tmp_path / "state")
    method.save_pretrained(tmp_path / "adapter")
    again = METHODS[name](model_of())
    again.load(tmp_path / "state")
    for each in (method, again):
        task(each, 2)
    for left, right in zip(method.pairs, again.pairs, strict=True):
        assert torch.equal(left.A, right.A)
        assert torch.equal(left.B, right.B)
    earlier = METHODS[name](model_of())
    earlier.load(tmp_path / "state")
    with earlier.merged(), torch.no_grad():
        expected = earlier.model(input_ids=IDS).logits
    plain = PeftModel.from_pretrained(base(), tmp_path / "adapter").double()
    assert (plain(input_ids=IDS).logits - expected).abs().max() <= 1e-12


def test_merged_and_folded():
    """For long evaluations: the merge in the base itself, which has its bits back afterwards."""
    method = SLAO(model_of())
    for index in range(2):
        task(method, index)
    before = {name: p.detach().clone() for name, p in method.model.named_parameters()}
    with torch.no_grad():
        with method.merged():
            expected = method.model(input_ids=IDS).logits
        with method.merged(fold=True):
            assert (method.model(input_ids=IDS).logits - expected).abs().max() <= 1e-12
            assert any(not torch.equal(p, before[name]) for name, p in method.model.named_parameters())
    assert all(torch.equal(p, before[name]) for name, p in method.model.named_parameters())


@pytest.mark.parametrize("name", REFUSED)
def test_refuses_by_name(name):
    with pytest.raises(ValueError, match=rf"{name} cannot treat 2 layers.*mlp\.experts.*experts") as caught:
        METHODS[name](model_of())
    assert "\n" not in str(caught.value)


def test_similarity_compares_each_expert_with_itself():
    from slao.similarity import Similarity

    method, similarity = SLAO(model_of()), Similarity()
    for index in range(2):
        method.begin_task(str(index))
        train(method, index)
        similarity.record(method)
        method.end_task()
    table = similarity.table()
    assert len(table["layers"]) == 9
    assert table["shapes"]["A"][1:] == [[3, 64]] * 4 + [[3, 32]] * 4
    assert all(0 < matrix[0][1] < 1 for matrix in table["overlap"]["A"])


def test_interference_and_weighted_merge_take_experts_one_by_one():
    model = model_of()
    model.add_adapter("second", LoraConfig(r=2, lora_alpha=7, target_modules=["q_proj"], target_parameters=BOTH))
    model.double()
    pairs = {name: find_pairs(model, name)[0] for name in ("default", "second")}
    torch.manual_seed(4)
    for pair in (*pairs["default"], *pairs["second"]):
        pair.B.normal_()
    found = interference(["default", "second"], model=model)
    deltas = [
        [pair.scaling * B @ A for pair in both for A, B in by_expert(pair, pair.A, pair.B)] for both in pairs.values()
    ]
    assert [name.partition("[")[2] for name in found.layers] == ["", *[f"{e}]" for e in range(4)] * 2]
    for index in range(9):
        for i, left in enumerate(deltas):
            for j, right in enumerate(deltas):
                assert float(found.gram[index, i, j]) == pytest.approx(float((left[index] * right[index]).sum()))
    direct = interference([pairs["default"], pairs["second"]])
    assert torch.allclose(direct.gram, found.gram)
    merged = weighted_merge(["default", "second"], [0.5, 0.25], rank=5, model=model)
    for index, (A, B) in enumerate(merged.pairs):
        right = 0.5 * deltas[0][index] + 0.25 * deltas[1][index]
        assert (B @ A - right).norm() <= 1e-9 * right.norm()
