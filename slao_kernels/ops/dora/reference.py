"""DoRA in plain PyTorch: the oracle of its tests."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def dora(
    x: Tensor, weight: Tensor, bias: Tensor | None, magnitude: Tensor, A: Tensor, B: Tensor, scaling: float
) -> Tensor:
    """bias + m / ‖W + s B A‖ · (x Wᵀ + s x Aᵀ Bᵀ) with a norm that carries no gradient; shapes as in `dora.apply`."""
    norms = torch.linalg.vector_norm(weight.detach() + scaling * (B @ A).detach(), dim=1)
    y = magnitude / norms * (F.linear(x, weight) + scaling * (x @ A.T @ B.T))
    return y if bias is None else y + bias
