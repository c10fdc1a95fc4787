"""A patched model's base weights, bit for bit."""

from __future__ import annotations

from typing import Any

import torch
import twins
from torch import Tensor, nn

import slao_kernels


def words(tensor: Tensor) -> Tensor:
    return tensor.detach().reshape(-1).view(torch.uint8)


def base_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if "lora_" not in name}


def check_base(model: nn.Module, before: dict[str, Tensor]) -> None:
    now = base_of(model)
    assert now.keys() == before.keys()
    changed = [name for name, tensor in now.items() if not torch.equal(words(tensor), words(before[name]))]
    assert not changed


def patched(kind: str = "llama", dtype: torch.dtype = torch.bfloat16, **options: Any) -> Any:
    model = twins.peft_model(kind, dtype, **options)
    slao_kernels.patch(model)
    return model.eval()


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(input_ids=twins.token_ids()).logits
