"""The nodes of the autograd graph: a LoRA layer, or several of one x; and a branch on a called base layer's result.

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

    scalings: tuple[float, ...]
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
    layers: Sequence[Tensor | None],
    scalings: tuple[float, ...],
    precision: str = "base",
    backend: str = "auto",
    dropout: float = 0.0,
    made: torch.dtype | None = None,
) -> Call:
    """The call of x (..., K) through `layers`: weight, bias, A and B of each, as they are stored.

    made: the dtype of what a called base made of x; None where the base product is computed here, in x's dtype.
    """
    device, adapters = x.device.type, [M.dtype for M in (*layers[2::4], *layers[3::4]) if M is not None]
    if torch.is_autocast_enabled(device):
        # What autocast asks of every linear layer, PEFT's included.
        dtype = torch.get_autocast_dtype(device)
        branch = dtype if made is None else torch.promote_types(dtype, made)
    else:
        dtype = branch = x.dtype if made is None else torch.promote_types(x.dtype, made)
        if precision == "adapter":
            branch = reduce(torch.promote_types, adapters, branch)
    wide, uniform = branch is not dtype, all(p is None or p.dtype is x.dtype is branch for p in layers)
    backend = dispatch.choose("lora_linear", device, backend)
    if backend == "native" and torch.bfloat16 not in (dtype, x.dtype):
        backend = "eager"  # cpu.py has nothing else
    # The core rounds A and B of one dtype while it reads them, to bf16.
    rounds = backend == "native" and made is None and branch is torch.bfloat16 and len(set(adapters)) == 1
    # Not on an x that is read in another dtype than the branch's.
    reads = not wide if made is None else x.dtype is branch or not _holds(branch, x.dtype)
    draws = backend == "triton" and 0.0 < dropout < 1.0 and reads and branch in _SEEDED_DTYPES
    draws = draws and sum(A.shape[0] for A in layers[2::4] if A is not None) <= _SEEDED_RANK
    return Call(scalings, device, dtype, None if rounds else branch, wide, uniform, backend, dropout, draws)


def _holds(wide: torch.dtype, narrow: torch.dtype) -> bool:
    return torch.promote_types(narrow, wide) is wide


def drop(call: Call, x: Tensor) -> tuple[Tensor, Tensor | None]:
    """(what the branch reads, what was drawn): x after torch's dropout and the mask, or x and the backend's seed."""
    if call.draws:
        # A tensor: reading it back would stop the GPU, and a captured graph draws a new one at each replay.
        return x, torch.randint(2**63 - 1, (1,), device=x.device)
    return torch.native_dropout(x, call.dropout, True)


class LoraLinear(torch.autograd.Function):
    """yᵢ = x Wᵢᵀ + bᵢ + sᵢ · dropout(x) Aᵢᵀ (core + core_delta)ᵀ Bᵢᵀ.

    tensors: weight (N, K), bias (N) or None, A (r, K) and B (N, r) of each layer; with one layer also core and
    core_delta (r, r), either None. Returns y (..., N), or a tuple of them. Saves what the branch read, t (M, Σr) and
    tensors of the adapters' size, nothing (M, N); with torch's dropout also the mask, and x where a weight trains.

    C-LoRA's routing R = core + core_delta costs only r×r products: the kernels see B R in the forward pass and R A in
    the backward one, and what they return is multiplied by core_deltaᵀ afterwards.
    """

    @staticmethod
    def forward(ctx: Any, call: Call, x: Tensor, *tensors: Any) -> Any:
        stored, end = x, 4 * len(call.scalings)
        weights: Sequence[Any] = tensors[0:end:4]
        biases, As, Bs = tensors[1:end:4], tensors[2:end:4], tensors[3:end:4]
        if not call.uniform:
            x = x if x.dtype is call.dtype else x.to(call.dtype)
            weights, biases = cast(weights, call.dtype), cast(biases, call.dtype)
            if call.factor is not None:
                As, Bs = cast(As, call.factor), cast(Bs, call.factor)
        read, drawn = drop(call, x) if call.dropout else (x, None)
        source = None if read is x else read
        values = Bs
        if len(tensors) > end:
            B = tensors[3]
            values = cast((B @ routing(tensors).to(B.dtype),), Bs[0].dtype)
        if dispatch.direct():
            products = operators.products_of(call.backend, drawn, call.dropout)
            run = products.wide_forward if call.wide else products.forward
            ys, t = run(x, source, operators.Layers(weights, biases, As, values, call.scalings))
        else:
            op, args = torch.ops.slao_kernels.lora_linear, (x, source, weights, biases, As, values, call.scalings)
            ys, t = op(*args, call.wide, call.backend, drawn, call.dropout)
        more: tuple[Any, ...] = ()
        if call.dropout or len(tensors) > end:
            trains = any(weight.requires_grad for weight in tensors[:end:4])
            more = (x if trains else None, drawn, *tensors[end:])
        ctx.save_for_backward(read, t, *weights, *As, *Bs, *more)
        ctx.call = call
        if not call.uniform:
            ctx.dtypes = [None, *(None if p is None else p.dtype for p in (stored, *tensors))]
        return ys[0] if len(ys) == 1 else tuple(ys)

    @staticmethod
    def backward(ctx: Any, *dys: Tensor) -> tuple[Tensor | None, ...]:
        return once(_linear_grads, ctx, *dys) if torch.is_grad_enabled() else _linear_grads(ctx, *dys)


def _linear_grads(ctx: Any, *dys: Tensor) -> tuple[Tensor | None, ...]:
    call, saved, wanted, n = ctx.call, ctx.saved_tensors, ctx.needs_input_grad, len(dys)
    need_x, end = wanted[1], 2 + 4 * n
    need_As, need_Bs = wanted[4:end:4], wanted[5:end:4]
    read, t, weights, As, Bs = saved[0], saved[1], *(saved[i * n + 2 : i * n + n + 2] for i in range(3))
    x, drawn, *cores = saved[2 + 3 * n :] or (read, None)
    if cores:
        need_As, As = [need_As[0] or wanted[7]], [routing(cores).to(As[0].dtype) @ As[0]]
    needs, direct = (need_x, need_As, need_Bs), dispatch.direct()
    layers = operators.Layers(weights, (None,) * n, As, Bs, call.scalings)
    if not direct:
        op, rest = torch.ops.slao_kernels.lora_linear_backward, (call.backend, drawn, call.dropout)
        dx, dAs, dBs, g = op(dys, read, weights, t, As, Bs, call.scalings, call.wide, *needs, *rest)
    elif operators.batched(dys):
        run, kept = operators.outside_autocast(reference.grads, call.device), _kept(call, drawn)
        dx, dAs, dBs, g = run(read, dys, layers, t, kept)
    else:
        products = operators.products_of(call.backend, drawn, call.dropout)
        run = operators.outside_autocast(products.wide_backward if call.wide else products.backward, call.device)
        dx, dAs, dBs, g = run(read, dys, layers, t, needs)
    grads: list[Any] = [None, dx]
    for dA, dB in zip(dAs, dBs, strict=True):
        grads += None, None, dA, dB
    if True in wanted[2:end:4] or True in wanted[3:end:4]:
        _add_base_grads(grads, ctx, dys, x)
    if cores:
        grads[4:] = _through_cores(cores[1], g, t, dAs[0], dBs[0], wanted[4:])
    if not call.uniform:
        grads = [None if one is None else one.to(dtype) for one, dtype in zip(grads, ctx.dtypes, strict=True)]
    if direct:
        return tuple(grads)
    # An operator gives something for everything.
    return tuple(grad if need else None for grad, need in zip(grads, wanted, strict=True))


def _add_base_grads(grads: list[Any], ctx: Any, dys: Sequence[Tensor], x: Any) -> None:
    """dW, and db in its bias's dtype, of the base layers that train."""
    for place, dy in enumerate(dys):
        wanted, at, dy2 = ctx.needs_input_grad, 2 + 4 * place, rows_of(dy)
        if wanted[at]:
            grads[at] = dy2.t() @ rows_of(x)
        if wanted[at + 1]:
            grads[at + 1] = dy2.sum(0, dtype=dy.dtype if ctx.call.uniform else ctx.dtypes[at + 1])


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
            out = y if in_place else torch.empty(y.shape, dtype=y.dtype, device=y.device)
            # The branch may be wider than what autocast would make of it: a called base returns what it likes.
            run = operators.outside_autocast(operators.products_of(call.backend, drawn, call.dropout).add, call.device)
            t = run(x, y, A, B, call.scalings[0], out)
            if in_place:
                ctx.mark_dirty(y)
        else:
            out, t = torch.ops.slao_kernels.lora_add(y, x, A, B, call.scalings[0], call.backend, drawn, call.dropout)
        ctx.save_for_backward(x, t, A, B, drawn)
        return out

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        return once(_add_grads, ctx, dy) if torch.is_grad_enabled() else _add_grads(ctx, dy)


