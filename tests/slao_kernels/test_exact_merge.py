"""merge_adapter and unmerge_adapter of patched models: the base comes back bit for bit."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import twins
from bases import base_of, check_base, logits, patched
from kinds import build, x_of

import slao_kernels
from slao_kernels.testing import error_ratio

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False"),
    pytest.mark.filterwarnings("ignore:(Merge|Unmerge) lora module"),
]
DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_whole_model_again_and_again(kind, dtype):
    """The merged model answers as the adapter does; afterwards no bit has changed. PEFT's own round trips drift."""
    model, twin = patched(kind, dtype), twins.peft_model(kind, dtype)
    before, keys = base_of(model), list(model.state_dict())
    expected = logits(copy.deepcopy(model).double())
    for cycle in range(20):
        model.merge_adapter(safe_merge=cycle % 2 == 0)
        if cycle == 0:
            assert list(model.state_dict()) == keys
            rounding = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 4e-2}
            assert error_ratio(logits(model), expected) <= rounding[dtype]
            assert any(not torch.equal(p, before[name]) for name, p in base_of(model).items())
        model.unmerge_adapter()
        if cycle < 10:
            twin.merge_adapter()
            twin.unmerge_adapter()
    check_base(model, before)
    if dtype.itemsize == 2:
        assert any(not torch.equal(p, before[name]) for name, p in base_of(twin).items())


@pytest.mark.parametrize("options", [{}, {"use_rslora": True}, {"lora_bias": True}], ids=str)
def test_several_active_adapters(options):
    """Merged in one call or one by one, with ranks and biases of their own; Σ s_i B_i A_i is what was added."""
    model = build("two adapters", torch.bfloat16, torch.float32, **options)
    slao_kernels.patch(model)
    layer, before = model.proj, base_of(model)
    wide = copy.deepcopy(model).double()
    expected = wide(x_of().double()).detach()
    for steps in ([None], [["default"], ["other"]], [["other"], None]):
        for names in steps:
            layer.merge(adapter_names=names)
        assert sorted(layer.merged_adapters) == ["default", "other"]
        assert error_ratio(model(x_of(dtype=torch.bfloat16)), expected) <= 2e-2
        layer.unmerge()
        assert layer.merged_adapters == []
        assert "slao_kept" not in layer.__dict__
        check_base(model, before)


def test_what_the_adapter_does_while_it_is_merged_does_not_matter():
    model = patched()
    before = base_of(model)
    model.merge_adapter()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.mul_(3.0)
    for layer in model.modules():
        if hasattr(layer, "set_scale"):
            layer.set_scale("default", 7.0)
    model.unmerge_adapter()
    check_base(model, before)


def test_autocast_inference_mode_and_disabled_adapters():
    """PEFT's disable_adapter unmerges in the forward."""
    model = patched()
    before = base_of(model)
    with model.disable_adapter():
        expected = logits(model)
    with torch.autocast("cpu", torch.bfloat16):
        model.merge_adapter()
    model.unmerge_adapter()
    check_base(model, before)
    with torch.inference_mode():
        model.merge_adapter()
    with model.disable_adapter():
        assert torch.equal(logits(model), expected)
    check_base(model, before)


COPIES: dict[str, Callable[[Any], Any]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
}


@pytest.mark.parametrize("how", COPIES)
def test_copies_of_a_merged_model_unmerge_by_themselves(how):
    model = patched()
    before = base_of(model)
    model.merge_adapter()
    copied = COPIES[how](model)
    for one in (copied, model):
        assert torch.equal(logits(one), logits(model))
    for one in (copied, model):
        one.unmerge_adapter()
        check_base(one, before)


def test_moved_and_wider_in_between():
    """What holds W' bit for bit unmerges; the base is then W in that dtype."""
    model = patched()
    before = base_of(model)
    model.merge_adapter()
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        model.to(dtype)
    model.float()
    model.unmerge_adapter()
    check_base(model, {name: tensor.float() for name, tensor in before.items()})


@pytest.mark.gpu
def test_moved_between_devices():
    model = patched()
    before = base_of(model)
    for there, back in (("cpu", "cuda"), ("cuda", "cpu")):
        model.to(there).merge_adapter()
        model.to(back).unmerge_adapter()
        check_base(model.cpu(), before)


def test_merge_and_unload_keeps_the_merge_and_nothing_else():
    model = patched(dtype=torch.float32)
    expected = logits(model)
    merged = model.merge_and_unload()
    assert error_ratio(logits(merged), expected) <= 1e-5
    assert not any("slao_kept" in module.__dict__ for module in merged.modules())


def test_a_wish_for_other_kernels_does_not_stop_a_merge():
    model = patched()
    before = base_of(model)
    for backend in ("reference", "triton", "eager"):
        with slao_kernels.use_backend(backend):
            model.merge_adapter()
        model.unmerge_adapter()
        check_base(model, before)


def test_side_memory():
    """Under two bits a weight and the copies of A and B."""
    model = patched(r=2)
    model.merge_adapter()
    layers = [module for module in model.modules() if "slao_kept" in module.__dict__]
    assert len(layers) > 5
    for layer in layers:
        (one,) = layer.__dict__["slao_kept"]
        W, A, B = layer.base_layer.weight, layer.lora_A["default"].weight, layer.lora_B["default"].weight
        assert one.kept.stream_bytes <= W.numel() * 2 / 8 + 64
        assert one.kept.nbytes == one.kept.stream_bytes + A.nbytes + B.nbytes
