"""fold_(keep=) and unfold_, there and back, against PEFT's merge and unmerge, plain folds and the copy floor.

Beside the times: the side memory in bits a weight, and the share of weights that plain round trips change (ours: none).
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft.tuners.lora import layer as lora
from race import checker, race
from torch import nn

import slao_kernels

RANK = 16
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@pytest.mark.parametrize("delta", ["1%", "10%", "100%"])
@pytest.mark.parametrize("weight", DTYPES)
def test_exact_fold(weight: str, delta: str, benchmark: Any, device: str, layers: list[tuple[int, int]]) -> None:
    from peft import LoraConfig

    torch.manual_seed(0)
    dtype, size = DTYPES[weight], float(delta[:-1]) / 100  # of the delta's entries, over those of W
    model = nn.ModuleList()
    for n, k in layers[:7]:  # one block: every layer of the model has one of these shapes
        base = nn.Linear(k, n, bias=False, device=device, dtype=dtype)
        nn.init.normal_(base.weight, std=0.02)
        module = lora.Linear(base, "default", LoraConfig(r=RANK, lora_alpha=RANK), r=RANK, lora_alpha=RANK)
        model.append(module.to(device))
        nn.init.normal_(module.lora_A["default"].weight, std=1.0)
        nn.init.normal_(module.lora_B["default"].weight, std=0.02 * size * RANK**-0.5)
    weights = [module.base_layer.weight.detach().clone() for module in model]
    As = [module.lora_A["default"].weight.detach() for module in model]
    Bs = [module.lora_B["default"].weight.detach() for module in model]
    before = torch.cat([W.flatten() for W in weights])
    other, keep = before.clone(), slao_kernels.Kept()

    def exact() -> None:
        slao_kernels.fold_(weights, As, Bs, 1.0, keep=keep)
        slao_kernels.unfold_(weights, keep)

    def peft() -> None:
        for module in model:
            module.merge()
        for module in model:
            module.unmerge()

    def plain() -> None:
        for sign in (1.0, -1.0):
            slao_kernels.fold_(drifting, As, Bs, sign)

    def changed(found: list[Any]) -> float:
        """Per cent of the weights that are not what they were."""
        start, count = 0, 0
        for W in found:
            count += int((W.flatten() != before[start : start + W.numel()]).sum())
            start += W.numel()
        return 100 * count / start

    drifting = [W.clone() for W in weights]
    for once in (peft, plain):
        once()
    info = benchmark.extra_info
    info["% changed by one PEFT merge"] = changed([module.base_layer.weight for module in model])
    info["% changed by one plain fold"] = changed(drifting)
    slao_kernels.fold_(weights, As, Bs, 1.0, keep=keep)
    info["bits a weight"] = keep.bits_per_weight
    slao_kernels.unfold_(weights, keep)
    peers: dict[str, Any] = {"PEFT merge": peft, "plain folds": plain, "copy floor": lambda: other.copy_(before)}
    race(benchmark, exact, peers, device, rounds=5)
    checker(benchmark, device)("ours", changed(weights) == 0, "left weights changed")
