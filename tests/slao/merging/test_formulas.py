"""Each method on small tensors, in fp64 where it has a formula: the formula written out with dense matrices."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from slao.merging import factors, product
from slao.schedules import inv_sqrt

# The same sums in another order: 1e-13 and less on these sizes. Twice through an SVD: a little more.
EXACT = 1e-10


def adapters(m: int, n: int, ranks: list[int], seed: int = 0, dtype: torch.dtype = torch.float64):
    g = torch.Generator().manual_seed(seed)
    return [(torch.randn(r, n, generator=g, dtype=dtype), torch.randn(m, r, generator=g, dtype=dtype)) for r in ranks]


def dense(pairs, given) -> list[Tensor]:
    return [f * B.double() @ A.double() for (A, B), f in zip(pairs, given, strict=True)]


def error(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def truncated(delta: Tensor, rank: int) -> Tensor:
    U, S, Vh = torch.linalg.svd(delta, full_matrices=False)
    return (U[:, :rank] * S[:rank]) @ Vh[:rank]


def check_cut(cut: product.Cut, expected: Tensor, rank: int, tolerance: float = EXACT) -> None:
    """The best of that rank, and what it says of itself."""
    assert cut.A.shape == (rank, expected.shape[1])
    assert cut.B.shape == (expected.shape[0], rank)
    best = truncated(expected, rank)
    assert error(cut.B.double() @ cut.A.double(), best) <= tolerance
    assert cut.total == pytest.approx(float(expected.square().sum()), rel=max(tolerance, 1e-10))
    assert cut.lost == pytest.approx(float((expected - best).square().sum()), rel=tolerance, abs=tolerance * cut.total)


SHAPES = [
    (12, 17, [3, 3, 3], 3),
    (17, 12, [2, 4, 1], 4),
    (6, 5, [4, 4, 4], 2),
    (1, 9, [1, 1, 1], 1),
    (9, 7, [1, 2, 3], 7),
]
FACTORS = [0.5, -0.3, 2.0]


@pytest.mark.parametrize(("m", "n", "ranks", "rank"), SHAPES)
def test_svd_is_the_dense_one(m, n, ranks, rank):
    pairs = adapters(m, n, ranks)
    check_cut(product.svd(pairs, FACTORS, rank), sum(dense(pairs, FACTORS)), rank)


def test_slao_is_its_closed_form():
    pairs = adapters(9, 7, [3] * 4)
    lambdas = [1 / math.sqrt(i) for i in range(1, 5)]
    A, B = factors.slao(pairs, inv_sqrt)
    weights = [lambdas[j] * math.prod(1 - lam for lam in lambdas[j + 1 :]) for j in range(4)]
    assert weights == pytest.approx([0.062, 0.149, 0.289, 0.5], abs=5e-4)
    assert error(B, sum(w * B for w, (_, B) in zip(weights, pairs, strict=True))) <= 1e-15
    assert torch.equal(A, pairs[-1][0])
    assert torch.equal(pairs[0][1], adapters(9, 7, [3] * 4)[0][1]), "the first adapter was written into"


def test_linear_takes_the_roots_and_the_sign_once():
    pairs = adapters(9, 7, [3] * 3)
    A, B = factors.linear(pairs, FACTORS)
    assert error(A, sum(math.copysign(abs(f) ** 0.5, f) * A for f, (A, _) in zip(FACTORS, pairs, strict=True))) <= 1e-15
    assert error(B, sum(abs(f) ** 0.5 * B for f, (_, B) in zip(FACTORS, pairs, strict=True))) <= 1e-15


def test_ties_elects_a_sign():
    stack = torch.tensor(
        [
            # elected +: 3 and 1 | -: -2 and -3 | sum 0 counts as +: 2 | zeros are not counted | only zeros
            [3.0, 1.0, 2.0, 4.0, 0.0],
            [1.0, -2.0, -2.0, 0.0, 0.0],
            [-1.0, -3.0, 0.0, 2.0, 0.0],
        ]
    )
    weights = torch.tensor([1.0, 2.0, 3.0]).view(3, 1)
    expected = torch.tensor([(3 + 2) / 2, (-4 - 9) / 2, 2.0, (4 + 6) / 2, 0.0])
    assert torch.equal(factors.disjoint_mean(stack, weights), expected)


@pytest.mark.parametrize(("density", "kept"), [(1.0, 12), (0.5, 6), (0.2, 2), (0.01, 0)])
def test_trimming_keeps_the_largest(density, kept):
    stack = torch.randn(3, 4, 3)
    found = factors.trimmed(stack, density)
    for row, before in zip(found.flatten(1), stack.flatten(1), strict=True):
        largest = before.abs().sort(descending=True).indices[:kept]
        assert torch.equal(row, torch.zeros(12).index_copy(0, largest, before[largest]))


def test_dare_is_unbiased_and_seeded():
    pairs = [(torch.ones(40, 50), torch.ones(50, 40))]
    first, again, other = (factors.dare_ties(pairs, [1.0], 0.25, seed, "layer") for seed in (0, 0, 1))
    assert torch.equal(first[0], again[0])
    assert torch.equal(first[1], again[1])
    assert not torch.equal(first[0], other[0])
    for part in first:
        assert set(part.unique().tolist()) == {0.0, 4.0}
        assert float(part.mean()) == pytest.approx(1, abs=4 * (3 / 2000) ** 0.5)  # four standard deviations


@pytest.mark.parametrize(("m", "n", "ranks", "rank"), SHAPES)
def test_magmax_is_the_dense_one(m, n, ranks, rank):
    pairs = adapters(m, n, ranks)
    stack = torch.stack(dense(pairs, FACTORS))
    chosen = stack.gather(0, stack.abs().argmax(0, keepdim=True))[0]
    check_cut(product.magmax(pairs, FACTORS, rank), chosen, rank)


def test_magmax_ties_go_to_the_newer():
    """The other choice would be off by 2 B; fp32's rounding is some eps of B's norm, 3.7."""
    A, B = torch.eye(2), torch.tensor([[1.0, -2.0], [3.0, 0.0]])
    cut = product.magmax([(A, B), (A, -B)], [1.0, 1.0], 2)
    assert (cut.B @ cut.A + B).abs().max() <= 1e-5
    cut = product.magmax([(A, -B), (A, B)], [1.0, 1.0], 2)
    assert (cut.B @ cut.A - B).abs().max() <= 1e-5


@pytest.mark.parametrize("shape", [(300, 200), (200, 300)])
@pytest.mark.parametrize(("dtype", "excess"), [(torch.float64, 1e-10), (torch.float32, 1e-4)])
def test_the_leading_part_is_found_without_a_gap(shape, dtype, excess):
    """Noise has close singular values: the hard case. What is left over may exceed the best by so much."""
    matrix = torch.randn(shape, dtype=torch.float64)
    U, S, V = product.leading(matrix.to(dtype), 8)
    left = (matrix - (U * S).double() @ V.T.double()).norm()
    best = (matrix - truncated(matrix, 8)).norm()
    assert float(left / best) - 1 <= excess
    for factor in (U, V):
        assert (factor.T @ factor - torch.eye(8)).abs().max() <= (1e-12 if dtype == torch.float64 else 1e-5)


@pytest.mark.parametrize("seed", range(10))
def test_the_leading_part_of_less_rank_and_of_zero(seed):
    """Products and QRs are backward stable: off by c · eps of the matrix's norm, c at most a few for each of a sum's
    m + n terms if errors have no common sign (measured in 1500 draws: 6). A basis that is not orthogonal shows here:
    of QRs of what is in it already there are many, and two passes leave a hundred to ten thousand eps."""
    m, n = 60, 50
    generator = torch.Generator().manual_seed(seed)
    factors = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((m, 2), (2, n))]
    tolerance = (m + n) * torch.finfo(torch.float64).eps
    for matrix in (factors[0] @ factors[1], torch.zeros(m, n, dtype=torch.float64)):
        U, S, V = product.leading(matrix, 5)
        assert (matrix - (U * S) @ V.T).norm() <= tolerance * matrix.norm()
        for factor in (U, V):
            assert (factor.T @ factor - torch.eye(5)).norm() <= tolerance


def dense_opcm(taus: list[Tensor], alpha: float = 0.5) -> Tensor:
    """As published, but for the diagonal beyond the rank of the merge: there the vectors are anyone's choice."""
    merged = taus[0]
    for tau in taus[1:]:
        U, S, Vh = torch.linalg.svd(merged)
        seen = U.T @ tau @ Vh.T
        leading = int((S.cumsum(0) / S.sum() > alpha).double().argmax())
        seen[:leading, :leading] = 0
        own = int(torch.linalg.matrix_rank(merged))
        seen.diagonal()[:own] = 0
        merged = merged + U @ seen @ Vh
    return merged


