"""fold_ one weight after another, a few rows at a time: the oracle of every test and the last fallback."""

from __future__ import annotations

import torch
from torch import Tensor

# Elements of W in one block: 4 MiB in fp32, well under 1 % of the weights of any model worth folding in place.
_BLOCK = 1 << 20


def fold_(weights: list[Tensor], As: list[Tensor], Bs: list[Tensor], scalings: list[float]) -> None:
    """W += s B A in fp32 (fp64 if any of the three is fp64), rounded once at the store; no copy the size of W."""
    for W, A, B, s in zip(weights, As, Bs, scalings, strict=True):
        wide = torch.promote_types(torch.float32, torch.promote_types(W.dtype, torch.promote_types(A.dtype, B.dtype)))
        A, B = A.to(wide), B.to(wide)
        step = max(1, _BLOCK // max(1, W.shape[1]))
        for start in range(0, W.shape[0], step):
            rows = slice(start, start + step)
            W[rows].copy_(torch.addmm(W[rows].to(wide), B[rows], A, alpha=s))
