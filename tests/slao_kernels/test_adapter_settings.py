"""Settings of an adapter in whole models: rsLoRA and patterns, which change each layer's factor; DoRA.

What of DoRA falls back: test_eligibility.py. Numbers, copies, compile: test_layers.py, test_layers_peft.py.
"""

from __future__ import annotations

import math
import re

import peft
import pytest
import torch
import twins
from kinds import LINEAR, build, operators, pair
from torch import nn

import slao_kernels
from slao_kernels.layers import FusedLoraLinear
from slao_kernels.testing import TOLERANCE, error_ratio

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False"),
]

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


# --- DoRA ------------------------------------------------------------------------------------------------------------


def test_a_change_of_magnitude_below_bf16_is_seen():
    """The factor stays fp32: a magnitude that is 1 ‰ off shows in a bf16 layer's mean output, as in PEFT's."""
    models = [build("DoRA, no bias", torch.bfloat16, size=(256, 64)) for _ in range(2)]
    for net in models:
        net.proj.lora_magnitude_vector.float()
    slao_kernels.patch(models[0])
    x = twins.net_input(512, 256, dtype=torch.bfloat16)
    for net in models:
        before = net(x).double()
        net.proj.lora_magnitude_vector["default"].weight.data *= 1.001
        growth = net(x).double().norm() / before.norm()
        assert abs(growth - 1.001) < 2e-4


def test_dropout_in_eval_mode():
    """While training it is PEFT's, which is known from the start (test_eligibility.py)."""
    model, twin, report = pair("DoRA", lora_dropout=0.4)
    assert list(report.fallbacks) == ["proj"]
    model.eval()
    twin.eval()
    twins.check_same(model, twin, ops=operators("DoRA"))


@pytest.mark.parametrize("other", [{}, {"use_dora": True}], ids=["LoRA", "DoRA"])
def test_one_of_two_adapters(other):
    """Fused, whichever it is; both together are PEFT's: test_eligibility.py."""
    model, twin, report = pair("DoRA")
    for net in (model, twin):
        torch.manual_seed(4)
        config = twins.config(r=5, target_modules=["proj"], init_lora_weights=False, **other)
        peft.inject_adapter_in_model(config, net, "other")
    for name in ("default", "other"):
        for net in (model, twin):
            net.proj.set_adapter(name)
        twins.check_same(model, twin, ops=1)
    assert report.fallbacks == {}


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_training_a_whole_model(kind, tmp_path):
    """Steps of AdamW: PEFT's losses and adapters; saved as PEFT saves."""
    model, twin, report = twins.model_pair(kind, use_dora=True)
    assert report.skipped == {}
    losses = [twins.train(net, torch.optim.AdamW, 5, lr=1e-3) for net in (model, twin)]
    assert losses[0][-1] < losses[0][0]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    with twins.CountOps() as ops:
        twins.check_close(twins.step(model), twins.step(twin), 2e-2)  # AdamW turns roundings into signs
    assert ops.counts["dora_norm"] == ops.counts["lora_linear"] == len(report.patched)
    assert report.fallbacks == {}
    assert all(type(model.get_submodule(name)) is FusedLoraLinear for name in report.patched)
    model.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(twins.base_model(kind), tmp_path)
    ids = twins.token_ids()
    twins.check_close({"y": loaded(ids).logits.detach()}, {"y": model.eval()(ids).logits.detach()})
