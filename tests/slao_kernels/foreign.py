"""LoRA layers over bases that are no plain nn.Linear, a net for each kind; what needs a package is skipped without it.

"stand-in" kinds put PEFT's own LoRA class (which needs no package for that) over `Quantised`, which really quantises;
"made up" ones have a package made up for PEFT's class to exist beside: its class and dispatch are the real ones.
"""

from __future__ import annotations

import importlib
import sys
import warnings
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any
from unittest import mock

import peft
import pytest
import torch
import torch.nn.functional as F
import twins
from changes import Doubling
from peft import import_utils
from torch import Tensor, nn

K, N = 64, 32  # in eval mode bitsandbytes packs 4 bits in whole blocks of 64 × 32


class Quantised(nn.Module):
    """8-bit rows and a scale each: what GPTQ, AWQ, AQLM and others come to. No `weight`, as theirs."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        weight = linear.weight.detach()
        scale = weight.abs().amax(1, keepdim=True) / 127
        self.register_buffer("qweight", (weight / scale).round().to(torch.int8))
        self.register_buffer("scale", scale)
        self.register_buffer("bias", linear.bias.detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, (self.qweight * self.scale).to(x.dtype), self.bias.to(x.dtype))


class Packed(Quantised):
    """With a weight of integers."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear)
        self.weight = nn.Parameter(self.qweight, requires_grad=False)


class Net(twins.Net):
    """What unpickles one imports this module, which makes up packages."""


def config(**options: Any) -> peft.LoraConfig:
    return twins.config(**{"target_modules": ["proj"], "init_lora_weights": False, **options})


def injected(base: nn.Module, **options: Any) -> Net:
    net = Net(base)
    for key in [key for key in options if key.startswith("is_loaded")]:
        setattr(net, key, options.pop(key))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return peft.inject_adapter_in_model(config(**options), net)


def stand_in(path: str) -> Callable[..., Net]:
    def make(linear: nn.Linear, dtype: torch.dtype, **options: Any) -> Net:
        module, _, name = path.rpartition(".")
        cls = getattr(importlib.import_module(f"peft.tuners.lora.{module}"), name)
        made = config(**options)
        return Net(cls(Quantised(linear), "default", config=made, r=made.r, lora_alpha=made.lora_alpha))

    return make


def subclass(linear: nn.Linear, dtype: torch.dtype, **options: Any) -> Net:
    base = Doubling(linear.in_features, linear.out_features)
    base.load_state_dict(linear.state_dict())
    return injected(base.to(dtype), **options)


def bitsandbytes(bits: int) -> Callable[..., Net]:
    def make(linear: nn.Linear, dtype: torch.dtype, **options: Any) -> Net:
        bnb = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
        if bits == 4:
            base = bnb.nn.Linear4bit(linear.in_features, linear.out_features, compute_dtype=dtype, quant_type="nf4")
        else:
            base = bnb.nn.Linear8bitLt(linear.in_features, linear.out_features, has_fp16_weights=False)
        base.load_state_dict(linear.state_dict())
        base = base.to("cpu")  # this quantises
        assert base.weight.dtype == (torch.uint8 if bits == 4 else torch.int8)
        base.bias.data = base.bias.data.to(dtype)
        return injected(base.requires_grad_(False), **{f"is_loaded_in_{bits}bit": True}, **options)

    return make


def torchao(linear: nn.Linear, dtype: torch.dtype, **options: Any) -> Net:
    pytest.importorskip("torchao", reason="torchao is not installed")
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    base = nn.Sequential(nn.Linear(linear.in_features, linear.out_features))
    base[0].load_state_dict(linear.state_dict())
    base.to(dtype).requires_grad_(False)
    quantize_(base, Int8WeightOnlyConfig())
    return injected(base[0], **options)


def made_up(name: str, package: str, layer: str) -> Callable[..., Net]:
    """Over a package that cannot be installed here: there while PEFT asks for it, here when it defines its class."""
    parts = package.split(".")
    modules = {name: ModuleType(name) for name in (".".join(parts[: i + 1]) for i in range(len(parts)))}
    for key, module in modules.items():
        module.__spec__ = ModuleSpec(key, None)
    setattr(modules[package], layer, Packed)
    available = getattr(import_utils, f"is_{name}_available")

    def make(linear: nn.Linear, dtype: torch.dtype, **options: Any) -> Net:
        with mock.patch.dict(sys.modules, modules):
            available.cache_clear()
            made = injected(Packed(linear), **options)
        available.cache_clear()
        return made

    with mock.patch.dict(sys.modules, modules):
        available.cache_clear()
        importlib.reload(importlib.import_module(f"peft.tuners.lora.{name}"))
    available.cache_clear()
    return make


def hqq(linear: nn.Linear, dtype: torch.dtype, **options: Any) -> Net:
    pytest.importorskip("hqq", reason="hqq is not installed")
    from hqq.core.quantize import BaseQuantizeConfig, HQQLinear

    settings = BaseQuantizeConfig(nbits=8, group_size=8)
    base = HQQLinear(linear, settings, compute_dtype=dtype, device="cpu", del_orig=False)
    return injected(base, **options)


INC = "neural_compressor.torch.algorithms.fp8_quant._quant_common.helper_modules"
# kind -> (the fused class, how it is made)
KINDS: dict[str, tuple[str, Callable[..., Net]]] = {
    "subclass of nn.Linear": ("FusedLoraLinear", subclass),
    "GPTQ, stand-in": ("FusedGPTQLoraLinear", stand_in("gptq.GPTQLoraLinear")),
    "AWQ, stand-in": ("FusedAwqLoraLinear", stand_in("awq.AwqLoraLinear")),
    "AQLM, stand-in": ("FusedAqlmLoraLinear", stand_in("aqlm.AqlmLoraLinear")),
    "Transformer Engine, stand-in": ("FusedTeLinear", stand_in("te.TeLinear")),
    "EETQ, made up": ("FusedEetqLoraLinear", made_up("eetq", "eetq", "EetqLinear")),
    "INC, made up": ("FusedIncLoraLinear", made_up("inc", INC, "PatchedLinear")),
    "bitsandbytes, 4 bits": ("FusedLinear4bit", bitsandbytes(4)),
    "bitsandbytes, 8 bits": ("FusedLinear8bitLt", bitsandbytes(8)),
    "torchao, int8": ("FusedTorchaoLoraLinear", torchao),
    "HQQ, 8 bits": ("FusedHqqLoraLinear", hqq),
}


def net(
    kind: str,
    dtype: torch.dtype = torch.float32,
    adapter: torch.dtype | None = None,
    size: tuple[int, int] = (K, N),
    **options: Any,
) -> Net:
    """The same net at every call, with an adapter that is not zero, in training mode. adapter: A's and B's dtype."""
    torch.manual_seed(0)
    linear = nn.Linear(*size)
    torch.manual_seed(1)
    made = KINDS[kind][1](linear, dtype, **options)
    torch.manual_seed(2)
    for name, parameter in made.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter, std=0.2)
            parameter.data = parameter.data.to(adapter or dtype)
    return made.train()
