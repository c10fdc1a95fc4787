"""orthogonal_init_ in the compiled core: Cholesky QR of all matrices at once, Householder for the few it flags."""

from __future__ import annotations

import array

import torch
from torch import Tensor

from ... import native
from . import reference

_DONE, _NOT_FINITE, _FLAGGED = 0, 2, 3


def orthogonal_init_(As: list[Tensor], r: list[Tensor], status: Tensor) -> None:
    """As `reference.orthogonal_init_`; see csrc/cpu/orthogonal_init.cpp."""
    states = array.array("i", [0]) * len(As)
    table = native.table(map(native.matrix, As))
    triangles = native.table(map(native.matrix, r))
    finite = native.core().orthogonal_init(table, triangles, states, torch.get_num_threads(), "auto")
    if not finite:
        # A matrix that was only flagged is as unwritten as all the others.
        status.copy_(torch.tensor([_NOT_FINITE if state == _NOT_FINITE else _DONE for state in states]))
        return
    native.written(As)
    flagged = [index for index, state in enumerate(states) if state == _FLAGGED]
    status.copy_(torch.tensor(states))
    if flagged:
        found = torch.empty(len(flagged), dtype=torch.int32)
        reference.orthogonal_init_([As[i] for i in flagged], [r[i] for i in flagged] if r else [], found)
        status[flagged] = found
