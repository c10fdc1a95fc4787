"""A layer with a routing core or frozen pairs: forward and every gradient, PEFT's merging, copies, refusals."""

from __future__ import annotations

import copy
import pickle
from collections import OrderedDict

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora.layer import Linear as LoraLinear
from torch import Tensor, nn

import slao_kernels
from slao_kernels import extension
from slao_kernels.testing import error_ratio

N, K = 20, 12
f64 = torch.float64
NAME = "base_model.model.lin"
either = pytest.mark.parametrize("patched", [True, False])


def make(r: int = 4, kind: str = "", patched: bool = True, dtype: torch.dtype = f64, **lora):
    """(model, its layer, x); with a core, or two frozen pairs."""
    torch.manual_seed(0)
    model = get_peft_model(
        nn.Sequential(OrderedDict(lin=nn.Linear(K, N))), LoraConfig(r=r, target_modules=["lin"], **lora)
    ).to(dtype)
    if patched:
        slao_kernels.patch(model)
    layer = extension.extend(model.base_model.model.lin, "default")
    with torch.no_grad():
        layer.lora_B["default"].weight.normal_()
    if kind == "core":
        layer.slao_core, delta = torch.randn(2, r, r, dtype=f64).to(dtype)
        layer.slao_core_delta = nn.Parameter(delta)
    elif kind == "frozen":
        layer.slao_frozen_A, layer.slao_frozen_B = torch.randn(8, K, dtype=dtype), torch.randn(N, 8, dtype=dtype)
    return model, layer, torch.randn(5, K, dtype=dtype)


def pair_of(layer) -> tuple[Tensor, Tensor]:
    return layer.lora_A["default"].weight, layer.lora_B["default"].weight


def formula(layer, x):
    """The stop-gradient formula of C-LoRA, written out."""
    (A, B), core, delta = pair_of(layer), layer.slao_core, layer.slao_core_delta
    old = x @ A.detach().T @ (core + delta).T @ B.detach().T
    new = x.detach() @ A.T @ delta.detach().T @ B.T
    return layer.base_layer(x) + layer.scaling["default"] * (old + new - new.detach())


@either
@pytest.mark.parametrize("r", [1, 4, 12])
@pytest.mark.parametrize("rows", [(1,), (7,), (2, 5), (0,)], ids=str)
def test_core_forward_and_gradients_are_the_formulas(patched, r, rows):
    _, layer, _ = make(r, "core", patched)
    x, dy = torch.randn(*rows, K, dtype=f64, requires_grad=True), torch.randn(*rows, N, dtype=f64)
    leaves = [x, *pair_of(layer), layer.slao_core_delta]
    y, expected = layer(x), formula(layer, x)
    got, want = (torch.autograd.grad(out, leaves, dy) for out in (y, expected))
    for mine, theirs in zip([y, *got], [expected, *want], strict=True):
        assert error_ratio(mine, theirs) <= 1e-14
    assert layer.slao_options.fallbacks.get(layer.slao_options.name) == (None if patched else "not patched")


def test_a_zero_change_is_the_frozen_layer_and_gives_only_the_core_a_gradient():
    _, layer, x = make()
    layer.slao_core, delta = torch.zeros(2, 4, 4, dtype=f64)
    layer.slao_core_delta = nn.Parameter(delta)
    y = layer(x)
    assert torch.equal(y, layer.base_layer(x))
    y.square().sum().backward()
    assert layer.slao_core_delta.grad.abs().max() > 1e-3
    assert not any(weight.grad.any() for weight in pair_of(layer))


@either
@pytest.mark.parametrize("scaled", [True, False])
def test_frozen_pairs_are_added_and_do_not_train(patched, scaled):
    model, layer, x = make(kind="frozen", patched=patched, lora_alpha=6)
    weights = torch.tensor([0.5, 2.0], dtype=f64)
    if scaled:
        layer.slao_frozen_scale = nn.Parameter(weights.clone())
    each = (weights if scaled else torch.ones(2, dtype=f64)).repeat_interleave(4)
    (A, B), C, D = pair_of(layer), layer.slao_frozen_A, layer.slao_frozen_B
    y = layer(x)
    assert error_ratio(y, layer.base_layer(x) + x @ (1.5 * (B @ A + (D * each) @ C)).T) <= 1e-14
    y.sum().backward()
    trained = [name for name, p in model.named_parameters() if p.grad is not None]
    expected = ["lora_A.default.weight", "lora_B.default.weight"] + ["slao_frozen_scale"] * scaled
    assert sorted(name.split("lin.")[1] for name in trained) == sorted(expected)
    if scaled:  # d/dw_k of the sum of y: 1ᵀ (s B_k A_k) x summed over rows
        want = [1.5 * (x @ (D[:, k : k + 4] @ C[k : k + 4]).T).sum() for k in (0, 4)]
        assert error_ratio(layer.slao_frozen_scale.grad, torch.stack(want)) <= 1e-12


