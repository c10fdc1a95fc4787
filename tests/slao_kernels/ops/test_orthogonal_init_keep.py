"""orthogonal_init_(keep=...): what the matrices were, taken in the pass that overwrites them."""

from __future__ import annotations

import pytest
import torch
from on_lists import DTYPES, INTERPRETED, PUBLIC, Seen, at
from torch import Tensor

import slao_kernels


def matrices(dtype: torch.dtype) -> list[Tensor]:
    """Regular, in need of a second pass, rank-deficient, zero, transposed, strided."""
    near = torch.randn(1, 90, dtype=torch.float64) * 30 + torch.randn(8, 90, dtype=torch.float64)
    twice = torch.randn(4, 30).repeat(2, 1)
    found = [torch.randn(16, 300), near, twice, torch.zeros(3, 7), torch.randn(40, 5).t(), torch.randn(6, 60)[:, ::3]]
    return [A.to(dtype) for A in found]


@at(PUBLIC)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("with_r", [False, True])
def test_what_was_is_kept(dtype, ops, with_r):
    As = matrices(dtype)
    before, alone = [A.clone() for A in As], [A.clone() for A in As]
    keep = [torch.full_like(A, torch.nan) for A in As]
    keep[1] = keep[1].t().contiguous().t()  # of other strides than the matrix
    versions = [copy._version for copy in keep]
    report = slao_kernels.orthogonal_init_(As, return_r=with_r, keep=keep, backend=ops.backend)
    plain = slao_kernels.orthogonal_init_(alone, return_r=with_r, backend=ops.backend)
    for copy, old, A, other in zip(keep, before, As, alone, strict=True):
        assert torch.equal(copy, old)
        assert torch.equal(A, other)
    assert report.deficient == plain.deficient
    assert all(copy._version > version for copy, version in zip(keep, versions, strict=True))


@at(PUBLIC)
def test_all_copies_are_one_call(ops):
    """What a GPU does, which copies before the other launches; a mode that looks on takes a CPU there too. One launch
    for the list: test_cuda_emulated.py counts it, and the test below."""
    As = matrices(torch.float32)
    before, keep = [A.clone() for A in As], [torch.empty_like(A) for A in As]
    with Seen() as seen:
        slao_kernels.orthogonal_init_(As, keep=keep, backend=ops.backend)
    assert [name for name in seen.names if "copy" in name or name.startswith("slao_kernels::")] == [
        "slao_kernels::scaled_merge_",
        "slao_kernels::orthogonal_init_",
    ]
    assert all(torch.equal(copy, old) for copy, old in zip(keep, before, strict=True))


@pytest.mark.skipif(not INTERPRETED, reason="runs under Triton's interpreter")
def test_one_launch_of_triton_copies_all(monkeypatch):
    from slao_kernels.ops import tables
    from slao_kernels.ops.scaled_merge import device

    kernels, launch = [], tables.launch
    monkeypatch.setattr(
        tables, "launch", lambda kernel, *rest, **more: (kernels.append(kernel), launch(kernel, *rest, **more))
    )
    As = [torch.randn(2, 9) for _ in range(30)]
    before, keep = [A.clone() for A in As], [torch.empty_like(A) for A in As]
    slao_kernels.orthogonal_init_(As, keep=keep, backend="triton")
    assert kernels.count(device.merge_kernel) == 1
    assert all(torch.equal(copy, old) for copy, old in zip(keep, before, strict=True))


@at(PUBLIC)
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_nothing_is_written_where_one_is_not_finite(ops, value):
    As = matrices(torch.float32)
    As[4][1, 2] = value
    before, keep = [A.clone() for A in As], [torch.full_like(A, 7.0) for A in As]
    with pytest.raises(ValueError, match=r"As\[4\]: has NaN or infinite entries"):
        slao_kernels.orthogonal_init_(As, keep=keep, backend=ops.backend)
    for A, old, copy in zip(As, before, keep, strict=True):
        assert torch.equal(A.nan_to_num(), old.nan_to_num())
        assert (copy == 7.0).all()


A, B = torch.randn(3, 8), torch.randn(3, 8)
BAD = {
    "too few": ([A, B], [torch.empty(3, 8)], "lengths differ: As 2, keep 1"),
    "shape": ([A, B], [torch.empty(3, 8), torch.empty(3, 7)], r"keep\[1\]: is \(3, 7\) torch.float32, A \(3, 8\)"),
    "dtype": ([A], [torch.empty(3, 8).double()], r"keep\[0\]: is \(3, 8\) torch.float64"),
    "itself": ([A], [A], r"keep\[0\]: is As\[0\] itself"),
    "another": ([A, B], [torch.empty(3, 8), A], r"overlaps the memory of"),
    "one for two": ([A, B], [B.clone()] * 2, r"keep\[1\]: overlaps the memory of keep\[0\]"),
    "no tensor": ([A], [None], r"keep\[0\]: is a NoneType"),
    "meta": ([A], [torch.empty(3, 8, device="meta")], r"keep\[0\]: is on the meta device"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_named_before_anything_is_written(case):
    As, keep, message = BAD[case]
    before = [A.clone() for A in As]
    with pytest.raises(ValueError, match=message):
        slao_kernels.orthogonal_init_(As, keep=keep)
    assert all(torch.equal(A, old) for A, old in zip(As, before, strict=True))


def test_an_empty_list():
    for report in (slao_kernels.orthogonal_init_([], keep=[]), slao_kernels.orthogonal_init_([], return_r=True)):
        assert (report.deficient, report.r or []) == ([], [])
