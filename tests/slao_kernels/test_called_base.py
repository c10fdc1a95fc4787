"""A layer over a base that is no plain nn.Linear: the base is called, the LoRA branch added by one node.

Numbers, dtypes, copies, files, adapters, checkpointing, compile and training: test_layers.py, test_layers_peft.py. What
the branch cannot take: test_eligibility.py.
"""

from __future__ import annotations

import changes
import peft
import pytest
import torch
import twins
from changes import attribute, half
from kinds import ADD, pair
from peft.tuners.lora import layer as lora
from torch import Tensor, nn

import slao_kernels
from slao_kernels.layers import FusedLoraLinear
from slao_kernels.testing import tiny_model

pytestmark = pytest.mark.usefixtures("one_thread")

# What is done to the base layer, and what the report says of it.
CHANGES = {
    name: (change, why.format("base layer"))
    for name, (change, why) in {
        **changes.OF_A_MODULE,
        **changes.OF_A_WEIGHT,
        "subclass": (changes.other_class, "{} is changes's Other"),
        "parametrized": (changes.parametrized, "{} is torch's ParametrizedLinear"),
    }.items()
}
REFUSING = {
    "fp8 weight": (
        attribute("weight", lambda w: nn.Parameter(w.detach().to(torch.float8_e4m3fn), requires_grad=False)),
        "base weight is stored as torch.float8_e4m3fn",
    ),
    "bias dtype": (
        attribute("bias", lambda bias: nn.Parameter(bias.detach().bfloat16())),
        "base bias is torch.bfloat16, weight torch.float32",
    ),
}


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("change", {**CHANGES, **REFUSING})
def test_base_changed(change, when, told):
    """PEFT's numbers (or the base's own exception); the base is called once; reported as fused, with why it is called.

    With adapters of every kind: test_plan.py.
    """
    alter, why = {**CHANGES, **REFUSING}[change]
    model, twin = twins.net(), twins.net()
    if when == "after":
        report = slao_kernels.patch(model)
        twins.check_fused(model)
        assert report.notes == {}
    undos = [alter(net.proj.base_layer) for net in (model, twin)]
    if when == "before":
        report = slao_kernels.patch(model, strict=True)
    if change in REFUSING:
        twins.check_same_error(model, twin)
    else:
        twins.check_same(model, twin, ops=ADD)
    assert (report.patched, report.skipped, report.fallbacks) == (["proj"], {}, {})
    assert report.notes == {"proj": f"base layer called: {why}"}
    assert told() == []
    if change in CHANGES:
        calls = []
        handle = model.proj.base_layer.register_forward_pre_hook(lambda *_: calls.append(1))
        twins.check_close(*(twins.net_step(net, twins.net_input()) for net in (model, twin)))  # perhaps in place
        assert len(calls) == 1
        handle.remove()
    for undo in undos:
        undo()
    twins.check_fused(model)
    assert slao_kernels.unpatch(model) == 1
    assert type(model.proj) is lora.Linear
    assert "slao_options" not in vars(model.proj)


def test_a_layer_whose_base_turned_plain_is_fused_whole():
    """patch again, after the reason has gone: one node for both, and no note."""
    model = twins.net()
    handle = model.proj.base_layer.register_forward_hook(half)
    assert slao_kernels.patch(model).notes == {"proj": "base layer called: base layer has hooks"}
    handle.remove()
    assert slao_kernels.patch(model).notes == {}
    assert type(model.proj) is FusedLoraLinear
    twins.check_fused(model)


class Scaled(nn.Linear):
    """A base that takes more than x."""

    def forward(self, x: Tensor, by: float = 1.0, *, shift: float = 0.0) -> Tensor:
        return by * super().forward(x) + shift


def test_other_arguments_reach_the_base():
    model, twin, report = twins.net_pair(base=lambda: Scaled(24, 20))
    for args, kwargs in (((), {}), ((3.0,), {}), ((), {"shift": 2.0}), ((3.0,), {"shift": 2.0, "alora_offsets": None})):
        twins.check_same(model, twin, twins.net_input(), *args, ops=ADD, **kwargs)
    assert report.fallbacks == {}


