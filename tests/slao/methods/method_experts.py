"""A tiny mixture whose experts have a LoRA under a method, and tasks without training."""

from __future__ import annotations

from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

import slao_kernels
from slao_kernels.adapters import LoraPair
from slao_kernels.testing import tiny_model

BOTH = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
IDS = torch.randint(0, 128, (2, 6), generator=torch.Generator().manual_seed(1))


def base(kind: str = "mixtral") -> nn.Module:
    model = tiny_model(kind, num_hidden_layers=1).double()
    model.set_experts_implementation("eager")
    return model


def model_of(kind: str = "mixtral") -> nn.Module:
    config = LoraConfig(r=3, lora_alpha=5, target_modules=["q_proj"], target_parameters=BOTH)
    torch.manual_seed(0)
    model = get_peft_model(base(kind), config).double()
    slao_kernels.patch(model)
    return model


def train(method: Any, index: int) -> None:
    """Something of its own in every entry of A and B."""
    g = torch.Generator().manual_seed(index)
    for pair in method.pairs:
        for value in (pair.A, pair.B):
            value.add_(torch.randn(value.shape, generator=g, dtype=torch.float64) * 0.2)


def task(method: Any, index: int) -> None:
    method.begin_task(str(index))
    train(method, index)
    method.end_task()


def by_expert(pair: LoraPair, A: Tensor, B: Tensor) -> list[tuple[Tensor, Tensor]]:
    """PEFT's own layout, as `ParamWrapper.get_delta_weight` reads it."""
    count = pair.experts
    As = A.reshape(count, -1, A.shape[1])
    Bs = B.reshape(B.shape[0], -1, count)
    return [(As[index].clone(), Bs[:, :, index].clone()) for index in range(count)]
