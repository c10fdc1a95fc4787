"""A LoRA branch added to what some base layer returned: out = y + scaling dropout(x) Aᵀ Bᵀ, one node of the graph.

For bases that have to be called (quantised ones, subclasses, modules with hooks): nothing is known of them but their
result. The node's gradient of y is dy itself, so of y nothing is saved; x, t (M, r) and the adapters are. Where y is
nobody else's, the branch is added in place (`is_alone`); elsewhere one addmm reads y and writes the sum.

x or y may be narrower than the branch's dtype: wide.py's products then read and write them as they are.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ... import dispatch
from .. import schema_add
from . import _SEEDED_DTYPES, _SEEDED_RANK, _cast, group, reference
from .eager import Products


def products_of(backend: str, seed: Tensor | None, p: float, backward: bool = False) -> Products:
    """The backend's rank-r products; with a seed, those that draw dropout on x themselves ("triton" alone)."""
    if seed is None:
        return group.products_of(backend)
    kernels: Any = dispatch.implementation("lora_linear", backend)
    return kernels._DroppedBackward(seed, p) if backward else kernels.TritonProducts(seed, p)


def forward(y: Tensor, x: Tensor, A: Tensor, B: Tensor, scaling: float, out: Tensor, products: Products) -> Tensor:
    """Writes `out` (contiguous; y itself, or as large) and returns t; see ops/schema_add.py."""
    n, k = B.shape[0], A.shape[1]
    x2, y2, out2 = x.reshape(-1, k), y.reshape(-1, n), out.view(-1, n)
    t = products.shrink(x2, A) if x.dtype == A.dtype else products.shrink_wide(x2, A, 1.0)
    if B.shape[1] > A.shape[0]:  # a bias as one more column of B: its factor is 1
        t = torch.cat([t, t.new_ones(t.shape[0], 1)], 1)
    if y.dtype != t.dtype:
        if out is not y:
            out2.copy_(y2)
        products.add_wide_(out2, t, B, scaling)
    # The core has no expand that adds; torch's takes y in the epilogue of the GEMM.
    elif out is y:
        out2.addmm_(t, B.t(), alpha=scaling)
    else:
        torch.addmm(y2, t, B.t(), alpha=scaling, out=out2)
    return t