@pytest.mark.parametrize("kind", ["GPTQ, stand-in", "AWQ, stand-in", "AQLM, stand-in"])
def test_classes_that_take_only_x(kind):
    model, twin, _ = pair(kind)
    twins.check_same_error(model, twin, adapter_names=["default", "default"])


class Returning(nn.Linear):
    """A base whose result is something else."""

    what = "tuple"

    def forward(self, x: Tensor) -> object:
        y = super().forward(x)
        return {"tuple": (y, None), "broadcast": y.sum((0, 1)), "subclass": y.as_subclass(changes.Tagged)}[self.what]


@pytest.mark.parametrize("what", ["broadcast", "subclass"])
def test_results_that_the_node_does_not_take(what, told):
    """torch's operations add the branch then: the base is not called a second time."""
    model, twin, report = twins.net_pair(base=lambda: Returning(24, 20), lora_bias=True)
    calls = []
    for net in (model, twin):
        net.proj.base_layer.what = what
    model.proj.base_layer.register_forward_pre_hook(lambda *_: calls.append(1))
    with twins.CountOps() as ops:
        found = model(twins.net_input())
    assert ops.counts == {}
    assert len(calls) == 1
    expected = twin(twins.net_input())
    twins.check_close({"y": found.detach(), "type": type(found)}, {"y": expected.detach(), "type": type(expected)})
    reason = {"broadcast": "the base layer made (20,) of torch.float32", "subclass": "the base layer returned a Tagged"}
    assert report.fallbacks["proj"].startswith(reason[what])
    assert len(told()) == 1


def test_a_tuple_is_refused_as_by_peft():
    model, twin, _ = twins.net_pair(base=lambda: Returning(24, 20))
    twins.check_same_error(model, twin)


@pytest.mark.parametrize("kind", ["GPTQ, stand-in", "bitsandbytes, 4 bits", "torchao, int8"])
def test_hook_on_a_foreign_base(kind):
    """Its own affair."""
    model, twin, report = pair(kind)
    for net in (model, twin):
        net.proj.base_layer.register_forward_hook(half)
    twins.check_same(model, twin, ops=ADD)
    assert report.fallbacks == {}


def four_bit_llama() -> nn.Module:
    """Every projection a bitsandbytes 4-bit layer, as transformers' quantisation leaves them."""
    bnb = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}
    model = tiny_model("llama", **sizes)
    for name, module in list(model.named_modules()):
        if name.endswith("_proj"):
            how = {"bias": False, "compute_dtype": torch.float32, "quant_type": "nf4"}
            quantised = bnb.nn.Linear4bit(module.in_features, module.out_features, **how)
            quantised.load_state_dict(module.state_dict())
            model.set_submodule(name, quantised.to("cpu"))
    model.is_loaded_in_4bit = True
    return model


def four_bit_peft() -> nn.Module:
    torch.manual_seed(5)
    return twins.train_a_little(peft.get_peft_model(four_bit_llama(), twins.config()))


@pytest.mark.parametrize("reentrant", [None, False, True])
def test_whole_model(reentrant, tmp_path):
    """QLoRA on a tiny llama: logits, all gradients, and an adapter that loads without this library."""
    model, twin = four_bit_peft(), four_bit_peft()
    report = slao_kernels.patch(model, strict=True)
    assert len(report.patched) == len(report.notes) == 14
    assert "base layer called: base layer is bitsandbytes's Linear4bit" in str(report)
    for net in (model, twin):
        net.train()
        if reentrant is not None:
            net.enable_input_require_grads()
            net.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    for _ in range(2):
        twins.check_same(model, twin)
    assert report.fallbacks == {}
    model.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(four_bit_llama(), tmp_path, is_trainable=True)
    ids = twins.token_ids()
    twins.check_close({"logits": loaded.train()(ids).logits.detach()}, {"logits": twin(ids).logits.detach()})
