"""The GPU kernels' source on the CPU: launches, drivers, the order of blocks and threads, what is refused.

csrc/cuda/*.cu is compiled by the C++ compiler against tests/csrc/cuda_on_cpu.h into a temporary folder (the fixture
`emulated`). What passes here has correct logic; it says nothing about speed, and finds only those races that the order
of blocks and threads brings to light. What the kernels compute is tested by ops/test_orthogonal_init.py,
test_scaled_merge.py and test_fold.py; test_cuda.py is for the GPU itself.
"""

from __future__ import annotations

import array
import math
from collections.abc import Iterator
from types import ModuleType

import pytest
import torch
from on_lists import (
    COMPLETED,
    DTYPES,
    FINE,
    NOT_FINITE,
    STORAGE,
    Emulated,
    bits,
    conditioned,
    orthogonality,
    triangles_for,
)
from torch import Tensor

from slao_kernels import native
from slao_kernels.ops.orthogonal_init import native as orthogonal_init
from slao_kernels.ops.orthogonal_init import reference as orthogonal_reference

ORDERS = [(blocks, last_thread_first) for blocks in (0, 1, 2) for last_thread_first in (False, True)]


@pytest.fixture
def core(emulated: ModuleType) -> Iterator[ModuleType]:
    yield emulated
    emulated.set_order(0, False)


@pytest.fixture
def ops(core: ModuleType) -> Emulated:
    place = Emulated()
    place.core = core
    return place


def equal_runs(results: list[list[Tensor]]) -> bool:
    return all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))


# More than one launch takes


def test_more_pairs_than_one_launch_takes(core, ops):
    merged = [torch.randn(1 + i % 70).to(DTYPES[i % 4]) for i in range(1000)]
    tuned = [torch.randn(len(m)).to(DTYPES[i % 3]) for i, m in enumerate(merged)]
    lam = torch.rand(1000).tolist()
    expected = [m.double() + w * (f.double() - m.double()) for m, f, w in zip(merged, tuned, lam, strict=True)]
    start = core.launches()
    ops.merge(merged, tuned, lam)
    assert core.launches() - start == 3
    for m, e in zip(merged, expected, strict=True):
        torch.testing.assert_close(m.double(), e, rtol=torch.finfo(m.dtype).eps, atol=4e-6)
    ops.merge([], [], [])
    assert core.launches() - start == 3


def test_more_weights_than_one_launch_takes(core, ops):
    Ws = [torch.randn(3 + i % 5, 7).to(DTYPES[i % 4]) for i in range(600)]
    As, Bs = [torch.randn(2, 7) for _ in Ws], [torch.randn(len(W), 2) for W in Ws]
    expected = [W.double() + 0.5 * B.double() @ A.double() for W, A, B in zip(Ws, As, Bs, strict=True)]
    start = core.launches()
    ops.fold(Ws, As, Bs, [0.5] * 600)
    assert core.launches() - start == 3  # 450 in fp32, 150 in fp64
    for W, e in zip(Ws, expected, strict=True):
        torch.testing.assert_close(W.double(), e, rtol=torch.finfo(W.dtype).eps, atol=1e-5)
    ops.fold([torch.empty(0, 4)], [torch.ones(1, 4)], [torch.ones(0, 1)], [1.0])
    assert core.launches() - start == 3


def test_more_matrices_than_one_launch_takes(core, ops):
    sizes = [(1 + i % 9, 10 + i % 23) if i % 5 else (17 + i % 4, 30 + i % 13) for i in range(700)]
    As = [torch.randn(size).to(DTYPES[i % 4]) for i, size in enumerate(sizes)]
    expected = [A.clone() for A in As]
    start = core.launches()
    assert ops.init(As)[0] == [FINE] * len(As)
    assert core.launches() - start > 4 * 2
    for i in (0, 5, 314, 315, 316, 560, 699):  # and each is what it would be by itself
        ops.init([expected[i]])
        assert torch.equal(bits(As[i]), bits(expected[i]))
    for A in As:
        assert orthogonality(A) <= STORAGE[A.dtype] * math.sqrt(len(A))
    As[690][0, 0] = math.nan  # in the last launch: the first must know
    before = [bits(A).clone() for A in As]
    assert ops.init(As)[0] == [NOT_FINITE if i == 690 else FINE for i in range(700)]
    assert all(torch.equal(bits(A), old) for A, old in zip(As, before, strict=True))


def test_copies_of_a_whole_model_are_one_launch(core, ops):
    """orthogonal_init_(keep=...) on a GPU: a merge with weight 1, of any dtypes and layouts, NaN payloads included."""
    As = [torch.randn(4 + i % 5, 50).to(DTYPES[i % 4]) for i in range(224)]
    As[3], As[5][0, 0] = torch.randn(50, 7).t(), math.nan
    kept, start = [torch.full_like(A, 7) for A in As], core.launches()
    ops.merge(kept, As, [1.0] * len(As))
    assert core.launches() - start == 1
    assert all(torch.equal(bits(copy), bits(A)) for copy, A in zip(kept, As, strict=True))


