"""What can happen to a LoRA layer and its parts after PEFT has made it, and what is said about it.

Each change is a function of what it changes that returns a function which undoes it. Used by the tests of reasons
(test_eligibility.py), of called bases (test_called_base.py) and of plans (test_plan.py).
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.modules import module as torch_module
from torch.nn.utils import parametrize

Undo = Callable[[], Any]
Change = Callable[[Any], Undo]


class Doubling(nn.Linear):
    """A layer that computes something else than its parent class."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class Twice(nn.Module):
    """A parametrization."""

    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


class OtherParameter(nn.Parameter):
    """A weight that is not a plain parameter, as quantised ones are."""


class Tagged(Tensor):
    """A tensor subclass, as DTensor and quantised tensors are."""


class Variant:
    """An adapter that is no plain LoRA."""

    @staticmethod
    def forward(module: nn.Module, active_adapter: str, x: Tensor, result: Tensor, **kwargs: Any) -> Tensor:
        return result + x.sum(-1, keepdim=True)


def half(module: nn.Module, *args: Any) -> Any:
    """A hook: half of the output, of the inputs, or of the result's gradients."""
    last = args[-1]
    return last / 2 if isinstance(last, Tensor) else tuple(None if part is None else part / 2 for part in last)


def half_back(module: nn.Module, dx: Any, dy: Any) -> Any:
    """A backward hook: half of what the module passes on."""
    return half(module, dx)


# --- how a change is written -----------------------------------------------------------------------------------------


def attribute(name: str, make: Callable[[Any], Any]) -> Change:
    """target.name becomes make(what it was)."""

    def apply(target: Any) -> Undo:
        before = getattr(target, name)
        setattr(target, name, make(before))
        return lambda: setattr(target, name, before)

    return apply


def item(name: str, make: Callable[[Any], Any]) -> Change:
    """target.name["default"] becomes make(what it was, or None)."""

    def apply(target: Any) -> Undo:
        items = getattr(target, name)
        before = items["default"] if "default" in items else None  # noqa: SIM401  a ModuleDict has no get
        items["default"] = make(before)

        def undo() -> None:
            if before is None:
                del items["default"]
            else:
                items["default"] = before

        return undo

    return apply


def data(name: str, dtype: torch.dtype) -> Change:
    def apply(target: Any) -> Undo:
        parameter = getattr(target, name)
        before = parameter.data
        parameter.data = before.to(dtype)
        return lambda: setattr(parameter, "data", before)

    return apply


def on(part: Callable[[Any], Any], change: Change) -> Change:
    return lambda layer: change(part(layer))


def all_of(*changes: Change) -> Change:
    def apply(target: Any) -> Undo:
        undos = [change(target) for change in changes]
        return lambda: [undo() for undo in reversed(undos)]

    return apply


# --- a module that PEFT's forward calls ------------------------------------------------------------------------------


def replace_forward(module: nn.Module) -> Undo:
    from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module

    class Half(ModelHook):
        def post_forward(self, module: nn.Module, output: Tensor) -> Tensor:
            return output / 2

    add_hook_to_module(module, Half())
    return lambda: remove_hook_from_module(module)


def other_dictionary(module: nn.Module) -> Undo:
    """As those do who take hooks off by `module._forward_hooks = OrderedDict()`; then a hook goes into the new one."""
    undo = attribute("_forward_hooks", lambda _: OrderedDict())(module)
    module.register_forward_hook(half)
    return undo


def other_class(module: Any) -> Undo:
    own = type(module)
    forward = lambda self, *args, **kwargs: 2 * own.forward(self, *args, **kwargs)  # noqa: E731
    return attribute("__class__", lambda _: type("Other", (own,), {"forward": forward}))(module)


def partitioned(module: Any) -> Undo:
    """As DeepSpeed's ZeRO-3 marks what it partitions."""
    weight = module.weight
    weight.ds_id = 0
    return lambda: delattr(weight, "ds_id")


