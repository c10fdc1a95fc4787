"""A patched layer that has run, of every kind of plan, beside its unpatched twin."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import changes
import peft
import torch
import twins
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import slao_kernels
from slao_kernels import extension

NARROW = 2e-2  # two bf16 (or fp16) chains of one layer: a few units of 2^-8 apart

# The kinds of plan: options of the adapter, base layer.
KINDS: dict[str, tuple[dict[str, Any], Callable[[], nn.Module]]] = {
    "linear": ({}, lambda: nn.Linear(24, 20)),
    "dropout": ({"lora_dropout": 0.25}, lambda: nn.Linear(24, 20)),
    "Conv1D": ({}, lambda: Conv1D(20, 24)),
    "several": ({}, lambda: nn.Linear(24, 20, bias=False)),
    "lora_bias": ({"lora_bias": True}, lambda: nn.Linear(24, 20)),
    "DoRA": ({"use_dora": True}, lambda: nn.Linear(24, 20)),
    "called base": ({"lora_dropout": 0.25}, lambda: changes.Doubling(24, 20)),
    "extended": ({}, lambda: nn.Linear(24, 20)),
    "refused": ({}, lambda: nn.Linear(24, 20)),
    "disabled": ({}, lambda: nn.Linear(24, 20)),
}
# Plans of PEFT's own forward: what changes beside their cause need not be noticed.
PEFTS = ("refused", "disabled")


def build(kind: str, patched: bool) -> nn.Module:
    """One layer with two adapters, all of which trains; the active ones name one more that this layer does not have."""
    options, base = KINDS[kind]
    net = twins.net(base, **options)
    torch.manual_seed(3)
    other = twins.config(r=2, target_modules=["proj"], init_lora_weights=False)
    peft.inject_adapter_in_model(other, net, adapter_name="other")
    changes.set_adapter("default", "listed", *(["other"] if kind == "several" else []))(net.proj)
    if patched:
        assert slao_kernels.patch(net, strict=True).patched == ["proj"]
    if kind == "extended":
        layer = extension.extend(net.proj, "default")
        layer.slao_core = torch.randn(3, 3, generator=torch.Generator().manual_seed(4))
        layer.slao_core_delta = nn.Parameter(torch.randn(3, 3, generator=torch.Generator().manual_seed(5)))
    elif kind == "refused":
        net.proj.lora_A["default"].register_forward_hook(changes.half)
    elif kind == "disabled":
        net.proj.enable_adapters(False)
    return net


def outcome(net: nn.Module, x: Tensor) -> dict[str, Any]:
    """The result and every gradient under one seed, or the error."""

    def run() -> dict[str, Any]:
        torch.manual_seed(2)
        parameters = {name: p for name, p in net.proj.named_parameters() if p.requires_grad}
        leaves = [*parameters.values(), *([x] if x.requires_grad else [])]
        y = net(x)
        grads = torch.autograd.grad(y.float().square().sum(), leaves, allow_unused=True)
        named = {n: g for n, g in zip([*parameters, "x"], grads, strict=False) if g is not None}
        return {"type": type(y), "y": y.detach(), **named}

    return twins.attempt(run)


def compare(found: dict[str, Any], expected: dict[str, Any]) -> None:
    tensors = [value for value in expected.values() if isinstance(value, Tensor)]
    if any(value.device.type == "meta" for value in tensors):
        found, expected = (
            {n: (v.shape, v.dtype) if n != "type" else v for n, v in d.items()} for d in (found, expected)
        )
    narrow = any(value.dtype in (torch.bfloat16, torch.float16) for value in tensors)
    twins.check_close(found, expected, NARROW if narrow else twins.FP32_RATIO)


class Pair:
    """A patched net that has run once, so that it has a plan, and its unpatched twin."""

    def __init__(self, kind: str) -> None:
        self.kind, self.x = kind, twins.net_input()
        self.net, self.twin = build(kind, True), build(kind, False)
        self.settle()

    def settle(self) -> None:
        """Both alike, and the plan holds."""
        self.check(self.x)
        self.plan = self.net.proj.__dict__["slao_plan"]
        assert self.holds(self.x)

    def holds(self, x: Any) -> bool:
        return self.plan.tensors(self.net.proj.__dict__, x) is not None

    def check(self, x: Tensor) -> None:
        compare(outcome(self.net, x), outcome(self.twin, x))

    @contextmanager
    def changed(self, change: changes.Change) -> Iterator[None]:
        undos = [change(net.proj) for net in (self.net, self.twin)]
        try:
            yield
        finally:
            for undo in undos:
                undo()