def test_a_hundred_layers_are_a_launch_of_each_kernel(core, ops):
    Ws, Fs = [torch.randn(3 + i % 5, 70) for i in range(100)], [torch.randn(3 + i % 5, 70) for i in range(100)]
    start = core.launches()
    ops.merge(Ws, Fs, [0.3] * 100)
    ops.fold(Ws, [torch.randn(2, 70)] * 100, [torch.randn(len(W), 2) for W in Ws], [0.5] * 100)
    assert core.launches() - start == 2
    assert ops.init([torch.randn(1 + i % 9, 10 + i % 23) for i in range(60)])[0] == [FINE] * 60
    assert core.launches() - start == 2 + 4


@pytest.mark.parametrize(("version", "served"), [(12010, True), (13000, True), (12000, False), (11080, False)])
def test_drivers_that_take_the_tables(version, served):
    reason = native._driver(version)
    assert (reason is None) == served
    assert served or f"CUDA {version // 1000}.{version % 1000 // 10}'s" in str(reason)


def test_the_order_of_blocks_and_threads_does_not_matter(core, ops):
    Ws, Fs = [torch.randn(200, 333), torch.randn(65, 129).bfloat16()], [torch.randn(200, 333), torch.randn(65, 129)]
    lows, ups = [torch.randn(40, 333), torch.randn(8, 129)], [torch.randn(200, 40), torch.randn(65, 8)]
    As = [torch.randn(16, 3000), torch.randn(40, 2100), torch.zeros(6, 50), conditioned(16, 1500, 1e5).float()]
    As += [conditioned(16, 1100, 1e5).bfloat16(), torch.randn(5, 400).double(), torch.randn(70, 80).half()]
    As += [torch.randn(16, 8) @ torch.randn(8, 300), torch.randn(8, 300).repeat(2, 1).bfloat16()]
    results = []
    for order in ORDERS:
        core.set_order(*order)
        w, f, a = ([tensor.clone() for tensor in tensors] for tensors in (Ws, Ws, As))
        ops.merge(w, Fs, [0.3, 0.9])
        ops.fold(f, lows, ups, [0.5, 0.5])
        states, triangles = ops.init(a, triangles=True)
        assert states == [FINE, FINE, COMPLETED, FINE, FINE, FINE, FINE, COMPLETED, COMPLETED]
        results.append([bits(tensor) for tensor in w + f + a + triangles])
    assert equal_runs(results)


# orthogonal_init's own


def test_zeros_give_the_unit_matrix(ops):
    A = torch.zeros(5, 9)
    assert ops.init([A])[0] == [COMPLETED]
    assert torch.equal(A, torch.eye(5, 9))


@pytest.mark.parametrize("angle", [5e-7, 3e-6])
def test_flagged_but_independent_rows_are_not_reported(ops, angle):
    """Below 1e-6 the Gram cannot tell; the reference's limit of 2^-23 decides what is deficient."""
    A = torch.randn(8, 400)
    A[3] = A[1] + angle * A[1].norm() / 20 * torch.randn(400)
    start, expected, status = A.clone(), A.clone(), torch.empty(1, dtype=torch.int32)
    orthogonal_reference.orthogonal_init_([expected], [], status)
    states, (R,) = ops.init([A], triangles=True)
    assert states == status.tolist() == [FINE]
    assert orthogonality(A) <= 1e-6
    assert (A[:3] - expected[:3]).abs().max() <= 1e-5  # the fourth row is mostly rounding, and turns those after it
    assert (R.T @ A - start).norm() <= 1e-6 * start.norm()


def test_the_operators_own_path(core):
    As, status = [torch.randn(4, 9), torch.zeros(3, 5)], torch.empty(4, dtype=torch.int32)[::2]
    orthogonal_init.on_gpu(core, orthogonal_init.tables(As), triangles_for(As), status, 0, 0)
    assert status.tolist() == [FINE, COMPLETED]
    assert all(orthogonality(A) <= 1e-6 for A in As)
    orthogonal_init.on_gpu(core, orthogonal_init.tables([]), [], torch.empty(0, dtype=torch.int32), 0, 0)


# What is refused


def test_too_many_rows_are_refused(core, ops):
    assert core.cuda_max_rank == 1024
    with pytest.raises(ValueError, match="between 1 and 1024 rows"):
        ops.init([torch.zeros(1025, 1025)])


def test_incomplete_tables_are_refused(core):
    with pytest.raises(ValueError, match="incomplete record"):
        core.cuda_scaled_merge(array.array("q", [0] * 11), array.array("d", [0.5]), 0, 0)
    with pytest.raises(ValueError, match="one a record"):
        core.cuda_fold(array.array("q", [0] * 18), array.array("d"), 0, 0)