def backward(
    dy: Tensor,
    x: Tensor,
    t: Tensor,
    A: Tensor,
    B: Tensor,
    scaling: float,
    need_x: bool,
    need_A: bool,
    need_B: bool,
    products: Products,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dx, dA, dB) of `slao_kernels::lora_add_backward`; see ops/schema_add.py."""
    n, (r, k) = B.shape[0], A.shape
    dy2, x2, B_own = dy.reshape(-1, n), x.reshape(-1, k), B[:, :r]
    dx, dA, dB = x.new_empty(x.shape if need_x else 0), A.new_empty(A.shape if need_A else 0), B.new_empty(0)
    need_g = need_x or need_A
    g = B.new_empty((dy2.shape[0], r) if need_g else 0)  # scaling dy B
    if dy.dtype == B.dtype and B.shape[1] == r:
        dB = B.new_empty(B.shape if need_B else 0)
        products.grad_t(dy2, t, B, scaling, g if need_g else None, dB if need_B else None)
    elif dy.dtype == B.dtype:
        if need_g:
            products.grad_t(dy2, t, B_own, scaling, g, None)
        dB = torch.mm(dy2.t(), t).mul_(scaling) if need_B else dB
    else:
        g = products.shrink_wide(dy2, B_own.t(), scaling) if need_g else g
        if need_B:
            dB = torch.empty_like(B)
            products.outer_wide(t, dy2, dB.t(), scaling)
    if need_A and x.dtype == g.dtype:
        products.grad_A(g, x2, dA)
    elif need_A:
        products.outer_wide(g, x2, dA, 1.0)
    if need_x and x.dtype == g.dtype:
        products.expand_(dx.view(-1, k), g, A.t(), 1.0)
    elif need_x:
        products.add_wide_(dx.zero_().view(-1, k), g, A.t(), 1.0)
    return dx, dA, dB


class _LoraAdd(torch.autograd.Function):
    """Saves x (dropped, where torch drops), t and the adapters; nothing (M, N), and of y nothing at all."""

    @staticmethod
    def forward(
        ctx: Any,
        y: Tensor,
        x: Tensor,
        A: Tensor,
        B: Tensor,
        scaling: float,
        dtype: torch.dtype,
        backend: str,
        seed: Tensor | None,
        p: float,
        in_place: bool,
    ) -> Tensor:
        cast_A, cast_B = _cast(A, dtype), _cast(B, dtype)
        if in_place:
            out, t = y, schema_add.lora_add_(y, x, cast_A, cast_B, scaling, backend, seed, p)
            ctx.mark_dirty(y)
        else:
            run = schema_add.lora_add if dispatch.direct() else torch.ops.slao_kernels.lora_add
            out, t = run(y, x, cast_A, cast_B, scaling, backend, seed, p)
        ctx.save_for_backward(x, t, cast_A, cast_B, seed)
        ctx.scaling, ctx.backend, ctx.p = scaling, backend, p
        ctx.grad_dtypes = A.dtype, B.dtype
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, t, A, B, seed = ctx.saved_tensors
        need_y, need_x, need_A, need_B = ctx.needs_input_grad[:4]
        run = schema_add.lora_add_backward if dispatch.direct() else torch.ops.slao_kernels.lora_add_backward
        needs = (need_x, need_A, need_B)
        dx, dA, dB = run(dy, x, t, A, B, ctx.scaling, *needs, ctx.backend, seed, ctx.p)
        return (
            dy if need_y else None,
            dx if need_x else None,
            _cast(dA, ctx.grad_dtypes[0]) if need_A else None,
            _cast(dB, ctx.grad_dtypes[1]) if need_B else None,
            *(None,) * 6,
        )


def holders(y: Tensor) -> tuple[int, int, int]:
    """How many hold y: as a Python object, as a tensor (saved by a node), as memory (views, detached or saved ones)."""
    return sys.getrefcount(y), y._use_count(), torch._C._storage_Use_Count(y.untyped_storage()._cdata)


def _of_a_fresh_one() -> tuple[int, int, int] | None:
    """What `holders` says, called like this, of a tensor that nobody else has; None where torch cannot tell."""
    y = torch.empty(1)
    try:
        return holders(y)
    except AttributeError:
        return None


FRESH = _of_a_fresh_one()


def writable(y: Tensor) -> bool:
    """Whether y, if nobody else holds it, may be written into in this mode.

    Not so: an expanded or otherwise not contiguous one; a view, which autograd may refuse to rebase; a leaf that
    wants a gradient; one made in inference mode, outside of it; memory that torch did not allocate (numpy's).
    """
    if y._is_view() or not y.is_contiguous() or (y.requires_grad and y.is_leaf):
        return False
    if y.is_inference() and not torch.is_inference_mode_enabled():
        return False
    return y.numel() > 0 and y.untyped_storage().resizable()


def apply(
    y: Tensor,
    x: Tensor,
    A: Tensor,
    B: Tensor,
    scaling: float,
    *,
    dropout: float = 0.0,
    precision: str = "base",
    backend: str = "auto",
    in_place: bool = False,
) -> Tensor:
    """y + scaling · dropout(x) Aᵀ Bᵀ in y's dtype and shape (..., N); without checks, as `lora_linear.apply`.

    x (..., K), A (r, K), B (N, r), or (N, r + 1) with a bias as its last column. precision: "base" computes the branch
    in the wider of y's and x's dtypes, "adapter" in the widest of all four. in_place: y may be overwritten.
    """
    device = x.device.type
    dtype = torch.promote_types(x.dtype, y.dtype)
    if precision == "adapter" and not torch.is_autocast_enabled(device):
        dtype = torch.promote_types(dtype, torch.promote_types(A.dtype, B.dtype))
    backend = dispatch.choose("lora_linear", device, backend)
    seed = None
    if dropout > 0.0:
        served = dtype == x.dtype and dtype in _SEEDED_DTYPES and A.shape[0] <= _SEEDED_RANK
        if backend == "triton" and served and dropout < 1.0:
            seed = torch.randint(2**63 - 1, (1,), device=x.device)
        else:
            x = torch.nn.functional.dropout(x, dropout)
    if backend == "reference":
        return reference.lora_add(y, x, A.to(dtype), B.to(dtype), scaling)
    if torch.is_grad_enabled():
        return _LoraAdd.apply(y, x, A, B, scaling, dtype, backend, seed, dropout, in_place)
    A, B = _cast(A, dtype), _cast(B, dtype)
    if in_place:
        schema_add.lora_add_(y, x, A, B, scaling, backend, seed, dropout)
        return y
    run = schema_add.lora_add if dispatch.direct() else torch.ops.slao_kernels.lora_add
    return run(y, x, A, B, scaling, backend, seed, dropout)[0]
