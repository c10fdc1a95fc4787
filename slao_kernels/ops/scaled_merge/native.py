"""scaled_merge_ in the compiled core: all pairs in one sweep over memory."""

from __future__ import annotations

import array
from types import ModuleType

import torch
from torch import Tensor

from ... import native


def scaled_merge_(merged: list[Tensor], finetuned: list[Tensor], lam: list[float]) -> None:
    """As `reference.scaled_merge_`; see csrc/cpu/scaled_merge.cpp and csrc/cuda/scaled_merge.cu."""
    core = native.core()
    if merged and merged[0].is_cuda:
        with native.launching(merged[0].device) as (device, stream):
            on_gpu(core, merged, finetuned, lam, device, stream)
    else:
        core.scaled_merge(*_tables(merged, finetuned, lam), torch.get_num_threads(), "auto")
    native.written(merged)


def on_gpu(
    core: ModuleType, merged: list[Tensor], finetuned: list[Tensor], lam: list[float], device: int, stream: int
) -> None:
    """One launch for each few hundred pairs; nothing is waited for."""
    core.cuda_scaled_merge(*_tables(merged, finetuned, lam), device, stream)


def _tables(
    merged: list[Tensor], finetuned: list[Tensor], lam: list[float]
) -> tuple[array.array[int], array.array[float]]:
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
