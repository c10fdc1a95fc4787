"""scaled_merge_ in the compiled core: all pairs in one sweep over memory."""

from __future__ import annotations

import array

import torch
from torch import Tensor

from ... import native


def scaled_merge_(merged: list[Tensor], finetuned: list[Tensor], lam: list[float]) -> None:
    """As `reference.scaled_merge_`; see csrc/cpu/scaled_merge.cpp."""
    words: list[int] = []
    weights: list[float] = []
    for target, source, weight in zip(merged, finetuned, lam, strict=True):
        if target.is_contiguous() and source.is_contiguous():
            words += native.row(target)
            words += native.row(source)
            weights.append(weight)
        else:
            for record in native.strided(target, source):
                words += record
                weights.append(weight)
    table = array.array("q", words)
    native.core().scaled_merge(table, array.array("d", weights), torch.get_num_threads(), "auto")
    native.written(merged)
