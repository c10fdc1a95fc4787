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
from . import skinny
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

    tensors: all weights, then all biases, all As, all Bs.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, scalings: list[float], backend: str, *tensors: Any) -> tuple[Tensor, ...]:
        count = len(scalings)
        weights, biases, As, Bs = (list(tensors[i : i + count]) for i in range(0, 4 * count, count))
        A, cast_Bs = torch.cat(_cast(As, x.dtype)), _cast(Bs, x.dtype)
        run = schema.lora_linear_group if dispatch.direct() else torch.ops.slao_kernels.lora_linear_group
        ys, t = run(x, weights, biases, A, cast_Bs, scalings, backend)
        ctx.save_for_backward(x, t, A, *weights, *cast_Bs)
        ctx.scalings, ctx.backend = scalings, backend
        ctx.dtypes = [(A.dtype, B.dtype) for A, B in zip(As, Bs, strict=True)]
        ctx.set_materialize_grads(False)
        # As alone: an output that depends on nothing trainable has no gradient, whatever its siblings have.
        needs = ctx.needs_input_grad
        ctx.awaited = {i for i in range(count) if needs[0] or any(needs[3 + i :: count])}
        ctx.mark_non_differentiable(*(y for i, y in enumerate(ys) if i not in ctx.awaited))
        ctx.kept = None
        return tuple(ys)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *dys: Tensor | None) -> tuple[Tensor | None, ...]:
        count = len(ctx.scalings)
        given = [i for i, dy in enumerate(dys) if dy is not None]
        if not given:
            return (None,) * (3 + 4 * count)
        # Alone, the outputs could be differentiated one after another, each once. So they can here: what autograd
        # frees after the first backward is kept while some output has had none.
        saved = ctx.kept if ctx.kept is not None and ctx.awaited.issuperset(given) else ctx.saved_tensors
        ctx.awaited.difference_update(given)
        ctx.kept = saved if ctx.awaited else None
        x, t, A, *rest = saved
        needs_x = ctx.needs_input_grad[0]
        need_weights, need_biases, need_As, need_Bs = (
            [ctx.needs_input_grad[3 + part * count + i] for i in given] for part in range(4)
        )
        weights, Bs = rest[:count], rest[count:]
        slices = [_slices(Bs)[i] for i in given]
        weights, Bs, scalings = ([of[i] for i in given] for of in (weights, Bs, ctx.scalings))
        if len(given) < count:
            t, A = torch.cat([t[:, ranks] for ranks in slices], 1), torch.cat([A[ranks] for ranks in slices])
        present = [dys[i] for i in given]
        direct, op = schema.lora_linear_group_backward, torch.ops.slao_kernels.lora_linear_group_backward
        dx, dA, dBs = (direct if dispatch.direct() else op)(
            present, x, weights, t, A, Bs, scalings, needs_x, need_As, need_Bs, ctx.backend
        )
        grads: list[Tensor | None] = [None] * (4 * count)
        x2 = x.reshape(-1, x.shape[-1])
        dAs = iter(dA.split([B.shape[1] for B, need in zip(Bs, need_As, strict=True) if need]) if any(need_As) else ())
        for place, i in enumerate(given):
            dy2 = dys[i].reshape(-1, weights[place].shape[0])  # type: ignore[union-attr]
            if need_weights[place]:
                grads[i] = dy2.t() @ x2
            if need_biases[place]:
                grads[count + i] = dy2.sum(0)
            if need_As[place]:
                grads[2 * count + i] = next(dAs).to(ctx.dtypes[i][0])
            if need_Bs[place]:
                grads[3 * count + i] = dBs[place].to(ctx.dtypes[i][1])
        return dx if needs_x else None, None, None, *grads


def _cast(matrices: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    return [matrix if matrix.dtype == dtype else matrix.to(dtype) for matrix in matrices]


def apply(
    x: Tensor,
    weights: list[Tensor],
    biases: list[Tensor | None],
    As: list[Tensor],
    Bs: list[Tensor],
    scalings: list[float],
    backend: str,
) -> list[Tensor]:
    """[x Wᵢᵀ + biasᵢ + scalingᵢ x Aᵢᵀ Bᵢᵀ], computed in the base's dtype (autocast's where it is on).

    x (..., K), Wᵢ (Nᵢ, K), Aᵢ (rᵢ, K), Bᵢ (Nᵢ, rᵢ); ranks and Nᵢ may differ. backend: a name that
    `dispatch.choose` gave, not "reference". Nothing is checked.
    """
    device = x.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        x, weights = x.to(dtype), [weight.to(dtype) for weight in weights]
        biases = [None if bias is None else bias.to(dtype) for bias in biases]
    if torch.is_grad_enabled():
        return list(_LoraLinearGroup.apply(x, scalings, backend, *weights, *biases, *As, *Bs))
    A, cast_Bs = torch.cat(_cast(As, x.dtype)), _cast(Bs, x.dtype)
    run = schema.lora_linear_group if dispatch.direct() else torch.ops.slao_kernels.lora_linear_group
    return run(x, weights, biases, A, cast_Bs, scalings, backend)[0]
