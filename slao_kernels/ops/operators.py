"""The contract with torch: every operator's schema, its fake (shape) function, and what runs behind it.

The operators are what `torch.compile`, CUDA graphs, dispatch modes and `opcheck` see; where nobody looks on
(`dispatch.direct`), whoever would call one calls what runs behind it. They take only what a kernel needs: casts,
C-LoRA's cores and autograd stand above them. `backend` is a name that `dispatch.choose` gave.

M = number of tokens (all leading sizes of x), K = in_features, N = out_features, r = rank. What is "not needed" comes
back empty.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .. import dispatch

# A hub build (tools/hub) is this package under another name, and an operator's name can be registered once.
NAMESPACE = __name__.partition(".")[0]
LIBRARY = torch.library.Library(NAMESPACE, "DEF")
OPS: Any = getattr(torch.ops, NAMESPACE)


def products_of(backend: str, drawn: Tensor | None = None, p: float = 0.0) -> Any:
    """The backend's products (lora_linear/products.py) under the dropout that was drawn, if any."""
    return dispatch.implementation("lora_linear", backend).products(drawn, p)


def outside_autocast(run: Callable[..., Any], device: str) -> Callable[..., Any]:
    """run, whose tensors have their dtypes already: autocast would change them, in a backward pass above all."""
    if not torch.is_autocast_enabled(device):  # entering a block takes microseconds
        return run
    return partial(_outside, run, device)


def _outside(run: Callable[..., Any], device: str, *args: Any) -> Any:
    with torch.autocast(device, enabled=False):
        return run(*args)


def batched(dy: Tensor) -> bool:
    """Whether this is many gradients in one (is_grads_batched, vectorize=True), in no memory that a kernel reads."""
    return torch._C._are_functorch_transforms_active() or torch._C._functorch.is_legacy_batchedtensor(dy)


# y = x Wᵀ + bias + scaling t Bᵀ, shaped (*x.shape[:-1], N); t = source Aᵀ (M, r), source = x, or x after dropout by
# torch (then drawn is of no interest). A and B share one dtype: x's; or a wider one, in which the branch is then
# computed and t kept (wide, for precision="adapter"), or which the backend rounds while it reads them ("native").
# drawn, of a dropout of probability p: torch's mask (bool, x's shape), or a seed (one int64 on x's device) from which
# the backend draws it itself, forward and backward; source is then x.
LIBRARY.define(
    "lora_linear(Tensor x, Tensor? source, Tensor weight, Tensor? bias, Tensor A, Tensor B, float scaling, bool wide, "
    "str backend, Tensor? drawn=None, float p=0.) -> (Tensor y, Tensor t)"
)
# With g = scaling dy B (M, r): dx = dy W + g A, what is drawn applied to g A as to x in forward; dA = gᵀ source,
# dB = scaling dyᵀ t.
LIBRARY.define(
    "lora_linear_backward(Tensor dy, Tensor source, Tensor weight, Tensor t, Tensor A, Tensor B, float scaling, "
    "bool wide, bool need_x, bool need_A, bool need_B, str backend, Tensor? drawn=None, float p=0.) "
    "-> (Tensor dx, Tensor dA, Tensor dB, Tensor g)"
)


def _lora_linear(
    x: Tensor,
    source: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    A: Tensor,
    B: Tensor,
    scaling: float,
    wide: bool,
    backend: str,
    drawn: Tensor | None = None,
    p: float = 0.0,
) -> tuple[Tensor, Tensor]:
    products = products_of(backend, drawn, p)
    run = products.wide_forward if wide else products.forward
    return outside_autocast(run, x.device.type)(x, source, weight, bias, A, B, scaling)


def _lora_linear_fake(
    x: Tensor, source: Any, weight: Tensor, bias: Any, A: Tensor, B: Any, scaling: float, wide: bool, *_: Any
) -> tuple[Tensor, Tensor]:
    tokens = x.shape[:-1]
    return x.new_empty((*tokens, weight.shape[0])), (A if wide else x).new_empty((tokens.numel(), A.shape[0]))


def _lora_linear_backward(
    dy: Tensor,
    source: Tensor,
    weight: Tensor,
    t: Tensor,
    A: Tensor,
    B: Tensor,
    scaling: float,
    wide: bool,
    need_x: bool,
    need_A: bool,
    need_B: bool,
    backend: str,
    drawn: Tensor | None = None,
    p: float = 0.0,
) -> tuple[Tensor, ...]:
    products = products_of(backend, drawn, p)
    run = products.wide_backward if wide else products.backward
    tensors, needs = (dy, source, weight, t, A, B), (need_x, need_A, need_B)
    grads = outside_autocast(run, source.device.type)(*tensors, scaling, needs)
    return tuple(source.new_empty(0) if grad is None else grad for grad in grads)


def _lora_linear_backward_fake(
    dy: Any, source: Tensor, weight: Any, t: Tensor, A: Tensor, B: Tensor, scaling: float, wide: bool, *rest: Any
) -> tuple[Tensor, ...]:
    need_x, need_A, need_B = rest[:3]
    of = (source, need_x), (A, need_A), (B, need_B), (t, need_x or need_A)
    return tuple(torch.empty_like(tensor) if need else source.new_empty(0) for tensor, need in of)


