"""Adding a LoRA adapter to a plain model through PEFT, and taking it out again."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

if TYPE_CHECKING:
    from peft import LoraConfig

ADAPTER = "default"
# What must agree for a second `patch(model, config)` to mean the adapter that is there already.
_IDENTITY = ("r", "lora_alpha", "lora_dropout", "use_rslora", "use_dora", "lora_bias")


def inject(model: nn.Module, config: LoraConfig | None) -> Callable[[], None]:
    """Inject `config` in place, its weights in fp32; returns a function that takes the adapter out again.

    Raises ValueError when there is nothing to inject into: no config and no transformers model, or no layer matches.
    """
    from peft import LoraConfig, inject_adapter_in_model
    from transformers import PreTrainedModel

    is_transformers = isinstance(model, PreTrainedModel)
    if config is None:
        if not is_transformers:
            raise ValueError(
                f"{type(model).__name__} has no LoRA layers and is no transformers model: there is nothing to patch; "
                "pass a peft.LoraConfig with target_modules, or a model that has an adapter"
            )
        config = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear")
    trainable = {parameter: parameter.requires_grad for parameter in model.parameters()}
    try:
        if is_transformers:
            # The model's own method: it also tells save_pretrained and the Trainer that an adapter is there.
            model.add_adapter(config, adapter_name=ADAPTER)
        else:
            inject_adapter_in_model(config, model, adapter_name=ADAPTER)
    except ValueError as error:
        _remove(model, trainable)
        raise ValueError(f"no LoRA adapter could be injected into {type(model).__name__}: {error}") from error
    _widen(model)
    return lambda: _remove(model, trainable)


def check_same(model: nn.Module, config: LoraConfig) -> None:
    """ValueError if `config` asks for another adapter than the model already carries."""
    there: Any = getattr(model, "peft_config", {}).get(ADAPTER)
    if there is None:
        raise ValueError("the model has LoRA layers already: leave config out, or pass a model without an adapter")
    differing = [key for key in _IDENTITY if getattr(there, key, None) != getattr(config, key, None)]
    if differing:
        what = ", ".join(
            f"{key} {getattr(there, key, None)} (config: {getattr(config, key, None)})" for key in differing
        )
        raise ValueError(f"the model already has a LoRA adapter with other settings: {what}; leave config out")


def _widen(model: nn.Module) -> None:
    """16-bit adapter weights to fp32, as `get_peft_model` does: an optimiser's small steps vanish in 16 bits."""
    from .adapters import find_pairs

    for pair in find_pairs(model, ADAPTER)[0]:
        for parameter in pair.parameters:
            if parameter.dtype in (torch.bfloat16, torch.float16):
                parameter.data = parameter.data.float()


def _remove(model: nn.Module, trainable: dict[nn.Parameter, bool]) -> None:
    from .adapters import lora_layers

    for name, layer in list(lora_layers(model)):
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, layer.base_layer)
    for parameter, flag in trainable.items():
        parameter.requires_grad_(flag)
    model.__dict__.pop("peft_config", None)
    if getattr(model, "_hf_peft_config_loaded", False):
        model._hf_peft_config_loaded = False
