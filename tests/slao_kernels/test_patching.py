"""patch and unpatch on PEFT models and plain transformers models: same numbers, same state, exact inverse, errors."""

from __future__ import annotations

import copy

import peft
import pytest
import torch
from peft.tuners.lora import layer as lora
from torch import Tensor, nn

import slao_kernels
from slao_kernels.layers import FusedLoraLinear
from slao_kernels.testing import error_ratio

pytestmark = pytest.mark.usefixtures("one_thread")

# kind -> LoRA layers under target_modules="all-linear" (two blocks; bert has a head transform, t5 two stacks)
LAYERS = {"llama": 14, "qwen3": 14, "gpt2": 8, "bert": 13, "t5": 32}
KINDS = list(LAYERS)
# bf16: our distance from an fp64 copy over PEFT's own. Both are rounding noise; 1.5 is far outside what two correct
# orders of summation give over all gradients together (single tiny gradients scatter between 0.3 and 2).
BF16_RATIO = 1.5


def snapshot(model: nn.Module) -> dict[str, tuple[type, dict]]:
    """Every module's class and instance dictionary (its containers by content, tensors by identity)."""
    found = {}
    for name, module in model.named_modules():
        state = {key: dict(value) if isinstance(value, dict) else value for key, value in module.__dict__.items()}
        found[name] = (type(module), state)
    return found


@pytest.mark.parametrize("train_base", [False, True], ids=["base frozen", "all trained"])
@pytest.mark.parametrize("kind", KINDS)
def test_peft_model_same_numbers(kind, train_base, twins):
    """Every LoRA layer runs our operator, forward and backward; logits and all gradients are PEFT's."""
    model = twins.peft_model(kind)
    if train_base:
        model.requires_grad_(True)
    expected = twins.step(model)
    report = slao_kernels.patch(model)
    assert len(report.patched) == LAYERS[kind]
    assert report.skipped == report.fallbacks == {}
    assert not report.injected
    with twins.CountOps() as ops:
        found = twins.step(model)
    assert ops.counts == {"lora_linear": LAYERS[kind], "lora_linear_backward": LAYERS[kind]}
    twins.check_close(found, expected)
    assert report.fallbacks == {}


@pytest.mark.parametrize("kind", KINDS)
def test_plain_model_gets_an_adapter(kind, twins):
    """patch(model, config) equals model.add_adapter(config) without us, numbers and trainability included."""
    model, twin = twins.base_model(kind), twins.base_model(kind)
    twin.load_state_dict(model.state_dict())
    torch.manual_seed(3)
    report = slao_kernels.patch(model, twins.config())
    torch.manual_seed(3)
    twin.add_adapter(twins.config())
    assert report.injected
    assert len(report.patched) == LAYERS[kind]
    assert report.skipped == {}
    assert [(n, p.requires_grad) for n, p in model.named_parameters()] == [
        (n, p.requires_grad) for n, p in twin.named_parameters()
    ]
    twins.train_a_little(twin)
    model.load_state_dict(twin.state_dict())
    twins.check_close(twins.step(model), twins.step(twin))


def test_plain_model_default_config(twins):
    """Without a config: r=8, alpha=16, all linear layers; B is zero, so the model computes what it did."""
    model = twins.base_model("llama")
    ids = torch.arange(1, 12)[None]
    expected = model(ids).logits
    report = slao_kernels.patch(model)
    assert report.injected
    assert len(report.patched) == LAYERS["llama"]
    adapter = model.peft_config["default"]
    assert (adapter.r, adapter.lora_alpha, adapter.lora_dropout) == (8, 16, 0.0)
    assert error_ratio(model(ids).logits, expected) <= 1e-6
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {
        n for n, _ in model.named_parameters() if "lora_" in n
    }


def test_plain_module_needs_a_config(twins):
    model = nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 4))
    with pytest.raises(ValueError, match=r"nothing to patch; pass a peft\.LoraConfig"):
        slao_kernels.patch(model)
    report = slao_kernels.patch(model, twins.config(target_modules=["0", "2"]))
    assert report.injected
    assert report.patched == ["0", "2"]
    assert type(model[0]) is FusedLoraLinear


