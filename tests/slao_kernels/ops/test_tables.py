"""Tables of pointers and what Triton's kernels over them share: records found, elements in and out."""

from __future__ import annotations

import pytest
import torch
from on_lists import DTYPES, bits
from on_triton import DEVICE, on_device
from torch import Tensor

import slao_kernels

pytest.importorskip("triton", reason="triton is not installed")
from slao_kernels.ops import tables
from slao_kernels.ops.scaled_merge import kernels


def merge(merged: list[Tensor], tuned: list[Tensor], lam: float | list[float]) -> None:
    slao_kernels.scaled_merge_(merged, tuned, lam, backend="triton")


@on_device
@pytest.mark.parametrize("count", [1, 2, 17, 1030])
def test_every_record_is_found(count):
    """More of them than one step of the search, some empty, some of several programs."""
    sizes = [(0, 1, 5, 3000)[i % 4] for i in range(count)]
    merged = [torch.zeros(size, device=DEVICE) for size in sizes]
    tuned = [torch.full((size,), float(i + 1), device=DEVICE) for i, size in enumerate(sizes)]
    merge(merged, tuned, 1.0)
    for i, (m, size) in enumerate(zip(merged, sizes, strict=True)):
        assert m.tolist() == [i + 1.0] * size


@on_device
@pytest.mark.parametrize("start", [0, 1, 8])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_edges_of_programs(dtype, start):
    """One more and one less than a program's share, from aligned addresses and others; nothing beyond is touched."""
    kind, wide = tables.TYPES[DTYPES.index(dtype)], dtype == torch.float64
    block = kernels.constants_of(kind, tables.TYPES[1], wide)["BLOCK"]
    for size in (block - 1, block, block + 1, 2 * block + 1025):
        whole = torch.randn(size + start + 9, dtype=torch.float64).to(dtype).to(DEVICE)
        old, tuned = whole.clone(), torch.randn(size).to(DEVICE)
        merge([whole[start : start + size]], [tuned], 0.25)
        assert torch.equal(bits(whole[:start]), bits(old[:start]))
        assert torch.equal(bits(whole[start + size :]), bits(old[start + size :]))
        exact = old[start : start + size].double().lerp(tuned.double(), 0.25)
        torch.testing.assert_close(whole[start : start + size].double(), exact, rtol=torch.finfo(dtype).eps, atol=1e-6)


@on_device
def test_copies_and_merges_of_any_dtypes_are_one_launch():
    merged = [torch.zeros(40, dtype=dtype, device=DEVICE) for dtype in DTYPES[1:] * 3]
    tuned = [torch.ones(40, dtype=dtype, device=DEVICE) for dtype in DTYPES[1:] for _ in range(3)]
    lam = [1.0, 0.5, 0.25] * 3
    assert len(kernels.tables(merged, tuned)) == 1
    merge(merged, tuned, lam)
    assert [m.double().mean().item() for m in merged] == lam
    merged.append(torch.zeros(40, dtype=torch.float64, device=DEVICE))
    assert len(kernels.tables(merged, [*tuned, tuned[0]])) == 2  # fp64 is computed in fp64
