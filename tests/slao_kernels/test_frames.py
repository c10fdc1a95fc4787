"""How deep a patched layer's call goes in Python, which is most of what a small layer costs: frames, not times."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import peft
import pytest
import torch
from changes import Doubling, set_adapter
from torch import nn

import slao_kernels

pytestmark = pytest.mark.usefixtures("one_thread")

PACKAGE = str(Path(slao_kernels.__file__).parent)
# The operators' own work. What they call among themselves (a view, a block of rows) is not counted.
PRODUCTS = ("products.py", "precise.py", "cpu.py", "reference.py")


def deepest(call: Callable[[], Any]) -> list[str]:
    """Our frames below a layer's forward, down to the first of the products: the longest list there is."""
    found: list[str] = []

    def profile(frame: FrameType | None, event: str, _: Any) -> None:
        nonlocal found
        if event != "call" or frame is None or not frame.f_code.co_filename.startswith(PACKAGE):
            return
        names: list[str] = []
        while frame is not None:
            file = frame.f_code.co_filename
            if file.startswith(PACKAGE):
                if file.endswith("layers.py") and frame.f_code.co_name == "forward":
                    if len(names) > len(found):
                        found = names[::-1]
                    return
                if names and Path(file).name in PRODUCTS:
                    return
                names.append(f"{Path(file).name}:{frame.f_code.co_name}")
            frame = frame.f_back

    sys.setprofile(profile)
    try:
        call()
    finally:
        sys.setprofile(None)
    return found


# Options of the adapter, base, options of patch.
CALLS: dict[str, tuple[dict[str, Any], Callable[[], nn.Module], dict[str, Any]]] = {
    "fp32": ({}, lambda: nn.Linear(64, 64), {}),
    "bf16, fp32 adapters": ({}, lambda: nn.Linear(64, 64).to(torch.bfloat16), {}),
    "autocast": ({}, lambda: nn.Linear(64, 64), {}),
    "dropout": ({"lora_dropout": 0.1}, lambda: nn.Linear(64, 64), {}),
    "called base": ({}, lambda: Doubling(64, 64), {}),
    "called base, dropout": ({"lora_dropout": 0.1}, lambda: Doubling(64, 64), {}),
    "DoRA": ({"use_dora": True}, lambda: nn.Linear(64, 64), {}),
    "two adapters": ({}, lambda: nn.Linear(64, 64), {}),
    "lora_bias": ({"lora_bias": True}, lambda: nn.Linear(64, 64), {}),
    "precision adapter": ({}, lambda: nn.Linear(64, 64).to(torch.bfloat16), {"precision": "adapter"}),
    "no grad": ({}, lambda: nn.Linear(64, 64), {}),
    "reference": ({}, lambda: nn.Linear(64, 64), {"backend": "reference"}),
}


@pytest.mark.parametrize("kind", CALLS)
def test_frames(kind, twins):
    options, base, how = CALLS[kind]
    net = twins.net(base, **options)
    if kind == "two adapters":
        peft.inject_adapter_in_model(twins.config(target_modules=["proj"]), net, adapter_name="other")
        set_adapter("default", "other")(net.proj)
    slao_kernels.patch(net, strict=True, **how)
    x = twins.net_input(2, 5, 64, dtype=net.proj.base_layer.weight.dtype)
    with torch.set_grad_enabled(kind != "no grad"), torch.autocast("cpu", torch.bfloat16, enabled=kind == "autocast"):
        net(x)  # makes the plan
        found = deepest(lambda: net(x))
    assert 3 <= len(found) <= 5, found
