"""Layers and adapters that patch must not touch: PEFT's own forward runs, bit for bit, and the reason is told once.

What a single call can have against the fused forward is in test_eligibility_calls.py. A base layer that is no plain
nn.Linear is no reason: it is called, see test_called_base.py.
"""

from __future__ import annotations

import peft
import pytest
import torch
from changes import OF_A_MODULE, OF_A_WEIGHT, PARTS, Doubling, on, other_class, parametrized, replace_forward
from torch import nn

import slao_kernels
from slao_kernels.layers import FusedLoraLinear

pytestmark = pytest.mark.usefixtures("one_thread")


# What is done to A or B, and what is said of it.
CHANGES = {
    f"{name}: {what}": (on(PARTS[name], change), why.format(name))
    for name in ("lora_A", "lora_B")
    for what, (change, why) in {**OF_A_MODULE, **OF_A_WEIGHT}.items()
}
PLAIN = "lora_A is a {}, lora_B a {}, not plain nn.Linear"
CHANGES |= {
    "lora_A: parametrized": (on(PARTS["lora_A"], parametrized), PLAIN.format("ParametrizedLinear", "Linear")),
    "lora_B: subclass": (on(PARTS["lora_B"], other_class), PLAIN.format("Linear", "Other")),
}


@pytest.mark.parametrize("change", CHANGES)
def test_layer_changed_before_patch(change, twins, told):
    alter, reason = CHANGES[change]
    model, twin = twins.net(), twins.net()
    alter(twin.proj)
    alter(model.proj)
    check_skipped(model, twin, reason, twins, told)


@pytest.mark.parametrize("base", [nn.Linear, Doubling], ids=["plain base", "called base"])
@pytest.mark.parametrize("change", CHANGES)
def test_layer_changed_after_patch(change, base, twins, told):
    alter, reason = CHANGES[change]
    model, twin = twins.net(lambda: base(24, 20)), twins.net(lambda: base(24, 20))
    alter(twin.proj)
    report = slao_kernels.patch(model)
    with twins.CountOps() as ops:
        model(twins.net_input())
    assert ops.counts == {"lora_linear" if base is nn.Linear else "lora_add": 1}
    alter(model.proj)
    twins.check_peft_runs(model, twin, report.fallbacks, reason, told)


def narrow(module: nn.Module, dtype: torch.dtype) -> None:
    for parameter in module.parameters():
        parameter.requires_grad_(False)
    module.to(dtype)


# Weights that PEFT's forward cannot multiply either (as they are; FSDP and ZeRO-3 put others there for the call).
BROKEN = {
    "lora_A flat": (
        lambda m: setattr(m.lora_A["default"], "weight", nn.Parameter(torch.ones(0))),
        "lora_A or lora_B is not a plain floating matrix (sharded or quantised?)",
    ),
    "lora_B fp8": (
        lambda m: narrow(m.lora_B["default"], torch.float8_e4m3fn),
        "lora_A or lora_B is not a plain floating matrix (sharded or quantised?)",
    ),
}


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("kind", BROKEN)
def test_weights_that_peft_refuses(kind, when, twins, told):
    """PEFT's own exception, not one of ours."""
    alter, reason = BROKEN[kind]
    model, twin = twins.net(), twins.net()
    alter(twin.proj)
    if when == "before":
        alter(model.proj)
    report = slao_kernels.patch(model)
    if when == "after":
        alter(model.proj)
    errors = []
    for net in (twin, model):
        with pytest.raises(RuntimeError) as caught:
            net(twins.net_input())
        errors.append(str(caught.value))
    assert errors[0] == errors[1]
    assert (report.skipped if when == "before" else report.fallbacks) == {"proj": reason}
    assert told() == [f"proj runs PEFT's own forward: {reason}"]


def check_skipped(model, twin, reason, twins, told, *args) -> None:
    report = slao_kernels.patch(model)
    assert (report.patched, report.fallbacks) == ([], {})
    assert not isinstance(model.proj, FusedLoraLinear)
    twins.check_peft_runs(model, twin, report.skipped, reason, told, *args)


def test_forward_replaced_on_the_lora_layer(twins, told):
    """Swapping the class of such a layer would do nothing."""
    model, twin = twins.net(), twins.net()
    replace_forward(model.proj)
    replace_forward(twin.proj)
    check_skipped(model, twin, "its forward was replaced on the instance (accelerate hooks?)", twins, told)


