"""fold_ in the compiled core: every weight read and written once."""

from __future__ import annotations

import array
from types import ModuleType

import torch
from torch import Tensor

from ... import native

Tables = tuple["array.array[int]", list[int]]  # the words of the records, and the weight that each record is of
Records = tuple["array.array[int]", "array.array[float]"]


def fold_(
    weights: list[Tensor], As: list[Tensor], Bs: list[Tensor], scalings: list[float], prepared: Tables | None = None
) -> None:
    """As `reference.fold_`; see csrc/cpu/fold.cpp and csrc/cuda/fold.cu.

    prepared: `tables` of the same lists, which the caller has kept.
    """
    core, found = native.core(), records(tables(weights, As, Bs) if prepared is None else prepared, scalings)
    if weights and weights[0].is_cuda:
        with native.launching(weights[0].device) as (device, stream):
            on_gpu(core, found, device, stream)
    else:
        core.fold(*found, torch.get_num_threads(), "auto")
    native.written(weights)


def on_gpu(core: ModuleType, found: Records, device: int, stream: int) -> None:
    """One launch for each few hundred weights and precision; nothing is waited for."""
    core.cuda_fold(*found, device, stream)


def records(prepared: Tables, scalings: list[float]) -> Records:
    """The records of csrc/tensor_table.h, and a scaling each."""
    words, owners = prepared
    return words, array.array("d", [scalings[owner] for owner in owners])


def tables(weights: list[Tensor], As: list[Tensor], Bs: list[Tensor]) -> Tables:
    """The records of every weight that has elements, without their scalings."""
    owners = [owner for owner, W in enumerate(weights) if W.numel()]
    triples = ((weights[owner], As[owner], Bs[owner]) for owner in owners)
    return native.table(native.matrix(W) + native.matrix(A) + native.matrix(B) for W, A, B in triples), owners
