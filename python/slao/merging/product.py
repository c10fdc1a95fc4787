"""Merges of the task vectors τ = weight · scaling · B A themselves, cut to a rank: svd, opcm, knots and magmax.

The first three never form a matrix of the layer's size: QRs of the stacked factors leave a core of R × R, R = Σ r.
MagMax chooses entry by entry, which no thin factors hold: it forms one layer's matrix at a time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from slao_kernels import orthogonal_init_, weighted_merge

from .factors import Pair, arithmetic, disjoint_mean, trimmed

_ROWS_BYTES = 16 << 20  # fp64 rows of MagMax's matrix that are held at once for each adapter


@dataclass(frozen=True)
class Cut:
    """A merged layer: A (rank, n), B (m, rank), for scaling 1. lost, total: ‖τ − B A‖² and ‖τ‖² of the merge τ before
    it was cut. norms: OPCM's ‖τ_t‖², (T,)."""

    A: Tensor
    B: Tensor
    lost: float
    total: float
    norms: Tensor | None = None


def svd(pairs: Sequence[Pair], factors: Sequence[float], rank: int) -> Cut:
    """The nearest to Σ τ_t: `slao_kernels.weighted_merge`, what PEFT's "svd" stores."""
    merge = weighted_merge([([A], [B], factor) for (A, B), factor in zip(pairs, factors, strict=True)],
                           [1.0] * len(pairs), rank, dtype=arithmetic([t for pair in pairs for t in pair]))  # fmt: skip
    A, B = merge.pairs[0]
    part = float(merge.lost[0])
    kept = float(B.double().square().sum())  # A's rows are orthonormal
    total = kept / (1 - part**2) if part < 1 else kept
    return Cut(A, B, part**2 * total, total)


def norm(pairs: Sequence[Pair]) -> float:
    """‖Σ B A‖ of fp64 factors, by their QRs: to 1e-16 of the norms of the factors, also where the terms cancel."""
    Ra = torch.linalg.qr(torch.cat([A for A, _ in pairs]).T, mode="r").R
    Rb = torch.linalg.qr(torch.cat([B for _, B in pairs], dim=1), mode="r").R
    return float((Rb @ Ra.T).norm())


def opcm(pairs: Sequence[Pair], factors: Sequence[float], rank: int, alpha: float = 0.5) -> Cut:
    """OPCM (arXiv 2501.09522): S_1 = τ_1, S_t = S_{t-1} + P_{t-1}(τ_t).

    In the bases of S_{t-1}'s singular vectors, P sets two things of τ_t to zero: the block of the leading ones, as many
    as hold at most the part `alpha` of the singular values' sum, and the diagonal (as far as S_{t-1} has rank; beyond
    it the vectors are anyone's choice). The published merge is S_T scaled to the mean of ‖τ_t‖ over the whole model:
    that factor is the caller's, from `Cut.norms` and `Cut.total`.
    """
    A = torch.cat([A.double() for A, _ in pairs])
    B = torch.cat([factor * B.double() for (_, B), factor in zip(pairs, factors, strict=True)], dim=1)
    (Qa, Ra), (Qb, Rb) = torch.linalg.qr(A.T), torch.linalg.qr(B)
    ranks = [A.shape[0] for A, _ in pairs]
    cores = [rb @ ra.T for rb, ra in zip(Rb.split(ranks, 1), Ra.split(ranks, 1), strict=True)]
    merged = cores[0]
    for core in cores[1:]:
        merged = merged + _projected(core, merged, alpha)
    cut = svd([((merged @ Qa.T), Qb)], [1.0], rank)
    norms = torch.stack([core.square().sum() for core in cores])
    return Cut(cut.A, cut.B, cut.lost, cut.total, norms)


def _projected(core: Tensor, merged: Tensor, alpha: float) -> Tensor:
    U, S, Vh = torch.linalg.svd(merged)
    seen = U.T @ core @ Vh.T
    own = int((S / S.max() > max(merged.shape) * torch.finfo(S.dtype).eps).sum())  # 0 where S is zero
    leading = min(own, int((S.cumsum(0) <= alpha * S.sum()).sum()))
    seen[:leading, :leading] = 0
    seen.diagonal()[:own] = 0
    return U @ seen @ Vh


