"""lora_linear with the compiled core's rank-r products: one call each way, and torch's GEMM for the rest.

A product that the core has no code for (another dtype, a large rank, unusual strides) is torch's, as in eager.py.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import eager, hilo, skinny
from . import wide as wide_branch
from .native_layer import CODES, backward_of, codes, core, forward_of, served


def _code(r: int, *large: Tensor) -> int:
    """The dtype code if the core can read these (M, K) matrices at rank r, else 0."""
    code = codes().get(large[0].dtype, 0)
    if not 0 < r <= core()[1]:
        return 0
    for matrix in large:
        if matrix.stride(1) != 1 or matrix.numel() == 0:
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
    wide: bool = False,
) -> tuple[Tensor, Tensor]:
    """(y, t) of `slao_kernels::lora_linear`; see ops/schema.py."""
    source = x if x_dropped is None else x_dropped
    code = 0 if wide else served(source, weight, bias, A, B)
    if not code or not x.is_contiguous():
        A, B = (A, B) if wide else (A.to(x.dtype), B.to(x.dtype))
        return eager.forward(x, x_dropped, weight, bias, A, B, scaling, wide, _THIS)
    return forward_of(x, source, weight, bias, A, B, scaling, code)


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
    grads = backward_of(dy2, x, weight, t, A, B, scaling, code, need_x, need_A, need_B)
    dx, dA, dB, g = (x.new_empty(0) if grad is None else grad for grad in grads)
    return dx, x.new_empty(0), dA, dB, g


class _Products:
    """The same products one by one, for what the two calls above do not cover and for groups of layers.

    Beside a 16-bit x or y the other matrix (A, B, dA, dB) may be fp32.
    """

    @staticmethod
    def shrink(x: Tensor, A: Tensor) -> Tensor:
        code = _code(A.shape[0], x) if _fits(A, x) else 0
        if not code:
            return skinny.shrink(x, A)
        t = x.new_empty((x.shape[0], A.shape[0]))
        _shrink(x, A.t(), t, 1.0, code)
        return t

    @staticmethod
    def expand_(y: Tensor, t: Tensor, B: Tensor, scaling: float, bias: Tensor | None = None) -> None:
        code = _code(B.shape[1], y) if t.dtype == y.dtype and _fits(B, y) and t.stride(1) == 1 else 0
        if not code or (bias is not None and not bias.is_contiguous()):
            return skinny.expand_(y, t, B, scaling, bias)
        b = 0 if bias is None else bias.data_ptr()
        (m, n), r = y.shape, t.shape[1]
        q_row, q_col = B.stride(1), B.stride(0)
        place = t.data_ptr(), t.stride(0), B.data_ptr(), q_row, q_col, b, y.data_ptr(), y.stride(0)
        core()[0].lora_expand(*place, m, n, r, scaling, code, _other(B, code), torch.get_num_threads())

    @staticmethod
    def grad_t(dy: Tensor, t: Tensor, B: Tensor, scaling: float, g: Tensor | None, dB: Tensor | None) -> None:
        code = _code(B.shape[1], dy) if t.dtype == dy.dtype and _fits(B, dy) and t.stride(1) == 1 else 0
        if not code or (g is not None and g.stride(1) != 1):
            return skinny.grad_t(dy, t, B, scaling, g, dB)
        if g is not None:
            _shrink(dy, B, g, scaling, code)
        if dB is not None:
            _outer(dy, t, dB, scaling, code)

    @staticmethod
    def grad_A(g: Tensor, x: Tensor, dA: Tensor) -> None:
        code = _code(g.shape[1], x) if g.dtype == x.dtype and _fits(dA, x) and g.stride(1) == 1 else 0
        if not code:
            return skinny.grad_A(g, x, dA)
        _outer(x, g, dA.t(), 1.0, code)

    # fp32 adapters on a 16-bit base: the core has no shrink whose t is fp32, and no expand that adds.
    shrink_wide = staticmethod(skinny.shrink_wide)
    add_wide_ = staticmethod(skinny.add_wide_)

    @staticmethod
    def outer_wide(t: Tensor, x: Tensor, out: Tensor, scaling: float) -> None:
        if _code(1, x) != CODES[torch.bfloat16] or x.numel() < _SPLIT_FROM or not wide_branch.splits(x, t):
            return skinny.outer_wide(t, x, out, scaling)
        torch.mul(hilo.outer(t, x, _fp32_outer), scaling, out=out)


# Elements of x from which the terms' making pays: at r = 16, 164 µs against 146 for 1024 × 384, 269 against 419 for
# 1024 × 1024, 1565 against 3583 for 2048 × 4096 (AMX, 2 threads; blocks of rows by torch).
_SPLIT_FROM = 1 << 20


def _fp32_outer(g: Tensor, x: Tensor) -> Tensor:
    """g x in fp32: g (R, M) and x (M, K) bf16, g's columns dense; as many ranks at a time as the core takes."""
    out = torch.empty((g.shape[0], x.shape[1]), dtype=torch.float32)
    for first in range(0, g.shape[0], core()[1]):
        ranks = slice(first, first + core()[1])
        _outer(x, g[ranks].t(), out[ranks].t(), 1.0, CODES[x.dtype])
    return out


def _fits(factor: Tensor, large: Tensor) -> bool:
    return factor.dtype in (large.dtype, torch.float32)


def _other(factor: Tensor, code: int) -> int:
    """The dtype code of a matrix that may be fp32 beside a large one of `code`."""
    return 1 if factor.dtype == torch.float32 else code


def _shrink(x: Tensor, P: Tensor, t: Tensor, scale: float, code: int) -> None:
    """t (M, R) = scale x (M, K) P (K, R)."""
    place = x.data_ptr(), x.stride(0), P.data_ptr(), *P.stride(), t.data_ptr(), t.stride(0)
    core()[0].lora_shrink(*place, *x.shape, t.shape[1], scale, code, _other(P, code), torch.get_num_threads())


def _outer(x: Tensor, t: Tensor, d: Tensor, scale: float, code: int) -> None:
    """d (N, R) = scale xᵀ t."""
    place = x.data_ptr(), x.stride(0), t.data_ptr(), t.stride(0), d.data_ptr(), *d.stride()
    core()[0].lora_outer(*place, *x.shape, t.shape[1], scale, code, _other(d, code), torch.get_num_threads())


_THIS = _Products()
shrink, expand_, grad_t, grad_A = _THIS.shrink, _THIS.expand_, _THIS.grad_t, _THIS.grad_A
shrink_wide, outer_wide, add_wide_ = _THIS.shrink_wide, _THIS.outer_wide, _THIS.add_wide_
