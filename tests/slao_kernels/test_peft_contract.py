"""What PEFT's users do with adapters works on a patched model as on its unpatched twin: add, combine, merge, swap.

Copies and files: test_peft_contract_copies.py. Training under autocast, checkpointing, compile: ..._training.py.
"""

from __future__ import annotations

from functools import partial

import pytest
import torch
from peft import get_peft_model_state_dict
from peft.utils.hotswap import hotswap_adapter, prepare_model_for_compiled_hotswap
from torch import nn

import slao_kernels
from slao_kernels.layers import FusedLoraLinear
from slao_kernels.testing import error_ratio

pytestmark = pytest.mark.usefixtures("one_thread")

TARGETS = ["q_proj", "v_proj", "down_proj"]  # six layers
LAYERS = 6


@pytest.fixture(params=["patch first", "adapters first"])
def pair(request, twins):
    """pair(*configs): (patched llama, its unpatched twin) with adapters default, a1, a2, ...; added before or after."""

    def build(*configs: dict, kind: str = "llama", **options):
        models = []
        for patched in (True, False):
            model = twins.peft_model(kind, **{"target_modules": TARGETS, **options})
            if patched and request.param == "patch first":
                slao_kernels.patch(model)
            for i, settings in enumerate(configs, start=1):
                add(twins, model, f"a{i}", **{"target_modules": TARGETS, **settings})
            if patched:
                slao_kernels.patch(model)
            models.append(model)
        return models

    return build


def add(twins, model: nn.Module, name: str, **settings) -> None:
    torch.manual_seed(len(name) + sum(map(ord, name)))
    model.add_adapter(name, twins.config(**settings))
    twins.train_a_little(model, seed=11)


def check_same(twins, model, twin, fused: int = LAYERS) -> None:
    """One step each: the same numbers, and `fused` layers ran our operator."""
    with twins.CountOps() as ops:
        found = twins.step(model)
    assert ops.forward == fused
    twins.check_close(found, twins.step(twin))


def both(function, *models):
    return [function(model) for model in models]


def activate(model: nn.Module, names: list[str]) -> None:
    model.base_model.set_adapter(names)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.requires_grad_(any(f".{adapter}." in name for adapter in names))


PATTERNS = {
    "rank_pattern": {"r": 4, "rank_pattern": {"q_proj": 2, "layers.1.mlp.down_proj": 7}},
    "alpha_pattern": {"alpha_pattern": {"v_proj": 11, "layers.0.self_attn.q_proj": 1}},
    "both": {"rank_pattern": {"q_proj": 5}, "alpha_pattern": {"q_proj": 3}},
    "rsLoRA": {"r": 5, "use_rslora": True},
    "both, rsLoRA": {"rank_pattern": {"q_proj": 5}, "alpha_pattern": {"v_proj": 3}, "use_rslora": True},
}


@pytest.mark.parametrize("pattern", PATTERNS)
def test_patterns(pattern, twins, pair):
    model, twin = pair(**PATTERNS[pattern])
    layers = [m for m in model.modules() if type(m) is FusedLoraLinear]
    assert len({layer.scaling["default"] for layer in layers}) >= (1 if pattern == "rsLoRA" else 2)
    check_same(twins, model, twin)


def test_one_of_several_adapters(twins, pair):
    model, twin = pair({"r": 6, "lora_alpha": 1}, {"target_modules": ["q_proj"]})
    check_same(twins, model, twin)
    both(lambda m: m.set_adapter("a1"), model, twin)
    check_same(twins, model, twin)
    both(lambda m: m.set_adapter("a2"), model, twin)  # on two of the six layers
    check_same(twins, model, twin, fused=2)
    both(lambda m: m.set_adapter("default"), model, twin)
    check_same(twins, model, twin)


ACTIVE = {
    "same rank": ({"r": 3, "lora_alpha": 4}, {"r": 3, "lora_alpha": 7}),
    "other ranks": ({"r": 1, "lora_alpha": 1}, {"r": 9, "use_rslora": True}),
    "on fewer layers": ({"target_modules": ["q_proj"]}, {"target_modules": ["v_proj"], "r": 2}),
}


@pytest.mark.parametrize("kind", ACTIVE)
def test_several_active_adapters(kind, twins, pair):
    """Σ s_i B_i A_i: one product of stacked ranks; every adapter's gradient is its own."""
    model, twin = pair(*ACTIVE[kind])
    names = ["default", "a1", "a2"]
    both(partial(activate, names=names), model, twin)
    assert model.base_model.active_adapters == names
    check_same(twins, model, twin)
    found = twins.step(model)
    assert all(any(f".{name}." in key for key in found) for name in names)


def test_several_active_on_conv1d(twins, pair):
    model, twin = pair({"r": 5, "target_modules": ["c_attn"]}, kind="gpt2", target_modules=["c_attn", "c_fc"])
    both(partial(activate, names=["a1", "default"]), model, twin)
    check_same(twins, model, twin, fused=4)


def test_adapter_on_new_layers(twins):
    """Layers that PEFT adapts later are PEFT's until patch is called again."""
    model, twin = (twins.peft_model("llama", target_modules=TARGETS) for _ in range(2))
    slao_kernels.patch(model)
    for m in (model, twin):
        add(twins, m, "a1", target_modules=["q_proj", "o_proj"])
        activate(m, ["default", "a1"])
    check_same(twins, model, twin)
    report = slao_kernels.patch(model)
    assert len(report.patched) == LAYERS + 2
    check_same(twins, model, twin, fused=LAYERS + 2)


def test_delete_adapter(twins, pair):
    model, twin = pair({"r": 2})
    both(lambda m: m.set_adapter("a1"), model, twin)
    both(lambda m: m.delete_adapter("default"), model, twin)
    check_same(twins, model, twin)
    assert list(model.state_dict()) == list(twin.state_dict())


