"""The formula of a LoRA layer of experts, one expert after another: the oracle."""

from __future__ import annotations

import torch
from torch import Tensor


def expert_linear(
    x: Tensor, weight: Tensor, A: Tensor | None, B: Tensor | None, scaling: float, ends: Tensor
) -> Tensor:
    """y_e = x_e W_eᵀ + scaling x_e A_eᵀ B_eᵀ; see `expert_linear` for the shapes."""
    start, parts = 0, []
    for e, end in enumerate(ends.tolist()):
        rows = x[start:end]
        parts.append(rows @ weight[e].T)
        if A is not None and B is not None:
            parts[-1] = parts[-1] + scaling * (rows @ A[e].T @ B[e].T)
        start = end
    return torch.cat(parts)
