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
import twins
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


BF16 = lambda: nn.Linear(64, 64).to(torch.bfloat16)  # noqa: E731
# Base (an nn.Linear unless it is given), options of the adapter, options of patch.
CALLS: dict[str, tuple[Callable[[], nn.Module] | None, dict[str, Any], dict[str, Any]]] = {
    "fp32": (None, {}, {}),
    "bf16, fp32 adapters": (BF16, {}, {}),
    "autocast": (None, {}, {}),
    "dropout": (None, {"lora_dropout": 0.1}, {}),
    "called base": (lambda: Doubling(64, 64), {}, {}),
    "called base, dropout": (lambda: Doubling(64, 64), {"lora_dropout": 0.1}, {}),
    "DoRA": (None, {"use_dora": True}, {}),
    "two adapters": (None, {}, {}),
    "lora_bias": (None, {"lora_bias": True}, {}),
    "precision adapter": (BF16, {}, {"precision": "adapter"}),
    "no grad": (None, {}, {}),
    "reference": (None, {}, {"backend": "reference"}),
}


@pytest.mark.parametrize("kind", CALLS)
def test_frames(kind):
    base, options, how = CALLS[kind]
    net = twins.net(base or (lambda: nn.Linear(64, 64)), **options)
    if kind == "two adapters":
        peft.inject_adapter_in_model(twins.config(target_modules=["proj"]), net, adapter_name="other")
        set_adapter("default", "other")(net.proj)
    slao_kernels.patch(net, strict=True, **how)
    x = twins.input_of(net).to(net.proj.base_layer.weight.dtype)
    with torch.set_grad_enabled(kind != "no grad"), torch.autocast("cpu", torch.bfloat16, enabled=kind == "autocast"):
        net(x)  # makes the plan
        found = deepest(lambda: net(x))
    assert 3 <= len(found) <= 5, found
