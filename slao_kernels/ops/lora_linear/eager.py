"""lora_linear from torch's own GEMMs: two passes over y forward, none of them a copy or an add of its own.

LoRA first, then the base GEMM on top of it with beta = 1: the M×N add rides in the GEMM's epilogue, and the
rank-r product is rounded before the larger base product joins it in the accumulator, which is more accurate than
adding two rounded M×N tensors. `scaling` is the GEMM's alpha, so no scaled copy of B is made.

Other backends are these two functions with other rank-r products (`products`, see skinny.py).
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from . import skinny
from . import wide as wide_branch


class Products(wide_branch.Products, Protocol):
    """The rank-r products; skinny.py says what each computes, wide.py what those for wider adapters do."""

    def shrink(self, x: Tensor, A: Tensor) -> Tensor: ...
    def expand_(self, y: Tensor, t: Tensor, B: Tensor, scaling: float, bias: Tensor | None = None) -> None: ...
    def grad_t(self, dy: Tensor, t: Tensor, B: Tensor, scaling: float, g: Tensor | None, dB: Tensor | None) -> None: ...
    def grad_A(self, g: Tensor, x: Tensor, dA: Tensor) -> None: ...


def forward(
    x: Tensor,
    x_dropped: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    A: Tensor,
    B: Tensor,
    scaling: float,
    wide: bool = False,
    products: Products = skinny,
) -> tuple[Tensor, Tensor]:
    """(y, t) of `slao_kernels::lora_linear`; see ops/schema.py."""
    if wide:
        return wide_branch.forward(x, x_dropped, weight, bias, A, B, scaling, products)
    out_features, in_features = weight.shape
    y = x.new_empty((*x.shape[:-1], out_features))
    x2, y2 = x.reshape(-1, in_features), y.view(-1, out_features)
    t = products.shrink(x2 if x_dropped is None else x_dropped.reshape(-1, in_features), A)
    skinny.linear_(products, y2, x2, weight.t(), t, B, scaling, bias)
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
    wide: bool = False,
    products: Products = skinny,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(dx, dx_dropped, dA, dB, g) of `slao_kernels::lora_linear_backward`; see ops/schema.py."""
    if wide:
        needs = (need_x, need_dropped, need_A, need_B)
        return wide_branch.backward(dy, x, x_dropped, weight, t, A, B, scaling, *needs, products)
    out_features, in_features = weight.shape
    dy2 = dy.reshape(-1, out_features)
    dx, dx_dropped = x.new_empty(x.shape if need_x else 0), x.new_empty(x.shape if need_dropped else 0)
    dA, dB = A.new_empty(A.shape if need_A else 0), B.new_empty(B.shape if need_B else 0)
    need_g = need_x or need_dropped or need_A
    g = t.new_empty(t.shape if need_g else 0)  # scaling dy B, (M, r)
    products.grad_t(dy2, t, B, scaling, g if need_g else None, dB if need_B else None)
    if need_A:
        source = x if x_dropped is None else x_dropped
        products.grad_A(g, source.reshape(-1, in_features), dA)
    if need_dropped:
        products.expand_(dx_dropped.view(-1, in_features), g, A.t(), 1.0)
    if need_x:
        dx2 = dx.view(-1, in_features)
        if x_dropped is None:
            skinny.linear_(products, dx2, dy2, weight, g, A.t(), 1.0)
        else:
            torch.mm(dy2, weight, out=dx2)
    return dx, dx_dropped, dA, dB, g
