"""O-LoRA (arXiv 2310.14152): IncLoRA whose new pair is kept orthogonal to the frozen ones by a penalty."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .inclora import IncLoRA


class OLoRA(IncLoRA):
    """IncLoRA and, in every step's loss, λ₁ Σ |A_old A_newᵀ| + λ₂ Σ (‖A_new‖ + ‖B_new‖), over layers and experts.

    |·| is the sum of the absolute values of all entries, ‖·‖ the Frobenius norm (not squared), as in the authors' code.
    orthogonality_weight: λ₁, 0.5 in the paper; it acts from the second task on. l2_weight: λ₂, 0 to 0.5 there.
    State, growth and export are IncLoRA's. Raises ValueError for a weight that is negative or not finite.
    """

    name = "olora"

    def __init__(
        self,
        model: nn.Module,
        orthogonality_weight: float = 0.5,
        l2_weight: float = 0.0,
        adapter: str = "default",
        seed: int = 0,
        beside: str = "keep",
    ) -> None:
        for what, value in (("orthogonality_weight", orthogonality_weight), ("l2_weight", l2_weight)):
            if not 0.0 <= value < float("inf"):
                raise ValueError(f"{what} must be a finite number of at least 0, not {value}")
        super().__init__(model, adapter=adapter, beside=beside, seed=seed)
        self.orthogonality_weight, self.l2_weight = float(orthogonality_weight), float(l2_weight)

    def penalty(self) -> Tensor | None:
        terms = []
        for pair, layer in zip(self.pairs, self.layers, strict=True):
            A, B = pair.parameters
            count, n = pair.experts, A.shape[1]
            if self.orthogonality_weight and (old := layer.slao_frozen_A) is not None:
                both = old.view(count, -1, n) @ A.view(count, -1, n).mT
                terms.append(self.orthogonality_weight * both.abs().sum(dtype=_wide(A)))
            if self.l2_weight:
                each = A.view(count, -1), B.view(-1, count).T
                terms += [self.l2_weight * torch.linalg.vector_norm(one, dim=1, dtype=_wide(one)).sum() for one in each]
        return torch.stack(terms).sum() if terms else None

    def _options(self) -> dict[str, Any]:
        return super()._options() | {"orthogonality_weight": self.orthogonality_weight, "l2_weight": self.l2_weight}


def _wide(tensor: Tensor) -> torch.dtype:
    """What a sum over 16-bit numbers needs."""
    return torch.promote_types(tensor.dtype, torch.float32)
