"""Which fused class a LoRA layer is swapped to, and those for PEFT's classes over quantised bases.

PEFT has a LoRA class for each kind of quantised base. Those in `_CLASSES` compute base(x) + Σ scaling · B A x, whatever
the base: each gets a subclass here that calls the base and adds the branch by one autograd node (layers.add_to_base).
It is made when first asked for, because most of PEFT's need packages of their own. Pickle asks by name, in a fresh
process too.
"""

from __future__ import annotations

import importlib
import inspect
from typing import Any

from torch import Tensor, nn

from .layers import FusedLoraLinear, FusedOptions, add_to_base

# PEFT's class, below peft.tuners.lora -> the name of ours, in this module.
_CLASSES = {
    "bnb.Linear8bitLt": "FusedLinear8bitLt",
    "bnb.Linear4bit": "FusedLinear4bit",
    "gptq.GPTQLoraLinear": "FusedGPTQLoraLinear",
    "awq.AwqLoraLinear": "FusedAwqLoraLinear",
    "aqlm.AqlmLoraLinear": "FusedAqlmLoraLinear",
    "eetq.EetqLoraLinear": "FusedEetqLoraLinear",
    "hqq.HqqLoraLinear": "FusedHqqLoraLinear",
    "inc.IncLoraLinear": "FusedIncLoraLinear",
    "torchao.TorchaoLoraLinear": "FusedTorchaoLoraLinear",
    "te.TeLinear": "FusedTeLinear",
}
_PACKAGE = "peft.tuners.lora."


def fused_class(layer: nn.Module) -> type | None:
    """The class that `layer`, PEFT's or already fused, is swapped to; None where its forward is not known."""
    own = peft_class(layer)
    if own is FusedLoraLinear.peft_class:
        return FusedLoraLinear
    name = _CLASSES.get(f"{own.__module__}.{own.__qualname__}".removeprefix(_PACKAGE))
    return None if name is None else getattr(importlib.import_module(__name__), name)


def peft_class(layer: nn.Module) -> type:
    """The class that `layer` has, or had before it was fused."""
    return type(layer).peft_class if is_fused(layer) else type(layer)


def is_fused(layer: nn.Module) -> bool:
    """Whether `patch` has swapped its class. A user's subclass of ours is something else."""
    return "peft_class" in type(layer).__dict__


def __getattr__(name: str) -> type:
    for theirs, ours in _CLASSES.items():
        if ours == name:
            module, _, cls = theirs.rpartition(".")
            # Into the module's own dictionary: the next one who asks, pickle included, gets the same class.
            return globals().setdefault(name, _make(getattr(importlib.import_module(_PACKAGE + module), cls), name))
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def _make(theirs: Any, name: str) -> type:
    kinds = [parameter.kind for parameter in inspect.signature(theirs.forward).parameters.values()]
    only_x = inspect.Parameter.VAR_POSITIONAL not in kinds

    class Fused(theirs):
        slao_options = FusedOptions("(unnamed layer)")
        peft_class = theirs
        _get_name, extra_repr = FusedLoraLinear._get_name, FusedLoraLinear.extra_repr

        def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            """As PEFT's: base(x) + Σ scaling · B A x over the active adapters. x: (..., K) -> (..., N)."""
            adapted = any(name in self.lora_A for name in self.active_adapters)
            if self.disable_adapters or self.merged_adapters or not adapted or (only_x and (args or kwargs)):
                return super().forward(x, *args, **kwargs)
            y = add_to_base(self, x, args, kwargs)
            return super().forward(x, *args, **kwargs) if y is None else y

    Fused.__name__ = Fused.__qualname__ = name
    Fused.__module__ = __name__
    Fused.__doc__ = f"PEFT's {theirs.__name__} with a fused LoRA branch; see the module."
    return Fused
