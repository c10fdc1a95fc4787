"""lora_linear: a frozen linear layer and its LoRA branch as one node of the autograd graph."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ... import dispatch
from .. import checks, schema
from . import native_layer, reference

PRECISIONS = ("base", "adapter")
# Where kernels.py draws dropout itself.
_SEEDED_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_SEEDED_RANK = 256


class _LoraLinear(torch.autograd.Function):
    """Saves x, t and tensors of the adapters' size; nothing (M, N). With dropout x_dropped too, or a seed instead.

    C-LoRA's routing R = core + core_delta costs only r×r products: the kernels see B R in the forward pass and
    R A in the backward one, and what they return is multiplied by core_deltaᵀ afterwards.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        x_dropped: Tensor | None,
        weight: Tensor,
        bias: Tensor | None,
        A: Tensor,
        B: Tensor,
        core: Tensor | None,
        core_delta: Tensor | None,
        scaling: float,
        dtype: torch.dtype,
        backend: str,
        seed: Tensor | None,
        p: float,
    ) -> Tensor:
        routing = _routing(core, core_delta)
        wide = dtype != x.dtype
        A_used, B_used = _used(A, B, dtype, backend, wide)
        value_B = B_used if routing is None else (B @ routing.to(B.dtype)).to(B_used.dtype)
        run = schema.lora_linear if dispatch.direct() else torch.ops.slao_kernels.lora_linear
        value_bias = None if bias is None else _cast(bias, x.dtype)
        y, t = run(x, x_dropped, weight, value_bias, A_used, value_B, scaling, backend, seed, p, wide)
        ctx.save_for_backward(x, x_dropped, weight, t, A_used, B_used, core, core_delta, seed)
        ctx.scaling, ctx.backend, ctx.p, ctx.wide = scaling, backend, p, wide
        ctx.grad_dtypes = A.dtype, B.dtype
        ctx.bias_dtype = None if bias is None else bias.dtype
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, x_dropped, weight, t, A, B, core, core_delta, seed = ctx.saved_tensors
        need_x, need_dropped, need_weight, need_bias, need_A, need_B, _, need_delta = ctx.needs_input_grad[:8]
        routing = _routing(core, core_delta)
        run = schema.lora_linear_backward if dispatch.direct() else torch.ops.slao_kernels.lora_linear_backward
        dx, dx_dropped, dA, dB, g = run(
            dy,
            x,
            x_dropped,
            weight,
            t,
            A if routing is None else (routing.to(A.dtype) @ A),
            B,
            ctx.scaling,
            need_x,
            need_dropped,
            need_A or need_delta,
            need_B,
            ctx.backend,
            seed,
            ctx.p,
            ctx.wide,
        )
        d_delta = (g.t() @ t).to(core_delta.dtype) if need_delta else None
        if routing is not None:
            # Only core_delta carries A's and B's gradient; a core without one is a frozen path.
            if need_A:
                dA = torch.zeros_like(dA) if core_delta is None else core_delta.to(dA.dtype).t() @ dA
            if need_B:
                dB = torch.zeros_like(dB) if core_delta is None else dB @ core_delta.to(dB.dtype).t()
        dy2 = dy.reshape(-1, weight.shape[0]) if need_weight or need_bias else dy
        return (
            dx if need_x else None,
            dx_dropped if need_dropped else None,
            dy2.t() @ x.reshape(-1, weight.shape[1]) if need_weight else None,
            dy2.sum(0, dtype=ctx.bias_dtype) if need_bias else None,
            _cast(dA, ctx.grad_dtypes[0]) if need_A else None,
            _cast(dB, ctx.grad_dtypes[1]) if need_B else None,
            None,
            d_delta,
            None,
            None,
            None,
            None,
            None,
        )


def _cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor if tensor.dtype is dtype else tensor.to(dtype)


def _used(A: Tensor, B: Tensor, dtype: torch.dtype, backend: str, wide: bool) -> tuple[Tensor, Tensor]:
    """A and B as the backend wants them: "native" rounds them itself, as it reads them."""
    if backend == "native" and not wide and A.dtype == B.dtype:
        return A, B
    return _cast(A, dtype), _cast(B, dtype)


