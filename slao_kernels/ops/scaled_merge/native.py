"""scaled_merge_ in the compiled core: all pairs in one sweep over memory."""

from __future__ import annotations

import array

import torch
from torch import Tensor

from ... import native


def scaled_merge_(merged: list[Tensor], finetuned: list[Tensor], lam: list[float]) -> None:
    """As `reference.scaled_merge_`; see csrc/cpu/scaled_merge.cpp."""
    records: list[tuple[int, ...]] = []
    weights = array.array("d")
    for target, source, weight in zip(merged, finetuned, lam, strict=True):
        for record in native.elementwise(target, source):
            records.append(record)
            weights.append(weight)
    native.core().scaled_merge(native.table(records), weights, torch.get_num_threads(), "auto")
    native.written(merged)
