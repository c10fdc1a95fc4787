"""precision="adapter": the LoRA branch in the adapter's wider dtype, without a wide copy of x or y.

PEFT's default (a 16-bit base with fp32 adapters) copies all of x to fp32 and adds an fp32 M×N tensor. Here t and g
are fp32, and x, dy, y and dx are read and written in their own dtype: by splitting the other operand (hilo.py), or,
where no GEMM gives an fp32 result from 16-bit operands (CPU, ROCm, fp64 adapters), by widening a block of rows at a
time, which then lives in the cache (CPU) or in a few megabytes (GPU).

The base GEMM comes first, as in PEFT, and is rounded before the branch joins it. LoRA first, as in eager.py, errs
less only while the branch is the smaller of the two, and here it may have any size.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import torch
from torch import Tensor

from . import hilo

# Elements of one widened block. CPU: half a million; shrink and outer at (2048, 4096), (2048, 1024) and (1024, 384)
# took up to 1.6 times as long with a quarter million (2 threads, 2 MiB of L2 each). A GPU wants fewer, larger launches.
_BLOCK = {"cpu": 1 << 19}
_BLOCK_ELSEWHERE = 1 << 24


class Products(Protocol):
    """What a backend may replace. x (M, K) and y (M, N) are narrow, all else has the adapters' dtype, any strides."""

    def shrink_wide(self, x: Tensor, A: Tensor, scaling: float) -> Tensor:
        """scaling x Aᵀ, a fresh (M, r): A (r, K)."""
        ...

    def outer_wide(self, t: Tensor, x: Tensor, out: Tensor, scaling: float) -> None:
        """out <- scaling tᵀ x: t (M, r), out (r, K), dense or its transpose."""
        ...

    def add_wide_(self, y: Tensor, t: Tensor, B: Tensor, scaling: float) -> None:
        """y += scaling t Bᵀ, rounded once: t (M, r), B (N, r)."""
        ...


class _Torch:
    """The products by torch's own GEMMs."""

    @staticmethod
    def shrink_wide(x: Tensor, A: Tensor, scaling: float) -> Tensor:
        if has_fp32_products(x, A):
            t = hilo.shrink(x, A, _mm)
            return t if scaling == 1.0 else t.mul_(scaling)
        t = A.new_empty((x.shape[0], A.shape[0]))
        for rows in _row_blocks(x):
            torch.addmm(t[rows], x[rows].to(A.dtype), A.t(), beta=0, alpha=scaling, out=t[rows])
        return t

    @staticmethod
    def outer_wide(t: Tensor, x: Tensor, out: Tensor, scaling: float) -> None:
        if has_fp32_products(x, t):
            torch.mul(hilo.outer(t, x, _mm), scaling, out=out)
            return
        total = t.new_zeros(out.shape)
        for rows in _row_blocks(x):
            total.addmm_(t[rows].t(), x[rows].to(t.dtype), alpha=scaling)
        out.copy_(total)

    @staticmethod
    def add_wide_(y: Tensor, t: Tensor, B: Tensor, scaling: float) -> None:
        if adds_split(y, B):
            hilo.add_(y, t, B, scaling)
            return
        for rows in _row_blocks(y):
            y[rows].copy_(torch.addmm(y[rows].to(t.dtype), t[rows], B.t(), alpha=scaling))


_torch = _Torch()
shrink_wide, outer_wide, add_wide_ = _torch.shrink_wide, _torch.outer_wide, _torch.add_wide_


def splits(narrow: Tensor, wide: Tensor) -> bool:
    """Whether hilo.py has the dtypes, and anything to do."""
    return narrow.dtype in hilo.DTYPES and wide.dtype == torch.float32 and narrow.numel() > 0 and wide.numel() > 0


def adds_split(y: Tensor, B: Tensor) -> bool:
    """Whether splitting t and B beats widening y. For fp16 on a CPU it does not: a forward pass at (M, K, N) =
    (1024, 384, 384) took 1.53 ms against 1.36, for bf16 0.58 against 0.63, at (2048, 4096, 4096) 37.9 against 43.4."""
    return splits(y, B) and (y.is_cuda or y.dtype == torch.bfloat16)


def has_fp32_products(narrow: Tensor, wide: Tensor) -> bool:
    """Whether torch multiplies 16-bit matrices into an fp32 one there: on CUDA alone, torch 2.11 to 2.13."""
    return narrow.is_cuda and not torch.version.hip and splits(narrow, wide)


def _mm(left: Tensor, right: Tensor) -> Tensor:
    return torch.mm(left, right, out_dtype=torch.float32)


def _row_blocks(matrix: Tensor) -> Iterator[slice]:
    rows, columns = matrix.shape
    step = max(16, _BLOCK.get(matrix.device.type, _BLOCK_ELSEWHERE) // max(columns, 1))
    return (slice(start, min(start + step, rows)) for start in range(0, rows, step))


def forward(
    x: Tensor,
    x_dropped: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    A: Tensor,
    B: Tensor,
    scaling: float,
    products: Products = _torch,
) -> tuple[Tensor, Tensor]:
    """(y, t) with t in A's dtype; see ops/schema.py."""
    out_features, in_features = weight.shape
    y = torch.nn.functional.linear(x, weight, bias)
    t = products.shrink_wide((x if x_dropped is None else x_dropped).reshape(-1, in_features), A, 1.0)
    products.add_wide_(y.view(-1, out_features), t, B, scaling)
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
    products: Products = _torch,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(dx, dx_dropped, dA, dB, g), the last three in A's dtype; see ops/schema.py."""
    out_features, in_features = weight.shape
    dy2 = dy.reshape(-1, out_features)
    dx, dx_dropped = x.new_empty(0), x.new_zeros(x.shape if need_dropped else 0)
    dA, dB = A.new_empty(A.shape if need_A else 0), B.new_empty(B.shape if need_B else 0)
    g = t.new_empty(0)  # scaling dy B, (M, r)
    if need_x or need_dropped or need_A:
        g = products.shrink_wide(dy2, B.t(), scaling)
    if need_B:
        products.outer_wide(t, dy2, dB.t(), scaling)
    if need_A:
        source = x if x_dropped is None else x_dropped
        products.outer_wide(g, source.reshape(-1, in_features), dA, 1.0)
    if need_dropped:
        products.add_wide_(dx_dropped.view(-1, in_features), g, A.t(), 1.0)
    if need_x:
        dx = (dy2 @ weight).view(x.shape)
        if x_dropped is None:
            products.add_wide_(dx.view(-1, in_features), g, A.t(), 1.0)
    return dx, dx_dropped, dA, dB, g
