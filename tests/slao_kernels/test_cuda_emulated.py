"""The GPU kernels' source on the CPU: their logic (indices, edges, arithmetic, barriers) without a GPU.

csrc/cuda/*.cu is compiled by the C++ compiler against tests/csrc/cuda_on_cpu.h into a temporary folder (the fixture
`emulated`). What passes here has correct logic; it says nothing about speed, and finds only those races that the order
of blocks and threads brings to light. tests/slao_kernels/test_cuda.py is for the GPU itself.
"""

from __future__ import annotations

import array
import math
from collections.abc import Iterator
from types import ModuleType

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from slao_kernels import native
from slao_kernels.ops.fold import native as fold
from slao_kernels.ops.fold import reference as fold_reference
from slao_kernels.ops.scaled_merge import native as scaled_merge
from slao_kernels.ops.scaled_merge import reference as merge_reference
from slao_kernels.testing import error_ratio

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
# As in ops/test_fold.py, with its reasons.
ONCE = {torch.float64: 2e-15, torch.float32: 4e-7, torch.bfloat16: 0.3 * 2**-7, torch.float16: 0.3 * 2**-10}
ORDERS = [(blocks, last_thread_first) for blocks in (0, 1, 2) for last_thread_first in (False, True)]


@pytest.fixture
def core(emulated: ModuleType) -> Iterator[ModuleType]:
    yield emulated
    emulated.set_order(0, False)
    emulated.set_driver(12010)


def bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(torch.uint8)


# --- scaled_merge ----------------------------------------------------------------------------------------------------


def merge(core: ModuleType, merged: list[Tensor], tuned: list[Tensor], lam: list[float]) -> None:
    core.cuda_scaled_merge(*native.numbered(scaled_merge.tables(merged, tuned), lam), 0, 0)


@pytest.mark.parametrize("target", DTYPES, ids=str)
@pytest.mark.parametrize("source", DTYPES, ids=str)
@pytest.mark.parametrize("lam", [0.3, 0.5, 0.8, 1.0])
def test_scaled_merge(core, target, source, lam):
    sizes = [1037, 8195, 4096, 3]
    merged, tuned = [torch.randn(n).to(target) for n in sizes], [torch.randn(n).to(source) for n in sizes]
    tuned[0][:8] = torch.tensor([0.0, -0.0, 40000.0, 1e-7, -6e-8, 3e-5, 1e-3, -40000.0]).to(source)
    merged[0][4:12] = torch.tensor([1e-40, -1e-7, 6e-8, 3e4, -3e4, 1.0, -1.0, 2.0]).to(target)
    expected = [m.clone() for m in merged]
    size = [torch.maximum(m.double().abs(), t.double().abs()) for m, t in zip(merged, tuned, strict=True)]
    merge_reference.scaled_merge_(expected, tuned, [lam] * len(sizes))
    merge(core, merged, tuned, [lam] * len(sizes))
    # As in test_native.py: with and without a fused multiply-add, or the rounding that it tips over.
    arithmetic = torch.finfo(torch.float64 if target == torch.float64 else torch.float32)
    for found, exact_, big in zip(merged, expected, size, strict=True):
        slack = 4 * arithmetic.eps * big + torch.finfo(target).eps * exact_.double().abs() + torch.finfo(target).tiny
        assert ((found.double() - exact_.double()).abs() <= slack).all()
        if lam == 1.0 and source != torch.float64:  # torch rounds fp64 to 16 bits twice
            assert torch.equal(bits(found), bits(exact_))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_ends_of_the_merge_are_exact(core, dtype):
    merged, tuned = torch.randn(5000).to(dtype), torch.randn(5000).to(dtype)
    tuned[0], merged[1] = math.inf, math.nan
    start = bits(merged).clone()
    merge(core, [merged], [tuned], [0.0])
    assert torch.equal(bits(merged), start)
    merge(core, [merged], [tuned], [1.0])
    assert torch.equal(bits(merged), bits(tuned))


