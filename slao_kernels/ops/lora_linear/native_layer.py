"""A whole lora_linear by the compiled core's two calls and torch's GEMM, as one autograd node.

On a small layer what Python costs is of the size of the GEMM, and more where that has just emptied the caches: so the
node does without operators and casts, and whoever calls it has made the checks (`served`).
"""

from __future__ import annotations

from functools import cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ... import native

CODES = {torch.float32: 1, torch.bfloat16: 2}  # csrc/tensor_table.h


@cache
def codes() -> dict[torch.dtype, int]:
    """The dtypes that this processor's code multiplies."""
    return {torch.bfloat16: CODES[torch.bfloat16]} if native.core().lora_rank else {}


@cache
def core() -> tuple[ModuleType, int]:
    return native.core(), int(native.core().lora_rank)


class _Fused(torch.autograd.Function):
    """Saves x, t and the parameters themselves, in the order of `_LoraLinear`: a recompute under a dispatch mode, which
    comes that way, has to save the same. A and B may be fp32 under a bf16 x: they are rounded as they are read, and
    their gradients are not.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, scaling: float, code: int
    ) -> Tensor:
        y, t = forward_of(x, x, weight, bias, A, B, scaling, code)
        ctx.save_for_backward(x, weight, t, A, B)
        ctx.scaling, ctx.code = scaling, code
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            return _differentiated_once(ctx, dy)
        x, weight, t, A, B = ctx.saved_tensors
        need_x, need_weight, need_bias, need_A, need_B, _, _ = ctx.needs_input_grad
        dy2 = dy if dy.dim() == 2 else dy.reshape(-1, dy.shape[-1])
        if dy2.stride(1) != 1:
            dy2 = dy2.contiguous()
        dx, dA, dB, _ = backward_of(dy2, x, weight, t, A, B, ctx.scaling, ctx.code, need_x, need_A, need_B)
        dW = dy2.t() @ x.reshape(-1, x.shape[-1]) if need_weight else None
        return dx, dW, dy2.sum(0) if need_bias else None, dA, dB, None, None


@once_differentiable
def _differentiated_once(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    return _Fused.backward(ctx, dy)


def fused(x: Tensor, weight: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, scaling: float, code: int) -> Tensor:
    """x Wᵀ + bias + scaling x Aᵀ Bᵀ, in x's dtype; code: what `served` gave for these."""
    if torch.is_grad_enabled():
        return _Fused.apply(x, weight, bias, A, B, scaling, code)
    return forward_of(x, x, weight, bias, A, B, scaling, code)[0]


def served(x: Tensor, weight: Tensor, bias: Tensor | None, A: Tensor, B: Tensor) -> int:
    """The dtype code with which the core computes the whole layer, 0 if it does not. plain.py asks the same in C."""
    code, (n, k), r = codes().get(x.dtype, 0), weight.shape, A.shape[0]
    if not code or x.dim() == 0 or x.shape[-1] != k or A.shape != (r, k) or B.shape != (n, r):
        return 0
    if not 0 < r <= core()[1] or A.dtype != B.dtype or A.dtype not in (torch.float32, x.dtype):
        return 0
    if bias is not None and not (bias.dtype == x.dtype and bias.is_contiguous()):
        return 0
    whole = x.is_contiguous() and A.is_contiguous() and B.is_contiguous()
    return code if whole and x.device.type == "cpu" else 0


def forward_of(
    x: Tensor,
    source: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    A: Tensor,
    B: Tensor,
    scaling: float,
    code: int,
) -> tuple[Tensor, Tensor]:
    """y and t = source Aᵀ; x and source (..., K) contiguous."""
    (n, k), r = weight.shape, A.shape[0]
    x2 = x if x.dim() == 2 else x.view(-1, k)
    m = x2.shape[0]
    y, t = x.new_empty((*x.shape[:-1], n)), x.new_empty((m, r))
    core()[0].lora_forward(
        source.data_ptr(),
        k,
        A.data_ptr(),
        B.data_ptr(),
        0 if bias is None else bias.data_ptr(),
        t.data_ptr(),
        r,
        y.data_ptr(),
        m,
        k,
        n,
        r,
        scaling,
        code,
        1 if A.dtype is torch.float32 else code,
        torch.get_num_threads(),
    )
    (y if y.dim() == 2 else y.view(m, n)).addmm_(x2, weight.t())
    return y, t


def backward_of(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    t: Tensor,
    A: Tensor,
    B: Tensor,
    scaling: float,
    code: int,
    need_x: bool,
    need_A: bool,
    need_B: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """dx, dA, dB and g = scaling dy B, None where not needed; dy (M, N) with unit columns, x (..., K) contiguous."""
    (n, k), r = weight.shape, A.shape[0]
    m = dy.shape[0]
    dx = torch.empty_like(x) if need_x else None
    g = torch.empty_like(t) if need_x or need_A else None
    dA, dB = torch.empty_like(A) if need_A else None, torch.empty_like(B) if need_B else None
    core()[0].lora_backward(
        x.data_ptr(),
        k,
        0 if g is None else g.data_ptr(),
        A.data_ptr(),
        0 if dx is None else dx.data_ptr(),
        m,
        k,
        r,
        code,
        1 if A.dtype is torch.float32 else code,
        torch.get_num_threads(),
        dy.data_ptr(),
        dy.stride(0),
        t.data_ptr(),
        r,
        B.data_ptr(),
        0 if dA is None else dA.data_ptr(),
        0 if dB is None else dB.data_ptr(),
        n,
        r,
        scaling,
    )
    if dx is not None:
        (dx if dx.dim() == 2 else dx.view(m, k)).addmm_(dy, weight)
    return dx, dA, dB, g
