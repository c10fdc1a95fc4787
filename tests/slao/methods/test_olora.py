"""O-LoRA: its penalty and that it makes the row spaces orthogonal. The rest is IncLoRA's."""

from __future__ import annotations

import pytest
import torch

from slao import IncLoRA, OLoRA
from slao_kernels.testing import error_ratio


def overlap(method: IncLoRA) -> float:
    """Mean of |cos| between rows of the newest A and the frozen ones."""
    found = []
    for index, pair in enumerate(method.pairs):
        old, new = (torch.nn.functional.normalize(A, dim=1) for A in (method.frozen(index)[0], pair.A))
        found.append((old @ new.T).abs().mean().item())
    return sum(found) / len(found)


def test_the_penalty_and_its_gradients_are_the_formula(lab):
    """By hand over entries, in fp64."""
    method = lab.make(OLoRA, orthogonality_weight=0.3, l2_weight=0.2)
    for index in range(3):
        lab.task(method, index)
    leaves = [parameter for pair in method.pairs for parameter in pair.parameters]
    expected = torch.zeros((), dtype=torch.float64)
    for index, pair in enumerate(method.pairs):
        A, B = pair.parameters
        for old in method.frozen(index)[0]:
            for new in A:
                expected = expected + 0.3 * (old * new).sum().abs()
        expected = expected + 0.2 * (A.square().sum().sqrt() + B.square().sum().sqrt())
    got, want = (torch.autograd.grad(value, leaves) for value in (method.penalty(), expected))
    assert method.frozen(0)[0].shape[0] == 8
    assert float(method.penalty()) == pytest.approx(float(expected), rel=1e-12)
    assert max(error_ratio(a, b) for a, b in zip(got, want, strict=True)) <= 1e-12


def test_no_frozen_pair_no_weight_no_penalty_and_a_zero_B_is_no_nan(lab):
    method = lab.make(OLoRA, l2_weight=0.1)
    assert lab.make(OLoRA).penalty() is None
    assert lab.make(OLoRA, orthogonality_weight=0.0).penalty() is None
    (gradient,) = torch.autograd.grad(method.penalty(), [method.pairs[0].parameters[1]])
    assert not gradient.any()  # B = 0


def test_the_penalty_turns_the_new_rows_away_from_the_old(lab):
    plain, apart = lab.make(IncLoRA), lab.make(OLoRA)
    for method in (plain, apart):
        lab.task(method, 0, steps=30)
        lab.task(method, 1, steps=30)
    assert overlap(plain) > 0.08
    assert overlap(apart) < 0.5 * overlap(plain)


def test_without_a_weight_it_is_inclora(lab):
    plain, same = lab.make(IncLoRA), lab.make(OLoRA, orthogonality_weight=0.0)
    for method in (plain, same):
        lab.task(method, 0)
        lab.task(method, 1)
    assert torch.equal(lab.logits(plain), lab.logits(same))


def test_refusals(lab):
    for options, message in (
        ({"orthogonality_weight": -1.0}, "orthogonality_weight must be a finite number of at least 0, not -1.0"),
        ({"l2_weight": float("inf")}, "l2_weight must be a finite number"),
    ):
        with pytest.raises(ValueError, match=message):
            lab.make(OLoRA, **options)
