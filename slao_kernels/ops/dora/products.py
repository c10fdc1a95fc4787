"""DoRA's norms, and the scaling of a result's columns: a block of rows at a time, so that nothing wide is large."""

from __future__ import annotations

import torch
from torch import Tensor

from ..lora_linear.precise import row_blocks


def norm(weight: Tensor, A: Tensor, B: Tensor, scaling: float) -> Tensor:
    """`slao_kernels::dora_norm`; see operators.py."""
    found = A.new_empty(weight.shape[0])
    for rows in row_blocks(weight):
        block = torch.addmm(weight[rows].to(A.dtype), B[rows], A, alpha=scaling)
        torch.linalg.vector_norm(block, dim=1, out=found[rows])
    return found


def scale(z: Tensor, c: Tensor, bias: Tensor | None) -> Tensor:
    """`slao_kernels::dora_scale`; see operators.py."""
    y = z.new_empty(z.shape)
    z2, y2 = z.reshape(-1, c.shape[0]), y.view(-1, c.shape[0])
    wide = None if bias is None else bias.to(c.dtype)
    for rows in row_blocks(z2):
        if wide is None:
            torch.mul(z2[rows], c, out=y2[rows])
        else:
            torch.addcmul(wide, z2[rows], c, out=y2[rows])
    return y


def scale_backward(dy: Tensor, z: Tensor, c: Tensor, need_z: bool, need_c: bool) -> tuple[Tensor, Tensor]:
    """`slao_kernels::dora_scale_backward`; see operators.py."""
    dz, dc = z.new_empty(z.shape if need_z else 0), c.new_zeros(c.shape if need_c else 0)
    dy2, z2 = dy.reshape(-1, c.shape[0]), z.reshape(-1, c.shape[0])
    dz2 = dz.view(-1, c.shape[0]) if need_z else dz
    for rows in row_blocks(dy2):
        part = dy2[rows].to(c.dtype)
        if need_c:
            dc += (part * z2[rows]).sum(0)
        if need_z:
            torch.mul(part, c, out=dz2[rows])
    return dz, dc
