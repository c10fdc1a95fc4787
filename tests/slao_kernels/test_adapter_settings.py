"""rsLoRA, rank_pattern and alpha_pattern, which change the factor of each layer, in whole models."""

from __future__ import annotations

import math
import re

import pytest
import torch
import twins
from kinds import LINEAR
from torch import nn

from slao_kernels.layers import FusedLoraLinear
from slao_kernels.testing import TOLERANCE, error_ratio

pytestmark = pytest.mark.usefixtures("one_thread")

# By the formula of the papers instead of by PEFT's `scaling`.
R, ALPHA = 4, 6
PATTERNS = {
    "rank_pattern": {"q_proj": 7, "layers.1.mlp.down_proj": 1},
    "alpha_pattern": {"q_proj": 11, "layers.0.mlp.down_proj": 1},
}
SETTINGS = {
    "plain": {},
    "rsLoRA": {"use_rslora": True},
    **{name: {name: pattern} for name, pattern in PATTERNS.items()},
    "all": {"use_rslora": True, **PATTERNS},
}


def of_pattern(pattern: dict[str, int], name: str, otherwise: int) -> int:
    return next((value for key, value in pattern.items() if re.search(rf"(^|\.){re.escape(key)}$", name)), otherwise)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("settings", SETTINGS)
def test_scaling_by_the_formula(settings, dtype):
    """Each layer alone: y = W x + alpha / r (or / √r) · B A x with its own alpha and r, in fp64; fused, both ways."""
    options = {"r": R, "lora_alpha": ALPHA, "target_modules": ["q_proj", "down_proj"], **SETTINGS[settings]}
    model, _, report = twins.model_pair("llama", dtype, **options)
    assert (len(report.patched), report.skipped, report.fallbacks) == (4, {}, {})
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
        assert ops.counts == LINEAR
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
def test_settings_while_training(settings):
    """Six steps of SGD leave PEFT's and our adapters where they should be: equal."""
    model, twin, report = twins.model_pair(r=R, lora_alpha=ALPHA, lora_bias=True, **SETTINGS[settings])
    losses = [twins.train(net, torch.optim.SGD, 6, lr=0.05) for net in (model, twin)]
    assert losses[0][5] < losses[0][0] - 0.05
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    twins.check_close(*({n: p.detach() for n, p in net.named_parameters()} for net in (model, twin)))
    assert report.fallbacks == {}
