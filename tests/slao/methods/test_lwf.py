"""LwF: its penalty against the formula on twins, what it holds, its state and what it does with a method's batch."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from torch import nn

from slao import LwF, SeqLoRA
from slao_kernels.testing import error_ratio


def body(method: LwF) -> nn.Module:
    return method._body


def forward(method: LwF, ids: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    return method.model(input_ids=ids, attention_mask=mask, labels=ids).loss


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("patched", [False, True])
def test_the_penalty_and_its_gradients_are_the_formula(lab, padded, patched):
    """By hand, from a twin that holds the old adapter and one that holds the new; on two rows, one of them padded."""
    method, old, new = lab.make(LwF, weight=3.0, patched=patched), lab.make(SeqLoRA), lab.make(SeqLoRA)
    assert forward(method, lab.IDS, None) > 0
    assert method.penalty() is None
    lab.task(method, 0)
    weights = [(pair.A.clone(), pair.B.clone()) for pair in method.pairs]
    lab.begin(method, 1)
    lab.train(method, shift=1)
    ids = torch.cat([lab.IDS, (lab.IDS + 9) % 40])
    mask = torch.ones_like(ids)
    mask[1, -5:] = 0
    given = mask if padded else None
    forward(method, ids, given)
    training = body(method).training
    got = method.penalty()
    for pair, now, before, (A, B) in zip(method.pairs, new.pairs, old.pairs, weights, strict=True):
        with torch.no_grad():
            now.A.copy_(pair.A), now.B.copy_(pair.B), before.A.copy_(A), before.B.copy_(B)
    bodies = [twin.model.base_model.model.model for twin in (new, old)]
    h, h_old = (one(input_ids=ids, attention_mask=given).last_hidden_state for one in bodies)
    h_old = h_old.detach()
    apart = (h - h_old).square().sum(-1) / h_old.square().sum(-1)
    want = 3.0 * (apart[mask.bool()] if padded else apart).mean()
    assert float(want.detach()) > 1e-4
    assert float(got.detach()) == pytest.approx(float(want.detach()), rel=1e-10)
    mine, theirs = ([p for pair in each.pairs for p in pair.parameters] for each in (method, new))
    gradients = torch.autograd.grad(got, mine), torch.autograd.grad(want, theirs)
    assert max(error_ratio(a, b) for a, b in zip(*gradients, strict=True)) <= 1e-10
    # The adapter that trains is in the model again, and the model in training mode.
    assert all(
        torch.equal(pair.A, now.A) and torch.equal(pair.B, now.B)
        for pair, now in zip(method.pairs, new.pairs, strict=True)
    )
    assert body(method).training == training


def test_a_weight_of_zero_is_seqlora_and_a_large_one_holds_the_answers(lab):
    plain, free, held = lab.make(SeqLoRA), lab.make(LwF, weight=0.0), lab.make(LwF, weight=1e4)
    moved = []
    for method in (plain, free, held):
        lab.task(method, 0)
        before = lab.logits(method)
        lab.task(method, 1, steps=10)
        moved.append(error_ratio(lab.logits(method), before))
    assert torch.equal(lab.logits(plain), lab.logits(free))
    assert moved[2] < 0.5 * moved[0]


def test_only_the_last_pass_with_gradients_of_a_task_counts(lab):
    method = lab.make(LwF)
    lab.task(method, 0)
    forward(method, lab.IDS, None)  # between tasks
    assert method.penalty() is None
    lab.begin(method, 1)
    with torch.no_grad():
        forward(method, lab.IDS, None)
    assert method.penalty() is None
    forward(method, lab.IDS, None)
    assert float(method.penalty()) == 0.0  # nothing has moved yet
    assert method.penalty() is None  # it was asked for once


def test_the_hook_does_not_keep_the_method_alive(lab):
    method = lab.make(LwF)
    lab.task(method, 0)
    model, gone = method.model, weakref.ref(method)
    del method
    gc.collect()
    assert gone() is None
    model(lab.IDS, labels=lab.IDS).loss.backward()


@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_it_trains_under_the_trainer(tiny, kind):
    """Sequential LoRA and LwF part at the second task, and only there, also where the head sees labelled rows alone."""
    adapters = []
    for method in (SeqLoRA, LwF):
        job = tiny.Job(kind, method, tiny.stream(tasks=2))
        result = job.train(tiny.sgd())
        adapters.append([pair.B.clone() for pair in job.method.pairs])
        assert result.finished
    trained = [(a, b) for a, b in zip(*adapters, strict=True) if a.any()]  # the pooler's is not
    assert len(trained) >= 4
    assert not any(torch.equal(a, b) for a, b in trained)


def test_refusals(lab):
    with pytest.raises(ValueError, match="weight must be a finite number of at least 0, not -1.0"):
        lab.make(LwF, weight=-1.0)
    method = lab.make(LwF)
    with pytest.raises(ValueError, match="the saved adapter of before does not fit .*q_proj"):
        method._load_state({"x": torch.zeros(1)})
