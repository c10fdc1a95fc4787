"""patch and unpatch on PEFT models and plain transformers models: same numbers, same state, exact inverse."""

from __future__ import annotations

import copy

import peft
import pytest
import torch
import twins
from kinds import LINEAR
from peft.tuners.lora import layer as lora
from torch import Tensor, nn

import slao_kernels
from slao_kernels.layers import FusedLoraLinear
from slao_kernels.testing import error_ratio

pytestmark = pytest.mark.usefixtures("one_thread")

# kind -> LoRA layers under target_modules="all-linear" (two blocks; bert has a head transform, t5 two stacks)
LAYERS = {"llama": 14, "qwen3": 14, "gpt2": 8, "bert": 13, "t5": 32}
# bf16: our distance from an fp64 copy over PEFT's own. Both are rounding noise; 1.5 is far outside what two correct
# orders of summation give over all gradients together (single tiny gradients scatter between 0.3 and 2).
BF16_RATIO = 1.5

every_kind = pytest.mark.parametrize("kind", LAYERS)


@pytest.mark.parametrize("train_base", [False, True], ids=["base frozen", "all trained"])
@every_kind
def test_peft_model_same_numbers(kind, train_base):
    """Every LoRA layer runs our operator, forward and backward; logits and all gradients are PEFT's."""
    model, twin, report = twins.model_pair(kind)
    for net in (model, twin) if train_base else ():
        net.requires_grad_(True)
    assert len(report.patched) == LAYERS[kind]
    twins.check_same(model, twin, ops=dict.fromkeys(LINEAR, LAYERS[kind]))
    assert (report.skipped, report.fallbacks, report.injected) == ({}, {}, False)


@every_kind
def test_plain_model_gets_an_adapter(kind):
    """patch(model, config) equals model.add_adapter(config) without us, numbers and trainability included."""
    model, twin = twins.base_model(kind), twins.base_model(kind)
    torch.manual_seed(3)
    report = slao_kernels.patch(model, twins.config())
    torch.manual_seed(3)
    twin.add_adapter(twins.config())
    assert (len(report.patched), report.skipped, report.injected) == (LAYERS[kind], {}, True)
    trained = [[(n, p.requires_grad) for n, p in net.named_parameters()] for net in (model, twin)]
    assert trained[0] == trained[1]
    twins.check_same(twins.train_a_little(model), twins.train_a_little(twin))


def test_plain_model_default_config():
    """Without a config: r=8, alpha=16, all linear layers; B is zero, so the model computes what it did."""
    model = twins.base_model("llama")
    expected = model(twins.token_ids()).logits
    report = slao_kernels.patch(model)
    assert report.injected
    assert len(report.patched) == LAYERS["llama"]
    adapter = model.peft_config["default"]
    assert (adapter.r, adapter.lora_alpha, adapter.lora_dropout) == (8, 16, 0.0)
    assert error_ratio(model(twins.token_ids()).logits, expected) <= 1e-6
    assert all(p.requires_grad == ("lora_" in n) for n, p in model.named_parameters())


def test_plain_module():
    model = nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 4))
    report = slao_kernels.patch(model, twins.config(target_modules=["0", "2"]))
    assert (report.injected, report.patched) == (True, ["0", "2"])
    assert type(model[0]) is FusedLoraLinear


@pytest.mark.parametrize("base", ["bfloat16", "bfloat16 under autocast", "float32 under autocast"])
@every_kind
def test_bf16_no_worse_than_peft(kind, base):
    model, twin, report = twins.model_pair(kind, getattr(torch, base.split()[0]))
    exact = twins.step(copy.deepcopy(twin).double())
    with torch.autocast("cpu", torch.bfloat16, enabled="autocast" in base), twins.CountOps() as ops:
        ours, theirs = twins.step(model), twins.step(twin)
    assert ops.forward == len(report.patched) == LAYERS[kind]
    assert {n: v.dtype for n, v in ours.items()} == {n: v.dtype for n, v in theirs.items()}

    def error(found: dict[str, Tensor]) -> float:
        """All gradients as one vector, each scaled to its own size."""
        return sum(error_ratio(found[n], exact[n]) ** 2 for n in exact if n != "logits") ** 0.5

    assert error_ratio(ours["logits"], exact["logits"]) <= BF16_RATIO * error_ratio(theirs["logits"], exact["logits"])
    assert error(ours) <= BF16_RATIO * error(theirs)


SAME = {
    "all-linear": {},
    "names": {"target_modules": ["q_proj", "up_proj"]},
    "regex": {"target_modules": r".*\.(k|o)_proj"},
    "one block": {"target_modules": ["q_proj"], "layers_to_transform": [1]},
    "excluded": {"target_modules": ["q_proj", "k_proj"], "exclude_modules": ["layers.0.self_attn.q_proj"]},
    # More than twenty full names, which PEFT condenses to what they have in common.
    "many": {"target_modules": [f"layers.{i}.mlp.{name}_proj" for i in range(9) for name in ("gate", "up", "down")]},
    "saved too": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
}


@pytest.mark.parametrize("how", ["injected", "PeftModel"])
@pytest.mark.parametrize("same", SAME)
def test_same_config_again(same, how):
    """patch(model, config) where that very config has been applied, by us or by get_peft_model."""
    config = twins.config(**SAME[same])
    model = twins.base_model("llama")
    if how == "injected":
        assert slao_kernels.patch(model, config).injected
    else:
        model = peft.get_peft_model(model, twins.config(**SAME[same]))
    report = slao_kernels.patch(model, config)
    assert not report.injected
    assert report.patched
    assert len(report.patched) == sum(isinstance(module, lora.Linear) for module in model.modules())


@pytest.mark.parametrize("kind", ["qwen3", "gpt2"])
def test_unpatch_is_the_exact_inverse(kind):
    """Of patch, called once or again."""
    model = twins.peft_model(kind)
    before, expected = twins.snapshot(model), twins.step(model)
    first = slao_kernels.patch(model)
    twins.step(model)
    again = slao_kernels.patch(model)
    assert (again.patched, again.skipped, again.injected) == (first.patched, {}, False)
    assert [slao_kernels.unpatch(model) for _ in range(2)] == [LAYERS[kind], 0]
    assert twins.snapshot(model) == before
    twins.check_equal(twins.step(model), expected)
    assert slao_kernels.patch(model).patched == first.patched


def test_modules_to_save_are_left_alone():
    model, twin = (twins.peft_model("llama", modules_to_save=["lm_head"]) for _ in range(2))
    wrapper = model.base_model.model.lm_head
    before = twins.snapshot(wrapper)
    report = slao_kernels.patch(model)
    assert (len(report.patched), report.skipped) == (14, {})
    assert twins.snapshot(wrapper) == before
    assert any("modules_to_save" in name for name in twins.check_same(model, twin))
