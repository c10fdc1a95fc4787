"""The rank-r products of a LoRA branch, by torch's own GEMMs.

Each of them reads or writes one large matrix and costs next to no arithmetic: the pieces that other backends replace
(native.py, kernels.py), while the base GEMM stays torch's. M = tokens, r = rank (stacked for several layers at once).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .wide import add_wide_, outer_wide, shrink_wide

__all__ = ["add_wide_", "expand_", "grad_A", "grad_t", "outer_wide", "shrink", "shrink_wide"]


def shrink(x: Tensor, A: Tensor) -> Tensor:
    """x Aᵀ: x (M, K), A (r, K); (M, r)."""
    return x @ A.t()


def expand_(y: Tensor, t: Tensor, B: Tensor, scaling: float, bias: Tensor | None = None) -> None:
    """y <- scaling t Bᵀ + bias: y (M, N), t (M, r), B (N, r), bias (N)."""
    if bias is None:
        torch.addmm(y, t, B.t(), beta=0, alpha=scaling, out=y)
    else:
        torch.addmm(bias, t, B.t(), alpha=scaling, out=y)


def grad_t(dy: Tensor, t: Tensor, B: Tensor, scaling: float, g: Tensor | None, dB: Tensor | None) -> None:
    """g <- scaling dy B (M, r) and dB <- scaling dyᵀ t (N, r), each where it is given; dy (M, N)."""
    if g is not None:
        torch.addmm(g, dy, B, beta=0, alpha=scaling, out=g)
    if dB is not None:
        torch.addmm(dB, dy.t(), t, beta=0, alpha=scaling, out=dB)


def grad_A(g: Tensor, x: Tensor, dA: Tensor) -> None:
    """dA <- gᵀ x: g (M, r), x (M, K), dA (r, K)."""
    torch.mm(g.t(), x, out=dA)


def linear_(
    products: Any, y: Tensor, x: Tensor, W: Tensor, t: Tensor, B: Tensor, scaling: float, bias: Tensor | None = None
) -> None:
    """y <- x W + scaling t Bᵀ + bias: y (M, N), x (M, K), W (K, N), t (M, r), B (N, r), bias (N).

    By the backend's one kernel, `products.gemm_`, where it has one and takes this product; else LoRA first, and the
    base GEMM on top of it with beta = 1.
    """
    gemm_ = getattr(products, "gemm_", None)
    if gemm_ is None or not gemm_(y, x, W, t, B, scaling, bias):
        products.expand_(y, t, B, scaling, bias)
        y.addmm_(x, W)
