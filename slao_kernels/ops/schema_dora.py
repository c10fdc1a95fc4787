"""schema.py's third screen: DoRA's norms and its scaling of the columns of a result.

N = out_features, K = in_features, M = number of tokens, r = rank; everything "wide" is fp32, or fp64 if asked for.
"""

from __future__ import annotations

from functools import cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from .schema import LIBRARY, _without_autocast

# (N,) the 2-norm of each row of weight + scaling B A, in the dtype of A and B; weight (N, K), A (r, K), B (N, r).
LIBRARY.define("dora_norm(Tensor weight, Tensor A, Tensor B, float scaling) -> Tensor")
# y = bias + c z in z's dtype, rounded once: z (..., N), c and bias (N,), c wide.
LIBRARY.define("dora_scale(Tensor z, Tensor c, Tensor? bias) -> Tensor")
# dz = c dy in z's dtype, dc = Σ dy z over the tokens in c's. What is not needed comes back empty.
LIBRARY.define("dora_scale_backward(Tensor dy, Tensor z, Tensor c, bool need_z, bool need_c) -> (Tensor dz, Tensor dc)")


@cache
def _dora() -> ModuleType:
    from . import dora  # not above: it imports this module

    return dora


def dora_norm(weight: Tensor, A: Tensor, B: Tensor, scaling: float) -> Tensor:
    return _without_autocast(_dora().norm, weight, A, B, scaling)


def dora_scale(z: Tensor, c: Tensor, bias: Tensor | None) -> Tensor:
    return _without_autocast(_dora().scale, z, c, bias)


def dora_scale_backward(dy: Tensor, z: Tensor, c: Tensor, need_z: bool, need_c: bool) -> tuple[Tensor, Tensor]:
    return _without_autocast(_dora().scale_backward, dy, z, c, need_z, need_c)


def _norm_fake(weight: Tensor, A: Tensor, B: Tensor, scaling: float) -> Tensor:
    return A.new_empty(weight.shape[0])


def _scale_fake(z: Tensor, c: Tensor, bias: Tensor | None) -> Tensor:
    return z.new_empty(z.shape)


def _scale_backward_fake(dy: Tensor, z: Tensor, c: Tensor, need_z: bool, need_c: bool) -> tuple[Tensor, Tensor]:
    return z.new_empty(z.shape if need_z else (0,)), c.new_empty(c.shape if need_c else (0,))


_OPERATORS: tuple[tuple[str, Any, Any], ...] = (
    ("dora_norm", dora_norm, _norm_fake),
    ("dora_scale", dora_scale, _scale_fake),
    ("dora_scale_backward", dora_scale_backward, _scale_backward_fake),
)
for _name, _kernel, _fake in _OPERATORS:
    LIBRARY.impl(_name, _kernel, "CompositeExplicitAutograd")
    torch.library.register_fake(f"slao_kernels::{_name}", _fake, lib=LIBRARY)
