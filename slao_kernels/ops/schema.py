"""The contract with torch: every operator's schema and fake (shape) function, on one screen.

The operators are what `torch.compile`, CUDA graphs and `opcheck` see. They take only what a kernel needs:
casting, scaling rules, C-LoRA's core and autograd stand above them (ops/*/__init__.py). `backend` is the name
that `dispatch.choose` gave; the operator looks the module up and calls the function of the same name in it.

M = number of tokens (all leading sizes of x), K = in_features, N = out_features, r = rank.
"""

from __future__ import annotations

from functools import cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from .. import dispatch

LIBRARY = torch.library.Library("slao_kernels", "DEF")

# y = x Wᵀ + bias + scaling (x_dropped or x) Aᵀ Bᵀ, shaped (*x.shape[:-1], N); t = (x_dropped or x) Aᵀ, (M, r).
# A and B share one dtype. wide: theirs, in which the branch is computed and t kept (precision="adapter"); else x's,
# and only the backend "native" takes them in another.
# seed (one int64 on x's device): the backend draws dropout of probability p on x itself; x_dropped is then None.
LIBRARY.define(
    "lora_linear(Tensor x, Tensor? x_dropped, Tensor weight, Tensor? bias, Tensor A, Tensor B, float scaling, "
    "str backend, Tensor? seed=None, float p=0., bool wide=False) -> (Tensor y, Tensor t)"
)
# With g = scaling dy B (M, r): dx (+)= dy W + g A, dA = gᵀx, dB = scaling dyᵀt. What is not needed comes back
# empty. With x_dropped, dx holds dy W alone and dx_dropped holds g A; with a seed, x and g A are masked as in forward.
LIBRARY.define(
    "lora_linear_backward(Tensor dy, Tensor x, Tensor? x_dropped, Tensor weight, Tensor t, Tensor A, Tensor B, "
    "float scaling, bool need_x, bool need_dropped, bool need_A, bool need_B, str backend, "
    "Tensor? seed=None, float p=0., bool wide=False) "
    "-> (Tensor dx, Tensor dx_dropped, Tensor dA, Tensor dB, Tensor g)"
)
# r: one (r, r) matrix per A to be filled, or an empty list. status (int32, one per matrix): 0 done, 1 done but
# rank-deficient, 2 not finite: then no A at all was written.
LIBRARY.define("orthogonal_init_(Tensor(a!)[] As, Tensor(b!)[] r, Tensor(c!) status, str backend) -> ()")
LIBRARY.define("scaled_merge_(Tensor(a!)[] merged, Tensor[] finetuned, float[] lam, str backend) -> ()")
LIBRARY.define("fold_(Tensor(a!)[] weights, Tensor[] As, Tensor[] Bs, float[] scalings, str backend) -> ()")


def lora_linear(
    x: Tensor,
    x_dropped: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    A: Tensor,
    B: Tensor,
    scaling: float,
    backend: str,
    seed: Tensor | None = None,
    p: float = 0.0,
    wide: bool = False,
) -> tuple[Tensor, Tensor]:
    run = dispatch.implementation("lora_linear", backend).forward
    return _without_autocast(run, x, x_dropped, weight, bias, A, B, scaling, wide, *_dropout(seed, p))


def _lora_linear_fake(
    x: Tensor,
    x_dropped: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    A: Tensor,
    B: Tensor,
    scaling: float,
    backend: str,
    seed: Tensor | None = None,
    p: float = 0.0,
    wide: bool = False,
) -> tuple[Tensor, Tensor]:
    tokens = x.shape[:-1]
    t = (A if wide else x).new_empty((tokens.numel(), A.shape[0]))
    return x.new_empty((*tokens, weight.shape[0])), t


