"""precision="adapter": the LoRA branch in the adapter's wider dtype, without a wide copy of x or y.

PEFT's default (a 16-bit base with fp32 adapters) copies all of x to fp32 and adds an fp32 M×N tensor. Here rows are
widened a block at a time, so that the copy lives in the cache (CPU) or in a few megabytes (GPU); the base GEMM
stays in the base's dtype, as in PEFT.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

# Elements of one widened block: 1 MiB of fp32 stays in a core's L2; a GPU wants fewer, larger launches.
_BLOCK = {"cpu": 1 << 18}
_BLOCK_ELSEWHERE = 1 << 24


def _row_blocks(matrix: Tensor) -> Iterator[slice]:
    rows, columns = matrix.shape
    step = max(16, _BLOCK.get(matrix.device.type, _BLOCK_ELSEWHERE) // max(columns, 1))
    return (slice(start, min(start + step, rows)) for start in range(0, rows, step))


def _shrink(x: Tensor, A: Tensor, alpha: float = 1.0) -> Tensor:
    """alpha x A in A's dtype: x (M, K) narrow, A (K, r) wide; (M, r)."""
    t = A.new_empty((x.shape[0], A.shape[1]))
    for rows in _row_blocks(x):
        torch.addmm(t[rows], x[rows].to(A.dtype), A, beta=0, alpha=alpha, out=t[rows])
    return t


def _add_expanded_(y: Tensor, t: Tensor, B: Tensor, alpha: float = 1.0) -> None:
    """y += alpha t B, added in t's dtype and rounded once: y (M, N) narrow, t (M, r) and B (r, N) wide."""
    for rows in _row_blocks(y):
        y[rows].copy_(torch.addmm(y[rows].to(t.dtype), t[rows], B, alpha=alpha))


def _outer(left: Tensor, right: Tensor, alpha: float = 1.0) -> Tensor:
    """alpha leftᵀ right in right's dtype: left (M, n) narrow, right (M, r) wide; (n, r)."""
    out = right.new_zeros((left.shape[1], right.shape[1]))
    for rows in _row_blocks(left):
        out.addmm_(left[rows].to(right.dtype).t(), right[rows], alpha=alpha)
    return out


def forward(
    x: Tensor,
    x_dropped: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    A: Tensor,
    B: Tensor,
    scaling: float,
) -> tuple[Tensor, Tensor]:
    """(y, t) with t in A's dtype; see ops/schema.py."""
    out_features, in_features = weight.shape
    y = torch.nn.functional.linear(x, weight, bias)
    t = _shrink((x if x_dropped is None else x_dropped).reshape(-1, in_features), A.t())
    _add_expanded_(y.view(-1, out_features), t, B.t(), scaling)
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
    """(dx, dx_dropped, dA, dB, g), the last three in A's dtype; see ops/schema.py."""
    out_features, in_features = weight.shape
    dy2 = dy.reshape(-1, out_features)
    nothing_wide, nothing = A.new_empty(0), x.new_empty(0)
    g = _shrink(dy2, B, scaling) if need_x or need_dropped or need_A else nothing_wide
    dx, dx_dropped, dA, dB = nothing, nothing, nothing_wide, nothing_wide
    if need_B:
        dB = _outer(dy2, t, scaling)
    if need_A:
        source = x if x_dropped is None else x_dropped
        dA = _outer(source.reshape(-1, in_features), g).t().contiguous()
    if need_dropped:
        dx_dropped = x.new_zeros(x.shape)
        _add_expanded_(dx_dropped.view(-1, in_features), g, A)
    if need_x:
        dx = (dy2 @ weight).view(x.shape)
        if x_dropped is None:
            _add_expanded_(dx.view(-1, in_features), g, A)
    return dx, dx_dropped, dA, dB, g