@pytest.mark.parametrize(("m", "n", "ranks", "rank"), SHAPES)
def test_opcm_is_the_dense_one(m, n, ranks, rank):
    pairs = adapters(m, n, ranks)
    taus = dense(pairs, FACTORS)
    cut = product.opcm(pairs, FACTORS, rank)
    check_cut(cut, dense_opcm(taus), rank)
    assert cut.norms is not None
    assert (cut.norms.sqrt() - torch.stack([tau.norm() for tau in taus])).abs().max() <= 1e-10


def test_opcm_leaves_the_leading_block_alone():
    """τ_2 within the leading vectors of τ_1 adds nothing; τ_2 apart from them is added whole."""
    Q, _ = torch.linalg.qr(torch.randn(9, 6, dtype=torch.float64))
    P, _ = torch.linalg.qr(torch.randn(7, 6, dtype=torch.float64))
    first = (P[:, :3].T, Q[:, :3] * torch.tensor([1.0, 1.1, 5.0], dtype=torch.float64))
    within = (P[:, 1:2].T, 3 * Q[:, 1:2])
    cut = product.opcm([first, within], [1.0, 1.0], 4)
    assert error(cut.B @ cut.A, first[1] @ first[0]) <= EXACT
    apart = (P[:, 3:].T, Q[:, 3:])
    cut = product.opcm([first, apart], [1.0, 1.0], 6)
    assert error(cut.B @ cut.A, first[1] @ first[0] + apart[1] @ apart[0]) <= EXACT


