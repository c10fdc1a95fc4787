"""lora_linear with the compiled core's rank-r products: one call each way, and torch's GEMM for the rest.

A product that the core has no code for (another dtype, a large rank, unusual strides) is torch's, as in eager.py.
"""

from __future__ import annotations

from functools import cache
from types import ModuleType

import torch
from torch import Tensor

from ... import native
from . import eager, skinny

_CODES = {torch.float32: 1, torch.bfloat16: 2}  # csrc/tensor_table.h


@cache
def _codes() -> dict[torch.dtype, int]:
    """The dtypes that this processor's code multiplies."""
    return {dtype: code for dtype, code in _CODES.items() if native.core().lora_has(code)}


@cache
def _core() -> tuple[ModuleType, int]:
    return native.core(), int(native.core().lora_rank)


def _code(r: int, *large: Tensor) -> int:
    """The dtype code if the core can read these (M, K) matrices at rank r, else 0."""
    code = _codes().get(large[0].dtype, 0)
    if not 0 < r <= _core()[1]:
        return 0
    for matrix in large:
        if matrix.stride(1) != 1 or matrix.numel() == 0 or (code == 2 and matrix.shape[1] % 2):
            return 0
    return code


def forward(
    x: Tensor,
    x_dropped: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    A: Tensor,
    B: Tensor,
    scaling: float,
) -> tuple[Tensor, Tensor]:
    """(y, t) of `slao_kernels::lora_linear`; see ops/schema.py."""
    (n, k), r = weight.shape, A.shape[0]
    x2 = x.reshape(-1, k)
    source = x2 if x_dropped is None else x_dropped.reshape(-1, k)
    code = _code(r, source) if A.dtype == x.dtype and A.is_contiguous() and B.is_contiguous() else 0
    if not code or (bias is not None and not bias.is_contiguous()):
        return eager.forward(x, x_dropped, weight, bias, A, B, scaling, _THIS)
    m = x2.shape[0]
    y, t = x.new_empty((*x.shape[:-1], n)), x.new_empty((m, r))
    _core()[0].lora_forward(
        source.data_ptr(),
        source.stride(0),
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
        torch.get_num_threads(),
    )
    y.view(m, n).addmm_(x2, weight.t())
    return y, t


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
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(dx, dx_dropped, dA, dB, g) of `slao_kernels::lora_linear_backward`; see ops/schema.py."""
    (n, k), r = weight.shape, A.shape[0]
    dy2, x2 = dy.reshape(-1, n), x.reshape(-1, k)
    whole = A.dtype == x.dtype and A.is_contiguous() and B.is_contiguous() and t.is_contiguous()
    code = _code(r, dy2, x2) if whole and x_dropped is None else 0
    if not code:
        needs = (need_x, need_dropped, need_A, need_B)
        return eager.backward(dy, x, x_dropped, weight, t, A, B, scaling, *needs, _THIS)
    m = x2.shape[0]
    dx, g = x.new_empty(x.shape if need_x else 0), x.new_empty((m, r) if need_x or need_A else 0)
    dA, dB = x.new_empty(A.shape if need_A else 0), x.new_empty(B.shape if need_B else 0)
    _core()[0].lora_backward(
        dy2.data_ptr(),
        dy2.stride(0),
        x2.data_ptr(),
        x2.stride(0),
        t.data_ptr(),
        A.data_ptr(),
        B.data_ptr(),
        g.data_ptr(),
        dA.data_ptr(),
        dB.data_ptr(),
        dx.data_ptr(),
        m,
        k,
        n,
        r,
        scaling,
        code,
        torch.get_num_threads(),
    )
    if need_x:
        dx.view(m, k).addmm_(dy2, weight)
    return dx, x.new_empty(0), dA, dB, g


class _Products:
    """The same products one by one, for what the two calls above do not cover and for groups of layers."""

    @staticmethod
    def shrink(x: Tensor, A: Tensor) -> Tensor:
        code = _code(A.shape[0], x) if A.dtype == x.dtype else 0
        if not code:
            return skinny.shrink(x, A)
        t = x.new_empty((x.shape[0], A.shape[0]))
        _shrink(x, A.t(), t, 1.0, code)
        return t

    @staticmethod
    def expand_(y: Tensor, t: Tensor, B: Tensor, scaling: float, bias: Tensor | None = None) -> None:
        code = _code(B.shape[1], y) if B.dtype == t.dtype == y.dtype and t.stride(1) == 1 else 0
        if not code or (bias is not None and not bias.is_contiguous()):
            return skinny.expand_(y, t, B, scaling, bias)
        b = 0 if bias is None else bias.data_ptr()
        (m, n), r = y.shape, t.shape[1]
        q_row, q_col = B.stride(1), B.stride(0)
        place = t.data_ptr(), t.stride(0), B.data_ptr(), q_row, q_col, b, y.data_ptr(), y.stride(0)
        _core()[0].lora_expand(*place, m, n, r, scaling, code, torch.get_num_threads())

    @staticmethod
    def grad_t(dy: Tensor, t: Tensor, B: Tensor, scaling: float, g: Tensor | None, dB: Tensor | None) -> None:
        code = _code(B.shape[1], dy) if B.dtype == t.dtype == dy.dtype and t.stride(1) == 1 else 0
        if not code or (g is not None and g.stride(1) != 1):
            return skinny.grad_t(dy, t, B, scaling, g, dB)
        if g is not None:
            _shrink(dy, B, g, scaling, code)
        if dB is not None:
            _outer(dy, t, dB, scaling, code)

    @staticmethod
    def grad_A(g: Tensor, x: Tensor, dA: Tensor) -> None:
        code = _code(g.shape[1], x) if g.dtype == x.dtype == dA.dtype and g.stride(1) == 1 else 0
        if not code:
            return skinny.grad_A(g, x, dA)
        _outer(x, g, dA.t(), 1.0, code)


def _shrink(x: Tensor, P: Tensor, t: Tensor, scale: float, code: int) -> None:
    """t (M, R) = scale x (M, K) P (K, R)."""
    place = x.data_ptr(), x.stride(0), P.data_ptr(), *P.stride(), t.data_ptr(), t.stride(0)
    _core()[0].lora_shrink(*place, *x.shape, t.shape[1], scale, code, torch.get_num_threads())


def _outer(x: Tensor, t: Tensor, d: Tensor, scale: float, code: int) -> None:
    """d (N, R) = scale xᵀ t."""
    place = x.data_ptr(), x.stride(0), t.data_ptr(), t.stride(0), d.data_ptr(), *d.stride()
    _core()[0].lora_outer(*place, *x.shape, t.shape[1], scale, code, torch.get_num_threads())


_THIS = _Products()
shrink, expand_, grad_t, grad_A = _THIS.shrink, _THIS.expand_, _THIS.grad_t, _THIS.grad_A
