"""Merges of the task vectors τ = weight · scaling · B A themselves, cut to a rank: svd, opcm, knots and magmax.

The first three never form a matrix of the layer's size: QRs of the stacked factors leave a core of R × R, R = Σ r.
MagMax chooses entry by entry, which no thin factors hold: it forms one layer's matrix at a time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from slao_kernels import weighted_merge

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


def leading(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """U (m, rank), S (rank) and V (n, rank) of the largest singular values, in the matrix's dtype.

    Block Lanczos with full reorthogonalisation from a fixed random start (Musco and Musco 2015): blocks are added to
    the basis until twice in a row the squares of the values found grow by less than 1e-6 of their sum (1e-12 in fp64),
    or the basis is complete and the result exact.
    """
    if matrix.shape[0] > matrix.shape[1]:
        U, S, V = leading(matrix.T, rank)
        return V, S, U
    m, n = matrix.shape
    width = min(m, rank + 8)
    start = torch.randn(n, width, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(matrix.dtype)
    block, basis, seen = matrix @ start, matrix.new_zeros(m, 0), matrix.new_zeros(n, 0)
    energy, calm, tolerance = 0.0, 0, 1e-12 if matrix.dtype == torch.float64 else 1e-6
    while True:
        block = block[:, : m - basis.shape[1]]
        # What is left of a block that the basis holds already is rounding, and its Q points into the basis again; a
        # second pass may leave little of a column, whose QR is then as inexact; a third has whole columns.
        for _ in range(3):
            block = torch.linalg.qr(block - basis @ (basis.T @ block)).Q
        basis, seen = torch.cat([basis, block], 1), torch.cat([seen, matrix.T @ block], 1)
        values = torch.linalg.eigvalsh(seen.double().T @ seen.double())[-rank:]
        before, energy = energy, float(values.sum())
        calm = calm + 1 if energy - before <= tolerance * energy else 0
        if calm == 2 or basis.shape[1] == m:
            break
        block = matrix @ seen[:, -block.shape[1] :]
    U, S, Vh = torch.linalg.svd(seen.T, full_matrices=False)
    return basis @ U[:, :rank], S[:rank], Vh[:rank].T
