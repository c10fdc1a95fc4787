"""Tables of pointers and what Triton's kernels over them share: records found, elements in and out, tables kept."""

from __future__ import annotations

import pytest
import torch
from on_triton import DEVICE, interpreted, on_device
from torch import Tensor

import slao_kernels

pytest.importorskip("triton", reason="triton is not installed")
from slao_kernels.ops import tables
from slao_kernels.ops.scaled_merge import kernels

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
test_under_the_interpreter = interpreted(__file__, at_least=20)


def merge(merged: list[Tensor], tuned: list[Tensor], lam: float | list[float]) -> None:
    slao_kernels.scaled_merge_(merged, tuned, lam, backend="triton")


def bits(tensor: Tensor) -> Tensor:
    return tensor.cpu().contiguous().view(torch.uint8)


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
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_every_16_bit_value_and_every_rounding(dtype):
    """There and back; and fp32 patterns around each 16-bit one, ties among them, as torch rounds them."""
    patterns = torch.arange(-32768, 32768, dtype=torch.int32).to(torch.int16)
    values = patterns.view(dtype).to(DEVICE)
    wide, back = torch.empty(65536, device=DEVICE), torch.empty(65536, dtype=dtype, device=DEVICE)
    merge([wide], [values], 1.0)
    merge([back], [wide], 1.0)
    nan = values.isnan().cpu()
    assert torch.equal(bits(wide.cpu()[~nan]), bits(values.cpu().float()[~nan]))
    assert torch.equal(back.cpu().view(torch.int16)[~nan], patterns[~nan])
    assert back.cpu()[nan].isnan().all()
    for low in (1, 0x0FFF, 0x1000, 0x1001, 0x3000, 0x7FFF, 0x8000, 0x8001, 0xFFFF):
        wide = ((patterns.to(torch.int32) << 16) | low).view(torch.float32).to(DEVICE)
        merge([back], [wide], 1.0)
        nan = wide.isnan().cpu()
        assert torch.equal(bits(back.cpu()[~nan]), bits(wide.cpu().to(dtype)[~nan]))
        assert back.cpu()[nan].isnan().all()


@on_device
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_copy_is_bit_for_bit(dtype):
    """A NaN keeps its payload, and one in the destination does not get through."""
    width = dtype.itemsize
    source = torch.randint(0, 256, (5000 * width,), dtype=torch.uint8).view(dtype).to(DEVICE)
    target = torch.full((5000,), float("nan"), dtype=dtype, device=DEVICE)
    other = torch.zeros(
        3, dtype=torch.float64, device=DEVICE
    )  # then the launch is for several dtypes, or there are two
    merge([target, other], [source, torch.ones(3, device=DEVICE)], 1.0)
    assert torch.equal(bits(target), bits(source))
    assert other.tolist() == [1.0] * 3


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


@on_device
def test_five_runs_are_bitwise_equal():
    start, tuned = [torch.randn(n).to(DEVICE) for n in (3, 5000)], [torch.randn(n).to(DEVICE) for n in (3, 5000)]
    results = []
    for _ in range(5):
        merged = [m.clone() for m in start]
        merge(merged, tuned, 0.7)
        results.append([bits(m) for m in merged])
    assert all(torch.equal(x, y) for other in results[1:] for x, y in zip(results[0], other, strict=True))
