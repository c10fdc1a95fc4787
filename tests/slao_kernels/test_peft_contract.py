"""What PEFT's users do with adapters works on a patched model as on its unpatched twin: add, combine, merge, swap,
copy, save, load."""

from __future__ import annotations

import copy
import json
import pickle
from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
import twins
from peft import get_peft_model_state_dict
from peft.utils.hotswap import hotswap_adapter, prepare_model_for_compiled_hotswap
from safetensors.torch import load_file
from torch import nn

import slao_kernels
from slao_kernels.layers import FusedLoraLinear, FusedOptions
from slao_kernels.testing import error_ratio

pytestmark = pytest.mark.usefixtures("one_thread")

TARGETS = ["q_proj", "v_proj", "down_proj"]  # six layers
LAYERS = 6


@pytest.fixture(params=["patch first", "adapters first"])
def pair(request):
    """pair(*configs): (patched llama, its unpatched twin) with adapters default, a1, a2, ...; added before or after."""

    def build(*configs: dict, kind: str = "llama", **options):
        models = [twins.peft_model(kind, **{"target_modules": TARGETS, **options}) for _ in range(2)]
        if request.param == "patch first":
            slao_kernels.patch(models[0])
        for model in models:
            for i, settings in enumerate(configs, start=1):
                add(model, f"a{i}", **{"target_modules": TARGETS, **settings})
        slao_kernels.patch(models[0])
        return models

    return build


def add(model: nn.Module, name: str, **settings) -> None:
    torch.manual_seed(len(name) + sum(map(ord, name)))
    model.add_adapter(name, twins.config(**settings))
    twins.train_a_little(model, seed=11)


def activate(*names: str) -> Callable[[nn.Module], None]:
    def act(model: nn.Module) -> None:
        model.base_model.set_adapter(list(names))
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.requires_grad_(any(f".{adapter}." in name for adapter in names))

    return act


def delete(model: nn.Module) -> None:
    model.set_adapter("a1")
    model.delete_adapter("default")


def weighted(combination: str) -> Callable[[nn.Module], None]:
    def act(model: nn.Module) -> None:
        model.add_weighted_adapter(["default", "a1"], [0.7, -0.4], "mixed", combination_type=combination)
        model.set_adapter("mixed")

    return act


def scale(model: nn.Module) -> None:
    """The next call uses what set_scale and scale_layer leave."""
    for layer in model.modules():
        if hasattr(layer, "scale_layer"):
            layer.set_scale("default", 0.3)
            layer.scale_layer(2.5)


def biases(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if "lora_B" in name and name.endswith("bias"):
            nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(len(name)))


def disable(model: nn.Module) -> None:
    """Disabling a merged adapter unmerges it."""
    model.merge_adapter()
    with model.disable_adapter(), twins.CountOps() as ops:
        twins.step(model.requires_grad_(True))
    assert ops.counts == {}


CONV1D = {"kind": "gpt2", "target_modules": ["c_attn", "c_fc"]}
# Further adapters, options of the first, what is done then, forwards of fused layers in a step. Several active
# adapters, Σ s_i B_i A_i: one product of stacked ranks; every adapter's gradient is its own.
USES: dict[str, tuple[list[dict[str, Any]], dict[str, Any], Callable[[nn.Module], Any], int]] = {
    "another": ([{"r": 6, "lora_alpha": 1}], {}, lambda m: m.set_adapter("a1"), LAYERS),
    "another on fewer layers": ([{"target_modules": ["q_proj"]}], {}, lambda m: m.set_adapter("a1"), 2),
    "back again": ([{"r": 6}], {}, lambda m: [m.set_adapter("a1"), m.set_adapter("default")], LAYERS),
    "several": ([{"lora_alpha": 4}, {"lora_alpha": 7}], {}, activate("default", "a1", "a2"), LAYERS),
    "several ranks": ([{"r": 1}, {"r": 9, "use_rslora": True}], {}, activate("default", "a1", "a2"), LAYERS),
    "several on fewer layers": (
        [{"target_modules": ["q_proj"]}, {"target_modules": ["v_proj"], "r": 2}],
        {},
        activate("default", "a1", "a2"),
        LAYERS,
    ),
    "several on Conv1D": ([{"r": 5, "target_modules": ["c_attn"]}], CONV1D, activate("a1", "default"), 4),
    "lora_bias on Conv1D": ([], {**CONV1D, "lora_bias": True}, biases, 4),
    "deleted": ([{"r": 2}], {}, delete, LAYERS),
    **{f"weighted, {how}": ([{"lora_alpha": 7}], {}, weighted(how), LAYERS) for how in ("linear", "cat", "svd")},
    # While it is merged or disabled, layer by layer: test_layers_peft.py.
    "merged and disabled": ([], {}, disable, LAYERS),
    "set_scale": ([], {}, scale, LAYERS),
    "double": ([], {}, lambda m: m.double(), LAYERS),
}


