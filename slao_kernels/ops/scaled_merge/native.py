"""scaled_merge_ in the compiled core: all pairs in one sweep over memory."""

from __future__ import annotations

import array
from types import ModuleType

import torch
from torch import Tensor

from ... import native

Tables = tuple["array.array[int]", list[int]]  # the words of the records, and the pair that each record is of
Records = tuple["array.array[int]", "array.array[float]"]


def scaled_merge_(
    merged: list[Tensor], finetuned: list[Tensor], lam: list[float], prepared: Tables | None = None
) -> None:
    """As `reference.scaled_merge_`; see csrc/cpu/scaled_merge.cpp and csrc/cuda/scaled_merge.cu.

    prepared: `tables` of the same lists, which the caller has kept.
    """
    core, found = native.core(), records(tables(merged, finetuned) if prepared is None else prepared, lam)
    if merged and merged[0].is_cuda:
        with native.launching(merged[0].device) as (device, stream):
            on_gpu(core, found, device, stream)
    else:
        core.scaled_merge(*found, torch.get_num_threads(), "auto")
    native.written(merged)


def on_gpu(core: ModuleType, found: Records, device: int, stream: int) -> None:
    """One launch for each few hundred pairs; nothing is waited for."""
    core.cuda_scaled_merge(*found, device, stream)


def records(prepared: Tables, lam: list[float]) -> Records:
    """The records of csrc/tensor_table.h: addresses, sizes and dtypes, and a weight each."""
    words, owners = prepared
    return words, array.array("d", [lam[owner] for owner in owners])


def tables(merged: list[Tensor], finetuned: list[Tensor]) -> Tables:
    """The records without their weights, which change from task to task."""
    words: list[int] = []
    owners: list[int] = []
    for owner, (target, source) in enumerate(zip(merged, finetuned, strict=True)):
        if target.is_contiguous() and source.is_contiguous():
            words += native.row(target)
            words += native.row(source)
            owners.append(owner)
        else:
            for record in native.strided(target, source):
                words += record
                owners.append(owner)
    return array.array("q", words), owners
