"""patch and unpatch on PEFT models and plain transformers models: same numbers, same state, exact inverse, errors."""

from __future__ import annotations

import copy

import peft
import pytest
import torch
from peft.tuners.lora import layer as lora
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import slao_kernels
from slao_kernels.layers import FusedLoraLinear
from slao_kernels.testing import error_ratio, tiny_model

# kind -> LoRA layers under target_modules="all-linear" (two blocks; bert has a head transform, t5 two stacks)
LAYERS = {"llama": 14, "qwen3": 14, "gpt2": 8, "bert": 13, "t5": 32}
KINDS = list(LAYERS)
FP32_RATIO = 1e-5  # of an output or gradient against the unpatched fp32 model
# bf16: our distance from an fp64 copy over PEFT's own. Both are rounding noise; 1.5 is far outside what two correct
# orders of summation give over all gradients together (single tiny gradients scatter between 0.3 and 2).
BF16_RATIO = 1.5


class CountOps(TorchDispatchMode):
    """How often each slao_kernels operator ran."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: dict[str, int] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "slao_kernels":
            name = func.overloadpacket._qualified_op_name.split("::")[1]
            self.counts[name] = self.counts.get(name, 0) + 1
        return func(*args, **(kwargs or {}))


def config(**options) -> peft.LoraConfig:
    # r and alpha whose ratio is no power of two: a misplaced rounding or factor shows.
    return peft.LoraConfig(**{"r": 3, "lora_alpha": 5, "target_modules": "all-linear", **options})


def base_model(kind: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    """A tiny model whose biases are not zero (transformers starts them at zero)."""
    model = tiny_model(kind).to(dtype)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter, std=0.1)
    return model


def train_a_little(model: nn.Module) -> nn.Module:
    """B as training leaves it: a delta of about a tenth of the base output."""
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.02)
    return model


def peft_model(kind: str, dtype: torch.dtype = torch.float32, **options) -> nn.Module:
    return train_a_little(peft.get_peft_model(base_model(kind, dtype), config(**options)))


def run(model: nn.Module) -> dict[str, Tensor]:
    """Logits and every gradient of one step; the loss is the model's own."""
    ids = torch.randint(1, 128, (3, 11), generator=torch.Generator().manual_seed(1))
    model.zero_grad()
    out = model(input_ids=ids, labels=ids)
    out.loss.backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {"logits": out.logits.detach(), **grads}


def snapshot(model: nn.Module) -> dict[str, tuple[type, dict]]:
    """Every module's class and instance dictionary (its containers by content, tensors by identity)."""
    found = {}
    for name, module in model.named_modules():
        state = {key: dict(value) if isinstance(value, dict) else value for key, value in module.__dict__.items()}
        found[name] = (type(module), state)
    return found


def check_equal(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = FP32_RATIO) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].dtype == value.dtype
        ratio = error_ratio(found[name], value)
        assert ratio <= tolerance, f"{name}: {ratio:.2e}"


@pytest.mark.parametrize("train_base", [False, True], ids=["base frozen", "all trained"])
@pytest.mark.parametrize("kind", KINDS)
def test_peft_model_same_numbers(kind, train_base):
    """Every LoRA layer runs our operator, forward and backward; logits and all gradients are PEFT's."""
    model = peft_model(kind)
    if train_base:
        model.requires_grad_(True)
    expected = run(model)
    report = slao_kernels.patch(model)
    assert len(report.patched) == LAYERS[kind]
    assert report.skipped == report.fallbacks == {}
    assert not report.injected
    with CountOps() as ops:
        found = run(model)
    assert ops.counts == {"lora_linear": LAYERS[kind], "lora_linear_backward": LAYERS[kind]}
    check_equal(found, expected)
    assert report.fallbacks == {}


