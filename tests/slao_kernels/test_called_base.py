"""A plain PEFT layer over a base that is no plain nn.Linear: the base is called, the LoRA branch added by one node."""

from __future__ import annotations

import changes
import pytest
import torch
from peft.tuners.lora import layer as lora
from torch import nn

import slao_kernels
from slao_kernels.layers import FusedLoraLinear

pytestmark = pytest.mark.usefixtures("one_thread")

ADD = {"lora_add": 1, "lora_add_backward": 1}


# What is done to the base layer, and what the report says of it.
CHANGES = {
    name: (change, why.format("base layer"))
    for name, (change, why) in {
        **changes.OF_A_MODULE,
        **changes.OF_A_WEIGHT,
        "subclass": (changes.other_class, "{} is changes's Other"),
        "parametrized": (changes.parametrized, "{} is torch's ParametrizedLinear"),
    }.items()
}


@pytest.mark.parametrize("options", [{}, {"lora_dropout": 0.4}, {"lora_bias": True}, {"use_rslora": True}], ids=str)
@pytest.mark.parametrize("change", CHANGES)
def test_base_changed_before_patch(change, options, twins, told):
    """PEFT's numbers and every gradient; the base is called once; reported as fused, with why it is called."""
    alter, why = CHANGES[change]
    model, twin = twins.net(**options), twins.net(**options)
    for net in (model, twin):
        alter(net.proj.base_layer)
    report = slao_kernels.patch(model, strict=True)
    assert (report.patched, report.skipped) == (["proj"], {})
    assert report.notes == {"proj": f"base layer called: {why}"}
    calls = []
    model.proj.base_layer.register_forward_pre_hook(lambda *_: calls.append(1))
    x = twins.net_input()
    with twins.CountOps() as ops:
        found = twins.net_step(model, x)
    assert ops.counts == ADD
    assert len(calls) == 1
    twins.check_close(found, twins.net_step(twin, x))
    twins.check_close(twins.net_step(model, x), twins.net_step(twin, x))  # without a dispatch mode: perhaps in place
    assert report.fallbacks == {}
    assert told() == []
    assert slao_kernels.unpatch(model) == 1
    assert type(model.proj) is lora.Linear
    assert "slao_options" not in vars(model.proj)
    twins.check_equal(twins.net_step(model, x), twins.net_step(twin, x))


@pytest.mark.parametrize("change", CHANGES)
def test_base_changed_after_patch(change, twins, told):
    alter, why = CHANGES[change]
    model, twin = twins.net(), twins.net()
    report = slao_kernels.patch(model)
    twins.check_fused(model)
    assert report.notes == {}
    for net in (model, twin):
        alter(net.proj.base_layer)
    x = twins.net_input()
    with twins.CountOps() as ops:
        found = twins.net_step(model, x)
    assert ops.counts == ADD
    twins.check_close(found, twins.net_step(twin, x))
    assert report.notes == {"proj": f"base layer called: {why}"}
    assert report.fallbacks == {}
    assert told() == []


def test_a_hook_that_is_gone_again(twins):
    model, twin = twins.net(), twins.net()
    slao_kernels.patch(model)
    handle = model.proj.base_layer.register_forward_hook(changes.half)
    model(twins.net_input())
    handle.remove()
    twins.check_fused(model)
    twins.check_close(twins.net_step(model, twins.net_input()), twins.net_step(twin, twins.net_input()))


@pytest.mark.parametrize("kind", ["fp8 weight", "bias dtype"])
@pytest.mark.parametrize("when", ["before", "after"])
def test_a_base_that_refuses(when, kind, twins):
    """Its own exception, as from PEFT's forward, not one of ours."""

    def alter(net: nn.Module) -> None:
        base = net.proj.base_layer
        if kind == "fp8 weight":
            base.weight = nn.Parameter(base.weight.detach().to(torch.float8_e4m3fn), requires_grad=False)
        else:
            base.bias = nn.Parameter(base.bias.detach().bfloat16())

    model, twin = twins.net(), twins.net()
    alter(twin)
    if when == "before":
        alter(model)
    report = slao_kernels.patch(model)
    if when == "after":
        alter(model)
    errors = []
    for net in (twin, model):
        with pytest.raises(RuntimeError) as caught:
            net(twins.net_input())
        errors.append(str(caught.value))
    assert errors[0] == errors[1]
    expected = {"fp8 weight": "base weight is stored as torch.float8_e4m3fn"}
    expected |= {"bias dtype": "base bias is torch.bfloat16, weight torch.float32"}
    assert report.notes == {"proj": f"base layer called: {expected[kind]}"}


def test_precision_reaches_the_branch(twins):
    """ "adapter": a delta far larger than the base's result keeps fp32's accuracy on a bf16 base."""

    def layer() -> nn.Module:
        model = twins.net(lambda: changes.Doubling(256, 192).to(torch.bfloat16))
        model.proj.lora_A.float()
        model.proj.lora_B.float()
        model.proj.scaling["default"] = 300.0
        return model

    x = twins.net_input(64, 256, dtype=torch.bfloat16)
    exact = layer().double()(x.double())
    errors = {}
    for precision in ("base", "adapter"):
        model = layer()
        slao_kernels.patch(model, precision=precision)
        errors[precision] = slao_kernels.testing.error_ratio(model(x), exact)
    assert errors["adapter"] < 0.0018  # one rounding to bf16: 2^-9 at most, 0.0017 RMS
    assert errors["base"] > 1.3 * errors["adapter"]


def test_a_layer_whose_base_turned_plain_is_fused_whole(twins):
    """patch again, after the reason has gone: one node for both, and no note."""
    model = twins.net()
    handle = model.proj.base_layer.register_forward_hook(changes.half)
    assert slao_kernels.patch(model).notes == {"proj": "base layer called: base layer has hooks"}
    handle.remove()
    report = slao_kernels.patch(model)
    assert report.notes == {}
    assert type(model.proj) is FusedLoraLinear
    twins.check_fused(model)
