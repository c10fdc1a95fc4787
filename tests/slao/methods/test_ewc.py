"""EWC: its Fisher information from the gradients of training, its penalty, and what it holds in place."""

from __future__ import annotations

import pytest
import torch

from slao import EWC, SeqLoRA
from slao_kernels.testing import error_ratio


def leaves(method: EWC) -> list[torch.Tensor]:
    return list(method._parameters.values())


@pytest.mark.parametrize("accumulation", [1, 3])
@pytest.mark.parametrize("scale", [1.0, 1024.0])
def test_the_fisher_is_the_mean_square_of_the_losses_own_gradients(lab, accumulation, scale):
    """By hand, from the loss of a twin without hooks. transformers takes the loss in fp32, which rounds at 1/3."""
    method, twin = lab.make(EWC, weight=5.0), lab.make(SeqLoRA)
    twins = [parameter for pair in twin.pairs for parameter in pair.parameters]
    expected = [torch.zeros_like(leaf) for leaf in twins]
    for index in range(3):
        lab.begin(method, index)
        optimizer = torch.optim.SGD(leaves(method), 0.05)
        for step in range(2 * accumulation):
            ids = (lab.IDS + 5 * index + step) % 40
            for mine, theirs in zip(twins, leaves(method), strict=True):
                mine.data.copy_(theirs.detach())
            gradients = torch.autograd.grad(twin.model(ids, labels=ids).loss, twins)
            for total, gradient in zip(expected, gradients, strict=True):
                total += gradient.square() / (2 * accumulation)
            ((method.model(ids, labels=ids).loss + method.penalty()) * scale / accumulation).backward()
            if step % accumulation == accumulation - 1:
                for leaf in leaves(method):
                    leaf.grad /= scale
                optimizer.step()
                optimizer.zero_grad()
        lab.end(method, index)
        assert max(error_ratio(a, b) for a, b in zip(method.fisher.values(), expected, strict=True)) <= 1e-6
    assert min(float(value.max()) for value in method.fisher.values()) > 0


def test_the_penalty_is_its_formula(lab):
    method = lab.make(EWC, weight=7.0, decay=0.5)
    lab.task(method, 0)
    first = {key: value.clone() for key, value in method.fisher.items()}
    anchor = [leaf.detach().clone() for leaf in leaves(method)]
    assert float(method.penalty()) == 0.0
    lab.begin(method, 1)
    lab.train(method, shift=1)
    want = sum(
        3.5 * (F * (leaf - old).square()).sum()
        for F, leaf, old in zip(first.values(), leaves(method), anchor, strict=True)
    )
    assert float(method.penalty()) == pytest.approx(float(want), rel=1e-12)
    assert float(want) > 0
    got, want = (torch.autograd.grad(value, leaves(method)) for value in (method.penalty(), want))
    assert max(error_ratio(a, b) for a, b in zip(got, want, strict=True)) <= 1e-12
    method._count_last()
    squares = {key: value / int(method._batches[key]) for key, value in method._squares.items()}
    lab.end(method, 1)
    for key, value in method.fisher.items():
        assert error_ratio(value, 0.5 * first[key] + squares[key]) <= 1e-14


def test_a_weight_of_zero_is_seqlora_and_a_large_one_holds_the_weights(lab):
    plain, free, held = lab.make(SeqLoRA), lab.make(EWC, weight=0.0), lab.make(EWC, weight=1e6)
    moved = []
    for method in (plain, free, held):
        lab.task(method, 0)
        before = [pair.B.clone() for pair in method.pairs]
        lab.task(method, 1, steps=10)
        moved.append(sum((pair.B - old).norm().item() for pair, old in zip(method.pairs, before, strict=True)))
    assert torch.equal(lab.logits(plain), lab.logits(free))
    assert moved[2] < 0.5 * moved[0]


def test_hooks_do_not_keep_the_method_alive_nor_look_outside_a_task(lab):
    import gc
    import weakref

    method = lab.make(EWC)
    lab.task(method, 0)
    before = {key: value.clone() for key, value in method.fisher.items()}
    lab.train(method)
    assert all(torch.equal(value, method.fisher[key]) for key, value in before.items())
    model, gone = method.model, weakref.ref(method)
    del method
    gc.collect()
    assert gone() is None
    model(lab.IDS, labels=lab.IDS).loss.backward()


def test_it_trains_under_the_trainer(tiny):
    """Whole batches or accumulated halves: the gradients of half batches are noisier, and their squares no smaller."""
    fishers = []
    for accumulation in (1, 2):
        job = tiny.Job("bert", EWC, tiny.stream(tasks=2))
        job.train(tiny.sgd(batch_size=4 // accumulation, gradient_accumulation=accumulation))
        assert all(int(batches) == 0 for batches in job.method._batches.values())
        fishers.append(sum(float(value.sum()) for value in job.method.fisher.values()))
    assert 1.0 < fishers[1] / fishers[0] < 20.0  # a factor left in would be a quarter


def test_refusals(lab):
    for options, message in (
        ({"weight": -1.0}, "weight must be a finite number of at least 0, not -1.0"),
        ({"decay": 1.5}, r"decay must lie in \[0, 1\], not 1.5"),
    ):
        with pytest.raises(ValueError, match=message):
            lab.make(EWC, **options)
    method = lab.make(EWC)
    with pytest.raises(ValueError, match="the saved fisher of .*q_proj.A does not fit its"):
        method._load_state({})


@pytest.mark.parametrize("broken", [float("inf"), float("nan")])
def test_a_pass_whose_gradients_are_not_finite_counts_for_nothing(lab, broken):
    """A loss scaler skips that step, and one layer's infinity takes the finite squares of the others with it."""
    plain, method = lab.make(EWC), lab.make(EWC)
    for each in (plain, method):
        each.begin_task("a")
        for step in range(3):
            ids = (lab.IDS + step) % 40
            if each is method:  # a skipped step before each one that counts
                loss = each.model(ids, labels=ids).loss + each.penalty()
                (loss + (each.pairs[0].parameters[1] * broken).sum()).backward()
                each.model.zero_grad()
            (each.model(ids, labels=ids).loss + each.penalty()).backward()
            each.model.zero_grad()
        each.end_task()
    assert all(torch.equal(method.fisher[key], value) for key, value in plain.fisher.items())
    assert float(method.penalty()) == 0.0