@pytest.mark.parametrize("use", USES)
def test_uses(use, pair):
    configs, options, act, fused = USES[use]
    model, twin = pair(*configs, **options)
    for net in (model, twin):
        act(net)
    assert model.base_model.active_adapters == twin.base_model.active_adapters
    if act is disable:  # PEFT's unmerge leaves its rounding, ours none (test_exact_merge.py)
        twins.check_close(dict(model.state_dict()), dict(twin.state_dict()), 1e-7)
        twin.load_state_dict(model.state_dict())
    twins.check_equal(dict(model.state_dict()), dict(twin.state_dict()))
    tolerance = 1e-12 if use == "double" else twins.FP32_RATIO
    found = twins.check_same(model, twin, ops=fused, tolerance=tolerance)
    assert all(any(f".{name}." in key for key in found) for name in model.base_model.active_adapters)


def test_unloaded(pair):
    """Merged or not: PEFT's classes, and nothing of ours."""
    model, twin = pair()
    expected = twins.step(model)["logits"]
    plain = copy.deepcopy(model).unload()
    assert not any(type(module) is FusedLoraLinear for module in plain.modules())
    assert torch.equal(plain(twins.token_ids()).logits, twins.base_model("llama")(twins.token_ids()).logits)
    merged, their_merged = (net.merge_and_unload() for net in (model, twin))
    assert [type(m) for m in merged.modules()] == [type(m) for m in their_merged.modules()]
    twins.check_close(dict(merged.state_dict()), dict(their_merged.state_dict()), 1e-7)  # one rounding less
    assert error_ratio(merged(twins.token_ids()).logits, expected) <= twins.FP32_RATIO
    assert slao_kernels.unpatch(merged) == 0


def test_adapter_on_new_layers():
    """Layers that PEFT adapts later are PEFT's until patch is called again."""
    model, twin, _ = twins.model_pair(target_modules=TARGETS)
    for net in (model, twin):
        add(net, "a1", target_modules=["q_proj", "o_proj"])
        activate("default", "a1")(net)
    twins.check_same(model, twin, ops=LAYERS)
    assert len(slao_kernels.patch(model).patched) == LAYERS + 2
    twins.check_same(model, twin, ops=LAYERS + 2)


def test_hotswap(tmp_path):
    """Ranks padded with zeros, scalings as tensors: fused all the same, before and after the swap."""
    other = twins.peft_model("llama", r=2, lora_alpha=9, target_modules=TARGETS)
    twins.train_a_little(other, seed=23).save_pretrained(tmp_path / "other")
    model, twin, report = twins.model_pair(r=4, target_modules=TARGETS)
    for net in (model, twin):
        prepare_model_for_compiled_hotswap(net, target_rank=8)
    layer = model.get_submodule(report.patched[0])
    assert isinstance(layer.scaling["default"], torch.Tensor)
    assert layer.lora_A["default"].weight.shape[0] == 8
    twins.check_same(model, twin, ops=LAYERS)
    before = {name: id(p) for name, p in model.named_parameters()}
    for net in (model, twin):
        hotswap_adapter(net, tmp_path / "other", adapter_name="default")
    assert {name: id(p) for name, p in model.named_parameters()} == before
    twins.check_same(model, twin, ops=LAYERS)
    expected = other(twins.token_ids()).logits
    assert error_ratio(model(twins.token_ids()).logits, expected) <= twins.FP32_RATIO


def test_what_peft_reports(pair):
    """State dict by adapter, status, and a printed name off which PEFT reads a layer's kind, and that it is fused."""
    model, twin = pair({"target_modules": ["q_proj"]})
    for name in ("default", "a1"):
        twins.check_equal(*(get_peft_model_state_dict(net, adapter_name=name) for net in (model, twin)))
    assert model.get_layer_status() == twin.get_layer_status()
    assert model.get_model_status() == twin.get_model_status()
    lines, expected = (
        repr(next(m for m in net.modules() if hasattr(m, "lora_A"))).split("\n") for net in (model, twin)
    )
    assert (lines[0], expected[0]) == ("lora.Linear(", "lora.Linear(")
    assert [line for line in lines if line.strip() != "fused by slao_kernels"] == expected
    assert len(lines) == len(expected) + 1


WRONG_NAMES = {
    "set_adapter": lambda m, ids: m.set_adapter("nope"),
    "delete_adapter": lambda m, ids: m.delete_adapter("nope"),
    "mixed batch": lambda m, ids: m.eval()(ids, adapter_names=["default", "nope", "__base__"]),
    "merge": lambda m, ids: m.base_model.merge_and_unload(adapter_names=["nope"]),
    "add_weighted_adapter": lambda m, ids: m.add_weighted_adapter(["default", "nope"], [1.0, 1.0], "sum"),
}


