"""Experts' LoRA layers from torch's GEMMs: one grouped GEMM a product on a GPU, a loop over the experts elsewhere.

As in lora_linear/products.py the branch is written first and the base product joins it in the accumulator where there
is a loop; torch's grouped GEMM has no such form, there the branch is added. No W_eff = W + s B A is ever made, and no
gradient of W. S = rows, sorted by expert; E = experts, K and N = features, r = rank.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from ... import dispatch


def forward(
    x: Tensor, weight: Tensor, A: Tensor | None, B: Tensor | None, scaling: float, ends: Tensor
) -> tuple[Tensor, Tensor]:
    """(y (S, N), t = x_e A_eᵀ (S, r)) of the operator `expert_linear`; t is empty without a branch."""
    r = 0 if A is None else A.shape[1]
    y, t = x.new_empty((x.shape[0], weight.shape[1])), x.new_empty((x.shape[0], r))
    if _all_grouped(x, weight.mT, A):
        y = F.grouped_mm(x, weight.mT, offs=ends)
        if A is not None and B is not None:
            t = F.grouped_mm(x, A.mT, offs=ends)
            y.add_(F.grouped_mm(t, B.mT, offs=ends), alpha=scaling)
        return y, t
    wide = _wide(x)
    for e, rows in rows_of_experts(ends):
        own, W, out = x[rows].to(wide), weight[e].to(wide), _room(y, rows, wide)
        if A is None or B is None:
            torch.mm(own, W.t(), out=out)
        else:
            t[rows] = found = torch.mm(own, A[e].to(wide).t())
            torch.addmm(out, found, B[e].to(wide).t(), beta=0, alpha=scaling, out=out).addmm_(own, W.t())
        if out.dtype is not y.dtype:
            y[rows] = out
    return y, t


def backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    t: Tensor,
    A: Tensor | None,
    B: Tensor | None,
    scaling: float,
    ends: Tensor,
    needs: tuple[bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """(dx, dA, dB), None where not needed: g = scaling dy_e B_e; dx = dy_e W_e + g A_e, dA = gᵀ x_e, dB = s dy_eᵀ t_e.

    An expert without rows has gradients of zero.
    """
    need_x, need_A, need_B = needs
    if A is None or B is None:
        need_A = need_B = False
    dx = torch.empty_like(x) if need_x else None
    if _all_grouped(dy, weight, A) and _all_grouped(x, weight.mT, A):
        dA = dB = None
        if need_x:
            dx = F.grouped_mm(dy, weight, offs=ends)
        if A is not None and B is not None and (need_x or need_A):
            g = F.grouped_mm(dy, B, offs=ends).mul_(scaling)
            if dx is not None:
                dx.add_(F.grouped_mm(g, A, offs=ends))
            if need_A:
                dA = F.grouped_mm(g.t(), x, offs=ends)
        if need_B:
            dB = F.grouped_mm(dy.t(), t, offs=ends).mul_(scaling)
        return dx, dA, dB
    dA = torch.zeros_like(A) if A is not None and need_A else None
    dB = torch.zeros_like(B) if B is not None and need_B else None
    wide = _wide(x)
    for e, rows in rows_of_experts(ends):
        own, base = dy[rows].to(wide), weight[e].to(wide) if need_x else None
        out = None if dx is None else _room(dx, rows, wide)
        if A is not None and B is not None and (need_x or need_A):
            g = torch.mm(own, B[e].to(wide)).mul_(scaling)
            if dA is not None:
                dA[e] = torch.mm(g.t(), x[rows].to(wide))
            if out is not None:
                torch.mm(g, A[e].to(wide), out=out).addmm_(own, base)
        elif out is not None:
            torch.mm(own, base, out=out)
        if dx is not None and out is not None and out.dtype is not dx.dtype:
            dx[rows] = out
        if dB is not None:
            dB[e] = torch.mm(own.t(), t[rows].to(wide)).mul_(scaling)
    return dx, dA, dB


def _wide(x: Tensor) -> torch.dtype:
    """What a loop computes in: a CPU without bf16 instructions takes ten times as long over it as over fp32, for which
    one expert's weight at a time is widened."""
    narrow = x.device.type == "cpu" and x.dtype is torch.bfloat16 and not dispatch.cpu_computes(x.dtype)
    return torch.float32 if narrow else x.dtype


def rows_of_experts(ends: Tensor) -> Iterator[tuple[int, slice]]:
    """(expert, its rows) of every expert that has any. Waits for a GPU."""
    start = 0
    for e, end in enumerate(ends.tolist()):
        if end > start:
            yield e, slice(start, end)
        start = end


def _room(whole: Tensor, rows: slice, dtype: torch.dtype) -> Tensor:
    """Where an expert's result is computed: its rows of the whole, or as much memory in another dtype."""
    own = whole[rows]
    return own if whole.dtype is dtype else torch.empty_like(own, dtype=dtype)


def _all_grouped(left: Tensor, right: Tensor, A: Tensor | None) -> bool:
    """Whether torch's grouped GEMM serves left_e right_e, and the products with factors of A's rank beside it."""
    return grouped_serves(left, right) and (A is None or multiples(8, A.shape[1]))


def grouped_serves(left: Tensor, right: Tensor) -> bool:
    """Whether torch's grouped GEMM computes left_e right_e without a wait."""
    if not left.is_cuda or left.dtype is not torch.bfloat16 or 0 in left.shape or not _has_grouped(left.device.index):
        return False
    unit, step = sorted(right.stride()[1:])
    dense = left.stride(1) == unit == 1 and left.stride(0) >= left.shape[1] and step >= min(right.shape[1:])
    return dense and multiples(8, left.stride(0), right.stride(0), step, *right.shape[1:]) and aligned(left, right)


@cache
def _has_grouped(index: int) -> bool:
    """Whether torch has a grouped GEMM there: for sm_90 and sm_100, and on ROCm in some builds, which do not say so.
    Elsewhere its function waits for `ends` and loops (aten/src/ATen/native/cuda/GroupedBlas.cpp)."""
    if not hasattr(F, "grouped_mm") or torch.version.hip:
        return False
    return torch.cuda.get_device_capability(index) in ((9, 0), (10, 0))


def multiples(of: int, *sizes: int) -> bool:
    return all(size % of == 0 for size in sizes)


def aligned(*tensors: Tensor | None) -> bool:
    """Whether each begins at a multiple of 16 bytes."""
    return all(tensor is None or tensor.data_ptr() % 16 == 0 for tensor in tensors)
