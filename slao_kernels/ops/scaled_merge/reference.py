"""scaled_merge_ one tensor after another: the oracle of every test and the last fallback."""

from __future__ import annotations

import torch
from torch import Tensor


def scaled_merge_(merged: list[Tensor], finetuned: list[Tensor], lam: list[float]) -> None:
    """merged += lam (finetuned - merged), in fp32 (fp64 for an fp64 destination), rounded once at the store."""
    for target, source, weight in zip(merged, finetuned, lam, strict=True):
        dtype = torch.float64 if target.dtype == torch.float64 else torch.float32
        if weight == 1.0:
            target.copy_(source)
        elif weight != 0.0:  # 0 leaves the target as it is, whatever the source holds
            target.copy_(torch.lerp(target.to(dtype), source.to(dtype), weight))
