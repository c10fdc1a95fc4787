"""fold_ in the compiled core: every weight read and written once."""

from __future__ import annotations

import array

import torch
from torch import Tensor

from ... import native


def fold_(weights: list[Tensor], As: list[Tensor], Bs: list[Tensor], scalings: list[float]) -> None:
    """As `reference.fold_`; see csrc/cpu/fold.cpp."""
    records = [
        native.matrix(W) + native.matrix(A) + native.matrix(B)
        for W, A, B in zip(weights, As, Bs, strict=True)
        if W.numel()
    ]
    factors = array.array("d", [s for W, s in zip(weights, scalings, strict=True) if W.numel()])
    native.core().fold(native.table(records), factors, torch.get_num_threads(), "auto")
    native.written(weights)
