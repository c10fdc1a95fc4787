"""scaled_merge_ in the compiled core: all pairs in one sweep over memory."""

from __future__ import annotations

import array
from types import ModuleType

import torch
from torch import Tensor

from ... import native

Tables = tuple["array.array[int]", "array.array[float]"]


def scaled_merge_(
    merged: list[Tensor], finetuned: list[Tensor], lam: list[float], prepared: Tables | None = None
) -> None:
    """As `reference.scaled_merge_`; see csrc/cpu/scaled_merge.cpp and csrc/cuda/scaled_merge.cu.

    prepared: `tables` of the same lists, which the caller has kept.
    """
    core, records = native.core(), prepared or tables(merged, finetuned, lam)
    if merged and merged[0].is_cuda:
        with native.launching(merged[0].device) as (device, stream):
            on_gpu(core, records, device, stream)
    else:
        core.scaled_merge(*records, torch.get_num_threads(), "auto")
    native.written(merged)


def on_gpu(core: ModuleType, records: Tables, device: int, stream: int) -> None:
    """One launch for each few hundred pairs; nothing is waited for."""
    core.cuda_scaled_merge(*records, device, stream)


def tables(merged: list[Tensor], finetuned: list[Tensor], lam: list[float]) -> Tables:
    """The records of csrc/tensor_table.h: addresses, sizes and dtypes, and a weight each."""
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
    return array.array("q", words), array.array("d", weights)
