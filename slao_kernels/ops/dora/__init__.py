"""DoRA on a linear layer (arXiv 2402.09353): y = bias + m / ‖W + s B A‖ · (x Wᵀ + s x Aᵀ Bᵀ), the norm by rows.

What is in the brackets is `lora_linear`. PEFT also runs the base GEMM once, but forms B A by two products with the
identity, adds it to a copy of W in the adapter's dtype, and makes four passes over M × N. Here W + s B A exists a block
of rows at a time, and two passes scale and add. Forward and backward of one layer, PEFT's time over this, on two
AVX-512 cores with AMX, r = 16, fp32 adapters: 1.26 in fp32 and 2.0 in bf16 at M = 1024, K = N = 384; 1.8 and 2.8 at
M = 512, K = N = 1024. (The norms from ‖W‖² + 2 s (W Aᵀ)·B + s² B (A Aᵀ)·B would have saved 4 % of the last shape in
fp32 and 16 % in bf16, for a cache of ‖W‖² and digits lost where B A cancels W.)

The norm carries no gradient, as in the paper's section 4.3 and in PEFT. Saved beside lora_linear's: z, the brackets,
(M, N), where the magnitude has a gradient.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from ... import dispatch
from .. import lora_linear, schema_dora
from ..lora_linear import add
from ..lora_linear.wide import _row_blocks


def norm(weight: Tensor, A: Tensor, B: Tensor, scaling: float) -> Tensor:
    """`slao_kernels::dora_norm`; see ops/schema_dora.py."""
    found = A.new_empty(weight.shape[0])
    for rows in _row_blocks(weight):
        block = torch.addmm(weight[rows].to(A.dtype), B[rows], A, alpha=scaling)
        torch.linalg.vector_norm(block, dim=1, out=found[rows])
    return found


def scale(z: Tensor, c: Tensor, bias: Tensor | None) -> Tensor:
    """`slao_kernels::dora_scale`; see ops/schema_dora.py."""
    y = z.new_empty(z.shape)
    z2, y2 = z.reshape(-1, c.shape[0]), y.view(-1, c.shape[0])
    wide = None if bias is None else bias.to(c.dtype)
    for rows in _row_blocks(z2):
        if wide is None:
            torch.mul(z2[rows], c, out=y2[rows])
        else:
            torch.addcmul(wide, z2[rows], c, out=y2[rows])
    return y


def scale_backward(dy: Tensor, z: Tensor, c: Tensor, need_z: bool, need_c: bool) -> tuple[Tensor, Tensor]:
    """`slao_kernels::dora_scale_backward`; see ops/schema_dora.py."""
    dz, dc = z.new_empty(z.shape if need_z else 0), c.new_zeros(c.shape if need_c else 0)
    dy2, z2 = dy.reshape(-1, c.shape[0]), z.reshape(-1, c.shape[0])
    dz2 = dz.view(-1, c.shape[0]) if need_z else dz
    for rows in _row_blocks(dy2):
        part = dy2[rows].to(c.dtype)
        if need_c:
            dc += (part * z2[rows]).sum(0)
        if need_z:
            torch.mul(part, c, out=dz2[rows])
    return dz, dc


class _Scale(torch.autograd.Function):
    """bias + c z. Saves c, and z where c has a gradient."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, c: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(z, c)
        ctx.bias_dtype = None if bias is None else bias.dtype
        return (schema_dora.dora_scale if dispatch.direct() else torch.ops.slao_kernels.dora_scale)(z, c, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        z, c = ctx.saved_tensors
        need_z, need_c, need_bias = ctx.needs_input_grad
        op = torch.ops.slao_kernels.dora_scale_backward
        dz, dc = (schema_dora.dora_scale_backward if dispatch.direct() else op)(dy, z, c, need_z, need_c)
        d_bias = dy.reshape(-1, c.shape[0]).sum(0, dtype=ctx.bias_dtype) if need_bias else None
        return dz if need_z else None, dc if need_c else None, d_bias


def apply(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    magnitude: Tensor,
    A: Tensor,
    B: Tensor,
    scaling: float,
    *,
    precision: str = "base",
    backend: str = "auto",
) -> Tensor:
    """bias + magnitude / ‖weight + scaling B A‖ · (x weightᵀ + scaling x Aᵀ Bᵀ); nothing is checked.

    x (..., K), weight (N, K), bias (N) or None, magnitude (N), A (r, K), B (N, r); (..., N) in the dtype of the base
    product, autocast's where it is on. The norms, which have no gradient, and the factor are fp32 at least, whatever
    precision says of the branch ("adapter": it is added to the scaled base in the adapter's dtype, one more pass).
    """
    wide = torch.promote_types(torch.float32, torch.promote_types(A.dtype, B.dtype))
    wide = torch.promote_types(wide, torch.promote_types(weight.dtype, magnitude.dtype))
    find = schema_dora.dora_norm if dispatch.direct() else torch.ops.slao_kernels.dora_norm
    with torch.no_grad():
        norms = find(weight.detach(), A.detach().to(wide), B.detach().to(wide), scaling)
    c = magnitude.to(wide) / norms
    if precision == "adapter":  # c dy, were it rounded to the base's dtype, would narrow the branch's gradients
        y = _scaled(F.linear(x, weight), c, bias)
        B, in_place = c[:, None] * B, dispatch.direct()
        return add.apply(y, x, A, B, scaling, precision=precision, backend=backend, in_place=in_place)
    z = lora_linear.apply(x, weight, None, A, B, scaling, precision=precision, backend=backend)
    return _scaled(z, c, bias)


def _scaled(z: Tensor, c: Tensor, bias: Tensor | None) -> Tensor:
    if torch.is_grad_enabled():
        return _Scale.apply(z, c, bias)
    return (schema_dora.dora_scale if dispatch.direct() else torch.ops.slao_kernels.dora_scale)(z, c, bias)
