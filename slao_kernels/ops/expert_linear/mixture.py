"""A whole experts module in one node: gather, up, gate, down, routing weights, sum; and only what must be is kept.

Computed by blocks of rows: where the products are loops over the experts (a CPU), an expert at a time, so that what
stands between the tokens and the result is never whole; else all rows at once. Kept for the backward pass are the
gate's input and the branches' t; its output is computed again, and the gradient of the routing weights comes from the
product that the gradient of x needs anyway, so that the experts' own outputs are not kept at all. T tokens of H
features, k experts a token, S = T k rows, sorted by expert.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import operators
from ..lora_linear.autograd import once
from .products import rows_of_experts


class Projection(NamedTuple):
    """weight (E, N, K); A (E, r, K) and B (E, N, r), or neither; bias (E, N) or None. None of it but A and B trains."""

    weight: Tensor
    A: Tensor | None
    B: Tensor | None
    scaling: float
    bias: Tensor | None


class Routing(NamedTuple):
    """Where the rows come from: ids (S) their experts, order (S) the place of each in index.reshape(-1), back its
    inverse, ends (E) where each expert's rows end, k."""

    ids: Tensor
    order: Tensor
    back: Tensor
    ends: Tensor
    k: int


def mixture(
    x: Tensor,
    weights: Tensor,
    routing: Routing,
    up: Projection,
    down: Projection,
    gate: Callable[[Tensor], Tensor],
    backend: str,
) -> Tensor:
    """(T, H) of x (T, H) and the routing weights (T, k). gate: (rows, N_up) to (rows, K_down), with no parameter that
    trains. Gradients of x, weights, and both A and B."""
    given = x, weights, up.A, up.B, down.A, down.B
    keeps = torch.is_grad_enabled() and any(one is not None and one.requires_grad for one in given)
    static = _Static(up.scaling, down.scaling, routing.k, gate, backend, weights.shape, keeps)
    return _Mixture.apply(*given, static, *routing[:4], up.weight, up.bias, down.weight, down.bias)


class _Static(NamedTuple):
    """What is no tensor: those are saved, so that a checkpoint lets go of them and a change in place is noticed."""

    up: float
    down: float
    k: int
    gate: Callable[[Tensor], Tensor]
    backend: str
    shape: torch.Size
    keeps: bool


class _Block(NamedTuple):
    rows: slice
    experts: slice
    ends: Tensor


def _blocks(ends: Tensor) -> Iterator[_Block]:
    if not _loops(ends):
        yield _Block(slice(None), slice(None), ends)
        return
    for e, rows in rows_of_experts(ends):
        yield _Block(rows, slice(e, e + 1), torch.tensor([rows.stop - rows.start], dtype=torch.int32))


def _loops(tensor: Tensor) -> bool:
    """Whether the products are loops over the experts, and adding in place has an order."""
    return tensor.device.type == "cpu"


def _part(tensor: Tensor | None, experts: slice) -> Any:
    return None if tensor is None else tensor[experts]


class _Mixture(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weights: Tensor, A1: Any, B1: Any, A2: Any, B2: Any, static: _Static, *frozen: Any
    ) -> Tensor:
        up, down, routing = _parts(static, (A1, B1, A2, B2), frozen)
        of, all_tokens = weights.reshape(-1)[routing.order], routing.order // routing.k
        y, kept = _sums(x), []
        for rows, experts, ends in _blocks(routing.ends):
            tokens = all_tokens[rows]
            read = x.index_select(0, tokens).to(up.weight.dtype)
            u, t1 = _forward(up, read, static, routing, rows, experts, ends)
            z, t2 = _forward(down, static.gate(u).to(down.weight.dtype), static, routing, rows, experts, ends)
            y = _add(y, z * of[rows, None], tokens, routing)
            if static.keeps:
                kept += [u, t1, t2]
        if static.keeps:
            ctx.save_for_backward(x, of, A1, B1, A2, B2, *frozen, *kept)
        ctx.static = static
        return y.to(x.dtype)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        return once(_grads, ctx, dy) if torch.is_grad_enabled() else _grads(ctx, dy)


