"""fold_: W += s B A, rounded once, with no temporary the size of W."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from on_triton import INTERPRETED, interpreted

import slao_kernels
from slao_kernels import dispatch, native
from slao_kernels.testing import error_ratio

BACKENDS = [name for name in dispatch.BACKENDS[1:] if dispatch.why_not("fold", name, "cpu") is None]
if INTERPRETED:  # the others have had their turn
    assert "triton" in BACKENDS
    BACKENDS = ["triton"]
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
test_under_the_interpreter = interpreted(__file__, at_least=80)
# One rounding of W, uniform in half a unit either way: RMS 0.29 units. fp32 and fp64 add their sums' rounding.
ONCE = {torch.float64: 2e-15, torch.float32: 4e-7, torch.bfloat16: 0.3 * 2**-7, torch.float16: 0.3 * 2**-10}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("adapter", DTYPES, ids=str)
@pytest.mark.parametrize("weight", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 1, 1), (17, 33, 5), (64, 48, 16), (40, 300, 64)], ids=str)
def test_equals_the_exact_sum_rounded_once(shape, weight, adapter, backend):
    n, k, r = shape
    W, A, B = torch.randn(n, k).to(weight), torch.randn(r, k).to(adapter), torch.randn(n, r).to(adapter)
    exact = W.double() + 0.7 * B.double() @ A.double()
    slao_kernels.fold_([W], [A], [B], 0.7, backend=backend)
    assert W.dtype == weight
    assert error_ratio(W, exact) <= ONCE[weight]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("adapter", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("weight", DTYPES, ids=str)
def test_whole_tiles_and_edges(weight, adapter, backend):
    """Weights of several tiles, with ranks of several steps, in one list; what lies beside a weight stays as it is."""
    Ws, As, Bs, exact, around = [], [], [], [], []
    for rows, cols, r, pitch in ((130, 272, 40, 288), (64, 128, 16, 128), (257, 129, 7, 144)):
        whole = torch.randn(rows + 2, pitch).to(weight)
        around.append((whole, whole.clone()))
        Ws.append(whole[1:-1, :cols])
        As.append(torch.randn(r, cols).to(adapter))
        Bs.append(torch.randn(rows, r).to(adapter))
        exact.append(Ws[-1].double() - 0.3 * Bs[-1].double() @ As[-1].double())
    slao_kernels.fold_(Ws, As, Bs, -0.3, backend=backend)
    for W, e, (whole, before) in zip(Ws, exact, around, strict=True):
        assert error_ratio(W, e) <= ONCE[weight]
        assert torch.equal(whole[[0, -1]], before[[0, -1]])
        assert torch.equal(whole[:, W.shape[1] :], before[:, W.shape[1] :])


@pytest.mark.parametrize("backend", BACKENDS)
def test_runs_are_bitwise_equal(backend):
    W, A, B = torch.randn(70, 300), torch.randn(40, 300), torch.randn(70, 40)
    found = []
    for _ in range(3):
        found.append(W.clone())
        slao_kernels.fold_(found[-1:], [A], [B], 0.7, backend=backend)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


@settings(max_examples=40, deadline=None)
@given(
    sizes=st.lists(st.tuples(st.integers(1, 30), st.integers(1, 30), st.integers(1, 9)), min_size=1, max_size=4),
    transposed=st.booleans(),
    weight=st.sampled_from(DTYPES),
    seed=st.integers(0, 2**20),
)
def test_lists_and_layouts(sizes, transposed, weight, seed):
    g = torch.Generator().manual_seed(seed)
    for backend in BACKENDS:
        Ws = [
            torch.randn(k, n, generator=g).to(weight).t() if transposed else torch.randn(n, k, generator=g).to(weight)
            for n, k, _ in sizes
        ]
        As = [torch.randn(k, r, generator=g).t() for _, k, r in sizes]
        Bs = [torch.randn(n, r, generator=g).bfloat16() for n, _, r in sizes]
        scalings = torch.rand(len(sizes), generator=g).tolist()
        exact = [W.double() + s * B.double() @ A.double() for W, A, B, s in zip(Ws, As, Bs, scalings, strict=True)]
        slao_kernels.fold_(Ws, As, Bs, scalings, backend=backend)
        for W, e in zip(Ws, exact, strict=True):
            torch.testing.assert_close(W.double(), e, rtol=torch.finfo(weight).eps, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_temporary_of_the_weights_size(backend):
    # Interpreted, a program allocates like a call on its tile would; enough of them are needed, not 4096² elements.
    n = 512 if backend == "triton" else 4096
    W, A, B = torch.zeros(n, 4096, dtype=torch.bfloat16), torch.randn(16, 4096), torch.randn(n, 16)
    with torch.profiler.profile(profile_memory=True) as profile:
        slao_kernels.fold_([W], [A], [B], 1.0, backend=backend)
    sizes = [event.self_cpu_memory_usage / max(event.count, 1) for event in profile.key_averages()]
    largest = max(sizes, default=0)  # the core alone: torch takes no part
    assert largest <= 0.26 * W.numel() * W.element_size()  # the blocks of the reference: 1 Mi elements in fp32


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
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_named_before_anything_is_written(case):
    (Ws, As, Bs, s), message = BAD[case]
    W = torch.zeros(3, 5)
    with pytest.raises(ValueError, match=message):
        slao_kernels.fold_([W, *Ws], [torch.ones(2, 5), *As], [torch.ones(3, 2), *Bs], s)
    assert not W.any()


def test_overlapping_weights_are_refused():
    W = torch.zeros(6, 5)
    with pytest.raises(ValueError, match=r"weights\[1\]: overlaps the memory of weights\[0\]"):
        slao_kernels.fold_([W[:4], W[3:]], [torch.ones(2, 5)] * 2, [torch.ones(4, 2), torch.ones(3, 2)], 1.0)
    assert not W.any()


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
