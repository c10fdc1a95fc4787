"""The LoRA layer of a mixture's experts: rows sorted by expert through each expert's own W, A and B, one node."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ... import dispatch
from .. import operators
from ..lora_linear.autograd import once


def expert_linear(
    x: Tensor,
    weight: Tensor,
    A: Tensor | None,
    B: Tensor | None,
    scaling: float,
    ends: Tensor,
    *,
    backend: str = "auto",
) -> Tensor:
    """y_e = x_e W_eᵀ + scaling x_e A_eᵀ B_eᵀ for the rows x_e of every expert e, without W_eff = W_e + scaling B_e A_e.

    x: (S, K), its rows sorted by expert; weight: (E, N, K), frozen, any strides; A: (E, r, K) and B: (E, N, r), or None
    each: the base alone; all of one floating dtype. ends: (E,) int32, where each expert's rows end; the last is S.
    Returns (S, N). Gradients of x, A and B; saves x, t (S, r) and what it was given.
    """
    chosen = dispatch.choose("expert_linear", x.device.type, backend)
    if chosen == "reference":
        return dispatch.implementation("expert_linear", chosen).expert_linear(x, weight, A, B, scaling, ends)
    return ExpertLinear.apply(x, weight, A, B, scaling, ends, chosen)


class ExpertLinear(torch.autograd.Function):
    """The node of `expert_linear`. Differentiable once; writes into nothing that it was given."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, A: Any, B: Any, scaling: float, ends: Tensor, backend: str
    ) -> Tensor:
        args = x, weight, A, B, scaling, ends, backend
        run = operators.expert_linear if dispatch.direct() else operators.OPS.expert_linear
        y, t = run(*args)
        ctx.save_for_backward(x, weight, t, A, B, ends)
        ctx.scaling, ctx.backend = scaling, backend
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        return once(_grads, ctx, dy) if torch.is_grad_enabled() else _grads(ctx, dy)


def _grads(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, t, A, B, ends = ctx.saved_tensors
    need_x, _, need_A, need_B = ctx.needs_input_grad[:4]
    direct = dispatch.direct()
    run = operators.expert_linear_backward if direct else operators.OPS.expert_linear_backward
    grads = run(dy, x, weight, t, A, B, ctx.scaling, ends, need_x, need_A, need_B, ctx.backend)
    dx, dA, dB = (grad if need else None for grad, need in zip(grads, (need_x, need_A, need_B), strict=True))
    return dx, None, dA, dB, None, None, None