def _grads(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    if operators.batched(dy):
        raise RuntimeError("many gradients at once (is_grads_batched, vectorize=True) through fused experts; unpatch")
    x, of, A1, B1, A2, B2, *saved = ctx.saved_tensors
    static, (need_x, need_weights, *needs) = ctx.static, ctx.needs_input_grad[:6]
    run: Any = operators.expert_linear_backward
    frozen, kept = saved[:8], saved[8:]
    up, down, routing = _parts(static, (A1, B1, A2, B2), frozen)
    of_up, of_down = _Factors((A1, B1), needs[:2]), _Factors((A2, B2), needs[2:])
    dx, d_of, all_tokens = _sums(x), torch.zeros_like(of), routing.order // routing.k
    for (rows, experts, ends), u, t1, t2 in zip(_blocks(routing.ends), *(kept[i::3] for i in range(3)), strict=True):
        tokens, w = all_tokens[rows], of[rows, None]
        with torch.enable_grad():
            leaf = u.detach().requires_grad_()
            h = static.gate(leaf)
        own = dy.index_select(0, tokens).to(u.dtype)
        # The weight goes to what the gradient meets, not into it: so g is the one that the weight's own wants.
        pair = _part(A2, experts), _part(B2, experts)
        wh, wt = ((each.detach() * w).to(u.dtype) for each in (h, t2))
        g, *found = run(own, wh, down.weight[experts], wt, *pair, down.scaling, ends, True, *needs[2:], static.backend)
        of_down.put(found, experts)
        if need_weights:
            sums = torch.promote_types(g.dtype, torch.float32)
            found_w = (g * h.detach()).sum(1, dtype=sums)
            if down.bias is not None:
                found_w += (own * down.bias[routing.ids[rows]]).sum(1, dtype=sums)
            d_of[rows] = found_w
        if not (need_x or True in needs[:2]):
            continue
        (du,) = torch.autograd.grad(h, leaf, (g * w).to(h.dtype))
        read = x.index_select(0, tokens).to(u.dtype)
        pair = _part(A1, experts), _part(B1, experts)
        part, *found = run(
            du, read, up.weight[experts], t1, *pair, up.scaling, ends, need_x, *needs[:2], static.backend
        )
        of_up.put(found, experts)
        if need_x:
            dx = _add(dx, part, tokens, routing)
    d_weights = d_of[routing.back].view(static.shape) if need_weights else None
    return dx.to(x.dtype) if need_x else None, d_weights, *of_up.grads(), *of_down.grads(), *(None,) * 9


def _parts(static: _Static, factors: Any, frozen: Any) -> tuple[Projection, Projection, Routing]:
    A1, B1, A2, B2 = factors
    ids, order, back, ends, W1, bias1, W2, bias2 = frozen
    up, down = Projection(W1, A1, B1, static.up, bias1), Projection(W2, A2, B2, static.down, bias2)
    return up, down, Routing(ids, order, back, ends, static.k)


def _forward(
    of: Projection, x: Tensor, static: _Static, routing: Routing, rows: slice, experts: slice, ends: Tensor
) -> tuple[Tensor, Tensor]:
    pair = _part(of.A, experts), _part(of.B, experts)
    y, t = operators.expert_linear(x, of.weight[experts], *pair, of.scaling, ends, static.backend)
    return y if of.bias is None else y.add_(of.bias[routing.ids[rows]]), t


def _sums(x: Tensor) -> Tensor:
    """Of a loop: what its blocks are added to, in fp32 at least. Of all rows at once no more than its length and dtype
    are asked for."""
    return x.new_zeros(x.shape if _loops(x) else (len(x), 0), dtype=torch.promote_types(x.dtype, torch.float32))


def _add(sums: Tensor, part: Tensor, tokens: Tensor, routing: Routing) -> Tensor:
    """The rows of a block added to those of their tokens. All rows at once are sorted back first: adding in place has
    no order on a GPU."""
    if _loops(sums):
        return sums.index_add_(0, tokens, part.to(sums.dtype))
    return part[routing.back].view(len(sums), routing.k, part.shape[1]).sum(1, dtype=sums.dtype)


class _Factors:
    """The gradients of a projection's A and B, an expert or all of them at a time."""

    def __init__(self, factors: tuple[Any, Any], needs: Any) -> None:
        self.factors, self.needs = factors, needs
        self.found: list[Any] = [None, None]

    def put(self, parts: list[Tensor], experts: slice) -> None:
        for index, part in enumerate(parts):
            if not self.needs[index]:
                continue
            if experts == slice(None):
                self.found[index] = part
                continue
            if self.found[index] is None:
                self.found[index] = torch.zeros_like(self.factors[index])
            self.found[index][experts] = part

    def grads(self) -> list[Any]:
        """None where not needed; zeros where no expert had a row."""
        every = zip(self.found, self.factors, self.needs, strict=True)
        return [torch.zeros_like(of) if need and grad is None else grad for grad, of, need in every]
