"""DoRA's norms, and the scaling of a result's columns: a block of rows at a time, so that nothing wide is large."""

from __future__ import annotations

import torch
from torch import Tensor

from ..lora_linear.precise import by_rows, rows_of


def norm(weight: Tensor, A: Tensor, B: Tensor, scaling: float) -> Tensor:
    """`slao_kernels::dora_norm`; see operators.py."""
    found = A.new_empty(weight.shape[0])
    for block, own, out in by_rows(weight, B, found):
        torch.linalg.vector_norm(torch.addmm(block.to(A.dtype), own, A, alpha=scaling), dim=1, out=out)
    return found


def scale(z: Tensor, c: Tensor, bias: Tensor | None) -> Tensor:
    """`slao_kernels::dora_scale`; see operators.py."""
    y = z.new_empty(z.shape)
    wide = None if bias is None else bias.to(c.dtype)
    for block, out in by_rows(rows_of(z), rows_of(y)):
        if wide is None:
            torch.mul(block, c, out=out)
        else:
            torch.addcmul(wide, block, c, out=out)
    return y


def scale_backward(dy: Tensor, z: Tensor, c: Tensor, need_z: bool, need_c: bool) -> tuple[Tensor, Tensor]:
    """`slao_kernels::dora_scale_backward`; see operators.py."""
    dz, dc = z.new_empty(z.shape if need_z else 0), c.new_zeros(c.shape if need_c else 0)
    dy2, z2 = rows_of(dy), rows_of(z)
    for block, values, out in by_rows(dy2, z2, rows_of(dz) if need_z else dy2):
        part = block.to(c.dtype)
        if need_c:
            dc += (part * values).sum(0)
        if need_z:
            torch.mul(part, c, out=out)
    return dz, dc
