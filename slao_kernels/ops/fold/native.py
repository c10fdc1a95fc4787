"""fold_ in the compiled core: every weight read and written once."""

from __future__ import annotations

import array
from types import ModuleType

import torch
from torch import Tensor

from ... import native


def fold_(weights: list[Tensor], As: list[Tensor], Bs: list[Tensor], scalings: list[float]) -> None:
    """As `reference.fold_`; see csrc/cpu/fold.cpp and csrc/cuda/fold.cu."""
    core = native.core()
    if weights and weights[0].is_cuda:
        with native.launching(weights[0].device) as (device, stream):
            on_gpu(core, weights, As, Bs, scalings, device, stream)
    else:
        core.fold(*_tables(weights, As, Bs, scalings), torch.get_num_threads(), "auto")
    native.written(weights)


def on_gpu(
    core: ModuleType,
    weights: list[Tensor],
    As: list[Tensor],
    Bs: list[Tensor],
    scalings: list[float],
    device: int,
    stream: int,
) -> None:
    """One launch for each few hundred weights and precision; nothing is waited for."""
    core.cuda_fold(*_tables(weights, As, Bs, scalings), device, stream)


def _tables(
    weights: list[Tensor], As: list[Tensor], Bs: list[Tensor], scalings: list[float]
) -> tuple[array.array[int], array.array[float]]:
    records = [
        native.matrix(W) + native.matrix(A) + native.matrix(B)
        for W, A, B in zip(weights, As, Bs, strict=True)
        if W.numel()
    ]
    factors = array.array("d", [s for W, s in zip(weights, scalings, strict=True) if W.numel()])
    return native.table(records), factors
