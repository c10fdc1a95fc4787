"""Adding a LoRA adapter to a plain model through PEFT, and taking it out again."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch import nn

if TYPE_CHECKING:
    from peft import LoraConfig

ADAPTER = "default"
# What must agree for a second `patch(model, config)` to mean the adapter that is there already.
_IDENTITY = ("r", "lora_alpha", "lora_dropout", "use_rslora", "use_dora", "lora_bias", "rank_pattern", "alpha_pattern")
# The modules that PEFT trains and saves beside the adapter for a model of that task, where it has them.
_HEADS = {"SEQ_CLS": ("classifier", "score"), "TOKEN_CLS": ("classifier", "score"), "QUESTION_ANS": ("qa_outputs",)}
_ATTRIBUTES = ("peft_config", "_hf_peft_config_loaded")  # what PEFT and transformers set on the model itself


def inject(model: nn.Module, config: LoraConfig | None) -> Callable[[], None]:
    """Inject `config` in place, its weights in fp32; returns a function that takes the adapter out again.

    Raises ValueError, with the model as it was, when there is nothing to inject into: no config and no transformers
    model, or no layer matches.
    """
    from peft import LoraConfig, inject_adapter_in_model
    from peft.tuners.tuners_utils import cast_adapter_dtype
    from transformers import PreTrainedModel

    is_transformers = isinstance(model, PreTrainedModel)
    if config is None:
        if not is_transformers:
            raise ValueError(
                f"{type(model).__name__} has no LoRA layers and is no transformers model: there is nothing to patch; "
                "pass a peft.LoraConfig with target_modules, or a model that has an adapter"
            )
        config = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear")
    if not isinstance(config, LoraConfig):
        raise ValueError(f"config is a {type(config).__name__}, expected a peft.LoraConfig")
    config = copy.deepcopy(config)  # PEFT writes the layers that it found into it
    _add_heads(model, config)
    undo = _undo(model)
    try:
        if is_transformers:
            # The model's own method: it also tells save_pretrained and the Trainer that an adapter is there.
            model.add_adapter(config, adapter_name=ADAPTER)
        else:
            inject_adapter_in_model(config, model, adapter_name=ADAPTER)
        # As get_peft_model does: in 16 bits an optimiser's small steps would vanish.
        cast_adapter_dtype(model, adapter_name=ADAPTER)
    except Exception as error:
        undo()
        if isinstance(error, ValueError):
            raise ValueError(f"no LoRA adapter could be injected into {type(model).__name__}: {error}") from error
        raise
    return undo


def _add_heads(model: nn.Module, config: LoraConfig) -> None:
    """Name the head of the config's task type in its modules_to_save, as get_peft_model does."""
    task = str(getattr(config.task_type, "value", config.task_type))
    named = {name.rpartition(".")[2] for name, _ in model.named_modules()}
    heads = [head for head in _HEADS.get(task, ()) if head in named]
    if task in _HEADS and not heads and not config.modules_to_save:
        raise ValueError(
            f"task_type {task!r} trains the head {' or '.join(_HEADS[task])}, and {type(model).__name__} has none of "
            "that name: put the name of its head into modules_to_save, or leave task_type out"
        )
    if heads:
        config.modules_to_save = list(dict.fromkeys([*(config.modules_to_save or []), *heads]))


def check_same(model: nn.Module, config: LoraConfig) -> None:
    """ValueError if `config` asks for another adapter than the model already carries."""
    there: Any = getattr(model, "peft_config", {}).get(ADAPTER)
    if there is None:
        raise ValueError("the model has LoRA layers already: leave config out, or pass a model without an adapter")
    differing = [
        f"{key} {getattr(there, key, None)} (config: {getattr(config, key, None)})"
        for key in _IDENTITY
        if getattr(there, key, None) != getattr(config, key, None)
    ]
    differing += _differing_targets(model, config)
    if differing:
        raise ValueError(
            f"the model already has a LoRA adapter with other settings: {', '.join(differing)}; leave config out"
        )


def _differing_targets(model: nn.Module, config: LoraConfig) -> list[str]:
    """At most one line: layers that `config` does not name but that are adapted, or the other way round."""
    if config.target_modules in (None, "all-linear"):  # PEFT resolves these against a model without adapters
        return []
    from peft import PeftModel
    from peft.tuners.tuners_utils import check_target_module_exists

    from .adapters import lora_layers

    root = model.base_model.model if isinstance(model, PeftModel) else model  # where target_modules' names begin
    adapted = {name for name, _ in lora_layers(root)}
    wanted = {
        name
        for name, _ in root.named_modules()
        if name
        and check_target_module_exists(config, name)
        and not any(name.startswith(f"{layer}.") for layer in adapted)
    }
    if wanted == adapted or config.target_parameters:
        return []
    return [f"target_modules {sorted(adapted - wanted)[:4]} (config: {sorted(wanted - adapted)[:4]})"]


def _undo(model: nn.Module) -> Callable[[], None]:
    """A function that gives `model` the modules, weights and trainability back that it has now.

    No tensor is copied: PEFT's initialisations that change the base weight (PiSSA) give it a new storage. The one
    that does not, "olora" on an fp32 model, is not undone.
    """
    children = [(module, dict(module._modules)) for module in model.modules()]
    parameters = [(parameter, parameter.data, parameter.requires_grad) for parameter in model.parameters()]
    attributes = {key: model.__dict__[key] for key in _ATTRIBUTES if key in model.__dict__}

    def undo() -> None:
        for module, before in children:
            module._modules.clear()
            module._modules.update(before)
        for parameter, data, requires_grad in parameters:
            if type(parameter) is nn.Parameter and parameter.data_ptr() != data.data_ptr():
                parameter.data = data
            parameter.requires_grad_(requires_grad)
        for key in _ATTRIBUTES:
            model.__dict__.pop(key, None)
        model.__dict__.update(attributes)

    return undo