@pytest.mark.parametrize("what", WRONG_NAMES)
def test_adapter_that_does_not_exist(what):
    """PEFT's own answer, whatever it is, and the model still runs fused where PEFT's still runs."""
    model, twin, _ = twins.model_pair(target_modules=TARGETS)
    answers = [twins.attempt(WRONG_NAMES[what], net, twins.token_ids()) for net in (model, twin)]
    if what == "merge":  # where PEFT merges what there is, which is nothing
        assert not any(isinstance(answer, dict) for answer in answers)
        return
    assert answers[0] == answers[1]
    assert "nope" in answers[0]["error"]
    twins.check_same(model, twin, ops=LAYERS)


# --- copies and files ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_copies_share_their_fallbacks_among_themselves_only(how):
    """The layers of one copy write into one dictionary, which is not the original's report. By themselves, and through
    files: test_layers_peft.py."""
    model, _, report = twins.model_pair(target_modules=TARGETS)
    copied = how(model)
    copied.get_submodule(report.patched[0])(twins.net_input(2, 3, 32), alora_offsets=[1])
    fallbacks = [m.slao_options.fallbacks for m in copied.modules() if type(m) is FusedLoraLinear]
    assert all(found is fallbacks[0] for found in fallbacks)
    assert list(fallbacks[0]) == report.patched[:1]
    assert report.fallbacks == {}


def test_save_pretrained_loads_in_plain_peft(tmp_path):
    """The same files as without us, bytes of the weights and keys of the configuration included."""
    model, twin, _ = twins.model_pair(target_modules=TARGETS)
    folders = tmp_path / "ours", tmp_path / "theirs"
    for net, folder in zip((model, twin), folders, strict=True):
        net.save_pretrained(folder)
    ours, theirs = (sorted(path.name for path in folder.iterdir()) for folder in folders)
    assert ours == theirs
    twins.check_equal(*(load_file(folder / "adapter_model.safetensors") for folder in folders))
    ours, theirs = (json.loads((folder / "adapter_config.json").read_text()) for folder in folders)
    for config in (ours, theirs):
        config["target_modules"] = sorted(config["target_modules"])
    assert ours == theirs
    loaded = peft.PeftModel.from_pretrained(twins.base_model("llama"), folders[0])
    assert not any(type(m) is FusedLoraLinear for m in loaded.modules())
    assert torch.equal(loaded(twins.token_ids()).logits, twin(twins.token_ids()).logits)


def test_injected_adapter_is_saved_by_transformers(tmp_path):
    """A plain model's own save_pretrained writes the adapter that patch injected."""
    model = twins.base_model("llama")
    slao_kernels.patch(model, twins.config(target_modules=TARGETS))
    twins.train_a_little(model).save_pretrained(tmp_path)
    assert (tmp_path / "adapter_config.json").exists()
    loaded = peft.PeftModel.from_pretrained(twins.base_model("llama"), tmp_path)
    twins.check_close(*({"y": net(twins.token_ids()).logits.detach()} for net in (model, loaded)))


def test_options_of_an_older_version():
    """A model that was patched and pickled before an option was there: the option has its default."""
    model, twin, report = twins.model_pair(target_modules=TARGETS)
    for name in report.patched:
        for later in ("notes", "precision"):
            del model.get_submodule(name).slao_options.__dict__[later]
    copied = pickle.loads(pickle.dumps(model))
    layers = [copied.get_submodule(name) for name in report.patched]
    assert [(layer.slao_options.notes, layer.slao_options.precision) for layer in layers] == [({}, "base")] * LAYERS
    layers[0].base_layer.register_forward_hook(lambda *_: None)
    with twins.CountOps() as ops:
        twins.check_close(twins.step(copied), twins.step(twin))
    assert ops.counts["lora_linear"] == LAYERS - 1
    assert layers[0].slao_options.notes == {report.patched[0]: "base layer called: base layer has hooks"}
    assert len(slao_kernels.patch(copied).patched) == LAYERS  # and from then on it is this version's


def test_options_of_a_newer_version_and_none():
    """What this version does not know is dropped; older still is nothing at all on the layer."""
    options = FusedOptions("layer", precision="adapter")
    options.__dict__["invented_later"] = 3
    copied = pickle.loads(pickle.dumps(options))
    assert copied == FusedOptions("layer", precision="adapter")
    assert "invented_later" not in vars(copied)
    model, twin, _ = twins.net_pair()
    del model.proj.__dict__["slao_options"]
    copied = pickle.loads(pickle.dumps(model))
    twins.check_same(copied, twin, ops=1)
    assert copied.proj.slao_options.name == "(unnamed layer)"