def test_disable_adapter(twins, pair):
    model, twin = pair()
    ids = twins.token_ids()
    with model.disable_adapter(), twin.disable_adapter(), twins.CountOps() as ops:
        off, expected = model(ids).logits, twin(ids).logits
    assert ops.counts == {}
    assert torch.equal(off, expected)
    assert error_ratio(off, twin(ids).logits) > 1e-4  # the adapter does something
    check_same(twins, model, twin)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("safe", [False, True])
def test_merge_and_unmerge(safe, kind, twins, pair):
    targets = TARGETS if kind == "llama" else ["c_attn", "c_fc", "c_proj"]
    model, twin = pair(kind=kind, target_modules=targets)
    before = twins.step(model)
    ids = twins.token_ids()
    both(lambda m: m.merge_adapter(safe_merge=safe), model, twin)
    with twins.CountOps() as ops:
        merged = model(ids).logits
    assert ops.counts == {}
    assert torch.equal(merged, twin(ids).logits)
    assert error_ratio(merged, before["logits"]) <= twins.FP32_RATIO
    assert all(torch.equal(value, twin.state_dict()[name]) for name, value in model.state_dict().items())
    both(lambda m: m.unmerge_adapter(), model, twin)
    check_same(twins, model, twin, fused=6 if kind == "llama" else 8)


def test_disabling_a_merged_adapter_unmerges_it(twins, pair):
    model, twin = pair()
    both(lambda m: m.merge_adapter(), model, twin)
    ids = twins.token_ids()
    with model.disable_adapter(), twin.disable_adapter():
        assert torch.equal(model(ids).logits, twin(ids).logits)
    check_same(twins, model, twin)


def test_merge_and_unload(twins, pair):
    model, twin = pair()
    expected = twins.step(model)["logits"]
    merged, their_merged = both(lambda m: m.merge_and_unload(), model, twin)
    assert [type(m) for m in merged.modules()] == [type(m) for m in their_merged.modules()]
    assert all(torch.equal(v, their_merged.state_dict()[name]) for name, v in merged.state_dict().items())
    assert error_ratio(merged(twins.token_ids()).logits, expected) <= twins.FP32_RATIO
    assert slao_kernels.unpatch(merged) == 0


def test_unload(twins, pair):
    model, _ = pair()
    plain = model.unload()
    assert not any(type(module) is FusedLoraLinear for module in plain.modules())
    assert torch.equal(plain(twins.token_ids()).logits, twins.base_model("llama")(twins.token_ids()).logits)


@pytest.mark.parametrize("combination", ["linear", "cat", "svd"])
def test_add_weighted_adapter(combination, twins, pair):
    model, twin = pair({"lora_alpha": 7})
    for m in (model, twin):
        m.add_weighted_adapter(["default", "a1"], [0.7, -0.4], "mixed", combination_type=combination)
        m.set_adapter("mixed")
    check_same(twins, model, twin)


def test_set_scale(twins, pair):
    """PEFT's set_scale and scale_layer change the factor; the next call uses it."""
    model, twin = pair()
    for m in (model, twin):
        for layer in m.modules():
            if hasattr(layer, "scale_layer"):
                layer.set_scale("default", 0.3)
                layer.scale_layer(2.5)
    check_same(twins, model, twin)


def test_hotswap(twins, tmp_path):
    """Ranks padded with zeros, scalings as tensors: fused all the same, before and after the swap."""
    other = twins.peft_model("llama", r=2, lora_alpha=9, target_modules=TARGETS)
    twins.train_a_little(other, seed=23).save_pretrained(tmp_path / "other")
    model, twin = (twins.peft_model("llama", r=4, target_modules=TARGETS) for _ in range(2))
    report = slao_kernels.patch(model)
    both(lambda m: prepare_model_for_compiled_hotswap(m, target_rank=8), model, twin)
    layer = model.get_submodule(report.patched[0])
    assert isinstance(layer.scaling["default"], torch.Tensor)
    assert layer.lora_A["default"].weight.shape[0] == 8
    check_same(twins, model, twin)
    before = {name: id(p) for name, p in model.named_parameters()}
    both(lambda m: hotswap_adapter(m, tmp_path / "other", adapter_name="default"), model, twin)
    assert {name: id(p) for name, p in model.named_parameters()} == before
    check_same(twins, model, twin)
    expected = other(twins.token_ids()).logits
    assert error_ratio(model(twins.token_ids()).logits, expected) <= twins.FP32_RATIO


def test_only_adapters_are_in_peft_state_dict(twins, pair):
    model, twin = pair({"r": 2})
    for name in ("default", "a1"):
        ours, theirs = both(lambda m: get_peft_model_state_dict(m, adapter_name=name), model, twin)  # noqa: B023
        twins.check_equal(ours, theirs)


def test_layer_status_and_printed_names(twins, pair):
    """PEFT reads a layer's kind off its printed name; ours says there that it is fused."""
    model, twin = pair({"target_modules": ["q_proj"]})
    assert both(lambda m: m.get_layer_status(), model, twin)[0] == twin.get_layer_status()
    assert model.get_model_status() == twin.get_model_status()
    (layer, *_), (theirs, *_) = both(lambda m: [x for x in m.modules() if hasattr(x, "lora_A")], model, twin)
    lines, expected = repr(layer).split("\n"), repr(theirs).split("\n")
    assert (lines[0], expected[0]) == ("lora.Linear(", "lora.Linear(")
    assert [line for line in lines if line.strip() != "fused by slao_kernels"] == expected
    assert len(lines) == len(expected) + 1
