"""Several LoRA linear layers of one x (q/k/v, gate/up) as one node of the autograd graph.

What that saves over a node for each layer: x is read once for all the ranks stacked (forward, and again for dA) and
saved once, and their shares of dx are summed by the GEMMs themselves (beta = 1) instead of by autograd in additions
of x's size. Which layers belong together is found out while running: see slao_kernels/groups.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ... import dispatch
from .. import schema
from . import native_group, native_layer, skinny
from .eager import Products


@cache
def products_of(backend: str) -> Products:
    """The backend's rank-r products, torch's own where its module brings none."""
    module: Any = dispatch.implementation("lora_linear", backend)
    return module if hasattr(module, "expand_") else skinny


def _slices(Bs: Sequence[Tensor]) -> list[slice]:
    """Where each layer's ranks lie among the stacked ones."""
    found, start = [], 0
    for B in Bs:
        found.append(slice(start, start + B.shape[1]))
        start += B.shape[1]
    return found


def forward(
    x: Tensor,
    weights: list[Tensor],
    biases: list[Tensor | None],
    A: Tensor,
    Bs: list[Tensor],
    scalings: list[float],
    products: Products = skinny,
) -> tuple[list[Tensor], Tensor]:
    """(ys, t) of `slao_kernels::lora_linear_group`; see ops/schema.py."""
    x2 = x.reshape(-1, x.shape[-1])
    t = products.shrink(x2, A)
    ts = t.split_with_sizes([B.shape[1] for B in Bs], 1)
    ys = []
    for weight, bias, B, scaling, t_i in zip(weights, biases, Bs, scalings, ts, strict=True):
        # N-D from the start: a view of a 2-D result would refuse the caller's in-place operations.
        y = x.new_empty((*x.shape[:-1], weight.shape[0]))
        y2 = y.view(-1, weight.shape[0])
        skinny.linear_(products, y2, x2, weight.t(), t_i, B, scaling, bias)
        ys.append(y)
    return ys, t


