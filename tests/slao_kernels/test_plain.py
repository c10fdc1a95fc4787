"""The common case's checks: in C and in Python they give the same answer, whatever has been done to a layer."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode

import slao_kernels
from slao_kernels import native, plain
from slao_kernels.ops.lora_linear import native_layer

MISSING = native.why_not("cpu") or native.why_not_lora("cpu")
needs_core = pytest.mark.skipif(MISSING is not None, reason=str(MISSING))


class Mode(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


class Subclass(nn.Linear):
    pass


class SubTensor(Tensor):
    pass


def layer_of(r: int = 3, dtype: torch.dtype = torch.float32, adapters: torch.dtype | None = None, **options) -> Any:
    model = nn.Sequential(nn.Linear(6, 10, bias=options.pop("bias", True)))
    peft_model = peft.get_peft_model(model.to(dtype), peft.LoraConfig(r=r, target_modules=["0"], **options))
    layer = peft_model.base_model.model[0].train()
    for part in (layer.lora_A, layer.lora_B):
        part.to(adapters or dtype)
    slao_kernels.patch(peft_model)
    return layer


def parameter(where: Callable[[Any], nn.Module], change: Callable[[nn.Module], None]) -> Callable[[Any], None]:
    return lambda layer: change(where(layer))


PARTS: dict[str, Callable[[Any], nn.Module]] = {
    "base": lambda layer: layer.base_layer,
    "down": lambda layer: layer.lora_A["default"],
    "up": lambda layer: layer.lora_B["default"],
    "dropout": lambda layer: layer.lora_dropout["default"],
}
HOOKS: dict[str, Callable[[nn.Module], Any]] = {
    "forward hook": lambda module: module.register_forward_hook(lambda *_: None),
    "forward pre-hook": lambda module: module.register_forward_pre_hook(lambda *_: None),
    "backward hook": lambda module: module.register_full_backward_hook(lambda *_: None),
    "backward pre-hook": lambda module: module.register_full_backward_pre_hook(lambda *_: None),
    "own forward": lambda module: setattr(module, "forward", module.forward),
}


def two_active(layer: Any) -> None:
    layer._active_adapter = ["default", "other"]


def transposed(name: str) -> Callable[[Any], None]:
    def change(layer: Any) -> None:
        weight = getattr(layer, name)["default"].weight
        weight.data = weight.data.t().contiguous().t()

    return change


def resized(layer: Any) -> None:
    layer.lora_A["default"].weight.data = torch.randn(4, 6)


def subclassed_base(layer: Any) -> None:
    layer.base_layer.__class__ = Subclass


# What is done to a layer, and whether it is still the common case.
CHANGES: dict[str, tuple[Callable[[Any], Any], bool]] = {
    "nothing": (lambda layer: None, True),
    "an integer scaling": (lambda layer: layer.scaling.update(default=2), True),
    "a tensor as scaling": (lambda layer: layer.scaling.update(default=torch.tensor(2.0)), False),
    "active by a list": (lambda layer: setattr(layer, "_active_adapter", ["default"]), True),
    "two active": (two_active, False),
    "none active": (lambda layer: setattr(layer, "_active_adapter", []), False),
    "one that is not there active": (lambda layer: setattr(layer, "_active_adapter", "other"), False),
    "disabled": (lambda layer: layer.enable_adapters(False), False),
    "merged": (lambda layer: layer.merge(), False),
    "a variant": (lambda layer: layer.lora_variant.update(default=object()), False),
    "A transposed": (transposed("lora_A"), True),
    "B transposed": (transposed("lora_B"), True),
    "A of another rank": (resized, False),
    "a subclass as base": (subclassed_base, False),
    "A partitioned": (lambda layer: setattr(layer.lora_A["default"].weight, "ds_id", 1), False),
    "the weight partitioned": (lambda layer: setattr(layer.base_layer.weight, "ds_id", 1), False),
    "a mark on the weight": (lambda layer: setattr(layer.base_layer.weight, "mark", 1), True),
    "a bias of another dtype": (lambda layer: setattr(layer.base_layer.bias, "data", torch.zeros(10).double()), False),
    "a weight in bf16": (lambda layer: layer.base_layer.to(torch.bfloat16), False),
    "A in bf16": (lambda layer: layer.lora_A.to(torch.bfloat16), True),
    "integer B": (
        lambda layer: setattr(layer.lora_B["default"], "weight", nn.Parameter(torch.ones(10, 3).int(), False)),
        False,
    ),
    "trained base": (lambda layer: layer.base_layer.requires_grad_(True), True),
}
CHANGES |= {f"{kind} on {part}": (parameter(PARTS[part], HOOKS[kind]), False) for kind in HOOKS for part in PARTS}

INPUTS: dict[str, tuple[Tensor, bool]] = {
    "2-D": (torch.randn(5, 6), True),
    "3-D": (torch.randn(2, 5, 6), True),
    "1-D": (torch.randn(6), True),
    "empty": (torch.randn(0, 6), True),
    "with a gradient": (torch.randn(5, 6, requires_grad=True), True),
    "not contiguous": (torch.randn(6, 5).t(), True),
    "0-D": (torch.tensor(1.0), False),
    "of another width": (torch.randn(5, 7), False),
    "of another dtype": (torch.randn(5, 6).double(), False),
    "of integers": (torch.ones(5, 6).int(), False),
    "on meta": (torch.randn(5, 6, device="meta"), False),
    "a subclass": (torch.randn(5, 6).as_subclass(SubTensor), False),
    "a parameter": (nn.Parameter(torch.randn(5, 6)), False),
}


@contextmanager
def a_global_hook():
    handle = nn.modules.module.register_module_forward_hook(lambda *_: None)
    yield
    handle.remove()


AROUND: dict[str, tuple[Callable[[], AbstractContextManager[Any]], bool]] = {
    "no grad": (torch.no_grad, True),
    "inference": (torch.inference_mode, True),
    "autocast": (lambda: torch.autocast("cpu", dtype=torch.bfloat16), False),
    "autocast of another device": (lambda: torch.autocast("cuda", enabled=False), True),
    "forward-mode": (forward_ad.dual_level, False),
    "a global hook": (a_global_hook, False),
    "a dispatch mode": (Mode, True),
    "nothing": (nullcontext, True),
}


def agree(layer: Any, x: Any, common: bool) -> int:
    """Both say the same, of the same tensors, and what was expected; returns the code."""
    found, expected = plain.plain_call(layer.__dict__, x), plain.in_python(layer.__dict__, x)
    assert (found is not None) == (expected is not None) == common
    if found is None or expected is None:
        return 0
    assert all(a is b for a, b in zip(found[:5], expected[:5], strict=True))
    return found[5]


@needs_core
def test_the_core_answers():
    assert plain.plain_call is native.core().plain_call


@needs_core
@pytest.mark.parametrize("change", CHANGES)
def test_changes_of_a_layer(change):
    do, common = CHANGES[change]
    layer = layer_of()
    do(layer)
    served = agree(layer, torch.randn(5, 6), common) > 0
    assert served == (common and change not in ("A transposed", "B transposed", "A in bf16"))


@needs_core
@pytest.mark.parametrize("kind", INPUTS)
def test_inputs(kind):
    x, common = INPUTS[kind]
    served = agree(layer_of(), x, common) > 0
    assert served == (common and kind != "not contiguous")


@needs_core
@pytest.mark.parametrize("where", AROUND)
def test_what_is_around_the_call(where):
    make, common = AROUND[where]
    layer, x = layer_of(), torch.randn(5, 6)
    with make():
        served = agree(layer, x, common) > 0
    assert served == (common and where != "a dispatch mode")


@needs_core
def test_while_torch_looks_on():
    """Inside vmap and under torch.jit.trace the fused node must not be taken."""
    layer, seen = layer_of(), []

    def look(x: Tensor) -> Tensor:
        seen.append(
            (plain.plain_call(layer.__dict__, torch.ones(5, 6)), plain.in_python(layer.__dict__, torch.ones(5, 6)))
        )
        return x * 2

    torch.vmap(look)(torch.ones(3))
    torch.jit.trace(look, torch.ones(3), check_trace=False)
    assert seen == [(None, None)] * 2


@needs_core
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("r", [1, 32, 65])
@pytest.mark.parametrize("adapters", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_the_code_is_what_the_core_serves(dtype, adapters, r, bias):
    layer = layer_of(r, dtype, adapters, bias=bias)
    x = torch.randn(5, 6, dtype=dtype)
    base, A, B = layer.base_layer, layer.lora_A["default"].weight, layer.lora_B["default"].weight
    assert agree(layer, x, True) == native_layer.served(x, base.weight, base.bias, A, B)


@pytest.mark.parametrize("own", [{}, {"_active_adapter": "default"}, None, 3])
@needs_core
def test_anything_else_is_no_crash(own):
    """What is no layer's dictionary is no common case, or is refused."""
    if isinstance(own, dict):
        assert plain.plain_call(own, torch.ones(2)) is None
    else:
        with pytest.raises(TypeError, match="plain_call"):
            plain.plain_call(own, torch.ones(2))
