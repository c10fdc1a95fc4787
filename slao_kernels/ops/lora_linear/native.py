"""lora_linear with the compiled core's rank-r products: one call each way, and torch's GEMM for the rest.

A product that the core has no code for (another dtype, a large rank, unusual strides) is torch's, as in eager.py.
"""

from __future__ import annotations

from functools import cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ... import native
from . import eager, skinny

_CODES = {torch.float32: 1, torch.bfloat16: 2}  # csrc/tensor_table.h


@cache
def codes() -> dict[torch.dtype, int]:
    """The dtypes that this processor's code multiplies."""
    return {dtype: code for dtype, code in _CODES.items() if native.core().lora_has(code)}


@cache
def _core() -> tuple[ModuleType, int]:
    return native.core(), int(native.core().lora_rank)


def _code(r: int, small: Tensor, *large: Tensor) -> int:
    """The dtype code if the core can read these (M, K) matrices and the small one, a P or Q of rank r, else 0."""
    code = codes().get(large[0].dtype, 0)
    if not 0 < r <= _core()[1] or 1 not in small.stride():
        return 0
    for matrix in large:
        if matrix.stride(1) != 1 or matrix.numel() == 0:
            return 0
    return code


class _Fused(torch.autograd.Function):
    """The whole layer in the common case, with as little around the core's calls as can be: on a small layer what
    Python costs is of the size of the GEMM, and more where that has just emptied the caches.

    Saves x, t and the parameters themselves, in the order of `_LoraLinear`: a recompute under a dispatch mode, which
    comes that way, has to save the same. A and B may be fp32 under a bf16 x: they are rounded as they are read,
    and their gradients are not.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, scaling: float, code: int
    ) -> Tensor:
        y, t = _forward(x, x, weight, bias, A, B, scaling, code)
        ctx.save_for_backward(x, weight, t, A, B)
        ctx.scaling, ctx.code = scaling, code
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            return _differentiated_once(ctx, dy)
        return _Fused.grads(ctx, dy)

    @staticmethod
    def grads(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, t, A, B = ctx.saved_tensors
        need_x, need_weight, need_bias, need_A, need_B, _, _ = ctx.needs_input_grad
        n = weight.shape[0]
        dy2 = dy if dy.dim() == 2 else dy.reshape(-1, n)
        if dy2.stride(1) != 1:
            dy2 = dy2.contiguous()
        dx, dA, dB, _ = _backward(dy2, x, weight, t, A, B, ctx.scaling, ctx.code, need_x, need_A, need_B)
        dW = dy2.t() @ x.reshape(-1, x.shape[-1]) if need_weight else None
        return dx, dW, dy2.sum(0) if need_bias else None, dA, dB, None, None


@once_differentiable
def _differentiated_once(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    return _Fused.grads(ctx, dy)


def fused(x: Tensor, weight: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, scaling: float, code: int) -> Tensor:
    """x Wᵀ + bias + scaling x Aᵀ Bᵀ, in x's dtype; code: what `served` gave for these."""
    if torch.is_grad_enabled():
        return _Fused.apply(x, weight, bias, A, B, scaling, code)
    return _forward(x, x, weight, bias, A, B, scaling, code)[0]


def served(x: Tensor, weight: Tensor, bias: Tensor | None, A: Tensor, B: Tensor) -> int:
    """The dtype code with which the core computes the whole layer, 0 if it does not. plain.py asks the same in C."""
    code, (n, k), r = codes().get(x.dtype, 0), weight.shape, A.shape[0]
    if not code or x.dim() == 0 or x.shape[-1] != k or A.shape != (r, k) or B.shape != (n, r):
        return 0
    if not 0 < r <= _core()[1] or A.dtype != B.dtype or A.dtype not in (torch.float32, x.dtype):
        return 0
    whole = x.is_contiguous() and A.is_contiguous() and B.is_contiguous() and (bias is None or bias.is_contiguous())
    return code if whole and x.device.type == "cpu" else 0


