"""When patch refuses (strict, bad arguments, other kernels) it names why and leaves the model as it was; its report."""

from __future__ import annotations

import re
import types
from collections.abc import Callable
from fnmatch import fnmatchcase
from functools import partial
from typing import Any

import peft
import pytest
import torch
import twins
from changes import half
from peft.tuners.lora import layer as lora
from torch import nn

import slao_kernels
from slao_kernels import dispatch
from slao_kernels.testing import tiny_model

pytestmark = pytest.mark.usefixtures("one_thread")


class OtherLinear(nn.Linear):
    """A base layer with a LoRA class of its own, see `config`."""


class OtherLora(lora.Linear):
    """A LoRA layer that patch must leave alone: it may compute something else."""


def config(**options: Any) -> peft.LoraConfig:
    """One that puts OtherLora around OtherLinear, by PEFT's own (experimental) means."""
    made = twins.config(**options)
    made._register_custom_module({OtherLinear: OtherLora})
    return made


def plain_model(other: bool = True) -> nn.Module:
    """A tiny llama, partly frozen as by a user; with `other`, one projection that patch cannot take."""
    model = tiny_model("llama")
    model.model.embed_tokens.weight.requires_grad_(False)
    if other:
        model.model.layers[1].mlp.down_proj.__class__ = OtherLinear
    return model


def patched_model(**options: Any) -> nn.Module:
    model = plain_model(other=False)
    slao_kernels.patch(model, twins.config(**options))
    return model


def plain_module() -> nn.Module:
    model = nn.Sequential(nn.Linear(8, 6), OtherLinear(6, 4))
    model[0].bias.requires_grad_(False)
    return model


def kernel(name: str, package: str, part: nn.Module) -> types.MethodType:
    """As Axolotl and Unsloth name and bind theirs; it is never called."""
    made = types.FunctionType((lambda self, x: x).__code__, {}, name)
    made.__module__ = f"{package}.kernels.lora"
    return types.MethodType(made, part)


def with_kernels(package: str, *names: str, patched: bool) -> nn.Module:
    """On the instances, as both libraries do it: methods of the attention, the forward of the MLP."""
    model = patched_model(target_modules=["q_proj", "down_proj"]) if patched else plain_model(other=False)
    for block in model.model.layers:
        for name in names:
            part, attribute = (block.mlp, "forward") if "mlp" in name else (block.self_attn, name.replace("lora_", ""))
            setattr(part, attribute, kernel(name, package, part))
    return model


def refusal(make: Callable[[], nn.Module], *texts: str, **options: Any) -> tuple[Any, ...]:
    """The model, what the message says, what patch is given."""
    return make, texts, options


