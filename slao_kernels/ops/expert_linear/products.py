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

_GROUPED = (torch.bfloat16,)  # what torch's grouped GEMM takes on every GPU that has it
_ALIGNED = 16  # bytes: of the rows of whatever it reads


def forward(
    x: Tensor, weight: Tensor, A: Tensor | None, B: Tensor | None, scaling: float, ends: Tensor
) -> tuple[Tensor, Tensor]:
    """(y (S, N), t = x_e A_eᵀ (S, r)) of the operator `expert_linear`; t is empty without a branch."""
    r = 0 if A is None else A.shape[1]
    y, t = x.new_empty((x.shape[0], weight.shape[1])), x.new_empty((x.shape[0], r))
    if _takes_grouped(x, weight, A, B):
        y = _grouped(x, weight.transpose(1, 2), ends)
        if A is not None and B is not None:
            t = _grouped(x, A.transpose(1, 2), ends)
            y.add_(_grouped(t, B.transpose(1, 2), ends), alpha=scaling)
        return y, t
    wide = _wide(x)
    for e, rows in _rows(ends):
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
    if _takes_grouped(x, weight, A, B):
        dA = dB = None
        if need_x:
            dx = _grouped(dy, weight, ends)
        if A is not None and B is not None and (need_x or need_A):
            g = _grouped(dy, B, ends).mul_(scaling)
            if dx is not None:
                dx.add_(_grouped(g, A, ends))
            if need_A:
                dA = _grouped(g.t(), x, ends)
        if need_B:
            dB = _grouped(dy.t(), t, ends).mul_(scaling)
        return dx, dA, dB
    dA = torch.zeros_like(A) if A is not None and need_A else None
    dB = torch.zeros_like(B) if B is not None and need_B else None
    wide = _wide(x)
    for e, rows in _rows(ends):
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


@cache
def _has_bf16() -> bool:
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def _wide(x: Tensor) -> torch.dtype:
    """What a loop computes in: a CPU without bf16 instructions takes ten times as long over it as over fp32, for which
    one expert's weight at a time is widened."""
    narrow = x.device.type == "cpu" and x.dtype is torch.bfloat16 and not _has_bf16()
    return torch.float32 if narrow else x.dtype


def _rows(ends: Tensor) -> Iterator[tuple[int, slice]]:
    """(expert, its rows) of every expert that has any."""
    start = 0
    for e, end in enumerate(ends.tolist()):
        if end > start:
            yield e, slice(start, end)
        start = end


def _room(whole: Tensor, rows: slice, dtype: torch.dtype) -> Tensor:
    """Where an expert's result is computed: its rows of the whole, or as much memory in another dtype."""
    own = whole[rows]
    return own if whole.dtype is dtype else torch.empty_like(own, dtype=dtype)


def _takes_grouped(x: Tensor, *tensors: Tensor | None) -> bool:
    """Whether torch's grouped GEMM may compute this: its rows begin at multiples of 16 bytes, in the one dtype."""
    if not x.is_cuda or not hasattr(F, "grouped_mm") or x.shape[0] == 0:
        return False
    if torch.cuda.get_device_capability(x.device) < (8, 0):
        return False
    sizes = [x.shape[1], *(size for tensor in tensors if tensor is not None for size in tensor.shape[1:])]
    return x.dtype in _GROUPED and all(size * x.element_size() % _ALIGNED == 0 for size in sizes)


def _grouped(left: Tensor, right: Tensor, ends: Tensor) -> Tensor:
    left = left if left.stride(0) == 1 or left.stride(1) == 1 else left.contiguous()  # an expanded gradient is neither
    return F.grouped_mm(left, right, offs=ends)
