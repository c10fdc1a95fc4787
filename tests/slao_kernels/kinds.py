"""The kinds of layer that `patch` fuses, one table: how each is made, and which of our operators run in one step."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import foreign
import peft
import pytest
import torch
import twins
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import slao_kernels

LINEAR = {"lora_linear": 1, "lora_linear_backward": 1}
ADD = {"lora_add": 1, "lora_add_backward": 1}
SCALE = {"dora_norm": 1, "dora_scale": 1, "dora_scale_backward": 1}
SIZE = (foreign.K, foreign.N)

# name -> (base layer of K and N, options of the adapter). Beside these foreign.KINDS, over bases that are called.
PLAIN: dict[str, tuple[Callable[[int, int], nn.Module], dict[str, Any]]] = {
    "bias": (nn.Linear, {}),
    "no bias": (lambda k, n: nn.Linear(k, n, bias=False), {}),
    "Conv1D": (lambda k, n: Conv1D(n, k), {}),
    "rsLoRA": (nn.Linear, {"r": 5, "use_rslora": True}),
    "two adapters": (nn.Linear, {}),
    "lora_bias": (nn.Linear, {"lora_bias": True}),
    "lora_bias, no bias": (lambda k, n: nn.Linear(k, n, bias=False), {"lora_bias": True}),
    "lora_bias, Conv1D": (lambda k, n: Conv1D(n, k), {"lora_bias": True}),
    "DoRA": (nn.Linear, {"use_dora": True}),
    "DoRA, no bias": (lambda k, n: nn.Linear(k, n, bias=False), {"use_dora": True}),
    "DoRA, Conv1D": (lambda k, n: Conv1D(n, k), {"use_dora": True}),
}
KINDS = [*PLAIN, *foreign.KINDS]
# One of each way through layers.py: what `make test` runs of the grids.
FEW = ["bias", "two adapters", "lora_bias", "DoRA", "subclass of nn.Linear", "bitsandbytes, 4 bits"]
DROPPING = [kind for kind in KINDS if not kind.startswith("DoRA") and kind != "two adapters"]  # fused while training
MERGING = [
    *(kind for kind in PLAIN if kind != "lora_bias, no bias"),
    "subclass of nn.Linear",
    "bitsandbytes, 4 bits",
    "bitsandbytes, 8 bits",
    "HQQ, 8 bits",
]


def grid(values: Iterable[Any], few: Iterable[Any]) -> list[Any]:
    """`values` as parameters, those that are not among the few only in the full grids."""
    few = list(few)
    return [pytest.param(v, marks=[] if v in few else pytest.mark.exhaustive, id=str(v)) for v in values]


all_kinds = pytest.mark.parametrize("kind", grid(KINDS, FEW))


def operators(kind: str) -> dict[str, int]:
    if kind in foreign.KINDS:
        return ADD
    return {**LINEAR, **SCALE} if kind.startswith("DoRA") else LINEAR


def build(
    kind: str,
    dtype: torch.dtype = torch.float32,
    adapter: torch.dtype | None = None,
    size: tuple[int, int] = SIZE,
    **options: Any,
) -> nn.Module:
    """The same net at every call, in training mode; A, B, B's bias and the magnitude are as training leaves them.

    adapter: their dtype, the base's unless it is given.
    """
    if kind in foreign.KINDS:
        return foreign.net(kind, dtype, adapter, size, **options)
    base, own = PLAIN[kind]
    net = twins.net(lambda: base(*size), **{**own, **options})
    if kind == "two adapters":
        torch.manual_seed(4)
        other = {**options, "r": 5, "target_modules": ["proj"], "init_lora_weights": False}
        peft.inject_adapter_in_model(twins.config(**other), net, "other")
        net.proj.set_adapter(["default", "other"])
    g = torch.Generator().manual_seed(9)
    for name, parameter in net.proj.named_parameters():
        if name.endswith("magnitude_vector.default.weight"):
            parameter.data *= 1 + 0.2 * torch.randn(parameter.shape, generator=g)
        elif name.startswith("base_layer") and name.endswith("bias"):
            nn.init.normal_(parameter, std=0.3, generator=g)
        elif name.startswith("lora_B"):
            nn.init.normal_(parameter, std=1.0 if name.endswith("bias") else 0.2, generator=g)
    net.proj.to(adapter or dtype)
    net.proj.base_layer.to(dtype)
    return net


def pair(kind: str, *args: Any, precision: str = "base", **options: Any) -> tuple[nn.Module, nn.Module, Any]:
    """(patched, unpatched, report)"""
    model, twin = build(kind, *args, **options), build(kind, *args, **options)
    report = slao_kernels.patch(model, strict=True, precision=precision)
    assert (report.patched, report.skipped) == (["proj"], {})
    assert list(report.notes) == (["proj"] if kind in foreign.KINDS or _calls(kind, precision) else [])
    return model, twin, report


def _calls(kind: str, precision: str) -> bool:
    return precision == "adapter" and kind.startswith("lora_bias")


def x_of(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return twins.net_input(*(shape or (2, 5, SIZE[0])), dtype=dtype)


def compiled(net: nn.Module, **options: Any) -> Callable[[Tensor], dict[str, Tensor]]:
    """A step of the net under torch.compile, one graph each way."""
    torch._dynamo.reset()
    made = torch.compile(net, fullgraph=True, backend="aot_eager", **options)
    return lambda x: {name.removeprefix("_orig_mod."): value for name, value in twins.net_step(made, x).items()}
