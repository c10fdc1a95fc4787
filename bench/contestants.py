"""Who runs against the fused layer: PEFT in its two precisions, and the autograd node that popular trainers write."""

from __future__ import annotations

import copy
from itertools import chain
from typing import Any

import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import layer as lora
from torch import Tensor, nn

import slao_kernels

RANK, ALPHA = 16, 32


def twin(model: nn.Module) -> nn.Module:
    """A second module tree over the very same parameters and buffers: another contestant on one frozen base."""
    return copy.deepcopy(model, {id(tensor): tensor for tensor in chain(model.parameters(), model.buffers())})


def adapted(model: nn.Module, targets: str | list[str], base_dtype: bool = False, r: int = RANK) -> nn.Module:
    """`model` with PEFT's LoRA, changed in place: adapters in fp32 as PEFT makes them, or in the base's dtype.

    A and B are random, the same for all of one geometry: with PEFT's B = 0 a wrong branch would look right. Their
    values are bf16's, so that both precisions start from the same adapter.
    """
    config = LoraConfig(r=r, lora_alpha=ALPHA, target_modules=targets)
    model = get_peft_model(model, config, autocast_adapter_dtype=not base_dtype).base_model.model
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for module in lora_modules(model):
            A, B = module.lora_A["default"].weight, module.lora_B["default"].weight
            # Then the branch is about as large as the base product.
            A.copy_((torch.randn(A.shape, generator=generator) / A.shape[1] ** 0.5).bfloat16())
            B.copy_((torch.randn(B.shape, generator=generator) * 0.05).bfloat16())
    return model


def lora_modules(model: nn.Module) -> list[Any]:
    return [module for module in model.modules() if isinstance(module, lora.Linear)]


def fused(model: nn.Module, backend: str = "auto") -> nn.Module:
    """`model`, which has a LoRA, patched; an error if any layer keeps PEFT's forward."""
    slao_kernels.patch(model, strict=True, backend=backend)
    return model


def fell_back(model: nn.Module) -> set[str]:
    """After a call: why layers ran PEFT's own forward, which would then be under our name."""
    return {why for layer in lora_modules(model) for why in layer.slao_options.fallbacks.values()}


def assert_ran_fused(model: nn.Module) -> None:
    reasons = fell_back(model)
    assert not reasons, f"runs PEFT's own forward: {reasons}"


class MmAddmm(torch.autograd.Function):
    """LoRA layers of one x in one node, by `mm` and `addmm_`; x Aᵀ is computed again in the backward pass.

    What Unsloth and Axolotl do with dropout 0, dY B computed once as in Axolotl. x (M, K); `flat` is W (N, K),
    A (r, K), B (N, r) of each layer in turn, all of one dtype; one (M, N) for each layer.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, scaling: float, *flat: Tensor) -> tuple[Tensor, ...]:
        ctx.save_for_backward(x, *flat)
        ctx.scaling = scaling
        layers = zip(flat[::3], flat[1::3], flat[2::3], strict=True)
        return tuple(F.linear(x, W).addmm_(x @ A.t(), B.t(), alpha=scaling) for W, A, B in layers)

    @staticmethod
    def backward(ctx: Any, *dys: Tensor) -> tuple[Tensor | None, ...]:
        x, *flat = ctx.saved_tensors
        dx: Tensor | None = None
        grads: list[Tensor | None] = []
        for dy, W, A, B in zip(dys, flat[::3], flat[1::3], flat[2::3], strict=True):
            g = dy @ B
            dx = dy @ W if dx is None else dx.addmm_(dy, W)
            dx.addmm_(g, A, alpha=ctx.scaling)
            grads += [None, (g.t() @ x).mul_(ctx.scaling), (dy.t() @ (x @ A.t())).mul_(ctx.scaling)]
        return dx, None, *grads
