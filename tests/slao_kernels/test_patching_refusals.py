"""When patch refuses (strict, bad arguments) it names why and leaves the model as it was; what its report prints."""

from __future__ import annotations

import re

import peft
import pytest
import torch
from peft.tuners.lora import layer as lora
from torch import Tensor, nn

import slao_kernels
from slao_kernels import dispatch
from slao_kernels.layers import FusedLoraLinear
from slao_kernels.testing import tiny_model

pytestmark = pytest.mark.usefixtures("one_thread")


class OtherLinear(nn.Linear):
    """A base layer with a LoRA class of its own, see `config`."""


class OtherLora(lora.Linear):
    """A LoRA layer that patch must leave alone: it may compute something else."""


def config(twins, **options) -> peft.LoraConfig:
    """One that puts OtherLora around OtherLinear, by PEFT's own (experimental) means."""
    made = twins.config(**options)
    made._register_custom_module({OtherLinear: OtherLora})
    return made


def state_of(model: nn.Module) -> dict[str, object]:
    """What must not change: classes, instance dictionaries (tensors by identity), trainability, values."""
    modules = {}
    for name, module in model.named_modules():
        state = {key: dict(value) if isinstance(value, dict) else value for key, value in module.__dict__.items()}
        modules[name] = (type(module), state)
    return {
        "modules": modules,
        "trainable": {name: p.requires_grad for name, p in model.named_parameters()},
        "loaded": getattr(model, "_hf_peft_config_loaded", False),
    }


def values_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def plain_model(other: bool = True) -> nn.Module:
    """A tiny llama, partly frozen as by a user; with `other`, one projection that patch cannot take."""
    model = tiny_model("llama")
    model.model.embed_tokens.weight.requires_grad_(False)
    if other:
        model.model.layers[1].mlp.down_proj.__class__ = OtherLinear
    return model


def refuses(model: nn.Module, match: str, *args, **options) -> str:
    """patch(model, ...) raises ValueError with `match`, and the model is what it was; returns the message."""
    before, values = state_of(model), values_of(model)
    with pytest.raises(ValueError, match=match) as caught:
        slao_kernels.patch(model, *args, **options)
    assert state_of(model) == before
    assert "peft_config" not in model.__dict__ or "peft_config" in before["modules"][""][1]
    after = model.state_dict()
    assert list(after) == list(values)
    assert all(torch.equal(after[name], value) for name, value in values.items())
    return str(caught.value)


def test_strict_on_a_peft_model(twins):
    model = peft.get_peft_model(plain_model(), config(twins))
    message = refuses(model, "strict=True", strict=True)
    name = "base_model.model.model.layers.1.mlp.down_proj"
    assert f"1 LoRA layers would be skipped: {name}: " in message
    assert message.endswith("OtherLora has no fused forward")
    assert not any(type(module) is FusedLoraLinear for module in model.modules())
    report = slao_kernels.patch(model)  # without strict the rest is patched
    assert list(report.skipped) == [name]
    assert len(report.patched) == 13


EXTRAS = {
    "lora only": {},
    "modules_to_save": {"modules_to_save": ["lm_head"]},
    "trainable tokens": {"trainable_token_indices": [1, 2]},
    "bias": {"bias": "all"},
    "base weights changed": {"init_lora_weights": "pissa"},
    "embedding": {"target_modules": ["q_proj", "down_proj", "embed_tokens"]},
}


@pytest.mark.parametrize("extra", EXTRAS)
def test_strict_takes_an_injected_adapter_out_again(extra, twins):
    model = plain_model()
    refuses(model, "strict=True", config(twins, **EXTRAS[extra]), strict=True)
    assert not hasattr(model, "peft_config")
    ids = torch.arange(1, 9)[None]
    assert torch.equal(model(ids).logits, plain_model()(ids).logits)
    assert slao_kernels.patch(model, twins.config()).injected  # nothing is left that would be in the way