def test_every_16_bit_value_survives_a_copy(core):
    patterns = torch.arange(-32768, 32768, dtype=torch.int32).to(torch.int16)
    for dtype in (torch.float16, torch.bfloat16):
        values = patterns.view(dtype)
        wide, back = torch.empty(65536), torch.empty(65536, dtype=dtype)
        merge(core, [wide], [values], [1.0])
        merge(core, [back], [wide], [1.0])
        nan = values.isnan()
        assert torch.equal(wide.isnan(), nan)
        assert torch.equal(wide[~nan].view(torch.int32), values.float()[~nan].view(torch.int32))
        assert torch.equal(back.view(torch.int16)[~nan], patterns[~nan])
        assert back[nan].isnan().all()


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    shapes=st.lists(st.tuples(st.integers(0, 90), st.integers(1, 90)), min_size=1, max_size=5),
    layout=st.sampled_from(["plain", "transposed", "strided", "shifted", "mixed"]),
    target=st.sampled_from(DTYPES),
    source=st.sampled_from(DTYPES),
    seed=st.integers(0, 2**20),
)
def test_merge_of_any_shape_layout_and_weight(core, shapes, layout, target, source, seed):
    g = torch.Generator().manual_seed(seed)
    whole = [torch.randn(2 * a, b + 1, generator=g).to(target) for a, b in shapes]
    guards = [w.clone() for w in whole]
    cut = {"plain": lambda w: w[: len(w) // 2, :-1], "shifted": lambda w: w.view(-1)[1 : w.numel() // 2]}
    merged = [cut.get(layout, lambda w: w[::2, :-1])(w) for w in whole]
    merged = [m.t() if layout == "transposed" else m for m in merged]
    tuned = [torch.randn(m.shape, generator=g).to(source) for m in merged]
    if layout == "mixed":
        tuned = [t.t().contiguous().t() for t in tuned]
    lam = torch.rand(len(shapes), generator=g).tolist()
    expected = [m.double() + w * (f.double() - m.double()) for m, f, w in zip(merged, tuned, lam, strict=True)]
    merge(core, merged, tuned, lam)
    for m, e, w, guard in zip(merged, expected, whole, guards, strict=True):
        torch.testing.assert_close(m.double(), e, rtol=torch.finfo(target).eps, atol=4e-6)
        if layout == "shifted" and w.numel():
            assert torch.equal(w.view(-1)[0], guard.view(-1)[0])
            assert torch.equal(w.view(-1)[w.numel() // 2 :], guard.view(-1)[w.numel() // 2 :])
        elif layout != "shifted":
            assert torch.equal(w[:, -1], guard[:, -1])
            if layout != "plain":
                assert torch.equal(w[1::2], guard[1::2])


def test_more_pairs_than_one_launch_takes(core):
    merged = [torch.randn(1 + i % 70).to(DTYPES[i % 4]) for i in range(1000)]
    tuned = [torch.randn(len(m)).to(DTYPES[i % 3]) for i, m in enumerate(merged)]
    lam = torch.rand(1000).tolist()
    expected = [m.double() + w * (f.double() - m.double()) for m, f, w in zip(merged, tuned, lam, strict=True)]
    start = core.launches()
    merge(core, merged, tuned, lam)
    assert core.launches() - start == 3
    for m, e in zip(merged, expected, strict=True):
        torch.testing.assert_close(m.double(), e, rtol=torch.finfo(m.dtype).eps, atol=4e-6)
    merge(core, [], [], [])
    assert core.launches() - start == 3


# --- fold ------------------------------------------------------------------------------------------------------------


def add_in(core: ModuleType, Ws: list[Tensor], As: list[Tensor], Bs: list[Tensor], scalings: list[float]) -> None:
    core.cuda_fold(*native.numbered(fold.tables(Ws, As, Bs), scalings), 0, 0)


@pytest.mark.parametrize("adapter", DTYPES, ids=str)
@pytest.mark.parametrize("weight", DTYPES, ids=str)
@pytest.mark.parametrize(
    "shape", [(1, 1, 1), (17, 33, 5), (64, 48, 16), (65, 129, 12), (40, 300, 64), (70, 140, 130)], ids=str
)
def test_fold_equals_the_exact_sum_rounded_once(core, shape, weight, adapter):
    n, k, r = shape
    W, A, B = torch.randn(n, k).to(weight), torch.randn(r, k).to(adapter), torch.randn(n, r).to(adapter)
    expected = W.double() + 0.7 * B.double() @ A.double()
    add_in(core, [W], [A], [B], [0.7])
    # fp32 sums of 130 products have more rounding than those of 64.
    slack = 4 if r > 64 and weight in (torch.float32, torch.float64) else 1
    assert error_ratio(W, expected) <= ONCE[weight] * slack


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    sizes=st.lists(st.tuples(st.integers(1, 80), st.integers(1, 150), st.integers(1, 40)), min_size=1, max_size=4),
    layouts=st.tuples(*[st.sampled_from(["plain", "transposed", "sliced", "shifted"])] * 3),
    weight=st.sampled_from(DTYPES),
    adapter=st.sampled_from(DTYPES),
    seed=st.integers(0, 2**20),
)
def test_fold_of_any_shape_and_layout(core, sizes, layouts, weight, adapter, seed):
    g = torch.Generator().manual_seed(seed)

    def laid_out(rows: int, cols: int, layout: str, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        if layout == "transposed":
            whole = torch.randn(cols + 2, rows + 3, generator=g).to(dtype)
            return whole, whole.t()[:rows, :cols]
        whole = torch.randn(rows + 2, cols + 8, generator=g).to(dtype)
        return whole, {"plain": whole[:rows, :cols].clone(), "sliced": whole[:rows, :cols]}.get(
            layout, whole[1 : rows + 1, 3 : cols + 3]
        )

    wholes, Ws = zip(*[laid_out(n, k, layouts[0], weight) for n, k, _ in sizes], strict=True)
    As = [laid_out(r, k, layouts[1], adapter)[1] for _, k, r in sizes]
    Bs = [laid_out(n, r, layouts[2], torch.bfloat16)[1] for n, _, r in sizes]
    scalings = torch.rand(len(sizes), generator=g).tolist()
    expected = [W.clone() for W in Ws]
    outside = [whole.double().sum() - W.double().sum() for whole, W in zip(wholes, Ws, strict=True)]
    fold_reference.fold_(expected, As, Bs, scalings)
    add_in(core, list(Ws), As, Bs, scalings)
    for W, e, whole, rest in zip(Ws, expected, wholes, outside, strict=True):
        torch.testing.assert_close(W.double(), e.double(), rtol=torch.finfo(weight).eps, atol=2e-5)
        if layouts[0] != "plain":
            torch.testing.assert_close(whole.double().sum() - W.double().sum(), rest, rtol=1e-9, atol=1e-9)


def test_more_weights_than_one_launch_takes(core):
    Ws = [torch.randn(3 + i % 5, 7).to(DTYPES[i % 4]) for i in range(600)]
    As, Bs = [torch.randn(2, 7) for _ in Ws], [torch.randn(len(W), 2) for W in Ws]
    expected = [W.double() + 0.5 * B.double() @ A.double() for W, A, B in zip(Ws, As, Bs, strict=True)]
    start = core.launches()
    add_in(core, Ws, As, Bs, [0.5] * 600)
    assert core.launches() - start == 3  # 450 in fp32, 150 in fp64
    for W, e in zip(Ws, expected, strict=True):
        torch.testing.assert_close(W.double(), e, rtol=torch.finfo(W.dtype).eps, atol=1e-5)
    add_in(core, [torch.empty(0, 4)], [torch.ones(1, 4)], [torch.ones(0, 1)], [1.0])
    assert core.launches() - start == 3


# --- both ------------------------------------------------------------------------------------------------------------


def test_the_order_of_blocks_and_threads_does_not_matter(core):
    Ws, Fs = [torch.randn(200, 333), torch.randn(65, 129).bfloat16()], [torch.randn(200, 333), torch.randn(65, 129)]
    lows, ups = [torch.randn(40, 333), torch.randn(8, 129)], [torch.randn(200, 40), torch.randn(65, 8)]
    results = []
    for order in ORDERS:
        core.set_order(*order)
        w, f = [W.clone() for W in Ws], [W.clone() for W in Ws]
        merge(core, w, Fs, [0.3, 0.9])
        add_in(core, f, lows, ups, [0.5, 0.5])
        results.append([bits(t) for t in w + f])
    for other in results[1:]:
        assert all(torch.equal(x, y) for x, y in zip(results[0], other, strict=True))


def test_an_older_driver_gets_smaller_tables(core):
    """Before CUDA 12.1 a kernel takes 4 KiB of parameters, which the emulator holds it to: more launches, the same
    bits."""
    Ws, Fs = [torch.randn(3 + i % 5, 70) for i in range(100)], [torch.randn(3 + i % 5, 70) for i in range(100)]
    lows, ups = [torch.randn(2, 70) for _ in Ws], [torch.randn(len(W), 2) for W in Ws]
    results = []
    for version, launches in ((12010, 2), (12000, 2 + 4)):  # 51 pairs a launch, 28 weights
        core.set_driver(version)
        w, f, start = [W.clone() for W in Ws], [F.clone() for F in Fs], core.launches()
        merge(core, w, Fs, [0.3] * 100)
        add_in(core, f, lows, ups, [0.5] * 100)
        assert core.launches() - start == launches
        results.append([bits(t) for t in w + f])
    assert all(torch.equal(x, y) for x, y in zip(*results, strict=True))


def test_copies_of_a_whole_model_are_one_launch(core):
    """orthogonal_init_(keep=...) on a GPU: a merge with weight 1, of any dtypes and layouts, NaN payloads included."""
    As = [torch.randn(4 + i % 5, 50).to(DTYPES[i % 4]) for i in range(224)]
    As[3], As[5][0, 0] = torch.randn(50, 7).t(), math.nan
    kept, start = [torch.full_like(A, 7) for A in As], core.launches()
    merge(core, kept, As, [1.0] * len(As))
    assert core.launches() - start == 1
    assert all(torch.equal(bits(copy), bits(A)) for copy, A in zip(kept, As, strict=True))


def test_incomplete_tables_are_refused(core):
    with pytest.raises(ValueError, match="incomplete record"):
        core.cuda_scaled_merge(array.array("q", [0] * 11), array.array("d", [0.5]), 0, 0)
    with pytest.raises(ValueError, match="one a record"):
        core.cuda_fold(array.array("q", [0] * 18), array.array("d"), 0, 0)
