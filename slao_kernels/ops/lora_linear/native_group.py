"""A group of layers of one x by the compiled core: per layer what native_layer.py does, but x's part only once.

Layer after layer, so that a y or a dy is still in the cache when its GEMM comes; and stacked ranks for dA and g A,
which read or write matrices of x's size.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .native_layer import core


def forward(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    As: Sequence[Tensor],
    Bs: Sequence[Tensor],
    scalings: Sequence[float],
    code: int,
) -> tuple[list[Tensor], Tensor]:
    """(ys, t), t (M, ΣR); code: what `native_layer.served` gave for every one of them."""
    k, tokens, threads = x.shape[-1], x.shape[:-1], torch.get_num_threads()
    x2 = x if x.dim() == 2 else x.view(-1, k)
    m, ranks = x2.shape[0], sum(A.shape[0] for A in As)
    t = x.new_empty((m, ranks))
    place, step, ys = t.data_ptr(), x.element_size(), []
    at, run = x.data_ptr(), core()[0].lora_forward
    for weight, bias, A, B, scaling in zip(weights, biases, As, Bs, scalings, strict=True):
        n, r = B.shape
        y = x.new_empty((*tokens, n))
        b, other = 0 if bias is None else bias.data_ptr(), 1 if A.dtype is torch.float32 else code
        run(at, k, A.data_ptr(), B.data_ptr(), b, place, ranks, y.data_ptr(), m, k, n, r, scaling, code, other, threads)
        (y if y.dim() == 2 else y.view(m, n)).addmm_(x2, weight.t())
        ys.append(y)
        place += r * step
    return ys, t


def backward(
    dys: Sequence[Tensor],
    x: Tensor,
    weights: Sequence[Tensor],
    t: Tensor,
    As: Sequence[Tensor],
    Bs: Sequence[Tensor],
    scalings: Sequence[float],
    code: int,
    need_x: bool,
    need_As: Sequence[bool],
    need_Bs: Sequence[bool],
) -> tuple[Tensor | None, list[Tensor | None], list[Tensor | None]]:
    """dx, dAs and dBs, None where not needed; dys (M, Nᵢ) with unit columns, all As of one dtype."""
    k, (m, ranks), step = x.shape[-1], t.shape, x.element_size()
    need_A = any(need_As)
    g, dx = torch.empty_like(t) if need_x or need_A else None, torch.empty_like(x) if need_x else None
    dAs: list[Tensor | None] = [torch.empty_like(A) if need_A else None for A in As]
    dBs: list[Tensor | None] = [torch.empty_like(B) if need else None for B, need in zip(Bs, need_Bs, strict=True)]
    t_at, layers = t.data_ptr(), []
    for dy, B, dA, dB, scaling in zip(dys, Bs, dAs, dBs, scalings, strict=True):
        n, r = B.shape
        a, b = 0 if dA is None else dA.data_ptr(), 0 if dB is None else dB.data_ptr()
        layers += [dy.data_ptr(), dy.stride(0), t_at, ranks, B.data_ptr(), a, b, n, r, scaling]
        t_at += r * step
    A = torch.cat(As) if need_x else As[0]  # for dx alone
    shared = x.data_ptr(), k, 0 if g is None else g.data_ptr(), A.data_ptr(), 0 if dx is None else dx.data_ptr()
    other = 1 if A.dtype is torch.float32 else code
    core()[0].lora_backward(*shared, m, k, ranks, code, other, torch.get_num_threads(), *layers)
    if dx is not None:
        dx2 = dx if dx.dim() == 2 else dx.view(m, k)
        for dy, weight in zip(dys, weights, strict=True):
            dx2.addmm_(dy, weight)
    return dx, [dA if need else None for dA, need in zip(dAs, need_As, strict=True)], dBs