def test_forward_replaced_after_patch(twins):
    """The hook then wraps the fused forward; unpatch cannot take that apart, so it refuses and changes nothing."""
    from accelerate.hooks import remove_hook_from_module

    model, twin = twins.net(), twins.net()
    slao_kernels.patch(model)
    replace_forward(model.proj)
    replace_forward(twin.proj)
    twins.check_fused(model)
    x = twins.net_input()
    twins.check_close(twins.net_step(model, x), twins.net_step(twin, x))
    assert slao_kernels.patch(model).patched == ["proj"]  # it is still fused, inside the hook
    with pytest.raises(ValueError, match="proj: its forward was replaced"):
        slao_kernels.unpatch(model)
    twins.check_fused(model)
    remove_hook_from_module(model.proj)
    remove_hook_from_module(twin.proj)
    assert slao_kernels.unpatch(model) == 1
    twins.check_equal(twins.net_step(model, x), twins.net_step(twin, x))


def test_hooks_taken_off_again(twins):
    """accelerate leaves the class's own forward bound on the instance: that is no replacement."""
    from accelerate.hooks import remove_hook_from_module

    model, twin = twins.net(), twins.net()
    for module in (model.proj.base_layer, model.proj.lora_A["default"]):
        replace_forward(module)
        remove_hook_from_module(module)
        assert "forward" in module.__dict__
    assert slao_kernels.patch(model).patched == ["proj"]
    twins.check_fused(model)
    x = twins.net_input()
    twins.check_close(twins.net_step(model, x), twins.net_step(twin, x))


# Adapters that are not plain LoRA on a plain linear layer: options of the adapter, base layer, input, reason.
KINDS = {
    "aLoRA": ({"alora_invocation_tokens": [1]}, lambda: nn.Linear(24, 20), (2, 5, 24), "ALora: not plain LoRA"),
    "Embedding": ({}, lambda: nn.Embedding(30, 20), None, "lora.layer.Embedding has no fused forward"),
    "Conv2d": ({}, lambda: nn.Conv2d(6, 8, 3), (2, 6, 7, 7), "lora.layer.Conv2d has no fused forward"),
    "Conv1d": ({}, lambda: nn.Conv1d(6, 8, 3), (2, 6, 7), "lora.layer.Conv1d has no fused forward"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_other_adapters(kind, twins, told):
    options, base, shape, reason = KINDS[kind]
    x = torch.arange(12).view(3, 4) if shape is None else twins.net_input(*shape)
    check_skipped(twins.net(base, **options), twins.net(base, **options), reason, twins, told, x)


@pytest.mark.parametrize("kind", ["aLoRA"])
def test_other_adapter_activated_after_patch(kind, twins, told):
    """A second adapter may be of a kind that has no kernel; the first one is fused again when it is active."""
    model, twin = twins.net(), twins.net()
    report = slao_kernels.patch(model)
    for net in (model, twin):
        torch.manual_seed(4)
        other = twins.config(target_modules=["proj"], init_lora_weights=False, **KINDS[kind][0])
        peft.inject_adapter_in_model(other, net, adapter_name="other")
        net.proj.set_adapter("other")
    twins.check_peft_runs(model, twin, report.fallbacks, KINDS[kind][3], told)
    for net in (model, twin):
        net.proj.set_adapter("default")
    twins.check_fused(model)
    twins.check_close(twins.net_step(model, twins.net_input()), twins.net_step(twin, twins.net_input()))


@pytest.mark.parametrize("what", ["model", "adapter"])
def test_meta_device(what, twins, told):
    """Weights on meta have no values to compare: the shape of the output, then the real thing after loading."""
    torch.manual_seed(0)
    with torch.device("meta" if what == "model" else "cpu"):
        model = twins.Net(nn.Linear(24, 20))
    config = twins.config(target_modules=["proj"])
    peft.inject_adapter_in_model(config, model, low_cpu_mem_usage=True)
    report = slao_kernels.patch(model)
    assert (report.patched, list(report.skipped)) == ([], ["proj"])
    whose = "its weights are" if what == "model" else "its adapter is"
    assert report.skipped["proj"].startswith(f"{whose} on the meta device; load")
    assert told() == [f"proj runs PEFT's own forward: {report.skipped['proj']}"]
    assert model(twins.net_input().to("meta") if what == "model" else twins.net_input()).shape == (2, 5, 20)
    twin = twins.net()
    model.load_state_dict(twin.state_dict(), assign=True)
    assert slao_kernels.patch(model).patched == ["proj"]
    twins.check_fused(model)
    x = twins.net_input()
    twins.check_close({"y": model(x)}, {"y": twin(x)})


def test_modules_to_save_are_left_alone(twins):
    model, twin = (twins.peft_model("llama", modules_to_save=["lm_head"]) for _ in range(2))
    wrapper = model.base_model.model.lm_head
    before = (type(wrapper), [(name, type(module)) for name, module in wrapper.named_modules()])
    report = slao_kernels.patch(model)
    assert len(report.patched) == 14
    assert report.skipped == {}
    assert (type(wrapper), [(name, type(module)) for name, module in wrapper.named_modules()]) == before
    found, expected = twins.step(model), twins.step(twin)
    assert any("modules_to_save" in name for name in expected)
    twins.check_close(found, expected)
