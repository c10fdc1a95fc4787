"""Other libraries' LoRA kernels on a model: they read A and B themselves, never calling the layers that patch fuses."""

from __future__ import annotations

from typing import Any

from torch import nn

# What to do about them, by the package that the kernel comes from.
_OFF = {
    "axolotl": "set every lora_*_kernel flag (lora_qkv_kernel, lora_o_kernel, lora_mlp_kernel) to false in its YAML",
    "unsloth": "load the model with transformers and peft.get_peft_model, not with FastLanguageModel",
}


def check_none(model: nn.Module) -> None:
    """ValueError, with all modules concerned, if Unsloth's or Axolotl's LoRA kernels are on the model already.

    Both put functions named apply_lora_qkv, apply_lora_o or apply_lora_mlp_<activation> on attention and MLP instances.
    """
    found: dict[str, list[str]] = {}
    for name, module in model.named_modules():
        for attribute, value in vars(module).items():
            kernel = _kernel(value)
            if kernel is not None:
                found.setdefault(kernel.__module__.split(".")[0], []).append(f"{name}.{attribute}")
    if not found:
        return
    lines = [
        f"{package} has LoRA kernels of its own on {len(where)} modules' methods ({', '.join(where[:3])}"
        f"{', ...' if len(where) > 3 else ''}); {_OFF.get(package, 'turn them off')}"
        for package, where in found.items()
    ]
    raise ValueError(
        f"two backends on one model: {'; '.join(lines)}; then patch, which would have no effect beside them"
    )


def _kernel(value: Any) -> Any:
    function = getattr(value, "__func__", value)
    name = getattr(function, "__name__", "")
    return function if callable(function) and isinstance(name, str) and name.startswith("apply_lora_") else None
