"""What is special about PEFT's DoRA layers, patched: the factor's dtype, other adapters, training.

What falls back: test_eligibility.py. Numbers, dtypes, copies, checkpointing and compile of them as of all kinds:
test_layers.py, test_layers_peft.py.
"""

from __future__ import annotations

import peft
import pytest
import torch
import twins
from kinds import build, operators, pair

import slao_kernels
from slao_kernels.layers import FusedLoraLinear

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False"),
]


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
