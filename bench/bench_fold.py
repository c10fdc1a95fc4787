"""fold_ against PEFT's own merge, layer by layer, on a GPU its other backend, and the copy floor."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft.tuners.lora import layer as lora
from race import race, triton_too
from torch import nn

import slao_kernels

RANK = 16


@pytest.mark.parametrize("adapter", ["fp32", "bf16"])
@pytest.mark.parametrize("weight", ["bf16", "fp32"])
def test_fold(weight: str, adapter: str, benchmark: Any, device: str, layers: list[tuple[int, int]]) -> None:
    from peft import LoraConfig

    dtypes = {"fp32": torch.float32, "bf16": torch.bfloat16}
    torch.manual_seed(0)
    model = nn.ModuleList()
    for n, k in layers[:7]:  # one block: every layer of the model has one of these shapes
        base = nn.Linear(k, n, bias=False, device=device, dtype=dtypes[weight])
        module = lora.Linear(base, "default", LoraConfig(r=RANK, lora_alpha=RANK), r=RANK, lora_alpha=RANK)
        model.append(module.to(device))
        for part in (module.lora_A["default"], module.lora_B["default"]):
            part.to(dtypes[adapter])
            nn.init.normal_(part.weight, std=0.02)
    weights = [module.base_layer.weight.detach().clone() for module in model]
    As = [module.lora_A["default"].weight for module in model]
    Bs = [module.lora_B["default"].weight for module in model]
    flat = torch.cat([W.flatten() for W in weights])
    other = flat.clone()

    def peft_merge() -> None:
        for module in model:
            module.merge()
            module.merged_adapters.clear()  # so that the next round merges again

    def addmm() -> None:
        for W, A, B in zip(weights, As, Bs, strict=True):
            W.addmm_(B.detach().to(W.dtype), A.detach().to(W.dtype), alpha=1.0)

    peers: dict[str, Any] = {"PEFT merge": peft_merge, "addmm_ loop": addmm, "copy floor": lambda: other.copy_(flat)}
    triton, left_out = triton_too("fold", device, lambda name: slao_kernels.fold_(weights, As, Bs, 1.0, backend=name))
    benchmark.extra_info["left out"] = left_out
    race(benchmark, lambda: slao_kernels.fold_(weights, As, Bs, 1.0), peers | triton, device, rounds=7)