def _forward(
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
    _core()[0].lora_forward(
        source.data_ptr(),
        k,
        A.data_ptr(),
        B.data_ptr(),
        0 if bias is None else bias.data_ptr(),
        t.data_ptr(),
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


def _backward(
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
    _core()[0].lora_backward(
        dy.data_ptr(),
        dy.stride(0),
        x.data_ptr(),
        k,
        t.data_ptr(),
        A.data_ptr(),
        B.data_ptr(),
        0 if g is None else g.data_ptr(),
        0 if dA is None else dA.data_ptr(),
        0 if dB is None else dB.data_ptr(),
        0 if dx is None else dx.data_ptr(),
        m,
        k,
        n,
        r,
        scaling,
        code,
        1 if A.dtype is torch.float32 else code,
        torch.get_num_threads(),
    )
    if dx is not None:
        (dx if dx.dim() == 2 else dx.view(m, k)).addmm_(dy, weight)
    return dx, dA, dB, g


def forward(
    x: Tensor,
    x_dropped: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    A: Tensor,
    B: Tensor,
    scaling: float,
    wide: bool = False,
) -> tuple[Tensor, Tensor]:
    """(y, t) of `slao_kernels::lora_linear`; see ops/schema.py."""
    source = x if x_dropped is None else x_dropped
    code = 0 if wide else served(source, weight, bias, A, B)
    if not code or not x.is_contiguous():
        A, B = (A, B) if wide else (A.to(x.dtype), B.to(x.dtype))
        return eager.forward(x, x_dropped, weight, bias, A, B, scaling, wide, _THIS)
    return _forward(x, source, weight, bias, A, B, scaling, code)


def backward(
    dy: Tensor,
    x: Tensor,
    x_dropped: Tensor | None,
    weight: Tensor,
    t: Tensor,
    A: Tensor,
    B: Tensor,
    scaling: float,
    need_x: bool,
    need_dropped: bool,
    need_A: bool,
    need_B: bool,
    wide: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(dx, dx_dropped, dA, dB, g) of `slao_kernels::lora_linear_backward`; see ops/schema.py."""
    dy2 = dy.reshape(-1, weight.shape[0])
    code = served(x, weight, None, A, B) if x_dropped is None and not wide and t.is_contiguous() else 0
    if not code or dy2.stride(1) != 1:
        needs, dtypes = (need_x, need_dropped, need_A, need_B, wide), (A.dtype, B.dtype)
        A, B = (A, B) if wide else (A.to(x.dtype), B.to(x.dtype))
        dx, dx_dropped, dA, dB, g = eager.backward(dy, x, x_dropped, weight, t, A, B, scaling, *needs, _THIS)
        return dx, dx_dropped, dA.to(dtypes[0]), dB.to(dtypes[1]), g
    grads = _backward(dy2, x, weight, t, A, B, scaling, code, need_x, need_A, need_B)
    dx, dA, dB, g = (x.new_empty(0) if grad is None else grad for grad in grads)
    return dx, x.new_empty(0), dA, dB, g


class _Products:
    """The same products one by one, for what the two calls above do not cover and for groups of layers."""

    @staticmethod
    def shrink(x: Tensor, A: Tensor) -> Tensor:
        code = _code(A.shape[0], A, x) if A.dtype == x.dtype else 0
        if not code:
            return skinny.shrink(x, A)
        t = x.new_empty((x.shape[0], A.shape[0]))
        _shrink(x, A.t(), t, 1.0, code)
        return t

    @staticmethod
    def expand_(y: Tensor, t: Tensor, B: Tensor, scaling: float, bias: Tensor | None = None) -> None:
        code = _code(B.shape[1], B, y) if B.dtype == t.dtype == y.dtype and t.stride(1) == 1 else 0
        if not code or (bias is not None and not bias.is_contiguous()):
            return skinny.expand_(y, t, B, scaling, bias)
        b = 0 if bias is None else bias.data_ptr()
        (m, n), r = y.shape, t.shape[1]
        q_row, q_col = B.stride(1), B.stride(0)
        place = t.data_ptr(), t.stride(0), B.data_ptr(), q_row, q_col, b, y.data_ptr(), y.stride(0)
        _core()[0].lora_expand(*place, m, n, r, scaling, code, code, torch.get_num_threads())

    @staticmethod
    def grad_t(dy: Tensor, t: Tensor, B: Tensor, scaling: float, g: Tensor | None, dB: Tensor | None) -> None:
        code = _code(B.shape[1], B, dy) if B.dtype == t.dtype == dy.dtype and t.stride(1) == 1 else 0
        if not code or (g is not None and g.stride(1) != 1):
            return skinny.grad_t(dy, t, B, scaling, g, dB)
        if g is not None:
            _shrink(dy, B, g, scaling, code)
        if dB is not None:
            _outer(dy, t, dB, scaling, code)

    @staticmethod
    def grad_A(g: Tensor, x: Tensor, dA: Tensor) -> None:
        code = _code(g.shape[1], g, x) if g.dtype == x.dtype == dA.dtype and g.stride(1) == 1 else 0
        if not code:
            return skinny.grad_A(g, x, dA)
        _outer(x, g, dA.t(), 1.0, code)


def _shrink(x: Tensor, P: Tensor, t: Tensor, scale: float, code: int) -> None:
    """t (M, R) = scale x (M, K) P (K, R)."""
    place = x.data_ptr(), x.stride(0), P.data_ptr(), *P.stride(), t.data_ptr(), t.stride(0)
    _core()[0].lora_shrink(*place, *x.shape, t.shape[1], scale, code, code, torch.get_num_threads())


def _outer(x: Tensor, t: Tensor, d: Tensor, scale: float, code: int) -> None:
    """d (N, R) = scale xᵀ t."""
    place = x.data_ptr(), x.stride(0), t.data_ptr(), t.stride(0), d.data_ptr(), *d.stride()
    _core()[0].lora_outer(*place, *x.shape, t.shape[1], scale, code, code, torch.get_num_threads())


_THIS = _Products()
shrink, expand_, grad_t, grad_A = _THIS.shrink, _THIS.expand_, _THIS.grad_t, _THIS.grad_A
