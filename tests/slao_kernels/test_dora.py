"""What is special about PEFT's DoRA layers, patched: the factor's dtype, what falls back, other adapters, training.

Numbers, dtypes, copies, checkpointing and compile of them as of all kinds: test_layers.py, test_layers_peft.py.
"""

from __future__ import annotations

import peft
import pytest
import torch
from torch import nn

import slao_kernels
from slao_kernels.layers import FusedLoraLinear

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False"),
]

FUSED = {"lora_linear": 1, "lora_linear_backward": 1, "dora_norm": 1, "dora_scale": 1, "dora_scale_backward": 1}


def layer(twins, base=lambda: nn.Linear(24, 20), **options) -> nn.Module:
    """One DoRA layer whose magnitude is not where it started."""
    model = twins.net(base, use_dora=True, **options)
    own = model.proj.lora_magnitude_vector["default"].weight
    own.data *= 1 + 0.2 * torch.randn(own.shape, generator=torch.Generator().manual_seed(9))
    return model


def pair(twins, *args, **options) -> tuple[nn.Module, nn.Module, slao_kernels.PatchReport]:
    """(patched, unpatched, report)"""
    model, twin = layer(twins, *args, **options), layer(twins, *args, **options)
    report = slao_kernels.patch(model, strict=True)
    assert (report.patched, report.skipped, report.notes) == (["proj"], {}, {})
    return model, twin, report


def test_a_change_of_magnitude_below_bf16_is_seen(twins):
    """The factor stays fp32: a magnitude that is 1 ‰ off shows in a bf16 layer's mean output, as in PEFT's."""
    models = [layer(twins, lambda: nn.Linear(256, 64, bias=False).to(torch.bfloat16)) for _ in range(2)]
    for net in models:
        net.proj.lora_magnitude_vector.float()
    slao_kernels.patch(models[0])
    x = twins.net_input(512, 256, dtype=torch.bfloat16)
    for net in models:
        before = net(x).double()
        net.proj.lora_magnitude_vector["default"].weight.data *= 1.001
        growth = net(x).double().norm() / before.norm()
        assert abs(growth - 1.001) < 2e-4


def test_dropout_while_training_is_pefts(twins, told):
    """PEFT then runs the base on the dropped x too. In eval mode it is fused; known from the start."""
    reason = "DoRA with lora_dropout=0.4 while training: PEFT scales the base of the dropped x"
    model, twin, report = pair(twins, lora_dropout=0.4)
    assert report.fallbacks == {"proj": reason}
    twins.check_peft_runs(model, twin, report.fallbacks, reason, told)
    model.eval()
    twin.eval()
    x = twins.net_input()
    with twins.CountOps() as ops:
        found = twins.net_step(model, x)
    assert ops.counts == FUSED
    twins.check_close(found, twins.net_step(twin, x))


def add_other(twins, net: nn.Module, **options) -> None:
    torch.manual_seed(4)
    config = twins.config(r=5, target_modules=["proj"], init_lora_weights=False, **options)
    peft.inject_adapter_in_model(config, net, "other")


@pytest.mark.parametrize("other", [{}, {"use_dora": True}], ids=["LoRA", "DoRA"])
def test_beside_another_adapter(other, twins, told):
    """Both active: PEFT's, in its order. One at a time: fused, whichever it is."""
    model, twin, report = pair(twins)
    for net in (model, twin):
        add_other(twins, net, **other)
    x = twins.net_input()
    for name in ("default", "other"):
        for net in (model, twin):
            net.proj.set_adapter(name)
        with twins.CountOps() as ops:
            found = twins.net_step(model, x)
        assert ops.counts["lora_linear"] == 1
        twins.check_close(found, twins.net_step(twin, x))
    for net in (model, twin):
        net.proj.set_adapter(["other", "default"])
    twins.check_peft_runs(model, twin, report.fallbacks, "DoRA beside other active adapters", told)


def hook_on_magnitude(net: nn.Module) -> None:
    net.proj.lora_magnitude_vector["default"].register_forward_hook(lambda module, args, output: output / 2)


def hook_on_base(net: nn.Module) -> None:
    net.proj.base_layer.register_forward_hook(lambda module, args, output: output / 2)


def bias_of_B(net: nn.Module) -> None:
    """PEFT's config refuses it, and its forward would count it into the norm."""
    net.proj.lora_B["default"].bias = nn.Parameter(torch.ones(20))


LEFT = {
    "hook on the magnitude": (hook_on_magnitude, {}, "DoRA's magnitude has hooks"),
    "hook on the base": (hook_on_base, {}, "DoRA over a base layer that has to be called"),
    "bias of B": (bias_of_B, {}, "DoRA with lora_bias"),
}


@pytest.mark.parametrize("what", LEFT)
def test_left_to_peft(what, twins, told):
    alter, options, reason = LEFT[what]
    model, twin = layer(twins, **options), layer(twins, **options)
    for net in (model, twin):
        alter(net)
    report = slao_kernels.patch(model)
    assert (report.patched, report.skipped) == ([], {"proj": reason})
    twins.check_peft_runs(model, twin, report.skipped, reason, told)


@pytest.mark.parametrize("what", ["hook on the magnitude", "hook on the base"])
def test_left_to_peft_after_patch(what, twins, told):
    alter, _, reason = LEFT[what]
    model, twin, report = pair(twins)
    for net in (model, twin):
        alter(net)
    twins.check_peft_runs(model, twin, report.fallbacks, reason, told)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_training_a_whole_model(kind, twins, tmp_path):
    """Steps of AdamW: PEFT's losses and adapters; saved as PEFT saves."""
    models = [twins.peft_model(kind, use_dora=True) for _ in range(2)]
    report = slao_kernels.patch(models[0], strict=True)
    losses: list[list[float]] = [[], []]
    for model, found in zip(models, losses, strict=True):
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
        for _ in range(5):
            optimizer.zero_grad()
            loss = model(input_ids=twins.token_ids(), labels=twins.token_ids()).loss
            loss.backward()
            optimizer.step()
            found.append(loss.item())
    assert losses[0][-1] < losses[0][0]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    with twins.CountOps() as ops:
        twins.check_close(twins.step(models[0]), twins.step(models[1]), 2e-2)  # AdamW turns roundings into signs
    assert ops.counts["dora_norm"] == ops.counts["lora_linear"] == len(report.patched)
    assert report.fallbacks == {}
    assert all(type(models[0].get_submodule(name)) is FusedLoraLinear for name in report.patched)
    models[0].save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(twins.base_model(kind), tmp_path)
    ids = twins.token_ids()
    twins.check_close({"y": loaded(ids).logits.detach()}, {"y": models[0].eval()(ids).logits.detach()})
