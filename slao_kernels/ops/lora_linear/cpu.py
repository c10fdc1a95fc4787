"""lora_linear on a CPU with bf16 instructions: the compiled core's rank-r products, one call each way for a layer.

The base GEMM stays torch's, and so does everything in another dtype: in fp32 torch's own products were as fast in most
of the committed rows. A and B, dA and dB may be fp32 beside a bf16 x: they are rounded as they are read, and their
gradients are not. csrc/README.md says how the products work.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

from ... import native
from .precise import Grads, outer_split, rows_of, splits
from .products import TorchProducts

_FP32, _BF16 = 1, 2  # csrc/tensor_table.h
# Elements of x from which splitting t into 16-bit terms pays: at r = 16, 164 µs against 146 for 1024 × 384, 269 against
# 419 for 1024 × 1024, 1565 against 3583 for 2048 × 4096 (AMX, 2 threads; blocks of rows by torch).
_SPLIT_FROM = 1 << 20


@cache
def _core() -> tuple[Any, int]:
    """The extension and its largest rank."""
    return native.core(), int(native.core().lora_rank)


class CpuProducts(TorchProducts):
    """A whole layer of bf16 by the core, where it can read the matrices; all else by torch.

    So a backward pass through dropout is torch's, and the branch of a called base: products of the core one by one
    were 0 to 9 % faster there than torch's from 64 tokens up, and 15 to 30 % slower at 16 (forward and backward, two
    AVX-512 cores with bf16 products; commit 2ac43cb last had them).
    """

    def forward(
        self,
        x: Tensor,
        source: Tensor | None,
        weight: Tensor,
        bias: Tensor | None,
        A: Tensor,
        B: Tensor,
        scaling: float,
    ) -> tuple[Tensor, Tensor]:
        """As TorchProducts'; in bf16 in one call: t, and y while t is in the cache."""
        read = x if source is None else source
        plain = bias is None or (bias.is_contiguous() and bias.dtype is torch.bfloat16)
        if not (plain and read.is_contiguous() and x.is_contiguous() and _serves(read, A, B)):
            return super().forward(x, source, weight, bias, A.to(x.dtype), B.to(x.dtype), scaling)
        core, (n, r), k = _core()[0], B.shape, x.shape[-1]
        x2 = rows_of(x)
        m = x2.shape[0]
        y, t = x.new_empty((*x.shape[:-1], n)), x.new_empty((m, r))
        of_t = read.data_ptr(), k, A.data_ptr(), 1, k, t.data_ptr(), r
        of_y = B.data_ptr(), 1, r, 0 if bias is None else bias.data_ptr(), y.data_ptr(), n
        core.lora_rows(*of_t, *of_y, m, k, n, r, 1.0, scaling, _code(A), torch.get_num_threads())
        rows_of(y).addmm_(x2, weight.t())
        return y, t

    def backward(
        self,
        dy: Tensor,
        source: Tensor,
        weight: Tensor,
        t: Tensor,
        A: Tensor,
        B: Tensor,
        scaling: float,
        needs: tuple[bool, bool, bool],
    ) -> Grads:
        """As TorchProducts'; in bf16 in one call: g, dx's part, dA and dB while dy is in the cache."""
        dy2, (need_x, need_A, need_B) = rows_of(dy), needs
        plain = self.mask is None and t.is_contiguous() and source.is_contiguous() and dy2.stride(1) == 1
        if not (plain and _serves(source, A, B)):
            rounded = A.to(t.dtype), B.to(t.dtype)
            dx, dA, dB, g = super().backward(dy, source, weight, t, *rounded, scaling, needs)
            return dx, None if dA is None else dA.to(A.dtype), None if dB is None else dB.to(B.dtype), g
        (n, r), k = B.shape, source.shape[-1]
        dx = torch.empty_like(source) if need_x else None
        g = torch.empty_like(t) if need_x or need_A else None
        dA, dB = torch.empty_like(A) if need_A else None, torch.empty_like(B) if need_B else None
        g_at, dx_at, dA_at, dB_at = (0 if part is None else part.data_ptr() for part in (g, dx, dA, dB))
        read = dy2.data_ptr(), dy2.stride(0), t.data_ptr(), source.data_ptr(), A.data_ptr(), B.data_ptr()
        sizes = dy2.shape[0], k, n, r, scaling, _code(A), torch.get_num_threads()
        _core()[0].lora_backward(*read, g_at, dx_at, dA_at, dB_at, *sizes)
        if dx is not None:
            rows_of(dx).addmm_(dy2, weight)
        return dx, dA, dB, g

    def outer_wide(self, t: Tensor, x: Tensor, scaling: float) -> Tensor:
        """As torch's, by a product of the core whose sums stay fp32, where it pays."""
        if x.dtype is not torch.bfloat16 or x.numel() < _SPLIT_FROM or x.stride(1) != 1 or not splits(x, t):
            return super().outer_wide(t, x, scaling)
        return outer_split(t, x, _outer).mul_(scaling)


def _serves(x: Tensor, A: Tensor, B: Tensor) -> bool:
    """Whether the core takes the whole layer: a contiguous bf16 x, A and B contiguous and of one dtype, none empty."""
    if x.dtype is not torch.bfloat16 or A.dtype is not B.dtype or A.dtype not in (torch.bfloat16, torch.float32):
        return False
    dense = A.is_contiguous() and B.is_contiguous()
    return dense and 0 < A.shape[0] <= _core()[1] and x.numel() > 0 and B.numel() > 0


def _code(factor: Tensor) -> int:
    return _FP32 if factor.dtype is torch.float32 else _BF16


def _outer(g: Tensor, x: Tensor) -> Tensor:
    """g x in fp32: g (R, M) and x (M, K) bf16, g's columns dense; as many ranks at a time as the core takes."""
    (core, most), (m, k) = _core(), x.shape
    out = torch.empty((g.shape[0], k), dtype=torch.float32)
    for d, part in zip(out.split(most), g.split(most), strict=True):
        places = x.data_ptr(), x.stride(0), part.data_ptr(), part.stride(1), d.data_ptr(), 1, d.stride(0)
        core.lora_outer(*places, m, k, part.shape[0], 1.0, _FP32, torch.get_num_threads())
    return out


_CPU = CpuProducts()


def products(drawn: Tensor | None = None, p: float = 0.0) -> CpuProducts:
    """The backend "native"."""
    return _CPU if drawn is None else CpuProducts(drawn, p)
