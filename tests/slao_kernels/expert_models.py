"""Tiny models whose experts have a LoRA adapter, and one training step of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import peft
import torch
from torch import Tensor, nn

from slao_kernels.testing import TOLERANCE, tiny_model

KINDS = ["mixtral", "qwen3_moe", "gpt_oss", "deepseek"]
BOTH = ("mlp.experts.gate_up_proj", "mlp.experts.down_proj")
IDS = torch.randint(0, 128, (3, 9), generator=torch.Generator().manual_seed(1))
EXACT = TOLERANCE[torch.float64]  # two ways to sum in fp64, through a model forward and back: 9e-16 was seen


def model_of(
    kind: str, dtype: torch.dtype, implementation: str = "eager", parameters: Sequence[str] = BOTH
) -> nn.Module:
    """With an adapter as training leaves it: fp32, fp64 in an fp64 model."""
    model = tiny_model(kind, num_hidden_layers=1).to(dtype)
    model.set_experts_implementation(implementation)
    model = peft.get_peft_model(model, config(3, 5, parameters))
    torch.manual_seed(3)
    for name, parameter in model.named_parameters():
        if "lora_" in name or "bias" in name:
            nn.init.normal_(parameter, std=0.1)
    return model.to(dtype) if dtype == torch.float64 else model


def config(r: int, alpha: int, parameters: Sequence[str] = BOTH) -> peft.LoraConfig:
    return peft.LoraConfig(r=r, lora_alpha=alpha, target_modules=[], target_parameters=list(parameters))


def experts_of(model: nn.Module) -> Any:
    """transformers' module."""
    return next(m for m in model.modules() if hasattr(m, "has_gate") and not hasattr(m, "base_layer"))


def wrapper_of(model: nn.Module) -> nn.Module:
    """PEFT's outermost wrapper around it, or the module itself."""
    return next(module for name, module in model.named_modules() if name.endswith("experts"))


def step(model: nn.Module, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """The logits and the gradients of everything that trains, of the routers too. dtype: autocast's."""
    for name, parameter in model.named_parameters():
        if "gate.weight" in name or "router.weight" in name:
            parameter.requires_grad_(True)
    model.zero_grad()
    with torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None):
        found = model(input_ids=IDS, labels=IDS)
    found.loss.backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {"logits": found.logits.detach(), **grads}
