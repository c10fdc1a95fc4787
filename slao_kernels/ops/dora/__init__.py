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

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ... import dispatch
from .. import operators
from ..lora_linear.autograd import Call, add, linear, once
from . import products


class _Scale(torch.autograd.Function):
    """bias + c z. Saves c, and z where c has a gradient."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, c: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(z if c.requires_grad else None, c)
        ctx.bias_dtype = None if bias is None else bias.dtype
        return products.scale(z, c, bias) if dispatch.direct() else operators.OPS.dora_scale(z, c, bias)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        return once(_scale_grads, ctx, dy) if torch.is_grad_enabled() else _scale_grads(ctx, dy)


def _scale_grads(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    z, c = ctx.saved_tensors
    need_z, need_c, need_bias = ctx.needs_input_grad
    z = dy if z is None else z  # of the same shape and dtype, and not read
    if dispatch.direct() and operators.batched(dy):
        dz, dc = (dy * c).to(z.dtype), (dy * z.to(c.dtype)).reshape(-1, c.shape[0]).sum(0)
    else:
        dz, dc = _run("scale_backward", dy, z, c, need_z, need_c)
    d_bias = dy.reshape(-1, c.shape[0]).sum(0, dtype=ctx.bias_dtype) if need_bias else None
    return dz if need_z else None, dc if need_c else None, d_bias


def _run(name: str, first: Tensor, *args: Any) -> Any:
    """The product, or its operator where something looks on."""
    if dispatch.direct():
        return operators.outside_autocast(getattr(products, name), first.device.type)(first, *args)
    return getattr(operators.OPS, f"dora_{name}")(first, *args)


def run(call: Call, x: Tensor, weight: Tensor, bias: Tensor | None, magnitude: Tensor, A: Tensor, B: Tensor) -> Tensor:
    """bias + magnitude / ‖weight + scaling B A‖ · (x weightᵀ + scaling x Aᵀ Bᵀ); nothing is checked.

    x (..., K), weight (N, K), bias (N) or None, magnitude (N), A (r, K), B (N, r); (..., N) in the dtype of the base
    product, autocast's where it is on. The norms, which have no gradient, and the factor are fp32 at least, whatever
    the branch's dtype (a wider one is added to the scaled base by itself, one more pass).
    """
    wide = torch.promote_types(torch.float32, torch.promote_types(A.dtype, B.dtype))
    wide = torch.promote_types(wide, torch.promote_types(weight.dtype, magnitude.dtype))
    with torch.no_grad():
        norms = _run("norm", weight, A.to(wide), B.to(wide), call.scaling)
    c = magnitude.to(wide) / norms
    scale = _Scale.apply if torch.is_grad_enabled() else partial(_run, "scale")
    inside = None
    if bias is not None and call.dtype is wide:
        # As the base layer adds it, so that a fresh adapter, whose factor is 1, changes no bit. Narrower products have
        # it added later, unrounded: there the factor is hardly ever 1.
        inside, bias = bias, (1 - c) * bias
    if call.wide:  # c dy, were it rounded to the base's dtype, would narrow the branch's gradients
        y = scale(F.linear(x, weight, inside), c, bias)
        return add(call)(call, y, x, A, c[:, None] * B, dispatch.direct())
    z = linear(call)(call, x, weight, inside, A, B)
    return scale(z, c, bias)
