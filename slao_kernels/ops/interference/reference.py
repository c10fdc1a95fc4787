"""interference with every delta written out: the oracle of the tests."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def gram(As: Sequence[Tensor], Bs: Sequence[Tensor], scalings: Sequence[float]) -> Tensor:
    """(T, T) of one layer: ⟨sᵢ Bᵢ Aᵢ, sⱼ Bⱼ Aⱼ⟩ in fp64."""
    deltas = [s * B.detach().double() @ A.detach().double() for A, B, s in zip(As, Bs, scalings, strict=True)]
    flat = torch.stack(deltas).flatten(1)
    return flat @ flat.T
