"""A tiny model under a method, and a few steps of training; conftest.py hands this module out as a fixture."""

from __future__ import annotations

from typing import Any

import torch
from peft import LoraConfig, get_peft_model

import slao_kernels
from slao.methods import Method
from slao_kernels.testing import tiny_model

IDS = torch.arange(3, 19)[None]


def make(
    method: type[Method],
    dtype: torch.dtype = torch.float64,
    patched: bool = True,
    seed: int = 0,
    lora: dict[str, Any] | None = None,
    **options: Any,
) -> Any:
    """`method` on a two-layer Llama with a LoRA on q_proj and v_proj."""
    torch.manual_seed(seed)
    config = LoraConfig(**{"r": 4, "target_modules": ["q_proj", "v_proj"], **(lora or {})})
    model = get_peft_model(tiny_model("llama"), config).to(dtype)
    if patched:
        slao_kernels.patch(model)
    return method(model, **options)


def train(method: Method, steps: int = 4, lr: float = 0.02, shift: int = 0) -> None:
    """Adam on the model's own loss and the penalty; `shift` makes it another task."""
    ids = (IDS + 7 * shift) % 40
    optimizer = torch.optim.Adam([p for p in method.model.parameters() if p.requires_grad], lr)
    for _ in range(steps):
        loss = method.model(ids, labels=ids).loss
        penalty = method.penalty()
        (loss if penalty is None else loss + penalty).backward()
        optimizer.step()
        optimizer.zero_grad()


def batches(index: int) -> list[dict[str, torch.Tensor]]:
    """The task's one batch, for methods that observe it; its last two tokens are padding."""
    mask = torch.ones_like(IDS)
    mask[:, -2:] = 0
    return [{"input_ids": (IDS + 7 * index) % 40, "attention_mask": mask, "labels": IDS}]


def begin(method: Method, index: int) -> None:
    method.observe(batches(index))
    method.begin_task(str(index))


def end(method: Method, index: int) -> None:
    method.observe(batches(index))
    method.end_task()


def task(method: Method, index: int, steps: int = 4) -> None:
    begin(method, index)
    train(method, steps, shift=index)
    end(method, index)


def logits(method: Method) -> torch.Tensor:
    with torch.no_grad():
        return method.model(IDS).logits


def deltas(method: Method) -> list[torch.Tensor]:
    """Per layer the (m, n) that PEFT would merge into the base, as the model is now."""
    return [pair.layer.get_delta_weight(method.adapter).detach().clone() for pair in method.pairs]