def _routing(core: Tensor | None, core_delta: Tensor | None) -> Tensor | None:
    if core is None or core_delta is None:
        return core_delta if core is None else core
    return core + core_delta


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
    `"adapter"` in A's and B's own (the wider of them and the base's), without a wide copy of x (see wide.py).
    Gradients have the dtype of their tensor; x, weight, bias, A, B and core_delta get one, core does not. With a
    core, A's and B's gradient flows through core_delta only (C-LoRA, arXiv 2502.17920). Differentiable once.
    `dropout` is a probability and applies when `training`; its mask is torch's own (`F.dropout`), or drawn inside the
    kernels ("triton") from a seed that torch's generator of x's device gives.
    Raises ValueError on shapes, dtypes or devices that do not fit, naming them.
    Source: LoRA (arXiv 2106.09685); this evaluation order: RunLoRA (arXiv 2312.03415), LoRAFusion (EuroSys'26).
    """
    _check(x, weight, bias, A, B, core, core_delta, dropout, precision)
    return apply(
        x,
        weight,
        bias,
        A,
        B,
        scaling,
        core=core,
        core_delta=core_delta,
        dropout=dropout if training else 0.0,
        precision=precision,
        backend=backend,
    )


def apply(
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
    precision: str = "base",
    backend: str = "auto",
) -> Tensor:
    """`lora_linear` without its checks: for callers that know that shapes, dtypes and devices fit.

    A bias may be wider than x (an fp32 lora_bias on a 16-bit base): it is added in x's dtype, its gradient stays wide.
    """
    device = x.device.type
    if torch.is_autocast_enabled(device):
        autocast = torch.get_autocast_dtype(device)
        x, weight = x.to(autocast), weight.to(autocast)
        bias = None if bias is None else bias.to(autocast)
        precision = "base"  # what autocast asks of every linear layer, PEFT's included
    dtype = x.dtype
    if precision == "adapter":
        dtype = torch.promote_types(dtype, torch.promote_types(A.dtype, B.dtype))
    backend = dispatch.choose("lora_linear", device, backend)
    wide = dtype != x.dtype
    common = dropout == 0.0 and core is core_delta is None and not wide and dispatch.direct()
    if backend == "native" and common and (code := native_layer.served(x, weight, bias, A, B)):
        return native_layer.fused(x, weight, bias, A, B, scaling, code)
    x_dropped = seed = None
    if dropout > 0.0:
        served = dtype == x.dtype and dtype in _SEEDED_DTYPES and A.shape[0] <= _SEEDED_RANK
        if backend == "triton" and served and dropout < 1.0:
            # A tensor: reading it back would stop the GPU, and a captured graph draws a new one at each replay.
            seed = torch.randint(2**63 - 1, (1,), device=x.device)
        else:
            x_dropped = torch.nn.functional.dropout(x, dropout)
    if backend == "reference":
        cast = (None if part is None else part.to(dtype) for part in (A, B, core, core_delta))
        A, B, core, core_delta = cast
        bias = None if bias is None else _cast(bias, x.dtype)
        return reference.lora_linear(x, x_dropped, weight, bias, A, B, scaling, core, core_delta)
    if torch.is_grad_enabled():
        return _LoraLinear.apply(
            x, x_dropped, weight, bias, A, B, core, core_delta, scaling, dtype, backend, seed, dropout
        )
    routing = _routing(core, core_delta)
    B = B if routing is None else B @ routing.to(B.dtype)
    A, B = _used(A, B, dtype, backend, wide)
    bias = None if bias is None else _cast(bias, x.dtype)
    run = schema.lora_linear if dispatch.direct() else torch.ops.slao_kernels.lora_linear
    return run(x, x_dropped, weight, bias, A, B, scaling, backend, seed, dropout, wide)[0]


def apply_plain(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    A: Tensor,
    B: Tensor,
    scaling: float,
    code: int,
    precision: str,
    backend: str,
) -> Tensor:
    """`apply` for what plain.py has found: no autocast, and `code` from the compiled core if that can take it whole."""
    if code and precision == "base" and dispatch.choose("lora_linear", "cpu", backend) == "native":
        return native_layer.fused(x, weight, bias, A, B, scaling, code)
    return apply(x, weight, bias, A, B, scaling, precision=precision, backend=backend)


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
        if not tensor.is_floating_point():
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