def test_strict_without_a_skip(twins):
    report = slao_kernels.patch(plain_model(other=False), twins.config(), strict=True)
    assert len(report.patched) == 14
    assert report.skipped == {}


def test_strict_on_a_plain_module(twins):
    """Not a transformers model: the adapter goes in and out through PEFT's low-level functions."""
    model = nn.Sequential(nn.Linear(8, 6), OtherLinear(6, 4))
    model[0].bias.requires_grad_(False)
    refuses(model, "strict=True", config(twins, target_modules=["0", "1"]), strict=True)


def test_nothing_to_inject():
    message = refuses(nn.Sequential(nn.Linear(4, 4)), "nothing to patch")
    assert message.startswith("Sequential has no LoRA layers and is no transformers model")


# A name that matches nothing; one that matches a layer PEFT has no LoRA for, met after others were replaced.
TARGETS = {"none": ["no_such_layer"], "unsupported": ["q_proj", "norm"]}


@pytest.mark.parametrize("targets", TARGETS)
def test_target_modules_that_do_not_fit(targets, twins):
    message = refuses(plain_model(), "no LoRA adapter could be injected", twins.config(target_modules=TARGETS[targets]))
    assert "LlamaForCausalLM" in message
    assert {"none": "no_such_layer", "unsupported": "RMSNorm"}[targets] in message


def test_target_modules_that_do_not_fit_in_a_plain_module(twins):
    refuses(nn.Sequential(nn.Linear(4, 4)), "no_such_layer", twins.config(target_modules=["no_such_layer"]))


def test_a_config_that_is_no_lora():
    """Another PEFT method would leave no LoRA layer to patch."""
    refuses(
        plain_model(),
        r"IA3Config, expected a peft\.LoraConfig",
        peft.IA3Config(target_modules=["k_proj"], feedforward_modules=[]),
    )


@pytest.mark.parametrize("plain", [True, False])
def test_unknown_backend(plain, twins):
    model = plain_model() if plain else peft.get_peft_model(plain_model(), twins.config())
    message = refuses(model, "unknown backend 'nonsense'", backend="nonsense")
    assert all(name in message for name in ("auto", "reference", "eager", "native", "triton"))


@pytest.mark.parametrize("backend", ["triton"])
def test_backend_that_cannot_run_here(backend):
    message = refuses(plain_model(), f"backend '{backend}' cannot run lora_linear on cpu", backend=backend)
    assert re.search("Triton has no such device|not installed", message)
    assert message.endswith("eager, reference")