# A branch on what a base layer, called, returned: out = y + scaling (x Aᵀ) Bᵀ in y's dtype and shape (..., N), a fresh
# tensor. B (N, r); or (N, r + 1), then its last column is a bias: out = y + scaling (x Aᵀ B[:, :r]ᵀ + B[:, r]).
# x is what the branch reads, after torch's dropout; with a seed in drawn, before the backend's. t = x Aᵀ (M, r), with a
# column of ones for the bias. A, B and t have the branch's dtype, as wide as x and y or wider.
LIBRARY.define(
    "lora_add(Tensor y, Tensor x, Tensor A, Tensor B, float scaling, str backend, Tensor? drawn=None, float p=0.) "
    "-> (Tensor out, Tensor t)"
)
# With g = scaling dy B (M, r): dx = g A under what was drawn, dA = gᵀ x, dB = scaling dyᵀ t, as wide as B. y's gradient
# is dy, and none of the operator's business.
LIBRARY.define(
    "lora_add_backward(Tensor dy, Tensor x, Tensor t, Tensor A, Tensor B, float scaling, bool need_x, bool need_A, "
    "bool need_B, str backend, Tensor? drawn=None, float p=0.) -> (Tensor dx, Tensor dA, Tensor dB)"
)


def _lora_add(
    y: Tensor,
    x: Tensor,
    A: Tensor,
    B: Tensor,
    scaling: float,
    backend: str,
    drawn: Tensor | None = None,
    p: float = 0.0,
) -> tuple[Tensor, Tensor]:
    out = y.new_empty(y.shape)
    return out, outside_autocast(products_of(backend, drawn, p).add, x.device.type)(x, y, A, B, scaling, out)


def _lora_add_fake(y: Tensor, x: Tensor, A: Tensor, B: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return y.new_empty(y.shape), B.new_empty((x.shape[:-1].numel(), B.shape[1]))


def _lora_add_backward(
    dy: Tensor,
    x: Tensor,
    t: Tensor,
    A: Tensor,
    B: Tensor,
    scaling: float,
    need_x: bool,
    need_A: bool,
    need_B: bool,
    backend: str,
    drawn: Tensor | None = None,
    p: float = 0.0,
) -> tuple[Tensor, ...]:
    run, needs = products_of(backend, drawn, p).add_backward, (need_x, need_A, need_B)
    grads = outside_autocast(run, x.device.type)(x, dy, t, A, B, scaling, needs)
    return tuple(of.new_empty(0) if grad is None else grad for of, grad in zip((x, A, B), grads, strict=True))


def _lora_add_backward_fake(
    dy: Any, x: Tensor, t: Any, A: Tensor, B: Tensor, scaling: float, *rest: Any
) -> tuple[Tensor, ...]:
    return tuple(of.new_empty(of.shape if need else 0) for of, need in zip((x, A, B), rest, strict=False))


# Experts (expert_linear/): x (S, K) sorted by expert, weight (E, N, K), A (E, r, K) and B (E, N, r) or neither, ends
# (E) int32: y_e = x_e W_eᵀ + scaling t_e B_eᵀ, t_e = x_e A_eᵀ. One dtype, but for ends.
LIBRARY.define(
    "expert_linear(Tensor x, Tensor weight, Tensor? A, Tensor? B, float scaling, Tensor ends, str backend) "
    "-> (Tensor y, Tensor t)"
)
# With g = scaling dy_e B_e: dx = dy_e W_e + g A_e, dA_e = gᵀ x_e, dB_e = scaling dy_eᵀ t_e.
LIBRARY.define(
    "expert_linear_backward(Tensor dy, Tensor x, Tensor weight, Tensor t, Tensor? A, Tensor? B, float scaling, "
    "Tensor ends, bool need_x, bool need_A, bool need_B, str backend) -> (Tensor dx, Tensor dA, Tensor dB)"
)


def expert_linear(
    x: Tensor, weight: Tensor, A: Tensor | None, B: Tensor | None, scaling: float, ends: Tensor, backend: str
) -> tuple[Tensor, Tensor]:
    """What runs behind the operator."""
    run = dispatch.implementation("expert_linear", backend).forward
    return outside_autocast(run, x.device.type)(x, weight, A, B, scaling, ends)


def _expert_linear_fake(x: Tensor, weight: Tensor, A: Tensor | None, *_: Any) -> tuple[Tensor, Tensor]:
    rows, r = x.shape[0], 0 if A is None else A.shape[1]
    return x.new_empty((rows, weight.shape[1])), x.new_empty((rows, r))


def expert_linear_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    t: Tensor,
    A: Tensor | None,
    B: Tensor | None,
    scaling: float,
    ends: Tensor,
    need_x: bool,
    need_A: bool,
    need_B: bool,
    backend: str,
) -> tuple[Tensor, ...]:
    """What runs behind the operator."""
    run, needs = dispatch.implementation("expert_linear", backend).backward, (need_x, need_A, need_B)
    grads = outside_autocast(run, x.device.type)(dy, x, weight, t, A, B, scaling, ends, needs)
    return tuple(x.new_empty(0) if grad is None else grad for grad in grads)