def parametrized(module: nn.Module) -> Undo:
    parametrize.register_parametrization(module, "weight", Twice())
    return lambda: parametrize.remove_parametrizations(module, "weight", leave_parametrized=False)


# What can happen to any module, and to one with a weight; {} is how a reason names the module.
OF_A_MODULE: dict[str, tuple[Change, str]] = {
    "hook": (lambda m: m.register_forward_hook(half).remove, "{} has hooks"),
    "pre-hook": (lambda m: m.register_forward_pre_hook(half).remove, "{} has hooks"),
    "backward hook": (lambda m: m.register_full_backward_hook(half_back).remove, "{} has hooks"),
    "backward pre-hook": (lambda m: m.register_full_backward_pre_hook(half).remove, "{} has hooks"),
    "other dictionary of hooks": (other_dictionary, "{} has hooks"),
    "forward replaced": (replace_forward, "{}'s forward was replaced on the instance (accelerate hooks?)"),
}
OF_A_WEIGHT: dict[str, tuple[Change, str]] = {
    "ZeRO-3": (partitioned, "{}'s weight is partitioned by DeepSpeed ZeRO-3"),
    "other parameter": (
        attribute("weight", lambda weight: OtherParameter(weight.detach() * 1.5)),
        "{}'s weight is a OtherParameter",
    ),
}
GLOBAL_HOOKS: dict[str, Change] = {
    "forward": lambda _: torch_module.register_module_forward_hook(half).remove,
    "pre": lambda _: torch_module.register_module_forward_pre_hook(half).remove,
    "backward": lambda _: torch_module.register_module_full_backward_hook(half_back).remove,
    "backward pre": lambda _: torch_module.register_module_full_backward_pre_hook(half).remove,
}
PARTS: dict[str, Callable[[Any], Any]] = {
    "base": lambda layer: layer.base_layer,
    "lora_A": lambda layer: layer.lora_A["default"],
    "lora_B": lambda layer: layer.lora_B["default"],
    "lora_dropout": lambda layer: layer.lora_dropout["default"],
    "lora_magnitude_vector": lambda layer: layer.lora_magnitude_vector["default"],
}


def of_parts(layer: Any) -> Iterator[tuple[str, Change]]:
    """Everything that can happen to the modules that PEFT's forward of this layer calls, and to their tensors."""
    names = [name for name in PARTS if name == "base" or "default" in getattr(layer, name)]
    for name in names:
        part, module = PARTS[name], PARTS[name](layer)
        tensors = [key for key, value in module._parameters.items() if value is not None]
        for what, (change, _) in (OF_A_MODULE | (OF_A_WEIGHT if tensors else {})).items():
            yield f"{name}: {what}", on(part, change)
        yield f"{name}: class", on(part, other_class)
        if tensors:
            yield f"{name}: parametrized", on(part, parametrized)
        if name == "base":
            yield "base: another module", attribute("base_layer", copy.deepcopy)
        else:
            yield f"{name}: another module", item(name, copy.deepcopy)
            yield f"{name}: another ModuleDict", attribute(name, copy.deepcopy)
        for key in tensors:
            for what, make in {
                "meta": lambda t: nn.Parameter(t.to("meta")),
                "shape": lambda t: nn.Parameter(t.detach()[:-1].clone()),
                "type": lambda t: OtherParameter(t.detach() * 1.5),
            }.items():
                yield f"{name}.{key}: {what}", on(part, attribute(key, make))
            if key == "bias" and isinstance(module, nn.Linear):  # Conv1D's own forward needs one
                yield f"{name}.bias: none", on(part, attribute(key, lambda _: None))
    for dtype in (torch.bfloat16, torch.float64):
        both = [data(key, dtype) for key, value in layer.base_layer._parameters.items() if value is not None]
        yield f"base: {dtype}", on(PARTS["base"], all_of(*both))
        wide = [on(PARTS[name], data("weight", dtype)) for name in ("lora_A", "lora_B")]
        if layer.lora_B["default"].bias is not None:
            wide.append(on(PARTS["lora_B"], data("bias", dtype)))
        if not hasattr(layer, "slao_core"):  # which has the adapter's dtype
            yield f"adapter: {dtype}", all_of(*wide)
    for name in names:
        if name in ("base", "lora_A", "lora_B") and getattr(PARTS[name](layer), "bias", None) is None:
            width = PARTS[name](layer).weight.shape[0]
            appears = attribute("bias", lambda _, width=width: nn.Parameter(torch.ones(width)))
            yield f"{name}.bias: one", on(PARTS[name], appears)


