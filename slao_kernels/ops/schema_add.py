"""schema.py's second screen: the operators that add a LoRA branch to the result of a base layer that was called.

M = number of tokens (all leading sizes of x), K = in_features, N = out_features, r = rank, c = the branch's dtype:
that of A, B and t, as wide as x and y or wider.
"""

from __future__ import annotations

from functools import cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from .schema import LIBRARY, _without_autocast

# out = y + scaling (x Aᵀ) Bᵀ in y's dtype and shape (..., N), a fresh tensor. B (N, r); or (N, r + 1), then its last
# column is a bias: out = y + scaling (x Aᵀ B[:, :r]ᵀ + B[:, r]). t = x Aᵀ (M, r), with a column of ones for the bias.
# seed (one int64 on x's device): the backend draws dropout of probability p on x itself.
LIBRARY.define(
    "lora_add(Tensor y, Tensor x, Tensor A, Tensor B, float scaling, str backend, Tensor? seed=None, float p=0.) "
    "-> (Tensor out, Tensor t)"
)
# With g = scaling dy B (M, r): dx = g A, dA = gᵀ x, dB = scaling dyᵀ t, as wide as B. What is not needed comes back
# empty. With a seed, x and g A are masked as in forward. y's gradient is dy, and none of the operator's business.
LIBRARY.define(
    "lora_add_backward(Tensor dy, Tensor x, Tensor t, Tensor A, Tensor B, float scaling, bool need_x, bool need_A, "
    "bool need_B, str backend, Tensor? seed=None, float p=0.) -> (Tensor dx, Tensor dA, Tensor dB)"
)


@cache
def _add() -> ModuleType:
    from .lora_linear import add  # not above: its package's modules import this one

    return add


def _into(
    out: Tensor, y: Tensor, x: Tensor, A: Tensor, B: Tensor, scaling: float, backend: str, seed: Tensor | None, p: float
) -> Tensor:
    add = _add()

    def run(x: Tensor) -> Tensor:
        return add.forward(y, x, A, B, scaling, out, add.products_of(backend, seed, p))

    return _on_device(run, x, backend)


def _on_device(run: Any, x: Tensor, backend: str) -> Any:
    """Triton launches on the current device, which need not be x's."""
    if backend != "triton" or not x.is_cuda:
        return _without_autocast(run, x)
    with torch.cuda.device_of(x):
        return _without_autocast(run, x)


def lora_add(
    y: Tensor, x: Tensor, A: Tensor, B: Tensor, scaling: float, backend: str, seed: Tensor | None = None, p: float = 0.0
) -> tuple[Tensor, Tensor]:
    out = y.new_empty(y.shape)
    return out, _into(out, y, x, A, B, scaling, backend, seed, p)


def lora_add_(
    y: Tensor, x: Tensor, A: Tensor, B: Tensor, scaling: float, backend: str, seed: Tensor | None = None, p: float = 0.0
) -> Tensor:
    """Into y, which must be contiguous; t. No operator: what looks on (compile, dispatch modes) gets `lora_add`."""
    return _into(y, y, x, A, B, scaling, backend, seed, p)


def _lora_add_fake(
    y: Tensor, x: Tensor, A: Tensor, B: Tensor, scaling: float, backend: str, seed: Tensor | None = None, p: float = 0.0
) -> tuple[Tensor, Tensor]:
    return y.new_empty(y.shape), B.new_empty((x.shape[:-1].numel(), B.shape[1]))


def lora_add_backward(
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
    seed: Tensor | None = None,
    p: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:
    add = _add()

    def run(dy: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        products = add.products_of(backend, seed, p, backward=True)
        return add.backward(dy, x, t, A, B, scaling, need_x, need_A, need_B, products)

    return _on_device(run, dy, backend)


def _lora_add_backward_fake(
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
    seed: Tensor | None = None,
    p: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        x.new_empty(x.shape if need_x else (0,)),
        A.new_empty(A.shape if need_A else (0,)),
        B.new_empty(B.shape if need_B else (0,)),
    )


for _name, _kernel, _fake in (
    ("lora_add", lora_add, _lora_add_fake),
    ("lora_add_backward", lora_add_backward, _lora_add_backward_fake),
):
    LIBRARY.impl(_name, _kernel, "CompositeExplicitAutograd")
    torch.library.register_fake(f"slao_kernels::{_name}", _fake, lib=LIBRARY)
