"""The space that the inputs of earlier tasks take up, kept as itself or as its complement, whichever is smaller."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Basis:
    """A subspace of Rⁿ. vectors: (n, k), orthonormal, fp64, k <= n/2; complement: they span what is NOT in it.

    Source: DualGPM, arXiv 2305.17665 (after gradient projection memory, arXiv 2103.09762).
    """

    vectors: Tensor
    complement: bool = False

    def off(self, gram: Tensor) -> Tensor:
        """P G P with P the projection off the subspace; G (n, n), the sum of x xᵀ over inputs x."""
        M = self.vectors
        if self.complement:
            return M @ (M.T @ gram @ M) @ M.T
        left = gram - M @ (M.T @ gram)
        return left - (left @ M) @ M.T

    def extended(self, gram: Tensor, threshold: float) -> Basis:
        """With as few more directions, largest first, as hold `threshold` of the energy tr(G) together with it."""
        total = gram.trace()
        if total <= 0:
            return self
        values, vectors = largest_first(self.off(gram))
        held = (total - values.sum() + torch.cat([values.new_zeros(1), values.cumsum(0)])) / total
        # At most those that really lie outside, for thresholds that rounding cannot reach.
        count = min(int((held < threshold).sum()), int((values > 1e-12 * total).sum()))
        if count == 0:
            return self
        new = vectors[:, :count]
        if self.complement:  # what of it remains: in its own coordinates, the directions across the new ones
            kept = _across(self.vectors.T @ new)
            return Basis(self.vectors @ kept, complement=True)
        M = torch.linalg.qr(torch.cat([self.vectors, new], 1))[0]  # once more orthonormal, to the last bit
        return Basis(M) if 2 * M.shape[1] <= M.shape[0] else Basis(_across(M), complement=True)


def empty(n: int, device: torch.device | None = None) -> Basis:
    """The space {0} of Rⁿ."""
    return Basis(torch.zeros(n, 0, dtype=torch.float64, device=device))


def largest_first(symmetric: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues (n,), none below zero, and eigenvectors in columns."""
    values, vectors = torch.linalg.eigh((symmetric + symmetric.T) / 2)
    return values.flip(0).clamp(min=0), vectors.flip(1)


def _across(M: Tensor) -> Tensor:
    """(n, n − k): an orthonormal basis of what is orthogonal to the k orthonormal columns of M."""
    return torch.linalg.qr(M, mode="complete")[0][:, M.shape[1] :]