STRICT = {
    "lora only": {},
    "modules_to_save": {"modules_to_save": ["lm_head"]},
    "trainable tokens": {"trainable_token_indices": [1, 2]},
    "bias": {"bias": "all"},
    "base weights changed": {"init_lora_weights": "pissa"},
    "embedding": {"target_modules": ["q_proj", "down_proj", "embed_tokens"]},
}
SKIPPED = (
    r"1 LoRA layers would be skipped: base_model\.model\.model\.layers\.1\.mlp\.down_proj: .*OtherLora has no fused"
)
# Theirs bypass the patched layers, so patch would report layers as fused that never run.
OTHERS = {
    "axolotl": (("apply_lora_qkv", "apply_lora_mlp_swiglu"), ["lora_qkv_kernel", "lora_mlp_kernel", "to false"]),
    "unsloth": (("apply_lora_o",), [r"peft\.get_peft_model"]),
    "another_one": (("apply_lora_mlp_geglu",), ["turn them off"]),
}
BACKENDS = ["unknown backend 'nonsense'", "auto", "reference", "eager", "native", "triton"]
NO_BACKEND = ["backend 'triton' cannot run lora_linear on cpu", "Triton has no such device|not installed"]
NO_ADAPTER = ["no LoRA adapter could be injected", "LlamaForCausalLM"]
UNFIT = twins.config(target_modules=["no_such_layer"])
OTHER_R = [
    "already has a LoRA adapter with other settings",
    r"r 3 \(config: 4\)",
    r"lora_dropout 0\.0 \(config: 0\.1\)",
]
REFUSALS = {
    "strict, a PEFT model": refusal(
        lambda: peft.get_peft_model(plain_model(), config()), "strict=True", SKIPPED + " forward$", strict=True
    ),
    # The adapter that was injected is taken out again; of a plain module through PEFT's low-level functions.
    **{
        f"strict, {name}": refusal(plain_model, "strict=True", config=config(**extra), strict=True)
        for name, extra in STRICT.items()
    },
    "strict, module": refusal(plain_module, "strict=True", config=config(target_modules=["0", "1"]), strict=True),
    "no config": refusal(
        plain_module,
        "^Sequential has no LoRA layers and is no transformers model",
        r"nothing to patch; pass a peft\.LoraConfig",
    ),
    "no such target": refusal(plain_model, *NO_ADAPTER, "no_such_layer", config=UNFIT),
    "no such target, module": refusal(plain_module, "no_such_layer", config=UNFIT),
    # One that matches a layer PEFT has no LoRA for, met after others were replaced.
    "unfit target": refusal(
        plain_model, *NO_ADAPTER, "RMSNorm", config=twins.config(target_modules=["q_proj", "norm"])
    ),
    # Another PEFT method would leave no LoRA layer to patch.
    "no LoRA": refusal(
        plain_model,
        r"IA3Config, expected a peft\.LoraConfig",
        config=peft.IA3Config(target_modules=["k_proj"], feedforward_modules=[]),
    ),
    "unknown backend": refusal(plain_model, *BACKENDS, backend="nonsense"),
    "unknown backend, patched": refusal(patched_model, *BACKENDS, backend="nonsense"),
    "no backend": refusal(plain_model, *NO_BACKEND, "eager, reference$", backend="triton"),
    "precision": refusal(plain_model, "unknown precision 'half'", "choose one of base, adapter$", precision="half"),
    "settings": refusal(patched_model, *OTHER_R, "^((?!lora_alpha).)*$", config=twins.config(r=4, lora_dropout=0.1)),
    # A config that asks for other layers than the adapter has is a contradiction too.
    "targets": refusal(
        lambda: patched_model(target_modules=["q_proj"]),
        "target_modules",
        config=twins.config(target_modules=["k_proj"]),
    ),
    **{
        f"{package}, {'' if patched else 'un'}patched": refusal(
            partial(with_kernels, package, *names, patched=patched),
            "two backends on one model",
            rf"{package} has LoRA kernels of its own on {2 * len(names)} modules' methods \(",
            r"model\.layers\.0\.(self_attn|mlp)\.",
            *hints,
        )
        for package, (names, hints) in OTHERS.items()
        for patched in (True, False)
    },
}


def refuses(model: nn.Module, *texts: str, **options: Any) -> None:
    """Classes, instance dictionaries (tensors by identity), trainability and values are what they were."""

    def state() -> tuple[Any, ...]:
        return twins.snapshot(model), {name: p.requires_grad for name, p in model.named_parameters()}

    before, values = state(), {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=texts[0]) as caught:
        slao_kernels.patch(model, **options)
    assert all(re.search(text, str(caught.value)) for text in texts), str(caught.value)
    assert state() == before
    twins.check_equal(dict(model.state_dict()), values)


@pytest.mark.parametrize("what", REFUSALS)
def test_refusals(what):
    make, texts, options = REFUSALS[what]
    model = make()
    refuses(model, *texts, **options)
    if make is plain_model:  # nothing is left that would be in the way
        assert slao_kernels.patch(model, twins.config()).injected


def test_other_methods_on_instances_are_no_kernels():
    model = plain_model(other=False)
    attention = model.model.layers[0].self_attn
    attention.apply_something = kernel("apply_rotary", "axolotl", attention)
    assert len(slao_kernels.patch(model).patched) == 14


