"""Axolotl's and Unsloth's LoRA kernels as contestants, where their packages are installed beside a GPU.

Both offer the same three functions over modules that carry PEFT's LoRA layers under a Llama's names:
apply_lora_o(module, x), apply_lora_qkv(module, x, inplace), apply_lora_mlp_swiglu(module, x, inplace); x is (B, L, K).
Importing Unsloth changes transformers and PEFT for the whole process, the other contestants included: for clean
figures of those, run it in a process of its own (`--rivals unsloth`, and the others with `--rivals ""`).
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from functools import cache
from types import SimpleNamespace
from typing import Any

from torch import Tensor, nn

MODULES = {"axolotl": "axolotl.kernels.lora", "unsloth": "unsloth.kernels.fast_lora"}
NAMES = {"axolotl": "Axolotl", "unsloth": "Unsloth"}


@cache
def load(wanted: str) -> tuple[dict[str, Any], dict[str, str]]:
    """(name -> kernels, name -> why it is left out) of a comma-separated wish."""
    found: dict[str, Any] = {}
    left_out: dict[str, str] = {}
    for package in filter(None, (word.strip().lower() for word in wanted.split(","))):
        if package not in MODULES:
            raise ValueError(f"--rivals: unknown {package!r}; choose from {', '.join(MODULES)}")
        if importlib.util.find_spec(package) is None:
            left_out[NAMES[package]] = "not installed"
            continue
        try:
            found[NAMES[package]] = importlib.import_module(MODULES[package])
        except Exception as error:  # whatever another project's import raises
            left_out[NAMES[package]] = f"cannot be imported: {type(error).__name__}: {error}".splitlines()[0]
    return found, left_out


def of_layers(kernels: Any, layers: list[Any]) -> Callable[[Tensor], list[Tensor]]:
    """x (M, K) -> the outputs of one LoRA layer, or of q, k and v. Not in place: x belongs to all contestants."""
    if len(layers) == 1:
        alone = SimpleNamespace(o_proj=layers[0], training=True)
        return lambda x: [kernels.apply_lora_o(alone, x[None])[0]]
    names = ("q_proj", "k_proj", "v_proj")
    attention = SimpleNamespace(**dict(zip(names, layers, strict=True)), training=True)
    return lambda x: [y[0] for y in kernels.apply_lora_qkv(attention, x[None], inplace=False)]


def fuse(model: nn.Module, kernels: Any) -> nn.Module:
    """A Llama with PEFT's LoRA, changed in place to run attention projections and MLPs on `kernels`, their way."""
    for module in list(model.modules()):
        if hasattr(module, "q_proj"):
            _fuse_attention(module, kernels)
        elif hasattr(module, "gate_proj"):
            _fuse_mlp(module, kernels)
    return model


def _fuse_attention(attention: Any, kernels: Any) -> None:
    waiting: dict[str, Tensor] = {}

    def q(x: Tensor) -> Tensor:  # transformers calls the three one by one
        y, waiting["k"], waiting["v"] = kernels.apply_lora_qkv(attention, x)
        return y

    attention.q_proj.forward = q
    attention.k_proj.forward = lambda x: waiting.pop("k")
    attention.v_proj.forward = lambda x: waiting.pop("v")
    attention.o_proj.forward = lambda x: kernels.apply_lora_o(attention, x)


def _fuse_mlp(mlp: Any, kernels: Any) -> None:
    mlp.forward = lambda x: kernels.apply_lora_mlp_swiglu(mlp, x)
