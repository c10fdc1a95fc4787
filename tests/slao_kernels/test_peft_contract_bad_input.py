"""What a user can get wrong around patch: other kernels on the model, wrong adapter names, files of another version."""

from __future__ import annotations

import pickle
import types

import pytest
from peft.tuners.lora import layer as lora

import slao_kernels
from slao_kernels.layers import FusedLoraLinear, FusedOptions

pytestmark = pytest.mark.usefixtures("one_thread")

TARGETS = ["q_proj", "down_proj"]


def kernel(name: str, package: str) -> types.FunctionType:
    """As those libraries name them; it is never called."""
    made = types.FunctionType((lambda self, x: x).__code__, {}, name)
    made.__module__ = f"{package}.kernels.lora"
    return made


def put_on(model, package: str, *names: str) -> None:
    """On the instances, as both libraries do it: methods of the attention, the forward of the MLP."""
    for block in model.get_submodule("base_model.model.model.layers"):
        for name in names:
            part, attribute = (block.mlp, "forward") if "mlp" in name else (block.self_attn, name.replace("lora_", ""))
            setattr(part, attribute, types.MethodType(kernel(name, package), part))


OTHERS = {
    "axolotl": (("apply_lora_qkv", "apply_lora_mlp_swiglu"), ["lora_qkv_kernel", "lora_mlp_kernel", "to false"]),
    "unsloth": (("apply_lora_o",), ["peft.get_peft_model"]),
    "another_one": (("apply_lora_mlp_geglu",), ["turn them off"]),
}


@pytest.mark.parametrize("package", OTHERS)
@pytest.mark.parametrize("when", ["before patch", "after patch"])
def test_two_backends_on_one_model(package, when, twins):
    """Theirs bypass the patched layers, so patch would report layers as fused that never run."""
    names, hints = OTHERS[package]
    model = twins.peft_model("llama", target_modules=TARGETS)
    if when == "after patch":
        slao_kernels.patch(model)
    put_on(model, package, *names)
    before = [type(module) for module in model.modules()]
    with pytest.raises(ValueError, match="two backends on one model") as caught:
        slao_kernels.patch(model)
    message = str(caught.value)
    assert f"{package} has LoRA kernels of its own on {2 * len(names)} modules' methods (" in message
    assert all(hint in message for hint in hints)
    assert "base_model.model.model.layers.0." in message
    assert [type(module) for module in model.modules()] == before


def test_two_backends_before_an_adapter_is_injected(twins):
    model = twins.base_model("llama")
    block = model.model.layers[0].self_attn
    block.apply_o = types.MethodType(kernel("apply_lora_o", "unsloth"), block)
    with pytest.raises(ValueError, match=r"model\.layers\.0\.self_attn\.apply_o"):
        slao_kernels.patch(model, twins.config())
    assert not any(isinstance(module, lora.LoraLayer) for module in model.modules())


def test_other_methods_on_instances_are_no_kernels(twins):
    model = twins.peft_model("llama", target_modules=TARGETS)
    attention = model.get_submodule("base_model.model.model.layers.0.self_attn")
    attention.apply_something = types.MethodType(kernel("apply_rotary", "axolotl"), attention)
    assert len(slao_kernels.patch(model).patched) == 4


WRONG_NAMES = {
    "set_adapter": lambda m, ids: m.set_adapter("nope"),
    "delete_adapter": lambda m, ids: m.delete_adapter("nope"),
    "mixed batch": lambda m, ids: m.eval()(ids, adapter_names=["default", "nope", "__base__"]),
    "merge": lambda m, ids: m.base_model.merge_and_unload(adapter_names=["nope"]),
    "add_weighted_adapter": lambda m, ids: m.add_weighted_adapter(["default", "nope"], [1.0, 1.0], "sum"),
}


@pytest.mark.parametrize("what", WRONG_NAMES)
def test_adapter_that_does_not_exist(what, twins):
    """PEFT's own answer, whatever it is, and the model still runs fused where PEFT's still runs."""
    model, twin = (twins.peft_model("llama", target_modules=TARGETS) for _ in range(2))
    slao_kernels.patch(model)
    answers = []
    for net in (model, twin):
        try:
            WRONG_NAMES[what](net, twins.token_ids())
            answers.append((None, ""))
        except Exception as error:
            answers.append((type(error), str(error)))
    assert answers[0] == answers[1]
    assert "nope" in answers[0][1] or what == "merge"  # where PEFT merges what there is, which is nothing
    if what != "merge":
        twins.check_close(twins.step(model), twins.step(twin))


def test_options_of_an_older_version(twins):
    """A model that was patched and pickled before an option was there: the option has its default."""
    model, twin = (twins.peft_model("llama", target_modules=TARGETS) for _ in range(2))
    slao_kernels.patch(model)
    for layer in model.modules():
        if type(layer) is FusedLoraLinear:
            for later in ("notes", "precision"):
                del layer.slao_options.__dict__[later]
    copied = pickle.loads(pickle.dumps(model))
    options = [layer.slao_options for layer in copied.modules() if type(layer) is FusedLoraLinear]
    assert [(o.notes, o.precision) for o in options] == [({}, "base")] * 4
    copied.get_submodule(options[0].name).base_layer.register_forward_hook(lambda *_: None)
    with twins.CountOps() as ops:
        twins.check_close(twins.step(copied), twins.step(twin))
    assert ops.counts["lora_linear"] == 3
    assert options[0].notes == {options[0].name: "base layer called: base layer has hooks"}
    assert len(slao_kernels.patch(copied).patched) == 4  # and from then on it is this version's


def test_options_of_a_newer_version():
    """What this version does not know is dropped."""
    options = FusedOptions("layer", precision="adapter")
    options.__dict__["invented_later"] = 3
    copied = pickle.loads(pickle.dumps(options))
    assert copied == FusedOptions("layer", precision="adapter")
    assert "invented_later" not in vars(copied)


def test_layer_without_options(twins):
    """Older still: nothing at all on the layer."""
    model, twin = twins.net(), twins.net()
    slao_kernels.patch(model)
    del model.proj.__dict__["slao_options"]
    copied = pickle.loads(pickle.dumps(model))
    x = twins.net_input()
    twins.check_fused(copied)
    twins.check_close(twins.net_step(copied, x), twins.net_step(twin, x))
    assert copied.proj.slao_options.name == "(unnamed layer)"
