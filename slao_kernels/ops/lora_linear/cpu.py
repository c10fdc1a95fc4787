"""lora_linear on a CPU with bf16 instructions: the compiled core's rank-r products, one call each way for a layer.

The base GEMM stays torch's, and so does everything in another dtype: in fp32 torch's own products were as fast in most
of the committed rows. A and B, dA and dB may be fp32 beside a bf16 x: they are rounded as they are read, and their
gradients are not. csrc/README.md says how the products work.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from ... import native
from .precise import outer_split, rows_of, splits
from .products import Grads, Needs, TorchProducts

_FP32, _BF16 = 1, 2  # csrc/tensor_table.h
# Elements of x from which splitting t into 16-bit terms pays: at r = 16, 164 µs against 146 for 1024 × 384, 269 against
# 419 for 1024 × 1024, 1565 against 3583 for 2048 × 4096 (AMX, 2 threads; blocks of rows by torch).
_SPLIT_FROM = 1 << 20


@cache
def _core() -> tuple[Any, int]:
    """The extension and its largest rank."""
    return native.core(), int(native.core().lora_rank)


class CpuProducts(TorchProducts):
    """bf16 by the core, where it can read the matrices; all else by torch."""

    def forward(
        self,
        x: Tensor,
        source: Tensor | None,
        weights: Sequence[Tensor],
        biases: Sequence[Tensor | None],
        As: Sequence[Tensor],
        Bs: Sequence[Tensor],
        scalings: Sequence[float],
    ) -> tuple[list[Tensor], Tensor]:
        """As TorchProducts'; one layer of bf16 in one call: t, and y while t is in the cache."""
        read, A, B, bias = x if source is None else source, As[0], Bs[0], biases[0]
        one = len(As) == 1 and (bias is None or (bias.is_contiguous() and bias.dtype is torch.bfloat16))
        if not (one and read.is_contiguous() and x.is_contiguous() and _serves(read, A, B)):
            return super().forward(x, source, weights, biases, *_rounded(x.dtype, As, Bs), scalings)
        core, (n, r), k = _core()[0], B.shape, x.shape[-1]
        x2 = rows_of(x)
        m = x2.shape[0]
        y, t = x.new_empty((*x.shape[:-1], n)), x.new_empty((m, r))
        of_t = read.data_ptr(), k, A.data_ptr(), 1, k, t.data_ptr(), r
        of_y = B.data_ptr(), 1, r, 0 if bias is None else bias.data_ptr(), y.data_ptr(), n
        core.lora_rows(*of_t, *of_y, m, k, n, r, 1.0, scalings[0], _code(A), torch.get_num_threads())
        rows_of(y).addmm_(x2, weights[0].t())
        return [y], t

    def backward(
        self,
        source: Tensor,
        dys: Sequence[Tensor],
        weights: Sequence[Tensor],
        t: Tensor,
        As: Sequence[Tensor],
        Bs: Sequence[Tensor],
        scalings: Sequence[float],
        needs: Needs,
    ) -> Grads:
        """As TorchProducts'; one layer of bf16 in one call: g, dx's part, dA and dB while dy is in the cache."""
        need_x, need_As, need_Bs = needs
        A, B, dy = As[0], Bs[0], rows_of(dys[0])
        one = len(As) == 1 and self.mask is None and t.is_contiguous()
        if not (one and source.is_contiguous() and dy.stride(1) == 1 and _serves(source, A, B)):
            dx, dAs, dBs, g = super().backward(source, dys, weights, t, *_rounded(t.dtype, As, Bs), scalings, needs)
            return dx, _as_wide(dAs, As), _as_wide(dBs, Bs), g
        (n, r), k = B.shape, source.shape[-1]
        dx = torch.empty_like(source) if need_x else None
        g = torch.empty_like(t) if need_x or need_As[0] else None
        dA, dB = torch.empty_like(A) if need_As[0] else None, torch.empty_like(B) if need_Bs[0] else None
        g_at, dx_at, dA_at, dB_at = (0 if part is None else part.data_ptr() for part in (g, dx, dA, dB))
        read = dy.data_ptr(), dy.stride(0), t.data_ptr(), source.data_ptr(), A.data_ptr(), B.data_ptr()
        sizes = dy.shape[0], k, n, r, scalings[0], _code(A), torch.get_num_threads()
        _core()[0].lora_backward(*read, g_at, dx_at, dA_at, dB_at, *sizes)
        if dx is not None:
            rows_of(dx).addmm_(dy, weights[0])
        return dx, [dA], [dB], g

    def shrink(self, x: Tensor, A: Tensor) -> Tensor:
        if not _reads(x, A.shape[0], A):
            return super().shrink(x, A)
        t = x.new_empty((x.shape[0], A.shape[0]))
        _shrink(x, A.t(), t, 1.0)
        return t

    def linear_(
        self, y: Tensor, x: Tensor, W: Tensor, t: Tensor, B: Tensor, scaling: float, bias: Tensor | None
    ) -> None:
        if not _reads(y, B.shape[1], B) or not _reads(t, 1) or (bias is not None and not bias.is_contiguous()):
            return super().linear_(y, x, W, t, B, scaling, bias)
        _expand(t, B.t(), y, scaling, bias)
        y.addmm_(x, W.t())

    def grad_t(
        self, dy: Tensor, t: Tensor, B: Tensor, scaling: float, need_g: bool, need_dB: bool
    ) -> tuple[Tensor | None, Tensor | None]:
        if not (_reads(dy, B.shape[1], B) and _reads(t, 1)):
            return super().grad_t(dy, t, B, scaling, need_g, need_dB)
        g, dB = torch.empty_like(t) if need_g else None, torch.empty_like(B) if need_dB else None
        if g is not None:
            _shrink(dy, B, g, scaling)
        if dB is not None:
            _outer(dy, t, dB, scaling)
        return g, dB

    def grad_A(self, g: Tensor, x: Tensor) -> Tensor:
        if not (_reads(x, g.shape[1]) and _reads(g, 1)):
            return super().grad_A(g, x)
        dA = x.new_empty((g.shape[1], x.shape[1]))
        _outer(x, g, dA.t(), 1.0)
        return dA

    def grad_source(self, g: Tensor, A: Tensor) -> Tensor:
        if not (_reads(g, A.shape[0], A) and A.shape[1] > 0):
            return super().grad_source(g, A)
        dx = g.new_empty((g.shape[0], A.shape[1]))
        _expand(g, A, dx, self.scale, None)
        return dx if self.mask is None else dx.mul_(rows_of(self.mask))

    # The core has no shrink whose t is fp32, and no expand that adds: those of precision="adapter" are torch's.
    def outer_wide(self, t: Tensor, x: Tensor, scaling: float) -> Tensor:
        if not _reads(x, 1) or x.numel() < _SPLIT_FROM or not splits(x, t):
            return super().outer_wide(t, x, scaling)
        return outer_split(t, x, _fp32_outer).mul_(scaling)