def test_a_gpu_s_backend_before_the_model_is_there(monkeypatch, twins):
    """`patch(model, backend="triton").to("cuda")`: refused only where no device here could ever serve it."""
    monkeypatch.setattr(dispatch, "_triton_installed", True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    dispatch._available.cache_clear()
    try:
        model = twins.net()
        assert slao_kernels.patch(model, backend="triton").patched == ["proj"]
        with pytest.raises(
            ValueError, match="backend 'triton' cannot run lora_linear on cpu: Triton has no such device"
        ):
            model(twins.net_input())
        monkeypatch.setattr(dispatch, "_triton_installed", False)
        refuses(
            twins.net(), "backend 'triton' cannot run lora_linear on cuda: triton is not installed", backend="triton"
        )
    finally:
        monkeypatch.undo()
        dispatch._available.cache_clear()


def test_unknown_precision():
    message = refuses(plain_model(), "unknown precision 'half'", precision="half")
    assert message.endswith("choose one of base, adapter")


def test_contradictory_config(twins):
    model = plain_model(other=False)
    slao_kernels.patch(model, twins.config())
    message = refuses(model, "already has a LoRA adapter with other settings", twins.config(r=4, lora_dropout=0.1))
    assert "r 3 (config: 4)" in message
    assert "lora_dropout 0.0 (config: 0.1)" in message
    assert "lora_alpha" not in message


def test_contradictory_target_modules(twins):
    """A config that asks for other layers than the adapter has is a contradiction too."""
    model = peft.get_peft_model(plain_model(other=False), twins.config(target_modules=["q_proj"]))
    refuses(model, "target_modules", twins.config(target_modules=["k_proj"]))


def test_one_config_for_two_models(twins):
    """patch must not resolve target_modules="all-linear" inside the caller's config."""
    shared = twins.config()
    assert len(slao_kernels.patch(plain_model(other=False), shared).patched) == 14
    assert shared.target_modules == "all-linear"
    assert len(slao_kernels.patch(tiny_model("gpt2"), shared).patched) == 8


def test_report_text(twins):
    model = plain_model()
    report = slao_kernels.patch(model, config(twins, lora_dropout=0.1), backend="eager")
    head, *rows = str(report).split("\n")
    assert head == "slao_kernels: 13 of 14 LoRA layers fused (backend: eager), adapter injected"
    rows = [re.sub(" +", " ", row.strip()) for row in rows]
    assert "fused 2 × model.layers.*.self_attn.q_proj" in rows
    assert "fused 1 × model.layers.*.mlp.down_proj" in rows
    (skipped,) = [row for row in rows if row.startswith("skipped")]
    assert skipped.startswith("skipped 1 × model.layers.*.mlp.down_proj ")
    assert skipped.endswith(".OtherLora has no fused forward")
    assert sum(int(row.split()[1]) for row in rows if row.startswith("fused")) == len(report.patched) == 13
    assert (report.injected, report.backend, report.fallbacks) == (True, "eager", {})
    assert report.notes == {}


def test_report_text_with_fallbacks(twins):
    """Several active adapters with dropout: known from the start."""
    model = twins.peft_model("llama", target_modules=["q_proj"], lora_dropout=0.1)
    model.add_adapter("other", twins.config(target_modules=["q_proj"]))
    model.base_model.set_adapter(["default", "other"])
    report = slao_kernels.patch(model)
    rows = [re.sub(" +", " ", row.strip()) for row in str(report).split("\n")]
    why = "lora_dropout=0.1 while training, and other adapters are active: each draws a mask of its own"
    assert f"falls back 2 × base_model.model.model.layers.*.self_attn.q_proj {why}" in rows
    assert len(report.fallbacks) == 2


def test_report_text_with_notes(twins):
    """A layer whose base is called counts as fused, and says so."""
    model = twins.peft_model("llama", target_modules=["q_proj"])
    name = "base_model.model.model.layers.*.self_attn.q_proj"
    model.get_submodule(name.replace("*", "1")).base_layer.register_forward_hook(lambda *_: None)
    report = slao_kernels.patch(model, strict=True)
    head, *rows = [re.sub(" +", " ", row.strip()) for row in str(report).split("\n")]
    assert head == "slao_kernels: 2 of 2 LoRA layers fused (backend: auto)"
    assert rows == [f"fused 1 × {name}", f"fused 1 × {name} base layer called: base layer has hooks"]
    assert report.notes == {name.replace("*", "1"): "base layer called: base layer has hooks"}


def test_report_text_without_fallbacks(twins):
    model = peft.get_peft_model(tiny_model("gpt2"), twins.config(target_modules=["c_attn"], fan_in_fan_out=True))
    report = slao_kernels.patch(model)
    lines = str(report).split("\n")
    assert lines[0] == "slao_kernels: 2 of 2 LoRA layers fused (backend: auto)"
    assert [line.split() for line in lines[1:]] == [["fused", "2", "×", "base_model.model.transformer.h.*.attn.c_attn"]]
    assert not report.injected


def test_a_layer_that_is_eligible_no_more_gets_its_class_back(twins):
    model = twins.peft_model("llama")
    names = slao_kernels.patch(model).patched
    layer = model.get_submodule(names[3])
    handle = layer.lora_A["default"].register_forward_hook(lambda *_: None)
    report = slao_kernels.patch(model)
    assert report.skipped == {names[3]: "lora_A has hooks"}
    assert type(layer) is lora.Linear
    assert "slao_options" not in vars(layer)
    handle.remove()
    assert slao_kernels.patch(model).patched == names
