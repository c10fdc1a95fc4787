"""The compiled core's X Xᵀ of stacks, and that with it and without it the ops on several adapters say the same."""

from __future__ import annotations

import pytest
import torch
from adapter_lists import adapter

import slao_kernels
from slao_kernels import native
from slao_kernels.ops import gram

pytestmark = pytest.mark.skipif(native.why_not("cpu") is not None, reason=f"no core: {native.why_not('cpu')}")
CPU = torch.device("cpu")


def stack(ranks: tuple[int, ...], n: int, seed: int) -> list[torch.Tensor]:
    """Every dtype, rows or columns in memory's order, with gaps."""
    g = torch.Generator().manual_seed(seed)
    found = []
    for at, r in enumerate(ranks):
        dtype = (torch.float32, torch.bfloat16, torch.float64, torch.float16)[(at + seed) % 4]
        matrix = torch.randn(r, n, generator=g).to(dtype)
        if (at + seed) % 3 == 1:
            matrix = matrix.T.contiguous().T
        elif (at + seed) % 3 == 2:
            matrix = torch.cat([matrix, torch.full_like(matrix, torch.nan)], 1)[:, :n]
        found.append(matrix)
    return found


@pytest.mark.parametrize("ranks", [(1,), (16, 16, 16), (3, 0, 70), (0,)], ids=str)
@pytest.mark.parametrize("n", [1, 7, 300, 2050])
def test_equals_the_product(ranks, n):
    """Sums of n products in fp64, in two orders."""
    stacks = [stack(ranks, n, seed) for seed in range(5)]
    found = gram.grams(stacks)
    X = torch.stack([torch.cat([matrix.double() for matrix in each]) for each in stacks])
    sizes = X.norm(dim=2)
    assert found.shape == (5, sum(ranks), sum(ranks))
    assert (found - X @ X.mT).abs().le(1e-15 * n**0.5 * sizes[:, :, None] * sizes[:, None, :] + 1e-300).all()
    assert torch.equal(found, found.mT)


def test_threads_change_no_bit():
    stacks, before = [stack((16, 16), 500, seed) for seed in range(7)], torch.get_num_threads()
    one = gram.grams(stacks)
    try:
        torch.set_num_threads(3)
        assert torch.equal(gram.grams(stacks), one)
    finally:
        torch.set_num_threads(before)


def test_it_gives_way_to_another_wish():
    assert gram.has(CPU)
    assert not gram.has(torch.device("meta"))
    for backend, expected in (("reference", False), ("triton", False), ("native", True), ("auto", True)):
        with slao_kernels.use_backend(backend):
            assert gram.has(CPU) is expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_interference_is_the_same_without_it(dtype):
    adapters = [adapter([(40, 300), (33, 9), (40, 300)], r, seed, dtype) for seed, r in enumerate((8, 5, 9))]
    found = slao_kernels.interference(adapters).gram
    with slao_kernels.use_backend("reference"):
        expected = slao_kernels.interference(adapters).gram
    norms = expected.diagonal(dim1=1, dim2=2).sqrt()
    assert ((found - expected).abs() / (norms[:, :, None] * norms[:, None, :])).max() <= 1e-13


def ill(columns: float) -> tuple[list[torch.Tensor], list[torch.Tensor], list[float]]:
    """An adapter whose B has columns that nearly agree."""
    (A,), (B,), _ = adapter([(60, 80)], 8)
    return [A], [B[:, :1] + columns * B], [1.0]


@pytest.mark.parametrize("columns", [1.0, 0.1, 1e-2, 1e-4, 0.0])
def test_merges_are_as_near_to_the_best_with_it(columns):
    """From well conditioned stacks, which take the Gram matrices, to those that it leaves to Householder."""
    adapters = [ill(columns), adapter([(60, 80)], 8, 1)]
    total = sum(w * s * B.double() @ A.double() for w, ((A,), (B,), (s,)) in zip((0.5, -1.5), adapters, strict=True))
    S = torch.linalg.svdvals(total)
    for backend in ("auto", "reference"):
        with slao_kernels.use_backend(backend):
            merge = slao_kernels.weighted_merge(adapters, [0.5, -1.5], 6)
        A, B = (factor.double() for factor in merge.pairs[0])
        best = float(S[6:].norm())
        assert float((total - B @ A).norm()) <= best + 2e-7 * float(S.norm())  # A and B in fp32
        assert abs(float(merge.lost[0]) - best / float(S.norm())) <= 1e-12
        assert (A @ A.T - torch.eye(6, dtype=torch.float64)).abs().max() <= 3e-7


def test_layers_that_need_another_way_are_merged_beside_the_others():
    """One well conditioned, one not, one in fp64, one of a rank above R; each in its place."""
    shapes = [(60, 80), (60, 80), (50, 40), (30, 30)]
    As, Bs, s = adapter(shapes, 8)
    As, Bs = list(As), list(Bs)
    Bs[1][:, 3] = Bs[1][:, 2]
    As[2], Bs[2] = As[2].double(), Bs[2].double()
    ranks = [5, 4, 8, 20]
    merge = slao_kernels.weighted_merge([(As, Bs, s)], [1.0], ranks)
    for index, (A, B) in enumerate(merge.pairs):
        assert A.shape == (ranks[index], shapes[index][1])
        assert A.dtype == B.dtype == (torch.float64 if index == 2 else torch.float32)
        total = s[index] * Bs[index].double() @ As[index].double()
        left = torch.linalg.svdvals(total)[ranks[index] :].norm()
        assert (total - B.double() @ A.double()).norm() <= left + 2e-7 * total.norm()
