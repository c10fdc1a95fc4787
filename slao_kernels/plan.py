"""What a patched layer does with a call, and everything that this was concluded from.

The conditions under which a call is fused are many and cost tens of microseconds to ask; what they look at hardly ever
changes. So they are asked once (`layers.make_plan`), and before the plan is used again `LayerPlan.tensors` compares
what they looked at with what is there now: places that must hold the very same objects, hook dictionaries that must be
as empty as they were, and facts that must be equal. Whatever has changed, the conditions are asked again; a refusal is
a plan too.

Kept are dictionaries and modules of the layer's parts, never the layer itself, whose memory a circle would keep, nor
its tensors: those are read where they stand at every call.
"""

from __future__ import annotations

from collections.abc import Callable
from operator import is_
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from . import dispatch

_MODULE = torch.nn.modules.module
# Torch's own dictionaries, never replaced.
GLOBAL_HOOKS = (
    _MODULE._global_forward_hooks,
    _MODULE._global_forward_pre_hooks,
    _MODULE._global_backward_hooks,
    _MODULE._global_backward_pre_hooks,
)
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_OWN = ("_active_adapter", "_disable_adapters", "merged_adapters")  # of PEFT's layer
_DICTIONARIES = ("_modules", "scaling", "lora_variant")
Facts = Any
Place = tuple[dict[str, Any], str]  # a dictionary and a key in it


class LayerPlan:
    """`run(plan, layer, x, tensors, args, kwargs)` computes the call; why: the reason where it is PEFT's own forward.

    adapters: the active ones. scaled: whether their scalings go into B. transposed:
    whether the base's weight is stored (K, N). called: why the base layer is called.
    call: what the node is given beside tensors; of a called base made has it, with the result's dtype that it is for.
    """

    def __init__(self, run: Callable[..., Any], why: str | None = None, adapters: tuple[str, ...] = ()) -> None:
        self.run, self.why, self.adapters = run, why, adapters
        self.scaled = self.transposed = False
        self.call: Any = None
        self.made: tuple[torch.dtype | None, Any] = (None, None)
        self.called: str | None = None
        self.owner = 0

    def __reduce__(self) -> tuple[Callable[[], None], tuple[()]]:
        return _dropped, ()  # a copied or unpickled layer makes its own

    def watch(self, layer: Any, x: Any) -> LayerPlan:
        """Write down what the plan for this layer and x was concluded from; returns the plan."""
        own = layer.__dict__
        self.owner = id(own)
        containers, slots = _modules_of(layer)
        self.modules = [parent[key] for parent, key in slots]
        self.kinds = list(map(type, self.modules))
        same = [*containers, *slots, *((module.__dict__, "forward") for module in self.modules)]
        for name in layer.active_adapters:
            if name not in layer.lora_A:  # it may get one
                same.append((layer.lora_A._modules, name))
                continue
            same += [(own["scaling"], name), (own["lora_variant"], name)]
            same.append(place(layer.lora_A[name], "bias"))
            dropout = layer.lora_dropout[name]
            if type(dropout) is not nn.Identity:
                same += [(dropout.__dict__, "training"), (dropout.__dict__, "p")]
        tensors = [place(module, name) for module, name in parameters_of(layer)]
        same += [(holder, name) for holder, name in tensors if holder.get(name) is None]
        # Somebody may give a module another dictionary of hooks: they are looked for anew.
        hooks = [(module.__dict__, name) for module in self.modules for name in _HOOKS]
        self.hooks_from, self.tensors_from = len(same), len(same) + len(hooks)
        self.places, self.names = map(list, zip(*same, *hooks, *tensors, strict=True))
        found = list(map(dict.get, self.places, self.names))
        self.objects = [*map(own.get, _DICTIONARIES), *found[: self.hooks_from]]
        self.hooks = list(map(bool, [*found[self.hooks_from : self.tensors_from], *GLOBAL_HOOKS]))
        self.hooked = any(self.hooks)
        self.own = [_copied(own.get(name)) for name in _OWN]
        self.facts = _facts_of(found[self.tensors_from :])
        self.of_x = _of_x(x)
        device = x.device.type if isinstance(x, Tensor) else "cpu"
        self.device_type = device if torch.amp.is_autocast_available(device) else "cpu"
        self.modes = _modes(self.device_type)
        return self

    def tensors(self, own: dict[str, Any], x: Any) -> list[Any] | None:
        """The tensors of `parameters_of`, as they are now, if the plan holds for the layer of this __dict__ and x."""
        if self.owner != id(own) or list(map(own.get, _OWN)) != self.own or list(map(type, self.modules)) != self.kinds:
            return None
        found: list[Any] = list(map(dict.get, self.places, self.names))
        if not all(map(is_, [*map(own.get, _DICTIONARIES), *found], self.objects)):
            return None
        hooks = found[self.hooks_from : self.tensors_from]
        hooked = self.hooked or any(hooks) or any(GLOBAL_HOOKS)
        if hooked and list(map(bool, [*hooks, *GLOBAL_HOOKS])) != self.hooks:
            return None
        found = found[self.tensors_from :]
        if _of_x(x) != self.of_x or _facts_of(found) != self.facts or _modes(self.device_type) != self.modes:
            return None
        return found


def _dropped() -> None:
    return None


def _copied(value: Any) -> Any:
    return list(value) if isinstance(value, list) else value


def active_adapters(layer: Any) -> list[str]:
    """Those of the active adapters that the layer has."""
    return [name for name in layer.active_adapters if name in layer.lora_A]


def _modules_of(layer: Any) -> tuple[list[Place], list[Place]]:
    """Where the layer keeps the dictionaries of its parts, and every module that PEFT's forward would call."""
    parts = layer._modules
    kinds = [kind for kind in ("lora_A", "lora_B", "lora_dropout", "lora_magnitude_vector") if kind in parts]
    slots = [(parts, "base_layer")]
    for name in active_adapters(layer):
        slots += [(parts[kind]._modules, name) for kind in kinds if name in parts[kind]._modules]
    return [(parts, kind) for kind in kinds], slots


def parameters_of(layer: Any) -> list[tuple[nn.Module, str]]:
    """(module, name) of the base's weight and bias, then of each active adapter's A, B, B's bias, and magnitude."""
    found = [(layer.base_layer, "weight"), (layer.base_layer, "bias")]
    magnitudes = layer.lora_magnitude_vector
    for name in active_adapters(layer):
        down, up = layer.lora_A[name], layer.lora_B[name]
        found += [(down, "weight"), (up, "weight"), (up, "bias")]
        if name in magnitudes:
            found.append((magnitudes[name], "weight"))
    return found


def place(module: nn.Module, name: str) -> Place:
    """The dictionary that holds the module's tensor; a DataParallel replica's are plain attributes."""
    for holder in (module._parameters, module._buffers):
        if name in holder:
            return holder, name
    return module.__dict__, name


def _facts_of(tensors: list[Any]) -> Facts:
    return [None if t is None else (type(t), t.dtype, t.device, t.shape, hasattr(t, "ds_id")) for t in tensors]


def _of_x(x: Any) -> Facts:
    """What about x, but for the number of tokens, decides; equal to nothing else where x is no plain tensor."""
    if type(x) is not Tensor and type(x) is not nn.Parameter:
        return object()
    return type(x), x.dtype, x.device, x.shape[-1:]


def _modes(device_type: str) -> Facts:
    """What is switched for a whole thread or process."""
    autocast = torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else None
    transformed = torch._C._are_functorch_transforms_active(), torch._C._get_tracing_state() is None
    return autocast, *transformed, forward_ad._current_level, dispatch.forced()
