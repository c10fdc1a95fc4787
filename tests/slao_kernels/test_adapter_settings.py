"""Settings of an adapter that change the formula, in whole models: lora_bias, rsLoRA, rank_pattern, alpha_pattern."""

from __future__ import annotations

import math
import re

import pytest
import torch
from torch import nn

import slao_kernels
from slao_kernels.layers import FusedLoraLinear
from slao_kernels.testing import TOLERANCE, error_ratio

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_lora_bias_in_a_whole_model(kind, twins):
    model, twin = (twins.peft_model(kind, lora_bias=True) for _ in range(2))
    for net in (model, twin):
        for name, parameter in net.named_parameters():
            if "lora_B" in name and name.endswith("bias"):
                nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(len(name)))
    report = slao_kernels.patch(model)
    for _ in range(3):
        with twins.CountOps() as ops:
            found = twins.step(model)
        assert ops.counts == dict.fromkeys(("lora_linear", "lora_linear_backward"), len(report.patched))
        twins.check_close(found, twins.step(twin))
    assert (report.skipped, report.fallbacks) == ({}, {})


# rsLoRA and patterns, by the formula of the papers instead of by PEFT's `scaling`.
R, ALPHA = 4, 6
SETTINGS = {
    "plain": {},
    "rsLoRA": {"use_rslora": True},
    "rank_pattern": {"rank_pattern": {"q_proj": 7, "layers.1.mlp.down_proj": 1}},
    "alpha_pattern": {"alpha_pattern": {"q_proj": 11, "layers.0.mlp.down_proj": 1}},
    "all": {
        "use_rslora": True,
        "rank_pattern": {"q_proj": 7, "layers.1.mlp.down_proj": 1},
        "alpha_pattern": {"q_proj": 11, "layers.0.mlp.down_proj": 1},
    },
}


def of_pattern(pattern: dict[str, int], name: str, otherwise: int) -> int:
    return next((value for key, value in pattern.items() if re.search(rf"(^|\.){re.escape(key)}$", name)), otherwise)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("settings", SETTINGS)
def test_scaling_by_the_formula(settings, dtype, twins):
    """Each layer alone: y = W x + alpha / r (or / √r) · B A x with its own alpha and r, in fp64; fused, both ways."""
    options = SETTINGS[settings]
    model = twins.peft_model("llama", dtype, r=R, lora_alpha=ALPHA, target_modules=["q_proj", "down_proj"], **options)
    report = slao_kernels.patch(model)
    assert len(report.patched) == 4
    assert (report.skipped, report.fallbacks) == ({}, {})
    seen = set()
    for name in report.patched:
        layer = model.get_submodule(name)
        assert type(layer) is FusedLoraLinear
        nn.init.normal_(layer.lora_B["default"].weight)  # the adapter's share is most of y
        A, B = (part["default"].weight for part in (layer.lora_A, layer.lora_B))
        r = of_pattern(options.get("rank_pattern", {}), name, R)
        alpha = of_pattern(options.get("alpha_pattern", {}), name, ALPHA)
        scaling = alpha / (math.sqrt(r) if options.get("use_rslora") else r)
        seen.add((r, scaling))
        assert A.shape[0] == B.shape[1] == r
        x = torch.randn(5, 7, A.shape[1], generator=torch.Generator().manual_seed(1)).to(dtype).requires_grad_()
        with twins.CountOps() as ops:
            layer(x).backward(torch.ones(5, 7, B.shape[0], dtype=dtype))
        assert ops.counts == {"lora_linear": 1, "lora_linear_backward": 1}
        wide = [p.detach().double().requires_grad_() for p in (x, A, B)]
        y = wide[0] @ layer.base_layer.weight.double().T + scaling * (wide[0] @ wide[1].T @ wide[2].T)
        y.sum().backward()
        # Adapters are fp32 on the bf16 base: they are rounded to bf16 too, and so is g.
        allowed = TOLERANCE[dtype] * (1 if dtype == torch.float32 else 2)
        assert error_ratio(layer(x), y) <= allowed
        for found, expected in zip((x, A, B), wide, strict=True):
            assert error_ratio(found.grad, expected.grad) <= allowed
        model.zero_grad()
    assert len(seen) == (1 if settings in ("plain", "rsLoRA") else 3)


@pytest.mark.parametrize("settings", SETTINGS)
def test_settings_while_training(settings, twins):
    """Six steps of SGD leave PEFT's and our adapters where they should be: equal."""
    models = [twins.peft_model("llama", r=R, lora_alpha=ALPHA, lora_bias=True, **SETTINGS[settings]) for _ in range(2)]
    report = slao_kernels.patch(models[0])
    losses = []
    for model in models:
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05)
        for _ in range(6):
            optimizer.zero_grad()
            loss = model(input_ids=twins.token_ids(), labels=twins.token_ids()).loss
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    assert losses[5] < losses[0] - 0.05
    assert losses[:6] == pytest.approx(losses[6:], rel=1e-5)
    ours, theirs = (dict(model.named_parameters()) for model in models)
    twins.check_close({n: p.detach() for n, p in ours.items()}, {n: p.detach() for n, p in theirs.items()})
    assert report.fallbacks == {}
