"""PEFT's LoRA classes over quantised bases, patched: what they refuse, and a whole 4-bit model.

Numbers, dtypes, copies, files, adapters, checkpointing, compile and training of them: test_layers.py and
test_layers_peft.py.
"""

from __future__ import annotations

import peft
import pytest
import torch
from kinds import pair
from torch import nn

import slao_kernels
from slao_kernels.testing import tiny_model

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("kind", ["bitsandbytes, 4 bits", "bitsandbytes, 8 bits", "HQQ, 8 bits"])
def test_mixed_batch(kind, twins, told):
    model, twin, report = pair(kind)
    reason = "called with adapter_names beside x"
    names = ["default", "__base__"]
    x = twins.net_input(2, 5, 64)
    with torch.no_grad(), twins.CountOps() as ops:
        found = model.eval()(x, adapter_names=names)
        assert torch.equal(found, twin.eval()(x, adapter_names=names))
    assert ops.counts == {}
    assert report.fallbacks == {"proj": reason}
    assert told() == [f"proj runs PEFT's own forward: {reason}"]


@pytest.mark.parametrize("kind", ["GPTQ, stand-in", "AWQ, stand-in", "AQLM, stand-in"])
def test_classes_that_take_only_x(kind, twins):
    """PEFT's own error for anything else."""
    model, twin, _ = pair(kind)
    errors = []
    for net in (twin, model):
        with pytest.raises(TypeError) as caught:
            net(twins.net_input(2, 5, 64), adapter_names=["default", "default"])
        errors.append(str(caught.value))
    assert errors[0] == errors[1]


@pytest.mark.parametrize("kind", ["bitsandbytes, 4 bits", "bitsandbytes, 8 bits", "HQQ, 8 bits", "torchao, int8"])
def test_variants_are_left_to_peft(kind, foreign, twins):
    model, twin = (foreign.net(kind, use_dora=True) for _ in range(2))
    report = slao_kernels.patch(model)
    assert report.patched == []
    assert report.skipped == {"proj": "DoRA over a base layer that has to be called"}
    assert type(model.proj) is type(twin.proj)
    twins.check_equal(twins.net_step(model, twins.net_input(2, 5, 64)), twins.net_step(twin, twins.net_input(2, 5, 64)))


@pytest.mark.parametrize("kind", ["GPTQ, stand-in", "bitsandbytes, 4 bits", "torchao, int8"])
def test_hooks_and_wrapped_forwards(kind, foreign, twins, told):
    """On A, B: PEFT's forward, with the reason. On the base: its own affair."""
    model, twin = foreign.net(kind), foreign.net(kind)
    report = slao_kernels.patch(model)
    for net in (model, twin):
        net.proj.base_layer.register_forward_hook(lambda module, args, output: output / 2)
    x = twins.net_input(2, 5, 64)
    twins.check_close(twins.net_step(model, x), twins.net_step(twin, x))
    assert report.fallbacks == {}
    for net in (model, twin):
        net.proj.lora_A["default"].register_forward_hook(lambda module, args, output: output / 2)
    twins.check_peft_runs(model, twin, report.fallbacks, "lora_A has hooks", told, x)
    assert slao_kernels.patch(model).skipped == {"proj": "lora_A has hooks"}
    assert type(model.proj) is type(twin.proj)


def four_bit_llama(twins) -> nn.Module:
    """Every projection a bitsandbytes 4-bit layer, as transformers' quantisation leaves them."""
    bnb = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}
    model = tiny_model("llama", **sizes)
    for name, module in list(model.named_modules()):
        if name.endswith("_proj"):
            quantised = bnb.nn.Linear4bit(
                module.in_features, module.out_features, bias=False, compute_dtype=torch.float32, quant_type="nf4"
            )
            quantised.load_state_dict(module.state_dict())
            model.set_submodule(name, quantised.to("cpu"))
    model.is_loaded_in_4bit = True
    return model


def four_bit_peft(twins) -> nn.Module:
    torch.manual_seed(5)
    return twins.train_a_little(peft.get_peft_model(four_bit_llama(twins), twins.config()))


@pytest.mark.parametrize("reentrant", [None, False, True])
def test_whole_model(reentrant, twins, tmp_path):
    """QLoRA on a tiny llama: logits, all gradients, and an adapter that loads without this library."""
    model, twin = four_bit_peft(twins), four_bit_peft(twins)
    report = slao_kernels.patch(model, strict=True)
    assert len(report.patched) == len(report.notes) == 14
    assert "base layer called: base layer is bitsandbytes's Linear4bit" in str(report)
    for net in (model, twin):
        net.train()
        if reentrant is not None:
            net.enable_input_require_grads()
            net.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    for _ in range(2):
        twins.check_close(twins.step(model), twins.step(twin))
    assert report.fallbacks == {}
    model.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(four_bit_llama(twins), tmp_path, is_trainable=True)
    ids = twins.token_ids()
    twins.check_close({"logits": loaded.train()(ids).logits.detach()}, {"logits": twin(ids).logits.detach()})
