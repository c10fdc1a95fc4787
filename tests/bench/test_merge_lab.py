"""The merges of the laboratory against their dense formulas, and what is scored of a recorded training."""

from __future__ import annotations

import merge_lab
import pytest
import torch
from merge_lab import Kept, Recorded

from slao.sweep import Job
from slao_kernels.testing import error_ratio

M, N, R, TASKS = 11, 9, 3, 4


def recorded(method: str = "slao") -> Recorded:
    """Two layers, four tasks."""
    torch.manual_seed(0)
    pairs = [[(torch.randn(R, N), torch.randn(M, R)) for _ in range(2)] for _ in range(TASKS)]
    inputs = [[torch.randn(50, N) for _ in range(2)] for _ in range(TASKS)]
    grams = [[x.T @ x / len(x) for x in each] for each in inputs]
    job = Job(0, method, method, 7, 8)
    return Recorded(job, method, {}, [f"t{i}" for i in range(TASKS)], pairs, grams)


def dense(pair: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    A, B = pair
    return B.double() @ A.double()


def test_no_merge_is_the_last_adapter():
    found = recorded()
    for mine, theirs in zip(merge_lab.merges_of(found, merge_lab.last), found.pairs, strict=True):
        assert all(torch.equal(dense(a), dense(b)) for a, b in zip(mine, theirs, strict=True))


def test_factors_are_slaos_average():
    found = recorded()
    merged = merge_lab.merges_of(found, merge_lab.factors)[-1]
    for layer in range(2):
        B = found.pairs[0][layer][1].double()
        for i in range(2, TASKS + 1):
            B = B + (found.pairs[i - 1][layer][1].double() - B) / i**0.5
        assert error_ratio(merged[layer][1], B) <= 1e-6
        assert torch.equal(merged[layer][0], found.pairs[-1][layer][0])


@pytest.mark.parametrize("power", [0.5, 1.0])
def test_products_are_averaged_and_cut(power):
    found = recorded()
    whole, cut = (merge_lab.merges_of(found, merge_lab.product(rank, power)) for rank in (N, 4))
    for layer in range(2):
        total = dense(found.pairs[0][layer])
        for i in range(2, TASKS + 1):
            total = total + (dense(found.pairs[i - 1][layer]) - total) * i**-power
        assert error_ratio(dense(whole[-1][layer]), total) <= 1e-6
        # The first merge holds two tasks' rank of six, cut to four: the best there is.
        first = dense(found.pairs[0][layer]) + (dense(found.pairs[1][layer]) - dense(found.pairs[0][layer])) * 2**-power
        best = torch.linalg.svdvals(first)[4:].norm()
        assert float((dense(cut[1][layer]) - first).norm()) == pytest.approx(float(best), rel=1e-5)


def test_by_inputs_is_the_least_squares_of_all_tasks():
    found = recorded()
    merged = merge_lab.merges_of(found, merge_lab.by_inputs())[-1]
    for layer in range(2):
        grams = [merge_lab._ridged(grams[layer], 1e-3) for grams in found.grams]
        weighted = sum(dense(pairs[layer]) @ G for pairs, G in zip(found.pairs, grams, strict=True))
        assert error_ratio(dense(merged[layer]), weighted @ torch.linalg.inv(sum(grams))) <= 1e-5


def test_by_inputs_is_cut_in_the_norm_of_all_inputs():
    found = recorded()
    whole, cut = (merge_lab.merges_of(found, merge_lab.by_inputs(rank))[1] for rank in (None, 2))
    for layer in range(2):
        S = sum(merge_lab._ridged(grams[layer], 1e-3) for grams in found.grams[:2])
        L = torch.linalg.cholesky(S)
        best = torch.linalg.svdvals(dense(whole[layer]) @ L)[2:].norm()
        assert float(((dense(cut[layer]) - dense(whole[layer])) @ L).norm()) == pytest.approx(float(best), rel=1e-4)


def test_a_sketch_keeps_the_leading_inputs_and_the_trace():
    gram = merge_lab._ridged(recorded().grams[0][0], 1e-3)
    kept = merge_lab._kept(gram, 3)
    assert float(kept.trace()) == pytest.approx(float(gram.trace()))
    assert torch.allclose(torch.linalg.eigvalsh(kept)[-3:], torch.linalg.eigvalsh(gram)[-3:])
    assert float(torch.linalg.eigvalsh(kept)[:-3].std()) <= 1e-10
    assert merge_lab._kept(gram, None) is gram


def test_a_factor_is_for_use_alone():
    found = recorded()
    plain, larger = (
        merge_lab.merges_of(found, merge)
        for merge in (merge_lab.by_inputs(4), merge_lab.scaled(merge_lab.by_inputs(4), 1.25))
    )
    for a, b in zip(plain, larger, strict=True):
        assert all(error_ratio(1.25 * dense(x), dense(y)) <= 1e-6 for x, y in zip(a, b, strict=True))


def test_the_table_pairs_each_run_with_slaos():
    rows = [
        {"trained": trained, "merge": merge, "seed": seed, "order": 0, "AA": aa, "BWT": -0.1}
        for trained, merge, scores in (("slao", "slao", (0.5, 0.6)), ("inclora", "last", (0.52, 0.64)))
        for seed, aa in enumerate(scores)
    ]
    lines = merge_lab.table(rows).split("\n")
    assert lines[2] == "| slao | slao | 2 | 0.5500 | -0.1000 | +0.00 (se 0.00) |"
    assert lines[3] == "| inclora | last | 2 | 0.5800 | -0.1000 | +3.00 (se 1.00) |"


def test_kept_is_what_a_merge_hands_on():
    seen = []

    def merge(i: int, kept: Kept, new: Kept) -> Kept:
        seen.append((i, len(kept.pairs)))
        return new

    merge_lab.merges_of(recorded(), merge)
    assert seen == [(2, 2), (3, 2), (4, 2)]
