"""A layer with a routing core or frozen pairs: forward and every gradient, PEFT's merging, copies, refusals."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora.layer import Linear as LoraLinear
from torch import nn

import slao_kernels
from slao_kernels import extension
from slao_kernels.testing import error_ratio

N, K = 20, 12


class Net(nn.Module):
    def __init__(self, bias: bool = True) -> None:
        super().__init__()
        self.lin = nn.Linear(K, N, bias=bias)

    def forward(self, x):
        return self.lin(x)


def make(r: int = 4, *, patched: bool = True, dtype: torch.dtype = torch.float64, **lora):
    torch.manual_seed(0)
    model = get_peft_model(Net(), LoraConfig(r=r, target_modules=["lin"], **lora)).to(dtype)
    if patched:
        slao_kernels.patch(model)
    layer = model.base_model.model.lin
    with torch.no_grad():
        layer.lora_B["default"].weight.normal_()
    return model, extension.extend(layer, "default")


def give_core(layer, r: int, dtype: torch.dtype = torch.float64) -> None:
    g = torch.Generator().manual_seed(1)
    layer.slao_core = torch.randn(r, r, generator=g, dtype=torch.float64).to(dtype)
    layer.slao_core_delta = nn.Parameter(torch.randn(r, r, generator=g, dtype=torch.float64).to(dtype))


def formula(layer, x):
    """The stop-gradient formula of C-LoRA, written out."""
    A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    core, delta = layer.slao_core, layer.slao_core_delta
    old = x @ A.detach().T @ (core + delta).T @ B.detach().T
    new = x.detach() @ A.T @ delta.detach().T @ B.T
    return layer.base_layer(x) + layer.scaling["default"] * (old + new - new.detach())


@pytest.mark.parametrize("patched", [True, False])
@pytest.mark.parametrize("r", [1, 4, 12])
@pytest.mark.parametrize("rows", [(1,), (7,), (2, 5), (0,)], ids=str)
def test_core_forward_and_gradients_are_the_formulas(patched, r, rows):
    _, layer = make(r, patched=patched)
    give_core(layer, r)
    x = torch.randn(*rows, K, dtype=torch.float64, requires_grad=True)
    dy = torch.randn(*rows, N, dtype=torch.float64)
    leaves = [x, layer.lora_A["default"].weight, layer.lora_B["default"].weight, layer.slao_core_delta]
    y, expected = layer(x), formula(layer, x)
    got, want = (torch.autograd.grad(out, leaves, dy) for out in (y, expected))
    for mine, theirs in zip([y, *got], [expected, *want], strict=True):
        assert error_ratio(mine, theirs) <= 1e-14
    assert layer.slao_options.fallbacks.get(layer.slao_options.name) == (None if patched else "not patched")


def test_a_zero_change_is_the_frozen_layer_and_gives_only_the_core_a_gradient():
    _, layer = make()
    layer.slao_core = torch.zeros(4, 4, dtype=torch.float64)
    layer.slao_core_delta = nn.Parameter(torch.zeros(4, 4, dtype=torch.float64))
    x = torch.randn(5, K, dtype=torch.float64)
    y = layer(x)
    assert torch.equal(y, layer.base_layer(x))
    y.square().sum().backward()
    assert layer.slao_core_delta.grad.abs().max() > 1e-3
    assert not layer.lora_A["default"].weight.grad.any()
    assert not layer.lora_B["default"].weight.grad.any()


@pytest.mark.parametrize("patched", [True, False])
@pytest.mark.parametrize("scaled", [True, False])
def test_frozen_pairs_are_added_and_do_not_train(patched, scaled):
    model, layer = make(patched=patched, lora_alpha=6)
    layer.slao_frozen_A = torch.randn(8, K, dtype=torch.float64)
    layer.slao_frozen_B = torch.randn(N, 8, dtype=torch.float64)
    weights = torch.tensor([0.5, 2.0], dtype=torch.float64)
    if scaled:
        layer.slao_frozen_scale = nn.Parameter(weights.clone())
    each = (weights if scaled else torch.ones(2, dtype=torch.float64)).repeat_interleave(4)
    A, B = layer.lora_A["default"].weight.detach(), layer.lora_B["default"].weight.detach()
    delta = 1.5 * (B @ A + (layer.slao_frozen_B * each) @ layer.slao_frozen_A)
    x = torch.randn(5, K, dtype=torch.float64)
    y = layer(x)
    assert error_ratio(y, layer.base_layer(x) + x @ delta.T) <= 1e-14
    y.sum().backward()
    trained = [name for name, p in model.named_parameters() if p.grad is not None]
    expected = ["lora_A.default.weight", "lora_B.default.weight"] + ["slao_frozen_scale"] * scaled
    assert sorted(name.split("lin.")[1] for name in trained) == sorted(expected)
    if scaled:  # d/dw_k of the sum of y: 1ᵀ (s B_k A_k) x summed over rows
        want = [
            1.5 * (x @ (layer.slao_frozen_B[:, k : k + 4] @ layer.slao_frozen_A[k : k + 4]).T).sum() for k in (0, 4)
        ]
        assert error_ratio(layer.slao_frozen_scale.grad, torch.stack(want)) <= 1e-12


@pytest.mark.parametrize("kind", ["core", "frozen"])
def test_merging_copies_and_pickles_keep_the_function(kind):
    model, layer = make()
    if kind == "core":
        give_core(layer, 4)
    else:
        layer.slao_frozen_A = torch.randn(8, K, dtype=torch.float64)
        layer.slao_frozen_B = torch.randn(N, 8, dtype=torch.float64)
    x = torch.randn(5, K, dtype=torch.float64)
    before = model(x)
    assert error_ratio(before, layer.base_layer(x)) > 0.1
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(x), before)
        assert other.base_model.model.lin.slao_options.fallbacks == {}
    with model.disable_adapter():
        assert torch.equal(model(x), layer.base_layer(x))
    model.merge_adapter()
    assert error_ratio(model(x), before) <= 1e-14
    model.unmerge_adapter()
    assert error_ratio(model(x), before) <= 1e-13
    merged = model.merge_and_unload()
    assert type(merged.lin) is nn.Linear
    assert error_ratio(merged(x), before) <= 1e-13


def test_16_bit_autocast_and_dropout():
    model, layer = make(dtype=torch.float32, lora_dropout=0.5)
    give_core(layer, 4, torch.float32)
    x = torch.randn(64, K)
    model.eval()
    exact = copy.deepcopy(model).double()(x.double())
    with torch.autocast("cpu", torch.bfloat16):
        y = model(x)
    assert y.dtype == torch.bfloat16
    # Three roundings of 2⁻⁹ at most of terms as large as y.
    assert error_ratio(y, exact) <= 1e-2
    model.train()
    torch.manual_seed(3)
    y = model(x)
    torch.manual_seed(3)
    dropped = nn.functional.dropout(x, 0.5)
    A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    want = layer.base_layer(x) + layer.scaling["default"] * (
        dropped @ A.T @ (layer.slao_core + layer.slao_core_delta).T @ B.T
    )
    assert error_ratio(y, want) <= 1e-6


def test_retract_is_the_inverse_and_patch_leaves_an_extended_layer_alone():
    model, layer = make()
    give_core(layer, 4)
    names = {name for name, _ in model.named_parameters()} | set(model.state_dict())
    assert any("slao_core_delta" in name for name in names)
    report = slao_kernels.patch(model)
    assert len(report.patched) == 1
    assert not report.skipped
    assert "extended by a method" in str(report)
    assert type(layer) is extension.ExtendedLoraLinear
    extension.retract(layer)
    assert type(layer).__name__ == "FusedLoraLinear"
    assert not any("slao" in name for name in [*model.state_dict(), *layer.__dict__] if name != "slao_options")
    plain, other = make(patched=False)
    extension.retract(other)
    assert not any("slao" in key for key in other.__dict__)
    assert type(other).__module__.startswith("peft.")
    assert plain(torch.zeros(1, K, dtype=torch.float64)).shape == (1, N)


@pytest.mark.parametrize("called", [True, False])
def test_unpatch_of_an_extended_layer(called):
    """It counts, keeps the method's forward in plain PyTorch, and is PEFT's once the method lets go of it."""
    model, layer = make()
    give_core(layer, 4)
    x = torch.randn(5, K, dtype=torch.float64)
    before = model(x)
    assert slao_kernels.unpatch(model) == 1
    assert slao_kernels.unpatch(model) == 0
    assert type(layer) is extension.ExtendedLoraLinear
    if called:
        assert error_ratio(model(x), before) <= 1e-14
        assert layer.slao_options.fallbacks == {"base_model.model.lin": "not patched"}
    extension.retract(layer)
    plain, theirs = make(patched=False)
    extension.retract(theirs)
    assert type(layer) is type(theirs) is LoraLinear
    assert vars(layer).keys() == vars(theirs).keys()
    plain.load_state_dict(model.state_dict())
    assert torch.equal(model(x), plain(x))
    assert slao_kernels.patch(model).patched == ["base_model.model.lin"]


def test_refusals():
    model, layer = make()
    with pytest.raises(ValueError, match="another method has extended it already"):
        extension.extend(layer, "default")
    model.add_adapter("other", LoraConfig(r=2, target_modules=["lin"]))
    model.base_model.set_adapter(["default", "other"])
    give_core(layer, 4)
    with pytest.raises(ValueError, match=r"cannot be active beside \['other'\]"):
        model(torch.zeros(1, K, dtype=torch.float64))
    model.set_adapter("other")
    assert model(torch.zeros(1, K, dtype=torch.float64)).shape == (1, N)
    emb = get_peft_model(nn.Sequential(nn.Embedding(5, 6)), LoraConfig(r=2, target_modules=["0"]))
    with pytest.raises(ValueError, match="cannot take a core or frozen pairs"):
        extension.extend(emb.base_model.model[0], "default")
