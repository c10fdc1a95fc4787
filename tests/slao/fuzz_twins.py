"""Two equal tiny PEFT models for test_fuzz_calls.py, what both are asked, and what is compared of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import peft
import torch
from torch import Tensor, nn

# RMS of the difference over the size. fp32 as in tests/slao_kernels/twins.py; 16 bits round y and the branch.
CLOSE = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 4e-2, torch.float16: 5e-3}
Pairs = dict[tuple[str, str], tuple[Tensor, Tensor]]  # A and B by layer and adapter
X = torch.randn(5, 12, generator=torch.Generator().manual_seed(1))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(12, 10), nn.Linear(10, 12, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        # Smooth: a kink would make a rounding into another gradient.
        return self.down(nn.functional.silu(self.up(x)))


def config(r: int = 3) -> peft.LoraConfig:
    return peft.LoraConfig(r=r, lora_alpha=5, target_modules=["up", "down"], init_lora_weights=False)


def plain() -> Any:
    torch.manual_seed(0)
    return peft.get_peft_model(Net(), config())


def add(model: Any) -> None:
    torch.manual_seed(5)
    model.add_adapter("other", config(2))


def disabled(model: Any) -> None:
    with model.disable_adapter():
        outputs(model)


# What both models are asked.
PEFTS: dict[str, Callable[[Any], Any]] = {
    "merge": lambda m: m.merge_adapter(),
    "unmerge": lambda m: m.unmerge_adapter(),
    "set default": lambda m: m.set_adapter("default"),
    "set other": lambda m: m.set_adapter("other"),
    "add": add,
    "delete": lambda m: m.delete_adapter("other"),
    "delete default": lambda m: m.delete_adapter("default"),
    "disabled": disabled,
    "disable layers": lambda m: m.base_model.disable_adapter_layers(),
    "enable layers": lambda m: m.base_model.enable_adapter_layers(),
    "to bf16": lambda m: m.to(torch.bfloat16),
    "half": lambda m: m.half(),
    "float": lambda m: m.float(),
    "double": lambda m: m.double(),
    "reload": lambda m: m.load_state_dict(m.state_dict()),
    "train": lambda m: m.train(),
    "eval": lambda m: m.eval(),
}
OURS = ["patch", "unpatch", "begin", "end", "merged", "save", "load", "export"]
ALL = [*PEFTS, *OURS, "copy", *["step", "begin", "end"] * 5, "merged", "unmerge", "enable layers", "set default"]


def layers_of(model: Any) -> dict[str, Any]:
    return {name: getattr(model.base_model.model, name) for name in ("up", "down")}


def factors_of(layer: Any, adapter: str) -> tuple[Tensor, Tensor]:
    """A and B of plain LoRA that stand for the adapter and what a method has added to it, in its dtype."""
    A, B = layer.lora_A[adapter].weight.detach(), layer.lora_B[adapter].weight.detach()
    if adapter != "default" or not hasattr(layer, "slao_core"):
        return A, B
    if layer.slao_core is not None:
        return A, B @ (layer.slao_core + layer.slao_core_delta.detach()).to(B.dtype)
    if layer.slao_frozen_A is None:
        return A, B
    return torch.cat([A, layer.slao_frozen_A.to(A.dtype)]), torch.cat([B, layer.slao_frozen_B.to(B.dtype)], 1)


def adapters(model: Any) -> Pairs:
    """Copies of A and B by layer and adapter."""
    return {
        (name, adapter): tuple(factor.clone() for factor in factors_of(layer, adapter))
        for name, layer in layers_of(model).items()
        for adapter in layer.lora_A
    }


def put(model: Any, found: Pairs) -> None:
    for (name, adapter), (A, B) in found.items():
        layer = layers_of(model)[name]
        layer.lora_A[adapter].weight.data, layer.lora_B[adapter].weight.data = A, B


def outputs(model: Any) -> Any:
    """y, or the type of the error."""
    try:
        with torch.no_grad():
            return model(X.to(model.base_model.model.up.base_layer.weight.dtype))
    except Exception as error:
        return type(error)


def gradients(model: Any) -> Any:
    """Those of A and B by name, or the type of the error."""
    model.zero_grad()
    try:
        model(X.to(model.base_model.model.up.base_layer.weight.dtype)).square().mean().backward()
    except Exception as error:
        return type(error)
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def close(found: Tensor, exact: Tensor, tolerance: float, size: Tensor | None = None) -> None:
    difference, exact = (found.double() - exact.double()).square().mean().sqrt(), exact.double()
    assert difference <= tolerance * (exact.square().mean().sqrt() if size is None else size), difference
