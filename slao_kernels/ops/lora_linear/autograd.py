"""The nodes of the autograd graph: a LoRA layer, and a branch on a called base layer's result.

Both are given tensors as they are stored and cast them inside, so autocast and adapters of another dtype are no other
path. Neither writes into a saved tensor or an input that is not marked; both are differentiable once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial, reduce
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from ... import dispatch
from .. import operators
from . import reference
from .precise import rows_of

PRECISIONS = ("base", "adapter")
# Where triton.py draws dropout itself.
_SEEDED_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_SEEDED_RANK = 256


class Call(NamedTuple):
    """What a call computes with, beside its tensors. Made by `call_for`, once a plan or once a call.

    dtype: of the base product, x's or autocast's. factor: what A and B are cast to, None where they stay as stored.
    wide: whether that is the dtype of the branch, wider than the base's (precision="adapter"). uniform: whether
    nothing at all is cast. dropout: the probability that applies now; draws: whether the backend draws it itself.
    """

    scaling: float
    device: str
    dtype: torch.dtype
    factor: torch.dtype | None
    wide: bool
    uniform: bool
    backend: str
    dropout: float
    draws: bool


def call_for(
    x: Tensor,
    layer: Sequence[Tensor | None],
    scaling: float,
    precision: str = "base",
    backend: str = "auto",
    dropout: float = 0.0,
    made: torch.dtype | None = None,
) -> Call:
    """The call of x (..., K) through `layer`: its weight, bias, A and B, as they are stored.

    made: the dtype of what a called base made of x; None where the base product is computed here, in x's dtype.
    """
    device, adapters = x.device.type, [M.dtype for M in layer[2:] if M is not None]
    if torch.is_autocast_enabled(device):
        # What autocast asks of every linear layer, PEFT's included.
        dtype = torch.get_autocast_dtype(device)
        branch = dtype if made is None else torch.promote_types(dtype, made)
    else:
        dtype = branch = x.dtype if made is None else torch.promote_types(x.dtype, made)
        if precision == "adapter":
            branch = reduce(torch.promote_types, adapters, branch)
    wide, uniform = branch is not dtype, all(p is None or p.dtype is x.dtype is branch for p in layer)
    backend = dispatch.choose("lora_linear", device, backend)
    if backend == "native" and torch.bfloat16 not in (dtype, x.dtype):
        backend = "eager"  # cpu.py has nothing else
    # The core rounds A and B of one dtype while it reads them, to bf16.
    rounds = backend == "native" and made is None and branch is torch.bfloat16 and len(set(adapters)) == 1
    # Not on an x that is read in another dtype than the branch's.
    reads = not wide if made is None else x.dtype is branch or not _holds(branch, x.dtype)
    draws = backend == "triton" and 0.0 < dropout < 1.0 and reads and branch in _SEEDED_DTYPES
    draws = draws and layer[2] is not None and layer[2].shape[0] <= _SEEDED_RANK
    return Call(scaling, device, dtype, None if rounds else branch, wide, uniform, backend, dropout, draws)


def _holds(wide: torch.dtype, narrow: torch.dtype) -> bool:
    return torch.promote_types(narrow, wide) is wide


def drop(call: Call, x: Tensor) -> tuple[Tensor, Tensor | None]:
    """(what the branch reads, what was drawn): x after torch's dropout and the mask, or x and the backend's seed."""
    if call.draws:
        # A tensor: reading it back would stop the GPU, and a captured graph draws a new one at each replay.
        return x, torch.randint(2**63 - 1, (1,), device=x.device)
    return torch.native_dropout(x, call.dropout, True)


class LoraLinear(torch.autograd.Function):
    """y = x Wᵀ + bias + scaling · dropout(x) Aᵀ (core + core_delta)ᵀ Bᵀ: x (..., K), y (..., N).

    weight (N, K), bias (N) or None, A (r, K), B (N, r); cores: none, or core and core_delta (r, r), either None. Saves
    what the branch read, t (M, r) and tensors of the adapters' size, nothing (M, N); with torch's dropout also the
    mask, and x where the weight trains.

    C-LoRA's routing R = core + core_delta costs only r×r products: the kernels see B R in the forward pass and R A in
    the backward one, and what they return is multiplied by core_deltaᵀ afterwards.
    """

    @staticmethod
    def forward(
        ctx: Any, call: Call, x: Tensor, weight: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, *cores: Any
    ) -> Tensor:
        ctx.call, trains = call, weight.requires_grad
        routed = (B @ routing(cores).to(B.dtype)) if cores else None  # in B's own dtype, rounded once
        if not call.uniform:
            tensors = x, weight, bias, A, B, *cores
            ctx.dtypes = [None, *(None if p is None else p.dtype for p in tensors)]
            x, weight, bias = cast((x, weight, bias), call.dtype)
            if call.factor is not None:
                A, B = cast((A, B), call.factor)
        values = B if routed is None else routed.to(B.dtype)
        read, drawn = drop(call, x) if call.dropout else (x, None)
        source = None if read is x else read
        if dispatch.direct():
            products = operators.products_of(call.backend, drawn, call.dropout)
            run = products.wide_forward if call.wide else products.forward
            y, t = run(x, source, weight, bias, A, values, call.scaling)
        else:
            op, tensors = operators.OPS.lora_linear, (x, source, weight, bias, A, values)
            y, t = op(*tensors, call.scaling, call.wide, call.backend, drawn, call.dropout)
        for_weight = x if trains and source is not None else None
        ctx.save_for_backward(read, t, weight, A, B, drawn, for_weight, *cores)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        return once(_linear_grads, ctx, dy) if torch.is_grad_enabled() else _linear_grads(ctx, dy)


def _linear_grads(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    call, (read, t, weight, A, B, drawn, x, *cores) = ctx.call, ctx.saved_tensors
    _, need_x, need_weight, need_bias, need_A, need_B, *need_cores = ctx.needs_input_grad
    direct, needs = dispatch.direct(), (need_x, need_A or True in need_cores, need_B)
    tensors = dy, read, weight, t, routing(cores).to(A.dtype) @ A if cores else A, B
    if not direct:
        op, rest = operators.OPS.lora_linear_backward, (call.backend, drawn, call.dropout)
        dx, dA, dB, g = op(*tensors, call.scaling, call.wide, *needs, *rest)
    elif operators.batched(dy):
        run = operators.outside_autocast(reference.grads, call.device)
        dx, dA, dB, g = run(*tensors, call.scaling, _kept(call, drawn))
    else:
        products = operators.products_of(call.backend, drawn, call.dropout)
        run = operators.outside_autocast(products.wide_backward if call.wide else products.backward, call.device)
        dx, dA, dB, g = run(*tensors, call.scaling, needs)
    dW = d_bias = None
    if need_weight:
        dW = rows_of(dy).t() @ rows_of(read if x is None else x)
    if need_bias:
        dtype = dy.dtype if call.uniform else ctx.dtypes[3]
        d_bias = rows_of(dy).sum(0, dtype=dtype)
    routed = _through_cores(cores[1], g, t, dA, dB, (need_A, need_B, *need_cores)) if cores else (dA, dB)
    grads: Any = (None, dx, dW, d_bias, *routed)
    if not call.uniform:
        grads = [None if one is None else one.to(dtype) for one, dtype in zip(grads, ctx.dtypes, strict=True)]
    if direct:
        return tuple(grads)
    # An operator gives something for everything.
    return tuple(grad if need else None for grad, need in zip(grads, ctx.needs_input_grad, strict=True))


def _through_cores(
    delta: Tensor | None, g: Tensor, t: Tensor, dA: Tensor, dB: Tensor, needs: Sequence[bool]
) -> tuple[Tensor | None, ...]:
    """(dA, dB, None, d core_delta): only core_delta carries A's and B's gradient; a core alone is a frozen path."""
    need_A, need_B, _, need_delta = needs
    if delta is None:
        return torch.zeros_like(dA) if need_A else None, torch.zeros_like(dB) if need_B else None, None, None
    return (
        delta.to(dA.dtype).t() @ dA if need_A else None,
        dB @ delta.to(dB.dtype).t() if need_B else None,
        None,
        g.t() @ t if need_delta else None,
    )


class LoraAdd(torch.autograd.Function):
    """y + scaling · dropout(x) Aᵀ Bᵀ in y's dtype and shape (..., N): x (..., K), A (r, K), B (N, r).

    B may be (N, r + 1) with a bias as its last column. Saves what the branch read, t and the adapters, and torch's
    mask; nothing (M, N), and of y nothing at all: its gradient is dy. in_place: y is nobody else's and is written into.
    """

    @staticmethod
    def forward(ctx: Any, call: Call, y: Tensor, x: Tensor, A: Tensor, B: Tensor, in_place: bool) -> Tensor:
        ctx.call = call
        if not call.uniform:
            ctx.dtypes = x.dtype, A.dtype, B.dtype
            if not _holds(call.factor, x.dtype):  # autocast's is narrower; a narrower x yet is read as it is
                x = x.to(call.factor)
            A, B = cast((A, B), call.factor)
        x, drawn = drop(call, x) if call.dropout else (x, None)
        if dispatch.direct():
            out = y if in_place else torch.empty_like(y, memory_format=torch.contiguous_format)
            # The branch may be wider than what autocast would make of it: a called base returns what it likes.
            run = operators.outside_autocast(operators.products_of(call.backend, drawn, call.dropout).add, call.device)
            t = run(x, y, A, B, call.scaling, out)
            if in_place:
                ctx.mark_dirty(y)
        else:
            out, t = operators.OPS.lora_add(y, x, A, B, call.scaling, call.backend, drawn, call.dropout)
        ctx.save_for_backward(x, t, A, B, drawn)
        return out

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        return once(_add_grads, ctx, dy) if torch.is_grad_enabled() else _add_grads(ctx, dy)


def _add_grads(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    call, (x, t, A, B, drawn) = ctx.call, ctx.saved_tensors
    _, need_y, *needs, _ = ctx.needs_input_grad
    direct, args, grads = dispatch.direct(), (t, A, B, call.scaling), None
    if not direct:
        grads = operators.OPS.lora_add_backward(dy, x, *args, *needs, call.backend, drawn, call.dropout)
    elif operators.batched(dy):
        grads = operators.outside_autocast(reference.add_grads, call.device)(x, dy, *args, _kept(call, drawn))
    else:
        run = operators.products_of(call.backend, drawn, call.dropout).add_backward
        grads = operators.outside_autocast(run, call.device)(x, dy, *args, needs)
    if not call.uniform:
        grads = [None if one is None else one.to(dtype) for one, dtype in zip(grads, ctx.dtypes, strict=True)]
    if not direct:  # an operator gives something for everything
        grads = [grad if need else None for grad, need in zip(grads, needs, strict=True)]
    return (None, dy if need_y else None, *grads, None)


# `Function.apply` without what it does for torch.func at every call (2.7 of the 8 µs that an empty node takes).
_linear, _add = (super(torch.autograd.Function, node).apply for node in (LoraLinear, LoraAdd))


def linear(call: Call) -> Callable[..., Any]:
    """What computes `call` now, with the arguments of LoraLinear.forward after ctx."""
    if call.backend == "reference":
        return _linear_by_reference
    if not torch.is_grad_enabled():
        return _linear_without_graph
    return LoraLinear.apply if _watched() else _linear


def add(call: Call) -> Callable[..., Tensor]:
    """The same for LoraAdd."""
    if call.backend == "reference":
        return _add_by_reference
    if not torch.is_grad_enabled():
        return _add_without_graph
    return LoraAdd.apply if _watched() else _add


def _watched() -> bool:
    return not dispatch.direct() or torch._C._are_functorch_transforms_active()


class _NoGraph:
    """The context of a forward pass that no backward pass follows."""

    @staticmethod
    def save_for_backward(*tensors: Any) -> None:
        """Nothing."""

    mark_dirty = save_for_backward


_linear_without_graph, _add_without_graph = partial(LoraLinear.forward, _NoGraph), partial(LoraAdd.forward, _NoGraph)


def _linear_by_reference(call: Call, x: Tensor, weight: Any, bias: Any, A: Any, B: Any, *cores: Any) -> Tensor:
    x, weight, bias = cast((x, weight, bias), call.dtype)
    A, B, *parts = cast((A, B, *cores), call.factor)
    dropped = F.dropout(x, call.dropout) if call.dropout else None
    return reference.lora_linear(x, dropped, weight, bias, A, B, call.scaling, *parts)


def _add_by_reference(call: Call, y: Tensor, x: Tensor, A: Tensor, B: Tensor, in_place: bool) -> Tensor:
    x = F.dropout(x, call.dropout) if call.dropout else x
    A, B = cast((A, B), call.factor)
    return reference.lora_add(y, x, A, B, call.scaling)


def cast(tensors: Sequence[Any], dtype: torch.dtype | None) -> Any:
    """Each of them, but for None, in dtype."""
    return [tensor if tensor is None or tensor.dtype is dtype else tensor.to(dtype) for tensor in tensors]


def routing(cores: Sequence[Any]) -> Tensor:
    """core + core_delta, either of which may be None."""
    core, core_delta = cores
    if core is None or core_delta is None:
        return core_delta if core is None else core
    return core + core_delta


def once(grads: Callable[..., Any], ctx: Any, dy: Tensor) -> Any:
    """The gradients, which refuse to be differentiated. Only where somebody may: it costs microseconds.

    torch's own refusal is silent where dy has no gradient: what they depend on beside dy would be lost.
    """
    return once_differentiable(grads)(ctx, dy if dy.requires_grad else dy.detach().requires_grad_())


def _kept(call: Call, drawn: Tensor | None) -> Tensor | float:
    """The factor of each x in what the branch read. RuntimeError where only a kernel could tell."""
    if drawn is None:
        return 1.0
    if call.draws:
        raise RuntimeError(
            "many gradients at once (is_grads_batched, vectorize=True) through dropout that Triton's kernels draw: "
            "take them one by one, in eval mode, or patch with backend='eager'"
        )
    return drawn / (1.0 - call.dropout) if call.dropout < 1.0 else drawn.to(torch.float32)