def _add_grads(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    call, (x, t, A, B, drawn) = ctx.call, ctx.saved_tensors
    _, need_y, *needs, _ = ctx.needs_input_grad
    direct, args, grads = dispatch.direct(), (t, A, B, call.scalings[0]), None
    if not direct:
        grads = torch.ops.slao_kernels.lora_add_backward(dy, x, *args, *needs, call.backend, drawn, call.dropout)
    elif operators.batched((dy,)):
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


def _linear_by_reference(call: Call, x: Tensor, *tensors: Any) -> Any:
    (x,), end = cast((x,), call.dtype), 4 * len(call.scalings)
    dropped = F.dropout(x, call.dropout) if call.dropout else None
    cores, ys = cast(tensors[end:], call.factor), []
    for i, scaling in enumerate(call.scalings):
        weight, bias = cast(tensors[4 * i : 4 * i + 2], call.dtype)
        A, B = cast(tensors[4 * i + 2 : 4 * i + 4], call.factor)
        ys.append(reference.lora_linear(x, dropped, weight, bias, A, B, scaling, *cores))
    return ys[0] if len(ys) == 1 else tuple(ys)


def _add_by_reference(call: Call, y: Tensor, x: Tensor, A: Tensor, B: Tensor, in_place: bool) -> Tensor:
    x = F.dropout(x, call.dropout) if call.dropout else x
    A, B = cast((A, B), call.factor)
    return reference.lora_add(y, x, A, B, call.scalings[0])


def cast(tensors: Sequence[Any], dtype: torch.dtype | None) -> Any:
    """Each of them, but for None, in dtype."""
    return [tensor if tensor is None or tensor.dtype is dtype else tensor.to(dtype) for tensor in tensors]


def routing(tensors: Sequence[Any]) -> Tensor:
    """core + core_delta, the last two of them, either of which may be None."""
    core, core_delta = tensors[-2:]
    if core is None or core_delta is None:
        return core_delta if core is None else core
    return core + core_delta


def once(grads: Callable[..., Any], ctx: Any, *dys: Tensor) -> Any:
    """The gradients, which refuse to be differentiated. Only where somebody may: it costs microseconds."""
    return once_differentiable(grads)(ctx, *dys)


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
