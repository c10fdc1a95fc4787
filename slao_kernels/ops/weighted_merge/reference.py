"""weighted_merge with the deltas written out and a dense SVD: the oracle of the tests."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def total(As: Sequence[Tensor], Bs: Sequence[Tensor], factors: Sequence[float]) -> Tensor:
    """(m, n) of one layer: Σ factor B A in fp64."""
    return torch.stack(
        [f * B.detach().double() @ A.detach().double() for A, B, f in zip(As, Bs, factors, strict=True)]
    ).sum(0)


def truncated(delta: Tensor, rank: int) -> Tensor:
    """(m, n): the nearest matrix of that rank (Eckart, Young)."""
    U, S, Vh = torch.linalg.svd(delta, full_matrices=False)
    return (U[:, :rank] * S[:rank]) @ Vh[:rank]