@pytest.mark.parametrize("kind", KINDS)
def test_plain_model_gets_an_adapter(kind):
    """patch(model, config) equals model.add_adapter(config) without us, numbers and trainability included."""
    model, twin = base_model(kind), base_model(kind)
    twin.load_state_dict(model.state_dict())
    torch.manual_seed(3)
    report = slao_kernels.patch(model, config())
    torch.manual_seed(3)
    twin.add_adapter(config())
    assert report.injected
    assert len(report.patched) == LAYERS[kind]
    assert report.skipped == {}
    assert [(n, p.requires_grad) for n, p in model.named_parameters()] == [
        (n, p.requires_grad) for n, p in twin.named_parameters()
    ]
    train_a_little(twin)
    model.load_state_dict(twin.state_dict())
    check_equal(run(model), run(twin))


def test_plain_model_default_config():
    """Without a config: r=8, alpha=16, all linear layers; B is zero, so the model computes what it did."""
    model = base_model("llama")
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


def test_plain_module_needs_a_config():
    model = nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 4))
    with pytest.raises(ValueError, match=r"nothing to patch; pass a peft\.LoraConfig"):
        slao_kernels.patch(model)
    report = slao_kernels.patch(model, config(target_modules=["0", "2"]))
    assert report.injected
    assert report.patched == ["0", "2"]
    assert type(model[0]) is FusedLoraLinear


@pytest.mark.parametrize("kind", KINDS)
def test_bf16_no_worse_than_peft(kind):
    model = peft_model(kind, torch.bfloat16)
    oracle = run(copy.deepcopy(model).double())
    theirs = run(model)
    assert len(slao_kernels.patch(model).patched) == LAYERS[kind]
    ours = run(model)
    assert all(ours[name].dtype == theirs[name].dtype for name in theirs)

    def error(found: dict[str, Tensor]) -> float:
        """All gradients as one vector, each scaled to its own size."""
        names = [name for name in oracle if name != "logits"]
        return torch.stack([error_ratio(found[n], oracle[n]) * torch.ones(()) for n in names]).square().mean().sqrt()

    assert error_ratio(ours["logits"], oracle["logits"]) <= BF16_RATIO * error_ratio(theirs["logits"], oracle["logits"])
    assert error(ours) <= BF16_RATIO * error(theirs)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_state_and_identity_stay(kind):
    model = peft_model(kind)
    state, parameters = model.state_dict(), dict(model.named_parameters())
    slao_kernels.patch(model)
    after = model.state_dict()
    assert list(after) == list(state)
    assert all(after[name].data_ptr() == state[name].data_ptr() for name in state)
    assert list(dict(model.named_parameters())) == list(parameters)
    assert all(p is parameters[name] for name, p in model.named_parameters())
    assert all(isinstance(m, lora.Linear) for m in model.modules() if type(m) is FusedLoraLinear)


def test_idempotent():
    model = peft_model("llama")
    first = slao_kernels.patch(model)
    classes = {name: type(module) for name, module in model.named_modules()}
    second = slao_kernels.patch(model)
    assert second.patched == first.patched
    assert (second.skipped, second.injected) == ({}, False)
    assert {name: type(module) for name, module in model.named_modules()} == classes
    assert slao_kernels.unpatch(model) == LAYERS["llama"]
    assert slao_kernels.unpatch(model) == 0


def test_idempotent_after_injection():
    """The same config again means the adapter that is there."""
    model = base_model("llama")
    first = slao_kernels.patch(model, config())
    second = slao_kernels.patch(model, config())
    assert (first.injected, second.injected) == (True, False)
    assert second.patched == first.patched
    assert sum("lora_A" in name for name, _ in model.named_parameters()) == LAYERS["llama"]


@pytest.mark.parametrize("kind", ["qwen3", "gpt2"])
def test_unpatch_is_the_exact_inverse(kind):
    model = peft_model(kind)
    before, expected = snapshot(model), run(model)
    slao_kernels.patch(model)
    run(model)
    assert slao_kernels.unpatch(model) == LAYERS[kind]
    assert snapshot(model) == before
    found = run(model)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert slao_kernels.patch(model).patched  # and again