@pytest.mark.parametrize("density", [1.0, 0.5])
@pytest.mark.parametrize(("m", "n", "ranks", "rank"), SHAPES)
def test_knots_is_the_dense_one(m, n, ranks, rank, density):
    pairs, scalings, weights = adapters(m, n, ranks), [2.0, 0.5, 1.5], [1.0, 0.5, 2.0]
    U, S, Vh = torch.linalg.svd(torch.cat(dense(pairs, scalings), dim=1), full_matrices=False)
    own = S / S[0] > 1e-12
    V = Vh[own].T.reshape(len(pairs), n, -1).contiguous()  # (T, n, k)
    keep = int(density * V[0].numel())
    kept = torch.zeros(V.shape, dtype=V.dtype)
    for row, part in zip(kept, V, strict=True):
        where = part.flatten().abs().sort(descending=True).indices[:keep]
        row.view(-1)[where] = part.flatten()[where]
    sign = torch.where(kept.sum(0) >= 0, 1.0, -1.0)
    agree = (kept * sign > 0).double()
    mean = (kept * agree * torch.tensor(weights).view(-1, 1, 1)).sum(0) / agree.sum(0).clamp(min=1)
    expected = (U[:, own] * S[own]) @ mean.T
    check_cut(product.knots(pairs, scalings, weights, rank, density), expected, rank)


def test_adapters_that_are_zero():
    """As B starts: alone they merge to zero; as the first, they leave the others what they are."""
    A, B = adapters(6, 5, [2])[0]
    zeros = [(A, torch.zeros_like(B))] * 2
    for cut in (
        product.svd(zeros, [1.0, 1.0], 3),
        product.magmax(zeros, [1.0, 1.0], 3),
        product.opcm(zeros, [1.0, 1.0], 3),
        product.knots(zeros, [1.0, 1.0], [1.0, 1.0], 3, 0.5),
    ):
        assert cut.A.shape == (3, 5)
        assert cut.A.isfinite().all()
        assert cut.B.abs().max() == 0
        assert cut.lost == cut.total == 0
    both = [zeros[0], (A, B)]
    for cut in (product.opcm(both, [1.0, 1.0], 2), product.knots(both, [1.0, 1.0], [1.0, 1.0], 2, 1.0)):
        assert error(cut.B @ cut.A, B @ A) <= EXACT
