"""fold_: W += s B A, rounded once, with no temporary the size of W, wherever it runs (on_lists.py)."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from on_lists import CORES, DTYPES, EMULATED, GPU, INTERPRETED, ONCE, PUBLIC, at
from torch import Tensor

import slao_kernels
from slao_kernels import native
from slao_kernels.testing import error_ratio

SHAPES = [(1, 1, 1), (17, 33, 5), (64, 48, 16), (40, 300, 64)]
# dtypes of A and B, and whether W lies column by column
ADAPTERS = [(dtype, dtype, False) for dtype in DTYPES]
if not INTERPRETED:  # where each takes a second
    SHAPES += [(7, 33, 3), (65, 129, 12), (100, 200, 16), (6, 4100, 8), (400, 300, 64), (70, 140, 130)]
    ADAPTERS += [(torch.bfloat16, torch.float32, transposed) for transposed in (False, True)]


def close(W: Tensor, exact: Tensor, slack: int = 1) -> None:
    """In RMS; and each entry, where W cancels the r products, but for a few fp32 units of the largest."""
    assert error_ratio(W, exact) <= slack * ONCE[W.dtype]
    torch.testing.assert_close(W.double(), exact, rtol=torch.finfo(W.dtype).eps, atol=slack * 1e-5)


@at(PUBLIC, CORES, EMULATED, GPU)
@pytest.mark.parametrize("adapter", ADAPTERS, ids=str)
@pytest.mark.parametrize("weight", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_the_exact_sum_rounded_once(shape, weight, adapter, ops):
    (n, k, r), (of_A, of_B, transposed) = shape, adapter
    W = torch.randn(k, n).to(weight).t() if transposed else torch.randn(n, k).to(weight)
    A, B = torch.randn(r, k).to(of_A), torch.randn(n, r).to(of_B)
    exact = W.double() + 0.7 * B.double() @ A.double()
    ops.fold([W], [A], [B], [0.7])
    assert W.dtype == weight
    # fp32 sums of 130 products have more rounding than those of 64.
    close(W, exact, 4 if r > 64 and weight in (torch.float32, torch.float64) else 1)


@at(PUBLIC)
@pytest.mark.parametrize("adapter", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("weight", DTYPES, ids=str)
def test_whole_tiles_and_edges(weight, adapter, ops):
    """Weights of several tiles, with ranks of several steps, in one list; what lies beside a weight stays as it is. And
    bitwise the same at the next run on equal memory."""
    Ws, again, As, Bs, exact, around = [], [], [], [], [], []
    for rows, cols, r, pitch in ((130, 272, 40, 288), (64, 128, 16, 128), (257, 129, 7, 144)):
        whole = torch.randn(rows + 2, pitch).to(weight)
        around.append((whole, whole.clone()))
        Ws.append(whole[1:-1, :cols])
        again.append(whole.clone()[1:-1, :cols])
        As.append(torch.randn(r, cols).to(adapter))
        Bs.append(torch.randn(rows, r).to(adapter))
        exact.append(Ws[-1].double() - 0.3 * Bs[-1].double() @ As[-1].double())
    for weights in (Ws, again):
        ops.fold(weights, As, Bs, [-0.3] * 3)
    for W, same, e, (whole, before) in zip(Ws, again, exact, around, strict=True):
        close(W, e)
        assert torch.equal(W, same)
        assert torch.equal(whole[[0, -1]], before[[0, -1]])
        assert torch.equal(whole[:, W.shape[1] :], before[:, W.shape[1] :])


def laid_out(rows: int, cols: int, layout: str, dtype: torch.dtype, g: torch.Generator) -> tuple[Tensor, Tensor]:
    """(what lies around it, the matrix)"""
    if layout == "transposed":
        whole = torch.randn(cols + 2, rows + 3, generator=g).to(dtype)
        return whole, whole.t()[:rows, :cols]
    whole = torch.randn(rows + 2, cols + 8, generator=g).to(dtype)
    dense, shifted = whole[:rows, :cols], whole[1 : rows + 1, 3 : cols + 3]
    return whole, {"plain": dense.clone(), "sliced": dense, "shifted": shifted}[layout]


LARGEST = (30, 30, 9) if INTERPRETED else (80, 150, 40)


@at(PUBLIC, EMULATED)
@settings(
    max_examples=20 if INTERPRETED else 60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    sizes=st.lists(st.tuples(*(st.integers(1, size) for size in LARGEST)), min_size=1, max_size=4),
    layouts=st.tuples(*[st.sampled_from(["plain", "transposed", "sliced", "shifted"])] * 3),
    weight=st.sampled_from(DTYPES),
    adapter=st.sampled_from(DTYPES),
    seed=st.integers(0, 2**20),
)
def test_any_shape_and_layout(ops, sizes, layouts, weight, adapter, seed):
    g = torch.Generator().manual_seed(seed)
    wholes, Ws = zip(*[laid_out(n, k, layouts[0], weight, g) for n, k, _ in sizes], strict=True)
    As = [laid_out(r, k, layouts[1], adapter, g)[1] for _, k, r in sizes]
    Bs = [laid_out(n, r, layouts[2], torch.bfloat16, g)[1] for n, _, r in sizes]
    scalings = torch.rand(len(sizes), generator=g).tolist()
    exact = [W.double() + s * B.double() @ A.double() for W, A, B, s in zip(Ws, As, Bs, scalings, strict=True)]
    outside = [whole.double().sum() - W.double().sum() for whole, W in zip(wholes, Ws, strict=True)]
    ops.fold(Ws, As, Bs, scalings)
    for W, e, whole, rest, A in zip(Ws, exact, wholes, outside, As, strict=True):
        atol = 1e-5 * max(1.0, len(A) / 9) ** 0.5  # an fp32 sum of r products
        torch.testing.assert_close(W.double(), e, rtol=torch.finfo(weight).eps, atol=atol)
        if layouts[0] != "plain":
            torch.testing.assert_close(whole.double().sum() - W.double().sum(), rest, rtol=1e-9, atol=1e-9)


@at(PUBLIC)
def test_no_temporary_of_the_weights_size(ops):
    # Interpreted, a program allocates like a call on its tile would; enough of them are needed, not 4096² elements.
    n, k = (512, 1024) if INTERPRETED else (4096, 4096)
    W, A, B = torch.zeros(n, k, dtype=torch.bfloat16), torch.randn(16, k), torch.randn(n, 16)
    with torch.profiler.profile(profile_memory=True) as profile:
        ops.fold([W], [A], [B], [1.0])
    sizes = [event.self_cpu_memory_usage / max(event.count, 1) for event in profile.key_averages()]
    largest = max(sizes, default=0)  # the core alone: torch takes no part
    assert largest <= 0.26 * W.numel() * W.element_size()  # the blocks of the reference: 1 Mi elements in fp32


shared = torch.zeros(6, 5)
BAD = {
    "length": (([torch.zeros(4, 6)], [], [torch.zeros(4, 2)], 1.0), "lengths differ: weights 2, As 1, Bs 2"),
    "shape": (
        ([torch.zeros(4, 6)], [torch.zeros(2, 5)], [torch.zeros(4, 2)], 1.0),
        r"weights\[1\]: W \(4, 6\), A \(2, 5\), B \(4, 2\) do not fit",
    ),
    "rank": (([torch.zeros(4, 6)], [torch.zeros(2, 6)], [torch.zeros(4, 3)], 1.0), "do not fit"),
    "scaling": (
        ([torch.zeros(4, 6)], [torch.zeros(2, 6)], [torch.zeros(4, 2)], float("inf")),
        r"scalings\[1\]: is inf, expected a finite number",
    ),
    "meta": (
        ([torch.zeros(4, 6, device="meta")], [torch.zeros(2, 6)], [torch.zeros(4, 2)], 1.0),
        r"weights\[1\]: is on the meta device",
    ),
    "overlap": (
        ([shared[:4], shared[3:]], [torch.ones(2, 5)] * 2, [torch.ones(4, 2), torch.ones(3, 2)], 1.0),
        r"weights\[2\]: overlaps the memory of weights\[1\]",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_named_before_anything_is_written(case):
    (Ws, As, Bs, s), message = BAD[case]
    W = torch.zeros(3, 5)
    with pytest.raises(ValueError, match=message):
        slao_kernels.fold_([W, *Ws], [torch.ones(2, 5), *As], [torch.ones(3, 2), *Bs], s)
    assert not W.any()
    assert not shared.any()


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peak memory is read from Linux's /proc")
@pytest.mark.skipif(native.why_not("cpu") is not None, reason=f"no compiled core: {native.why_not('cpu')}")
def test_peak_memory_is_under_one_per_cent_of_the_weight():
    program = """
import torch, slao_kernels

def peak():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM")) * 1024

torch.set_num_threads(2)
for dtype in (torch.bfloat16, torch.float32):
    W, A, B = torch.ones(8192, 4096, dtype=dtype), torch.ones(16, 4096), torch.ones(8192, 16)
    slao_kernels.fold_([W[:96]], [A], [B[:96]], 1.0)  # threads, lazy imports
    open("/proc/self/clear_refs", "w").write("5")  # the peak starts again from here
    before = peak()
    slao_kernels.fold_([W], [A], [B], 1.0)
    print((peak() - before) / W.nbytes)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    for share in map(float, done.stdout.split()):
        assert share < 0.01
    assert len(done.stdout.split()) == 2
