"""Merges that cannot come back bit for bit: refused in a line, or PEFT's, which the log says."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
from bases import base_of, check_base, patched
from kinds import build
from torch import nn

import slao_kernels
from slao_kernels import exact_merge

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False"),
    pytest.mark.filterwarnings("ignore:(Merge|Unmerge) lora module"),
]


def touch(model: Any) -> None:
    with torch.no_grad():
        next(p for name, p in model.named_parameters() if "base_layer.weight" in name)[1, 2] += 1


def touch_wider(model: Any) -> None:
    model.double()
    with torch.no_grad():
        next(p for name, p in model.named_parameters() if "base_layer.weight" in name)[1, 2] += 1e-13


def touch_bias(model: Any) -> None:
    with torch.no_grad():
        model.proj.base_layer.bias[3] += 1


def load(model: Any) -> None:
    parameter = next(p for name, p in model.named_parameters() if "base_layer.weight" in name)
    parameter.data = torch.zeros_like(parameter)


CHANGES: dict[str, tuple[Callable[[Any], Any], str]] = {
    "one weight": (touch, "has changed since the fold"),
    "loaded anew": (load, "has changed since the fold"),
    "half": (lambda model: model.half(), "has changed since the fold"),
    "a little, in a wider dtype": (
        touch_wider,
        "base weight was torch.float32 when it was merged and has changed since",
    ),
    "bias": (touch_bias, "the base bias has changed since the merge"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_base_is_refused_in_one_line(change, told):
    """Nothing is written; unpatched it is PEFT's to subtract, which a line says too."""
    act, message = CHANGES[change]
    if change == "bias":
        model = build("lora_bias", torch.bfloat16)
        slao_kernels.patch(model)
        layer = model.proj
        layer.merge()
    else:
        model = patched(dtype=torch.float32)
        layer = next(module for module in model.modules() if "slao_options" in module.__dict__)
        model.merge_adapter()
    act(model)
    before = base_of(model)
    with pytest.raises(ValueError, match=message) as caught:
        layer.unmerge()
    assert "\n" not in str(caught.value)
    assert layer.slao_options.name in str(caught.value)
    assert "slao_kernels.unpatch(model)" in str(caught.value)
    check_base(model, before)
    slao_kernels.unpatch(model)
    assert ["unmerging leaves rounding in the base: the model was unpatched" in line for line in told()] == [True]
    layer.unmerge()
    assert not layer.merged_adapters


def test_deleted_while_merged_stays_merged_as_with_peft(told):
    """Whatever was merged below it is then PEFT's to subtract."""
    nets = [build("two adapters") for _ in range(2)]
    slao_kernels.patch(nets[0])
    for net in nets:
        net.proj.merge(adapter_names=["default"])
        net.proj.merge(adapter_names=["other"])
        net.proj.delete_adapter("other")
        net.proj.unmerge()
        assert net.proj.merged_adapters == []
    torch.testing.assert_close(nets[0].proj.base_layer.weight, nets[1].proj.base_layer.weight, rtol=1e-5, atol=1e-6)
    assert ["adapter 'other' was deleted while it was merged" in line for line in told()] == [True]


def test_merged_by_peft_before_and_exactly_after(told):
    net, plain = build("two adapters"), build("two adapters")
    for one in (net, plain):
        one.proj.merge(adapter_names=["default"])
    slao_kernels.patch(net)
    after = base_of(net)
    net.proj.merge(adapter_names=["other"])
    kept = net.proj.__dict__["slao_kept"][:]
    assert [one.adapter for one in kept] == ["other"]
    net.proj.unmerge()
    plain.proj.unmerge()
    for name, tensor in base_of(net).items():
        assert torch.equal(tensor, base_of(plain)[name])
    assert any(not torch.equal(tensor, after[name]) for name, tensor in base_of(net).items())
    assert told() == []


def test_what_peft_merges_is_its_own_to_unmerge(told):
    """DoRA: all that PEFT's merge does to the base, before and after the exact part is given up."""
    model = build("DoRA")
    slao_kernels.patch(model)
    model.proj.merge()
    assert "slao_kept" not in model.proj.__dict__
    assert told() == []  # nothing exact is lost
    twin = build("DoRA")
    twin.proj.merge()
    assert torch.equal(model.proj.base_layer.weight, twin.proj.base_layer.weight)
    model.proj.unmerge()
    twin.proj.unmerge()
    assert torch.equal(model.proj.base_layer.weight, twin.proj.base_layer.weight)


def test_a_safe_merge_refuses_nan_with_the_base_as_it_was():
    model = patched()
    before = base_of(model)
    with torch.no_grad():
        next(p for name, p in model.named_parameters() if "lora_B" in name)[0, 0] = float("nan")
    with pytest.raises(
        ValueError, match="NaNs detected in the merged weights. The adapter default seems to be broken: .*q_proj"
    ):
        model.merge_adapter(safe_merge=True)
    check_base(model, before)


def test_a_bias_that_the_base_has_no_room_for_is_an_error_before_anything_is_written():
    net = build("lora_bias, no bias")
    slao_kernels.patch(net)
    before = base_of(net)
    with pytest.raises(RuntimeError, match="because the base layer has no bias: proj, adapter 'default'"):
        net.proj.merge()
    check_base(net, before)
    assert net.proj.merged_adapters == []


def layer_over(base: nn.Module, **options: Any) -> Any:
    config = peft.LoraConfig(target_modules=["0"], init_lora_weights=False, **options)
    return peft.get_peft_model(nn.Sequential(base), config).base_model.model[0]


def parametrized(layer: Any) -> Any:
    nn.utils.parametrizations.weight_norm(layer.base_layer)
    return layer


WHY_NOT: dict[str, tuple[Callable[[], Any], str]] = {
    "DoRA": (lambda: layer_over(nn.Linear(4, 4), use_dora=True), "adds more than a product of A and B"),
    "embedding": (lambda: layer_over(nn.Embedding(5, 4)), "adds no product of one A and B"),
    "convolution": (lambda: layer_over(nn.Conv2d(3, 4, 3)), "the base weight has 4 dimensions"),
    "meta": (lambda: layer_over(nn.Linear(4, 4)).to("meta"), "on meta"),
    "parametrized": (
        lambda: parametrized(layer_over(nn.Linear(4, 4))),
        "no plain tensor of its own",
    ),
}


@pytest.mark.parametrize("case", WHY_NOT)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_what_cannot_be_merged_exactly(case):
    make, message = WHY_NOT[case]
    assert message in str(exact_merge.why_not(make(), ["default"]))


def test_layers_that_share_a_weight_unmerge_in_reverse_only():
    """Of two folds into one weight the last is undone first: the other way round is refused, and nothing is lost."""
    layers = [layer_over(nn.Linear(6, 5)) for _ in range(2)]
    layers[1].base_layer.weight = layers[0].base_layer.weight
    before = layers[0].base_layer.weight.detach().clone()
    for layer in layers:
        exact_merge.merge(layer, ["default"])
    with pytest.raises(ValueError, match="has changed since the fold"):
        exact_merge.unmerge(layers[0])
    assert [exact_merge.unmerge(layer) for layer in reversed(layers)] == [True, True]
    assert torch.equal(layers[0].base_layer.weight, before)


def test_nothing_merged_is_left_to_peft():
    for kind, patch in itertools.product(["bias", "DoRA"], [False, True]):
        net = build(kind)
        if patch:
            slao_kernels.patch(net)
        with pytest.warns(UserWarning, match="Already unmerged"):
            net.proj.unmerge()