def backward(
    dys: list[Tensor],
    x: Tensor,
    weights: list[Tensor],
    t: Tensor,
    A: Tensor,
    Bs: list[Tensor],
    scalings: list[float],
    need_x: bool,
    need_As: list[bool],
    need_Bs: list[bool],
    products: Products = skinny,
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """(dx, dA, dBs) of `slao_kernels::lora_linear_group_backward`; see ops/schema.py."""
    in_features, slices = x.shape[-1], _slices(Bs)
    dy2s = [dy.reshape(-1, weight.shape[0]) for dy, weight in zip(dys, weights, strict=True)]
    dx = x.new_empty(x.shape if need_x else 0)
    dBs = [B.new_empty(B.shape if need else 0) for B, need in zip(Bs, need_Bs, strict=True)]
    wanted = [ranks for ranks, need in zip(slices, need_As, strict=True) if need]
    g = torch.empty_like(t) if need_x or wanted else t
    for dy2, B, dB, scaling, ranks, need_A, need_B in zip(
        dy2s, Bs, dBs, scalings, slices, need_As, need_Bs, strict=True
    ):
        need_g = need_x or need_A
        if need_g or need_B:
            products.grad_t(dy2, t[:, ranks], B, scaling, g[:, ranks] if need_g else None, dB if need_B else None)
    dA = A.new_empty((sum(ranks.stop - ranks.start for ranks in wanted), in_features))
    x2 = x.reshape(-1, in_features)
    if len(wanted) == len(slices):
        products.grad_A(g, x2, dA)
    else:
        row = 0
        for ranks in wanted:
            end = row + ranks.stop - ranks.start
            products.grad_A(g[:, ranks], x2, dA[row:end])
            row = end
    if need_x:
        dx2 = dx.view(-1, in_features)
        skinny.linear_(products, dx2, dy2s[0], weights[0], g, A.t(), 1.0)
        for dy2, weight in zip(dy2s[1:], weights[1:], strict=True):
            dx2.addmm_(dy2, weight)
    return dx, dA, dBs


class _LoraLinearGroup(torch.autograd.Function):
    """Saves x once, t (M, ΣR) and tensors of the adapters' size; one output for each layer.

    tensors: all weights, then all biases, all As, all Bs. code: how the compiled core takes all of them, or 0.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, scalings: list[float], backend: str, code: int, *tensors: Any
    ) -> tuple[Tensor, ...]:
        count = len(scalings)
        weights, biases, As, Bs = (list(tensors[i : i + count]) for i in range(0, 4 * count, count))
        if code:
            ys, t = native_group.forward(x, weights, biases, As, Bs, scalings, code)
        else:
            run = schema.lora_linear_group if dispatch.direct() else torch.ops.slao_kernels.lora_linear_group
            A, cast_Bs = torch.cat(_cast(As, x.dtype)), _cast(Bs, x.dtype)
            ys, t = run(x, weights, biases, A, cast_Bs, scalings, backend)
            if backend != "native":
                As, Bs = [A], cast_Bs
        # The same with a code and without: a recompute under a dispatch mode comes without.
        ctx.save_for_backward(x, t, *weights, *Bs, *As)
        ctx.scalings, ctx.backend, ctx.code = scalings, backend, code
        ctx.dtypes = [
            (A.dtype, B.dtype) for A, B in zip(tensors[2 * count : 3 * count], tensors[3 * count :], strict=True)
        ]
        ctx.set_materialize_grads(False)
        # As alone: an output that depends on nothing trainable has no gradient, whatever its siblings have.
        needs = ctx.needs_input_grad
        ctx.awaited = {i for i in range(count) if needs[0] or any(needs[4 + i :: count])}
        if len(ctx.awaited) < count:
            ctx.mark_non_differentiable(*(y for i, y in enumerate(ys) if i not in ctx.awaited))
        ctx.kept = None
        return tuple(ys)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *dys: Tensor | None) -> tuple[Tensor | None, ...]:
        count = len(ctx.scalings)
        given = [i for i, dy in enumerate(dys) if dy is not None]
        if not given:
            return (None,) * (4 + 4 * count)
        # Alone, the outputs could be differentiated one after another, each once. So they can here: what autograd
        # frees after the first backward is kept while some output has had none.
        saved = ctx.kept if ctx.kept is not None and ctx.awaited.issuperset(given) else ctx.saved_tensors
        ctx.awaited.difference_update(given)
        ctx.kept = saved if ctx.awaited else None
        x, t, *rest = saved
        weights, Bs, As = rest[:count], rest[count : 2 * count], rest[2 * count :]
        need_weights, need_biases, need_As, need_Bs = (
            ctx.needs_input_grad[4 + part * count : 4 + (part + 1) * count] for part in range(4)
        )
        grads: list[Tensor | None] = [None] * (4 * count)
        flat = [dy if dy is None or dy.dim() == 2 else dy.reshape(-1, dy.shape[-1]) for dy in dys]
        if ctx.code and len(given) == count:
            rows: list[Any] = [dy if dy.stride(1) == 1 else dy.contiguous() for dy in flat]  # type: ignore[union-attr]
            needs = ctx.needs_input_grad[0], need_As, need_Bs
            dx, dAs, dBs = native_group.backward(rows, x, weights, t, As, Bs, ctx.scalings, ctx.code, *needs)
            grads[2 * count :] = [*dAs, *dBs]
        else:
            dx, found = _backward_of_given(ctx, given, flat, x, t, weights, As, Bs, need_As, need_Bs)
            for i, (dA, dB) in found.items():
                grads[2 * count + i], grads[3 * count + i] = dA, dB
        for i in given:
            dy = flat[i]
            assert dy is not None
            if need_weights[i]:
                grads[i] = dy.t() @ x.reshape(-1, x.shape[-1])
            if need_biases[i]:
                grads[count + i] = dy.sum(0)
        return dx, None, None, None, *grads


def _backward_of_given(
    ctx: Any,
    given: list[int],
    dys: list[Any],
    x: Tensor,
    t: Tensor,
    weights: list[Tensor],
    As: list[Tensor],
    Bs: list[Tensor],
    need_As: list[bool],
    need_Bs: list[bool],
) -> tuple[Tensor | None, dict[int, tuple[Tensor | None, Tensor | None]]]:
    """dx, and (dA, dB) of the layers whose outputs have a gradient, by the operator."""
    A, Bs = torch.cat(_cast(As, x.dtype)), _cast(Bs, x.dtype)
    slices, need_x = _slices(Bs), ctx.needs_input_grad[0]
    if len(given) < len(Bs):
        t = torch.cat([t[:, slices[i]] for i in given], 1)
        A = torch.cat([A[slices[i]] for i in given])
    arguments = [dys[i] for i in given], x, [weights[i] for i in given], t, A, [Bs[i] for i in given]
    needs = [need_As[i] for i in given], [need_Bs[i] for i in given]
    direct, op = schema.lora_linear_group_backward, torch.ops.slao_kernels.lora_linear_group_backward
    run = direct if dispatch.direct() else op
    dx, dA, dBs = run(*arguments, [ctx.scalings[i] for i in given], need_x, *needs, ctx.backend)
    parts = iter(dA.split([Bs[i].shape[1] for i in given if need_As[i]]) if any(needs[0]) else ())
    found: dict[int, tuple[Tensor | None, Tensor | None]] = {}
    for i, dB in zip(given, dBs, strict=True):
        own = next(parts).to(ctx.dtypes[i][0]) if need_As[i] else None
        found[i] = own, dB.to(ctx.dtypes[i][1]) if need_Bs[i] else None
    return dx if need_x else None, found


def _cast(matrices: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    return [matrix if matrix.dtype == dtype else matrix.to(dtype) for matrix in matrices]


def _served_together(As: list[Tensor], backend: str) -> bool:
    """Whether the core, which serves each layer alone, takes their ranks stacked."""
    if backend != "native" or any(A.dtype != As[0].dtype for A in As):
        return False
    return sum(A.shape[0] for A in As) <= native_layer.core()[1]


def apply(
    x: Tensor,
    weights: list[Tensor],
    biases: list[Tensor | None],
    As: list[Tensor],
    Bs: list[Tensor],
    scalings: list[float],
    backend: str,
    code: int = 0,
) -> list[Tensor]:
    """[x Wᵢᵀ + biasᵢ + scalingᵢ x Aᵢᵀ Bᵢᵀ], computed in the base's dtype (autocast's where it is on).

    x (..., K), Wᵢ (Nᵢ, K), Aᵢ (rᵢ, K), Bᵢ (Nᵢ, rᵢ); ranks and Nᵢ may differ. backend: a name that
    `dispatch.choose` gave, not "reference". code: what `native_layer.served` gave for every layer, or 0. Nothing is
    checked.
    """
    device = x.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        x, weights = x.to(dtype), [weight.to(dtype) for weight in weights]
        biases = [None if bias is None else bias.to(dtype) for bias in biases]
        code = 0
    if code and not _served_together(As, backend):
        code = 0
    if torch.is_grad_enabled():
        return list(_LoraLinearGroup.apply(x, scalings, backend, code, *weights, *biases, *As, *Bs))
    if code:
        return native_group.forward(x, weights, biases, As, Bs, scalings, code)[0]
    A, cast_Bs = torch.cat(_cast(As, x.dtype)), _cast(Bs, x.dtype)
    run = schema.lora_linear_group if dispatch.direct() else torch.ops.slao_kernels.lora_linear_group
    return run(x, weights, biases, A, cast_Bs, scalings, backend)[0]