def _expert_linear_backward_fake(
    dy: Any, x: Tensor, weight: Any, t: Any, A: Tensor | None, B: Tensor | None, *rest: Any
) -> tuple[Tensor, ...]:
    needs = rest[2:5]
    pairs = zip((x, A, B), needs, strict=True)
    return tuple(x.new_empty(0) if of is None or not need else torch.empty_like(of) for of, need in pairs)


# DoRA (dora/products.py). "wide" is fp32, or fp64 if asked for.
# (N,) the 2-norm of each row of weight + scaling B A, in the dtype of A and B; weight (N, K), A (r, K), B (N, r).
LIBRARY.define("dora_norm(Tensor weight, Tensor A, Tensor B, float scaling) -> Tensor")
# y = bias + c z in z's dtype, rounded once: z (..., N), c and bias (N,), c wide.
LIBRARY.define("dora_scale(Tensor z, Tensor c, Tensor? bias) -> Tensor")
# dz = c dy in z's dtype, dc = Σ dy z over the tokens in c's.
LIBRARY.define("dora_scale_backward(Tensor dy, Tensor z, Tensor c, bool need_z, bool need_c) -> (Tensor dz, Tensor dc)")


def _dora() -> Any:
    return dispatch.implementation("dora", "eager")


def _dora_norm(weight: Tensor, A: Tensor, B: Tensor, scaling: float) -> Tensor:
    return outside_autocast(_dora().norm, weight.device.type)(weight, A, B, scaling)


def _dora_norm_fake(weight: Tensor, A: Tensor, B: Tensor, scaling: float) -> Tensor:
    return A.new_empty(weight.shape[0])


def _dora_scale(z: Tensor, c: Tensor, bias: Tensor | None) -> Tensor:
    return outside_autocast(_dora().scale, z.device.type)(z, c, bias)


def _dora_scale_fake(z: Tensor, c: Tensor, bias: Tensor | None) -> Tensor:
    return z.new_empty(z.shape)


def _dora_scale_backward(dy: Tensor, z: Tensor, c: Tensor, need_z: bool, need_c: bool) -> tuple[Tensor, Tensor]:
    return outside_autocast(_dora().scale_backward, dy.device.type)(dy, z, c, need_z, need_c)


def _dora_scale_backward_fake(dy: Tensor, z: Tensor, c: Tensor, need_z: bool, need_c: bool) -> tuple[Tensor, Tensor]:
    return z.new_empty(z.shape if need_z else 0), c.new_empty(c.shape if need_c else 0)


# r: one (r, r) matrix per A to be filled, or an empty list. status (int32, one per matrix): 0 done, 1 done but
# rank-deficient, 2 not finite: then no A at all was written.
LIBRARY.define("orthogonal_init_(Tensor(a!)[] As, Tensor(b!)[] r, Tensor(c!) status, str backend) -> ()")
LIBRARY.define("scaled_merge_(Tensor(a!)[] merged, Tensor[] finetuned, float[] lam, str backend) -> ()")
LIBRARY.define("fold_(Tensor(a!)[] weights, Tensor[] As, Tensor[] Bs, float[] scalings, str backend) -> ()")


def _orthogonal_init(As: list[Tensor], r: list[Tensor], status: Tensor, backend: str) -> None:
    dispatch.implementation("orthogonal_init", backend).orthogonal_init_(As, r, status)


def _scaled_merge(merged: list[Tensor], finetuned: list[Tensor], lam: list[float], backend: str) -> None:
    dispatch.implementation("scaled_merge", backend).scaled_merge_(merged, finetuned, lam)


def _fold(weights: list[Tensor], As: list[Tensor], Bs: list[Tensor], scalings: list[float], backend: str) -> None:
    dispatch.implementation("fold", backend).fold_(weights, As, Bs, scalings)


def _nothing(*args: Any) -> None:
    return None


_OPERATORS: tuple[tuple[str, Any, Any], ...] = (
    ("lora_linear", _lora_linear, _lora_linear_fake),
    ("lora_linear_backward", _lora_linear_backward, _lora_linear_backward_fake),
    ("lora_add", _lora_add, _lora_add_fake),
    ("lora_add_backward", _lora_add_backward, _lora_add_backward_fake),
    ("expert_linear", expert_linear, _expert_linear_fake),
    ("expert_linear_backward", expert_linear_backward, _expert_linear_backward_fake),
    ("dora_norm", _dora_norm, _dora_norm_fake),
    ("dora_scale", _dora_scale, _dora_scale_fake),
    ("dora_scale_backward", _dora_scale_backward, _dora_scale_backward_fake),
    ("orthogonal_init_", _orthogonal_init, _nothing),
    ("scaled_merge_", _scaled_merge, _nothing),
    ("fold_", _fold, _nothing),
)
for _name, _kernel, _fake in _OPERATORS:
    LIBRARY.impl(_name, _kernel, "CompositeExplicitAutograd")
    torch.library.register_fake(f"{NAMESPACE}::{_name}", _fake, lib=LIBRARY)