def _serves(x: Tensor, A: Tensor, B: Tensor) -> bool:
    """Whether the core takes the whole layer: a contiguous bf16 x, A and B contiguous and of one dtype, none empty."""
    if x.dtype is not torch.bfloat16 or A.dtype is not B.dtype or A.dtype not in (torch.bfloat16, torch.float32):
        return False
    dense = A.is_contiguous() and B.is_contiguous()
    return dense and 0 < A.shape[0] <= _core()[1] and x.numel() > 0 and B.numel() > 0


def _reads(large: Tensor, r: int, *factors: Tensor) -> bool:
    """Whether the core has a loop over this (M, K) matrix at rank r, beside factors that are bf16 or fp32."""
    if large.dtype is not torch.bfloat16 or large.stride(1) != 1 or large.numel() == 0 or not 0 < r <= _core()[1]:
        return False
    return all(factor.dtype in (torch.bfloat16, torch.float32) for factor in factors)


def _code(factor: Tensor) -> int:
    return _FP32 if factor.dtype is torch.float32 else _BF16


def _rounded(dtype: torch.dtype, As: Sequence[Tensor], Bs: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """What torch's products need: all of one dtype."""
    return [A.to(dtype) for A in As], [B.to(dtype) for B in Bs]


def _as_wide(grads: list[Tensor | None], factors: Sequence[Tensor]) -> list[Tensor | None]:
    return [grad if grad is None else grad.to(factor.dtype) for grad, factor in zip(grads, factors, strict=True)]


def _shrink(x: Tensor, P: Tensor, t: Tensor, scale: float) -> None:
    """t (M, R) = scale x (M, K) P (K, R)."""
    places = x.data_ptr(), x.stride(0), P.data_ptr(), *P.stride(), t.data_ptr(), t.stride(0)
    sizes = *x.shape, 0, t.shape[1], scale, 1.0, _code(P), torch.get_num_threads()
    _core()[0].lora_rows(*places, 0, 0, 0, 0, 0, 0, *sizes)


def _expand(t: Tensor, Q: Tensor, y: Tensor, scale: float, bias: Tensor | None) -> None:
    """y (M, N) = scale t (M, R) Q (R, N) + bias."""
    bias_at = 0 if bias is None else bias.data_ptr()
    places = t.data_ptr(), t.stride(0), Q.data_ptr(), *Q.stride(), bias_at, y.data_ptr(), y.stride(0)
    sizes = y.shape[0], 0, y.shape[1], t.shape[1], 1.0, scale, _code(Q), torch.get_num_threads()
    _core()[0].lora_rows(0, 0, 0, 0, 0, *places, *sizes)


def _outer(x: Tensor, t: Tensor, d: Tensor, scale: float) -> None:
    """d (N, R) = scale xᵀ t."""
    places = x.data_ptr(), x.stride(0), t.data_ptr(), t.stride(0), d.data_ptr(), *d.stride()
    _core()[0].lora_outer(*places, *x.shape, t.shape[1], scale, _code(d), torch.get_num_threads())


def _fp32_outer(g: Tensor, x: Tensor) -> Tensor:
    """g x in fp32: g (R, M) and x (M, K) bf16, g's columns dense; as many ranks at a time as the core takes."""
    out = torch.empty((g.shape[0], x.shape[1]), dtype=torch.float32)
    for first in range(0, g.shape[0], _core()[1]):
        ranks = slice(first, first + _core()[1])
        _outer(x, g[ranks].t(), out[ranks].t(), 1.0)
    return out


_CPU = CpuProducts()


def products(drawn: Tensor | None = None, p: float = 0.0) -> CpuProducts:
    """The backend "native"."""
    return _CPU if drawn is None else CpuProducts(drawn, p)
