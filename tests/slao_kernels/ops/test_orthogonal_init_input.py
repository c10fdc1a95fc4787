"""orthogonal_init_: what it refuses, whichever backend would compute it, and what looks bad and is not."""

from __future__ import annotations

import pytest
import torch

import slao_kernels

shared = torch.randn(6, 40)
BAD = {
    "r > n": ([torch.randn(5, 4)], r"As\[0\]: is \(5, 4\); it needs the shape \(r, n\)"),
    "vector": ([torch.randn(5)], r"As\[0\]: is \(5,\)"),
    "no rows": ([torch.randn(0, 5)], r"As\[0\]: is \(0, 5\)"),
    "integers": ([torch.ones(2, 4, dtype=torch.int32)], r"As\[0\]: is torch.int32"),
    "meta": ([torch.empty(2, 4, device="meta")], r"As\[0\]: is on the meta device; load the weights first"),
    "list": ([[1.0]], r"As\[0\]: is a list, expected a tensor"),
    "twice": ([shared, shared], r"As\[1\]: overlaps the memory of As\[0\]"),
    "overlap": ([shared[:4], shared[3:]], r"As\[1\]: overlaps the memory of As\[0\]"),
    "expanded": ([torch.randn(1, 9).expand(3, 9)], r"As\[0\]: is an expanded view"),
    "sparse": ([torch.eye(3).to_sparse()], r"As\[0\]: has layout torch.sparse_coo"),
    "many": ([torch.randn(5, 4)] * 20, "and 12 more"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_named_before_anything_is_written(case):
    As, message = BAD[case]
    good = torch.randn(3, 7)
    before, shared_before = good.clone(), shared.clone()
    with pytest.raises(ValueError, match=message):
        slao_kernels.orthogonal_init_([*As, good])
    assert torch.equal(good, before)
    assert torch.equal(shared, shared_before)


def test_side_by_side_views_are_not_an_overlap():
    """Columns of one matrix interleave in memory without sharing a byte (stacked A of q, k and v)."""
    both = torch.randn(4, 30)
    slao_kernels.orthogonal_init_([both[:, :13], both[:, 13:]])
    for A in (both[:, :13], both[:, 13:]):
        assert (A.double() @ A.double().T - torch.eye(4, dtype=torch.float64)).norm() <= 1e-6


def test_empty_list():
    report = slao_kernels.orthogonal_init_([], return_r=True)
    assert report.deficient == []
    assert report.r == []