@pytest.mark.parametrize("kind", ["core", "frozen"])
def test_merging_copies_and_pickles_keep_the_function(kind):
    model, layer, x = make(kind=kind)
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


@pytest.mark.parametrize("kind", ["core", "frozen"])
def test_a_merge_in_16_bits_is_rounded_once_as_pefts_is(kind):
    _, layer, _ = make(kind=kind, dtype=torch.bfloat16)
    wide = copy.deepcopy(layer).double()
    assert torch.equal(layer.get_delta_weight("default"), wide.get_delta_weight("default").bfloat16())


def test_16_bit_autocast_and_dropout():
    model, layer, _ = make(kind="core", dtype=torch.float32, lora_dropout=0.5)
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
    (A, B), core = pair_of(layer), layer.slao_core + layer.slao_core_delta
    branch = nn.functional.dropout(x, 0.5) @ A.T @ core.T @ B.T
    assert error_ratio(y, layer.base_layer(x) + layer.scaling["default"] * branch) <= 1e-6


def test_retract_is_the_inverse_and_patch_leaves_an_extended_layer_alone():
    model, layer, x = make(kind="core")
    names = {name for name, _ in model.named_parameters()} | set(model.state_dict())
    assert any("slao_core_delta" in name for name in names)
    report = slao_kernels.patch(model)
    assert (report.patched, report.skipped) == ([NAME], {})
    assert "extended by a method" in str(report)
    assert type(layer) is extension.ExtendedLoraLinear
    extension.retract(layer)
    assert type(layer).__name__ == "FusedLoraLinear"
    assert not any("slao" in name for name in [*model.state_dict(), *layer.__dict__] if name != "slao_options")
    plain, other, _ = make(patched=False)
    extension.retract(other)
    assert not any("slao" in key for key in other.__dict__)
    assert type(other) is LoraLinear
    assert plain(x).shape == (5, N)


@pytest.mark.parametrize("called", [True, False])
def test_unpatch_of_an_extended_layer(called):
    """It counts, keeps the method's forward in plain PyTorch, and is PEFT's once the method lets go of it."""
    model, layer, x = make(kind="core")
    before = model(x)
    assert [slao_kernels.unpatch(model) for _ in range(2)] == [1, 0]
    assert type(layer) is extension.ExtendedLoraLinear
    if called:
        assert error_ratio(model(x), before) <= 1e-14
        assert layer.slao_options.fallbacks == {NAME: "not patched"}
    extension.retract(layer)
    plain, theirs, _ = make(patched=False)
    extension.retract(theirs)
    assert type(layer) is type(theirs) is LoraLinear
    assert vars(layer).keys() == vars(theirs).keys()
    plain.load_state_dict(model.state_dict())
    assert torch.equal(model(x), plain(x))
    assert slao_kernels.patch(model).patched == [NAME]


def test_refusals():
    model, layer, x = make(kind="core")
    with pytest.raises(ValueError, match="another method has extended it already"):
        extension.extend(layer, "default")
    model.add_adapter("other", LoraConfig(r=2, target_modules=["lin"]))
    model.base_model.set_adapter(["default", "other"])
    with pytest.raises(ValueError, match=r"cannot be active beside \['other'\]"):
        model(x)
    model.set_adapter("other")
    assert model(x).shape == (5, N)
    model.set_adapter("default")
    before = model(x)
    model.merge_adapter()
    with pytest.raises(ValueError, match="is merged into the base: call unmerge_adapter"):
        extension.retract(layer)
    model.unmerge_adapter()
    assert error_ratio(model(x), before) <= 1e-13
    emb = get_peft_model(nn.Sequential(nn.Embedding(5, 6)), LoraConfig(r=2, target_modules=["0"]))
    with pytest.raises(ValueError, match="cannot take a core or frozen pairs"):
        extension.extend(emb.base_model.model[0], "default")