# --- the layer's own state -------------------------------------------------------------------------------------------


def set_adapter(*names: str) -> Change:
    def apply(layer: Any) -> Undo:
        before = list(layer.active_adapters)

        def activate(active: list[str]) -> None:
            layer.set_adapter(active)
            layer.requires_grad_(True)

        activate(list(names))
        return lambda: activate(before)

    return apply


def in_the_list(layer: Any) -> Undo:
    layer._active_adapter.append("other")
    return layer._active_adapter.pop


def appears_where_listed(layer: Any) -> Undo:
    """An adapter that other layers have, active by name here, gets an A and B here too."""
    parts = [getattr(layer, name)._modules for name in ("lora_A", "lora_B", "lora_dropout")]
    for part in parts:
        part["listed"] = part["other"]
    layer.scaling["listed"] = layer.scaling["other"]
    return lambda: [part.pop("listed") for part in [*parts, layer.scaling]]


def training(layer: Any) -> Undo:
    layer.train(not layer.training)
    return lambda: layer.train(not layer.training)


def enabled(layer: Any) -> Undo:
    def turn() -> None:
        layer.enable_adapters(layer.disable_adapters)
        layer.requires_grad_(True)

    turn()
    return turn


def merged(layer: Any) -> Undo:
    layer.merge()
    return layer.unmerge


def of_the_layer(layer: Any) -> Iterator[tuple[str, Change]]:
    yield "scaling", item("scaling", lambda s: 3 * s)
    yield "scaling: a tensor", item("scaling", lambda s: torch.tensor(3 * s))
    yield "scaling: another dictionary", attribute("scaling", lambda old: {name: 3 * s for name, s in old.items()})
    yield "variant", item("lora_variant", lambda _: Variant())
    yield "variant: another dictionary", attribute("lora_variant", lambda _: {"default": Variant()})
    yield "dropout", item("lora_dropout", lambda _: nn.Dropout(0.5))
    if type(layer.lora_dropout["default"]) is nn.Dropout:
        yield "dropout: p", on(PARTS["lora_dropout"], attribute("p", lambda _: 0.5))
        yield "training", training
    if not hasattr(layer, "slao_core"):  # whose adapter cannot be active beside another
        yield "adapters: both", set_adapter("other", "default")
        yield "adapters: in place", in_the_list
        yield "adapters: one more that was listed", appears_where_listed
    yield "adapters: the other", set_adapter("other")
    yield "adapters: none", set_adapter()
    yield "enabled", enabled
    yield "merged", merged


def of_hooks(layer: Any) -> Iterator[tuple[str, Change]]:
    for name, change in GLOBAL_HOOKS.items():
        yield f"global hook: {name}", change


# --- the process -----------------------------------------------------------------------------------------------------


def forward_mode(run: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(run(forward_ad.make_dual(x, torch.ones_like(x)))).tangent


TRANSFORMS: dict[str, Callable[[Callable[[Tensor], Tensor], Tensor], Tensor]] = {
    "grad": lambda run, x: torch.func.grad(lambda v: run(v).square().sum())(x),
    "vmap": lambda run, x: torch.func.vmap(run, randomness="different")(x),
    "jvp": lambda run, x: torch.func.jvp(run, (x,), (torch.ones_like(x),))[1],
    "forward mode": forward_mode,
}
