"""`cosines`: how each task's new vector lies to the merge of the tasks before, taken before they are merged."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from slao import SLAO, MergeStats, SeqLoRA, make_schedule
from slao_kernels.testing import tiny_model


def model(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return get_peft_model(tiny_model("llama"), LoraConfig(r=6, target_modules=["q_proj", "v_proj", "down_proj"]))


def deltas(method: SLAO | SeqLoRA) -> list[Tensor]:
    return [(pair.scaling * pair.B.double() @ pair.A.double()).flatten() for pair in method.pairs]


def run(method: SLAO | SeqLoRA, tasks: int) -> list[list[float]]:
    """Pretend to train; returns the cosines by deltas written out, from the second task on."""
    expected = []
    g = torch.Generator().manual_seed(3)
    for i in range(tasks):
        method.begin_task(str(i))
        for pair in method.pairs:
            for tensor in (pair.A, pair.B):
                tensor.add_(torch.randn(tensor.shape, generator=g) * 0.2)
        new = deltas(method)
        with method.merged():
            old = deltas(method)
        if i:
            pairs = zip(new, old, strict=True)
            expected.append([torch.nn.functional.cosine_similarity(a, b, dim=0).item() for a, b in pairs])
        method.end_task()
    return expected


@pytest.mark.parametrize(
    "options", [{}, {"merge": "AB"}, {"merge": "A", "init": "merged"}, {"init": "random"}], ids=str
)
def test_equal_the_dense_ones_of_every_task(options):
    method = SLAO(model(), keep_cosines=True, **options)
    expected = run(method, 4)
    assert method.cosines[0] is None
    assert len(method.cosines) == 4
    for found, dense in zip(method.cosines[1:], expected, strict=True):
        assert found == pytest.approx(dense, abs=1e-12)
        assert max(map(abs, dense)) > 0.01


def test_are_not_computed_unasked_and_change_nothing():
    plain, asked = SLAO(model()), SLAO(model(), keep_cosines=True)
    run(plain, 3)
    run(asked, 3)
    assert plain.cosines == [None, None, None]
    assert asked.lambdas == plain.lambdas
    for one, other in zip(plain.pairs, asked.pairs, strict=True):
        assert torch.equal(one.B, other.B)
    with plain.merged(), asked.merged():
        assert all(torch.equal(one.B, other.B) for one, other in zip(plain.pairs, asked.pairs, strict=True))
    sequential = SeqLoRA(model())
    run(sequential, 2)
    assert sequential.cosines == [None, None]


def test_a_schedule_that_asks_for_them_leaves_them_on_the_method():
    def agreeing(i, stats):
        return [0.5 if value > 0 else 0.25 for value in stats.cosine()]

    method = SLAO(model(), schedule=agreeing)
    expected = run(method, 3)
    for lam, found, dense in zip(method.lambdas[1:], method.cosines[1:], expected, strict=True):
        assert found == pytest.approx(dense, abs=1e-12)
        assert lam == [0.5 if value > 0 else 0.25 for value in dense]


def test_the_adaptive_schedule_is_its_formula():
    method = SLAO(model(), schedule="adaptive")
    expected = run(method, 4)
    for i, (lam, cosines) in enumerate(zip(method.lambdas[1:], expected, strict=True), 2):
        assert lam == pytest.approx([i ** (-(1 + c) / 2) for c in cosines], rel=1e-12)
        assert all(1 / i <= value <= 1 for value in lam)
        assert max(lam) - min(lam) > 0.01


@pytest.mark.parametrize(("angle", "wanted"), [(1.0, 1 / 3), (0.0, 3**-0.5), (-1.0, 1.0), (0.5, 3**-0.75)])
def test_the_adaptive_schedule_at_known_angles(angle, wanted):
    """B = (cos, sin) against (1, 0), with one A."""
    B, merged, A = torch.tensor([[angle], [(1 - angle**2) ** 0.5]]), torch.tensor([[1.0], [0.0]]), torch.ones(1, 3)
    stats = MergeStats(3, "c", ["layer"], [A], [B], [A], [merged], [1.0, 0.7])
    assert make_schedule("adaptive")(3, stats) == pytest.approx([wanted], rel=1e-6)  # fp32 inputs


def test_survive_save_and_load(tmp_path):
    method = SLAO(model(), keep_cosines=True)
    run(method, 3)
    method.save(tmp_path)
    other = SLAO(model(seed=5))  # asking for them or not is no part of what a state must agree on
    other.load(tmp_path)
    assert other.cosines == method.cosines
    assert other.cosines[0] is None