def lora_linear_backward(
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
    backend: str,
    seed: Tensor | None = None,
    p: float = 0.0,
    wide: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    run = dispatch.implementation("lora_linear", backend).backward
    needs = (need_x, need_dropped, need_A, need_B, wide)
    return _without_autocast(run, dy, x, x_dropped, weight, t, A, B, scaling, *needs, *_dropout(seed, p))


def _lora_linear_backward_fake(
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
    backend: str,
    seed: Tensor | None = None,
    p: float = 0.0,
    wide: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    return (
        x.new_empty(x.shape if need_x else (0,)),
        x.new_empty(x.shape if need_dropped else (0,)),
        A.new_empty(A.shape if need_A else (0,)),
        B.new_empty(B.shape if need_B else (0,)),
        t.new_empty(t.shape if need_x or need_dropped or need_A else (0,)),
    )


def _orthogonal_init(As: list[Tensor], r: list[Tensor], status: Tensor, backend: str) -> None:
    dispatch.implementation("orthogonal_init", backend).orthogonal_init_(As, r, status)


def _scaled_merge(merged: list[Tensor], finetuned: list[Tensor], lam: list[float], backend: str) -> None:
    dispatch.implementation("scaled_merge", backend).scaled_merge_(merged, finetuned, lam)


def _fold(weights: list[Tensor], As: list[Tensor], Bs: list[Tensor], scalings: list[float], backend: str) -> None:
    dispatch.implementation("fold", backend).fold_(weights, As, Bs, scalings)


def _nothing(*args: Any) -> None:
    return None


def _dropout(seed: Tensor | None, p: float) -> tuple[Any, ...]:
    """Arguments for the backends that draw dropout themselves; the others have no such parameters."""
    return () if seed is None else (seed, p)


def _without_autocast(run: Any, x: Tensor, *args: Any) -> Any:
    # The caller has cast everything already; autocast would narrow the wide branch of precision="adapter",
    # and in a backward pass inside an autocast block it would mix dtypes. Entering a block costs some
    # microseconds, so only where there is something to turn off.
    if not torch.is_autocast_enabled(x.device.type):
        return run(x, *args)
    with torch.autocast(x.device.type, enabled=False):
        return run(x, *args)


for _name, _kernel, _fake in (
    ("lora_linear", lora_linear, _lora_linear_fake),
    ("lora_linear_backward", lora_linear_backward, _lora_linear_backward_fake),
    ("orthogonal_init_", _orthogonal_init, _nothing),
    ("scaled_merge_", _scaled_merge, _nothing),
    ("fold_", _fold, _nothing),
):
    LIBRARY.impl(_name, _kernel, "CompositeExplicitAutograd")
    torch.library.register_fake(f"slao_kernels::{_name}", _fake, lib=LIBRARY)


# Several layers of one x. ys[i] = x Wᵢᵀ + biasᵢ + scalingᵢ tᵢ Bᵢᵀ; A is every Aᵢ stacked (ΣR, K), t = x Aᵀ (M, ΣR).
LIBRARY.define(
    "lora_linear_group(Tensor x, Tensor[] weights, Tensor?[] biases, Tensor A, Tensor[] Bs, float[] scalings, "
    "str backend) -> (Tensor[] ys, Tensor t)"
)
# With gᵢ = scalingᵢ dyᵢ Bᵢ side by side in g: dx = g A + Σ dyᵢ Wᵢ; dA = gᵀ x, only the rows of layers in need_As;
# dBs[i] = scalingᵢ dyᵢᵀ tᵢ. What is not needed comes back empty.
LIBRARY.define(
    "lora_linear_group_backward(Tensor[] dys, Tensor x, Tensor[] weights, Tensor t, Tensor A, Tensor[] Bs, "
    "float[] scalings, bool need_x, bool[] need_As, bool[] need_Bs, str backend) "
    "-> (Tensor dx, Tensor dA, Tensor[] dBs)"
)


@cache
def _group() -> ModuleType:
    from .lora_linear import group  # not above: its package imports this module

    return group


def lora_linear_group(
    x: Tensor,
    weights: list[Tensor],
    biases: list[Tensor | None],
    A: Tensor,
    Bs: list[Tensor],
    scalings: list[float],
    backend: str,
) -> tuple[list[Tensor], Tensor]:
    group = _group()
    return _without_autocast(group.forward, x, weights, biases, A, Bs, scalings, group.products_of(backend))


def _lora_linear_group_fake(
    x: Tensor,
    weights: list[Tensor],
    biases: list[Tensor | None],
    A: Tensor,
    Bs: list[Tensor],
    scalings: list[float],
    backend: str,
) -> tuple[list[Tensor], Tensor]:
    tokens = x.shape[:-1]
    return [x.new_empty((*tokens, w.shape[0])) for w in weights], x.new_empty((tokens.numel(), A.shape[0]))


def lora_linear_group_backward(
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
    backend: str,
) -> tuple[Tensor, Tensor, list[Tensor]]:
    group = _group()

    def run(x: Tensor, *args: Any) -> tuple[Tensor, Tensor, list[Tensor]]:
        return group.backward(dys, x, *args)

    products = group.products_of(backend)
    return _without_autocast(run, x, weights, t, A, Bs, scalings, need_x, need_As, need_Bs, products)


def _lora_linear_group_backward_fake(
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
    backend: str,
) -> tuple[Tensor, Tensor, list[Tensor]]:
    rows = sum(B.shape[1] for B, need in zip(Bs, need_As, strict=True) if need)
    dBs = [B.new_empty(B.shape if need else (0,)) for B, need in zip(Bs, need_Bs, strict=True)]
    return x.new_empty(x.shape if need_x else (0,)), A.new_empty((rows, x.shape[-1])), dBs


LIBRARY.impl("lora_linear_group", lora_linear_group, "CompositeExplicitAutograd")
LIBRARY.impl("lora_linear_group_backward", lora_linear_group_backward, "CompositeExplicitAutograd")
torch.library.register_fake("slao_kernels::lora_linear_group", _lora_linear_group_fake, lib=LIBRARY)
torch.library.register_fake("slao_kernels::lora_linear_group_backward", _lora_linear_group_backward_fake, lib=LIBRARY)