def knots(pairs: Sequence[Pair], scalings: Sequence[float], weights: Sequence[float], rank: int, density: float) -> Cut:
    """KnOTS with TIES (arXiv 2410.19735): [τ_1 … τ_T] = U Σ [V_1; …; V_T]ᵀ with τ_t = scaling B A, TIES on the V_t
    (weights count there, in the disjoint mean), and U Σ Vᵀ of what that makes. Singular values that are zero are left
    out.

    With A_tᵀ = Q_t R_t and the stacked B = Q R, U Σ comes from the SVD of all R · scaling R_tᵀ side by side, and V_t is
    Q_t (R · scaling R_tᵀ)ᵀ U Σ⁻¹: exactly zero where τ_t is, so that its rounding is not counted in the mean.
    """
    Qs, Rs = zip(*(torch.linalg.qr(A.double().T) for A, _ in pairs), strict=True)
    Q, R = torch.linalg.qr(torch.cat([B.double() for _, B in pairs], dim=1))
    ranks = [A.shape[0] for A, _ in pairs]
    cores = [s * r @ Rt.T for r, Rt, s in zip(R.split(ranks, 1), Rs, scalings, strict=True)]
    U, S, _ = torch.linalg.svd(torch.cat(cores, dim=1), full_matrices=False)
    own = S / S.max() > len(S) * torch.finfo(S.dtype).eps  # none where S is zero
    U, S = U[:, own], S[own]
    V = torch.stack([Qt @ (core.T @ (U / S)) for Qt, core in zip(Qs, cores, strict=True)])
    merged = disjoint_mean(trimmed(V, density), torch.tensor(weights, dtype=V.dtype).view(-1, 1, 1))
    return svd([(merged.T, Q @ (U * S))], [1.0], rank)


def magmax(pairs: Sequence[Pair], factors: Sequence[float], rank: int) -> Cut:
    """MagMax (arXiv 2407.06322): per entry the τ_t of the largest magnitude, the newer one where two are equal.

    Held as m × n in fp32 (fp64 for fp64 adapters), then cut by `leading`.
    """
    (m, n), dtype = (pairs[0][1].shape[0], pairs[0][0].shape[1]), arithmetic([t for pair in pairs for t in pair])
    As = [factor * A.double() for (A, _), factor in zip(pairs, factors, strict=True)]
    chosen = torch.empty(m, n, dtype=dtype)
    step = max(1, _ROWS_BYTES // (8 * n))
    for start in range(0, m, step):
        rows = slice(start, start + step)
        best = pairs[0][1][rows].double() @ As[0]
        for (_, B), A in zip(pairs[1:], As[1:], strict=True):
            newer = B[rows].double() @ A
            best = torch.where(newer.abs() >= best.abs(), newer, best)
        chosen[rows] = best
    total = float(sum(part.double().square().sum() for part in chosen.split(step)))
    U, S, V = leading(chosen, rank)
    return Cut(V.T.contiguous(), U * S, max(0.0, total - float(S.double().square().sum())), total)


def leading(matrix: Tensor, rank: int, tolerance: float = 0.0) -> tuple[Tensor, Tensor, Tensor]:
    """U (m, rank), S (rank) and V (n, rank) of the largest singular values, in the matrix's dtype: fp32 or fp64.

    Block Lanczos with full reorthogonalisation from a fixed random start (Musco and Musco 2015): blocks of a quarter of
    the rank are added to the basis until twice in a row the squares of the values found grow by less than `tolerance`
    of what they leave of ‖matrix‖², or by less than 1e-6 of their sum (1e-12 in fp64), or the basis is complete and the
    result exact. With a tolerance of 1e-2, ‖matrix − U S Vᵀ‖ is within 1 % of the least there is (bench/engines_svd.py,
    which also has the power iterations that this was chosen over).
    """
    if matrix.shape[0] > matrix.shape[1]:
        U, S, V = leading(matrix.T, rank, tolerance)
        return V, S, U
    m, n = matrix.shape
    width, floor = min(m, max(16, rank // 4)), 1e-12 if matrix.dtype == torch.float64 else 1e-6
    whole = sum(float(part.double().square().sum()) for part in matrix.split(max(1, _ROWS_BYTES // (8 * n))))
    start = torch.randn(width, n, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(matrix.dtype)
    # Rows are the vectors: `orthogonal_init_` takes them so, and is several times as fast as torch's QR.
    block, basis, seen = start @ matrix.T, matrix.new_zeros(0, m), matrix.new_zeros(0, n)
    gram = torch.zeros(0, 0, dtype=torch.float64)
    energy, calm = 0.0, 0
    while True:
        block = block[: m - len(basis)]
        # What is left of a block that the basis holds already is rounding, and its Q points into the basis again; a
        # second pass may leave little of a column, whose QR is then as inexact; a third has whole columns.
        for _ in range(3):
            block = (block - (block @ basis.T) @ basis).contiguous()
            orthogonal_init_([block])
        new = block @ matrix
        cross, own = (seen @ new.T).double(), (new @ new.T).double()
        gram = torch.cat([torch.cat([gram, cross], 1), torch.cat([cross.T, own], 1)])
        basis, seen = torch.cat([basis, block]), torch.cat([seen, new])
        before, energy = energy, float(torch.linalg.eigvalsh(gram)[-rank:].sum())
        grown = energy - before
        calm = calm + 1 if grown <= max(tolerance * (whole - energy), floor * energy) else 0
        if (calm >= 2 and len(basis) >= rank) or len(basis) == m:
            break
        block = new @ matrix.T
    U, S, Vh = torch.linalg.svd(seen, full_matrices=False)
    return basis.T @ U[:, :rank], S[:rank], Vh[:rank].T
