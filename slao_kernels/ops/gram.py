"""X Xᵀ in fp64 of stacks of matrices, by the compiled core: all that `interference`, and most that `weighted_merge`,
has to know of the factors on a CPU. Torch's way to the same copies them to fp64 first and computes both triangles."""

from __future__ import annotations

import array
from collections.abc import Sequence

import torch
from torch import Tensor

from .. import dispatch, native


def has(device: torch.device) -> bool:
    """Whether the core is there for tensors on `device`, and no other backend is wished for."""
    return device.type == "cpu" and dispatch.wished() in ("auto", "native") and native.why_not("cpu") is None


def grams(stacks: Sequence[Sequence[Tensor]]) -> Tensor:
    """(L, R, R) fp64 of L stacks, each of matrices (r, n) of any floating dtypes and strides that stand below one
    another, R = Σ r the same in all. NaN stays in its row and column.
    See csrc/cpu/gram.cpp."""
    count, rows = len(stacks), sum(matrix.shape[0] for matrix in stacks[0])
    found = torch.empty(count, rows, rows, dtype=torch.float64)
    table = native.table(native.matrix(matrix) for stack in stacks for matrix in stack)
    sizes = array.array("q", map(len, stacks))
    native.core().gram(table, sizes, found.data_ptr(), torch.get_num_threads(), "auto")
    return found + found.tril(-1).mT
