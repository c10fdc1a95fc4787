"""lora_linear: a frozen linear layer and its LoRA branch as one node of the autograd graph."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import checks
from .autograd import PRECISIONS, call_for, linear

__all__ = ["PRECISIONS", "lora_linear"]


def lora_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    A: Tensor,
    B: Tensor,
    scaling: float,
    *,
    core: Tensor | None = None,
    core_delta: Tensor | None = None,
    dropout: float = 0.0,
    training: bool = True,
    precision: str = "base",
    backend: str = "auto",
) -> Tensor:
    """y = x Wᵀ + bias + scaling · dropout(x) Aᵀ (core + core_delta)ᵀ Bᵀ.

    Shapes: x (..., K) with any strides, weight (N, K) (pass `w.t()` for a (K, N) one), bias (N) or None, A (r, K),
    B (N, r), core and core_delta (r, r) or None; returns (..., N), a fresh tensor in the dtype of the base product.
    Dtypes: x, weight and bias share one floating dtype; under autocast they are cast to its dtype. A and B may
    have another: `precision="base"` computes the LoRA branch in the base's dtype with the GEMM's fp32 accumulation,
    `"adapter"` in A's and B's own (the wider of them and the base's), without a wide copy of x (see precise.py).
    Gradients have the dtype of their tensor; x, weight, bias, A, B and core_delta get one, core does not. With a
    core, A's and B's gradient flows through core_delta only (C-LoRA, arXiv 2502.17920). Differentiable once.
    `dropout` is a probability and applies when `training`; its mask is torch's own (`F.dropout`), or drawn inside the
    kernels ("triton") from a seed that torch's generator of x's device gives.
    Raises ValueError on shapes, dtypes or devices that do not fit, naming them.
    Source: LoRA (arXiv 2106.09685); this evaluation order: RunLoRA (arXiv 2312.03415), LoRAFusion (EuroSys'26).
    """
    optional = {"bias": bias, "core": core, "core_delta": core_delta}
    _check_tensors(x=x, weight=weight, A=A, B=B, **{name: t for name, t in optional.items() if t is not None})
    (factor,) = checks.numbers("lora_linear", "scaling", [scaling], 1)
    _check(x, weight, bias, A, B, core, core_delta, dropout, precision)
    p = dropout if training else 0.0
    layer = weight, bias, A, B
    call = call_for(x, layer, factor, precision, backend, p)
    cores = () if core is core_delta is None else (core, core_delta)
    y: Tensor = linear(call)(call, x, *layer, *cores)
    return y


def _check_tensors(**tensors: object) -> None:
    """ValueError that names what no product takes."""
    problems = []
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            problems.append(f"{name} is a {type(tensor).__name__}, expected a tensor")
        elif tensor.device.type == "meta":
            problems.append(f"{name} is on the meta device; load the weights first")
        elif tensor.layout is not torch.strided:
            problems.append(f"{name} has layout {tensor.layout}, expected a dense tensor")
    if problems:
        raise ValueError("lora_linear: " + "; ".join(problems))


def _check(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    A: Tensor,
    B: Tensor,
    core: Tensor | None,
    core_delta: Tensor | None,
    dropout: float,
    precision: str,
) -> None:
    """ValueError that names everything about the arguments that does not fit."""
    problems = []
    if weight.dim() != 2 or A.dim() != 2 or B.dim() != 2 or x.dim() < 1:
        problems.append(
            f"x needs at least 1 dimension, weight, A and B 2; got {x.dim()}, {weight.dim()}, {A.dim()}, {B.dim()}"
        )
    else:
        (n, k), r = weight.shape, A.shape[0]
        expected = {"A": (A, (r, k)), "B": (B, (n, r)), "bias": (bias, (n,))}
        expected |= {"core": (core, (r, r)), "core_delta": (core_delta, (r, r))}
        if x.shape[-1] != k:
            problems.append(f"x has {x.shape[-1]} features, weight (N, K) = {(n, k)} reads {k}")
        for name, (tensor, shape) in expected.items():
            if tensor is not None and tuple(tensor.shape) != shape:
                problems.append(f"{name} is {tuple(tensor.shape)}, expected {shape}")
    tensors = {"x": x, "weight": weight, "bias": bias, "A": A, "B": B, "core": core, "core_delta": core_delta}
    given = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    for name, tensor in given.items():
        found = checks.elsewhere(tensor)
        if found is not None:
            problems.append(f"{name} {found}")
        if tensor.dtype not in checks.FLOATING:
            problems.append(f"{name} is {tensor.dtype}, expected a floating dtype")
        if tensor.device != x.device:
            problems.append(f"{name} is on {tensor.device}, x on {x.device}")
    if not torch.is_autocast_enabled(x.device.type):
        for name in ("weight", "bias"):
            if name in given and given[name].dtype != x.dtype:
                problems.append(f"{name} is {given[name].dtype}, x is {x.dtype}: cast one of them")
    if not 0.0 <= dropout < 1.0:
        problems.append(f"dropout is {dropout}, expected a probability in [0, 1)")
    if precision not in PRECISIONS:
        problems.append(f"unknown precision {precision!r}, choose one of {', '.join(PRECISIONS)}")
    if problems:
        raise ValueError("lora_linear: " + "; ".join(problems))