def test_a_gpu_s_backend_before_the_model_is_there(monkeypatch):
    """`patch(model, backend="triton").to("cuda")`: refused only where no device here could ever serve it."""
    monkeypatch.setattr(dispatch, "_triton_installed", True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    dispatch._available.cache_clear()
    try:
        model = twins.net()
        assert slao_kernels.patch(model, backend="triton").patched == ["proj"]
        why = "backend 'triton' cannot run lora_linear on {}: {}"
        with pytest.raises(ValueError, match=why.format("cpu", "Triton has no such device")):
            model(twins.net_input())
        monkeypatch.setattr(dispatch, "_triton_installed", False)
        refuses(twins.net(), why.format("cuda", "triton is not installed"), backend="triton")
    finally:
        monkeypatch.undo()
        dispatch._available.cache_clear()


def test_one_config_for_two_models():
    """patch must not resolve target_modules="all-linear" inside the caller's config."""
    shared = twins.config()
    assert len(slao_kernels.patch(plain_model(other=False), shared).patched) == 14
    assert shared.target_modules == "all-linear"
    assert len(slao_kernels.patch(tiny_model("gpt2"), shared).patched) == 8


def two_with_dropout() -> nn.Module:
    model = twins.peft_model("llama", target_modules=["q_proj"], lora_dropout=0.1)
    model.add_adapter("other", twins.config(target_modules=["q_proj"]))
    model.base_model.set_adapter(["default", "other"])
    return model


def one_hooked() -> nn.Module:
    model = twins.peft_model("llama", target_modules=["q_proj"])
    model.get_submodule(Q.replace("*", "1")).base_layer.register_forward_hook(half)
    return model


Q = "base_model.model.model.layers.*.self_attn.q_proj"
WHY = "lora_dropout=0.1 while training, and other adapters are active: each draws a mask of its own"
HOOKED = "base layer called: base layer has hooks"
ROWS = ["fused 2 × model.layers.*.self_attn.q_proj", "fused 1 × model.layers.*.mlp.down_proj"]
LEFT = "skipped 1 × model.layers.*.mlp.down_proj *.OtherLora has no fused forward"
ALL = "2 of 2 LoRA layers fused (backend: auto)"
# The model, the report's first line, lines that must be among the others ("*" is anything), what patch is given.
REPORTS: dict[str, tuple[Callable[[], nn.Module], str, list[str], dict[str, Any]]] = {
    "skipped": (
        plain_model,
        "13 of 14 LoRA layers fused (backend: eager), adapter injected",
        [*ROWS, LEFT],
        {"config": config(lora_dropout=0.1), "backend": "eager"},
    ),
    "fallbacks": (two_with_dropout, ALL, [f"fused 2 × {Q}", f"falls back 2 × {Q} {WHY}"], {}),
    # A layer whose base is called counts as fused, and says so.
    "notes": (one_hooked, ALL, [f"fused 1 × {Q}", f"fused 1 × {Q} {HOOKED}"], {"strict": True}),
    "nothing": (
        lambda: twins.peft_model("gpt2", target_modules=["c_attn"], fan_in_fan_out=True),
        ALL,
        ["fused 2 × base_model.model.transformer.h.*.attn.c_attn"],
        {},
    ),
}


@pytest.mark.parametrize("what", REPORTS)
def test_report_text(what):
    make, head, some, options = REPORTS[what]
    report = slao_kernels.patch(make(), **options)
    first, *rows = (re.sub(" +", " ", row.strip()) for row in str(report).split("\n"))
    assert first == f"slao_kernels: {head}"
    assert all(any(fnmatchcase(row, line) for row in rows) for line in some), rows
    assert len(rows) == (8 if what == "skipped" else len(some))
    assert sum(int(row.split()[1]) for row in rows if row.startswith("fused")) == len(report.patched)
    assert (report.injected, report.backend) == ("injected" in head, options.get("backend", "auto"))
    assert (len(report.skipped), len(report.fallbacks)) == {"skipped": (1, 0), "fallbacks": (0, 2)}.get(what, (0, 0))
    assert report.notes == ({Q.replace("*", "1"): HOOKED} if what == "notes" else {})


def test_a_task_type_whose_head_the_model_has_not():
    """PEFT would write a folder that it cannot load."""
    model = tiny_model("llama")
    with pytest.raises(ValueError, match="task_type 'SEQ_CLS' trains the head classifier or score, and .* has none"):
        slao_kernels.patch(model, peft.LoraConfig(target_modules=["q_proj"], task_type="SEQ_CLS"))
    assert not any("lora" in name for name, _ in model.named_modules())