@pytest.mark.parametrize("kind", KINDS)
def test_bf16_no_worse_than_peft(kind, twins):
    model = twins.peft_model(kind, torch.bfloat16)
    oracle = twins.step(copy.deepcopy(model).double())
    theirs = twins.step(model)
    assert len(slao_kernels.patch(model).patched) == LAYERS[kind]
    ours = twins.step(model)
    assert all(ours[name].dtype == theirs[name].dtype for name in theirs)

    def error(found: dict[str, Tensor]) -> float:
        """All gradients as one vector, each scaled to its own size."""
        names = [name for name in oracle if name != "logits"]
        return torch.stack([error_ratio(found[n], oracle[n]) * torch.ones(()) for n in names]).square().mean().sqrt()

    assert error_ratio(ours["logits"], oracle["logits"]) <= BF16_RATIO * error_ratio(theirs["logits"], oracle["logits"])
    assert error(ours) <= BF16_RATIO * error(theirs)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_state_and_identity_stay(kind, twins):
    model = twins.peft_model(kind)
    state, parameters = model.state_dict(), dict(model.named_parameters())
    slao_kernels.patch(model)
    after = model.state_dict()
    assert list(after) == list(state)
    assert all(after[name].data_ptr() == state[name].data_ptr() for name in state)
    assert list(dict(model.named_parameters())) == list(parameters)
    assert all(p is parameters[name] for name, p in model.named_parameters())
    assert all(isinstance(m, lora.Linear) for m in model.modules() if type(m) is FusedLoraLinear)


def test_idempotent(twins):
    model = twins.peft_model("llama")
    first = slao_kernels.patch(model)
    classes = {name: type(module) for name, module in model.named_modules()}
    second = slao_kernels.patch(model)
    assert second.patched == first.patched
    assert (second.skipped, second.injected) == ({}, False)
    assert {name: type(module) for name, module in model.named_modules()} == classes
    assert slao_kernels.unpatch(model) == LAYERS["llama"]
    assert slao_kernels.unpatch(model) == 0


def test_idempotent_after_injection(twins):
    """The same config again means the adapter that is there."""
    model = twins.base_model("llama")
    first = slao_kernels.patch(model, twins.config())
    second = slao_kernels.patch(model, twins.config())
    assert (first.injected, second.injected) == (True, False)
    assert second.patched == first.patched
    assert sum("lora_A" in name for name, _ in model.named_parameters()) == LAYERS["llama"]


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
def test_same_config_again(same, how, twins):
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


def test_weights_that_change_between_the_calls_of_siblings(twins):
    """As Method.merged() swaps them: k's B is another between q's call and k's own, which takes the one there is."""
    model, twin = (twins.peft_model("llama", target_modules=["q_proj", "k_proj"]) for _ in range(2))
    slao_kernels.patch(model)

    def swap(module: nn.Module, args: tuple, output: Tensor) -> None:
        B = attention[module].k_proj.lora_B["default"].weight
        B.data = B.data * -1.5

    attention = {}
    for net in (model, twin):
        for block in net.base_model.model.model.layers:
            attention[block.self_attn.q_proj] = block.self_attn
            block.self_attn.q_proj.register_forward_hook(swap)
    for _ in range(3):
        twins.check_close(twins.step(model), twins.step(twin))


@pytest.mark.parametrize("kind", ["qwen3", "gpt2"])
def test_unpatch_is_the_exact_inverse(kind, twins):
    model = twins.peft_model(kind)
    before, expected = snapshot(model), twins.step(model)
    slao_kernels.patch(model)
    twins.step(model)
    assert slao_kernels.unpatch(model) == LAYERS[kind]
    assert snapshot(model) == before
    found = twins.step(model)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert slao_kernels.patch(model).patched  # and again
