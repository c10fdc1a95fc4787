"""find_pairs: every LoRA pair as two matrices that share the adapter's memory, and why a layer has none."""

from __future__ import annotations

import math

import peft
import pytest
import torch
import transformers as hf
from torch import nn
from torch.nn.utils import parametrize

from slao_kernels.adapters import adapter_names, find_pairs, lora_layers
from slao_kernels.testing import tiny_model

pytestmark = pytest.mark.usefixtures("one_thread")


class ConvNet(nn.Module):
    def __init__(self, groups: int = 1) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(6, 8, 3, groups=groups), nn.Linear(8, 5)

    def forward(self, x):
        return self.head(self.conv(x).mean((-2, -1)))


def conv_net(groups: int = 1, **options) -> nn.Module:
    options = {"r": 4, "target_modules": ["conv", "head"], "init_lora_weights": False, **options}
    return peft.inject_adapter_in_model(peft.LoraConfig(**options), ConvNet(groups)).eval()


def test_linear(twins):
    """Names and order of the walk, (r, n) and (m, r), PEFT's scaling; the parameters are the model's own."""
    model = twins.peft_model("llama", r=3, lora_alpha=5, target_modules=["q_proj", "k_proj", "down_proj"])
    pairs, left_out = find_pairs(model)
    assert left_out == {}
    assert [pair.name for pair in pairs] == [name for name, _ in lora_layers(model)]
    assert [pair.name.rsplit(".", 1)[1] for pair in pairs] == ["q_proj", "k_proj", "down_proj"] * 2
    shapes = [(tuple(pair.A.shape), tuple(pair.B.shape)) for pair in pairs[:3]]
    assert shapes == [((3, 32), (32, 3)), ((3, 32), (16, 3)), ((3, 64), (32, 3))]
    for pair in pairs:
        assert model.get_submodule(pair.name) is pair.layer
        assert pair.parameters == (pair.layer.lora_A["default"].weight, pair.layer.lora_B["default"].weight)
        assert pair.scaling == 5 / 3
        assert not pair.A.requires_grad
        delta = pair.scaling * pair.B @ pair.A
        assert torch.allclose(delta, pair.layer.get_delta_weight("default"), atol=1e-7)


def test_conv1d(twins):
    """transformers' Conv1D stores W as (in, out); A and B are what they always are."""
    pairs, left_out = find_pairs(twins.peft_model("gpt2", target_modules=["c_attn"], fan_in_fan_out=True))
    assert left_out == {}
    assert [(tuple(p.A.shape), tuple(p.B.shape)) for p in pairs] == [((3, 32), (96, 3))] * 2
    delta = pairs[0].scaling * pairs[0].B @ pairs[0].A
    assert torch.allclose(delta.t(), pairs[0].layer.get_delta_weight("default"), atol=1e-7)


def test_embedding(twins):
    model = twins.peft_model("llama", target_modules=["embed_tokens", "q_proj"])
    pairs, left_out = find_pairs(model)
    assert left_out == {}
    assert pairs[0].name.endswith("embed_tokens")
    assert (tuple(pairs[0].A.shape), tuple(pairs[0].B.shape)) == ((3, 128), (32, 3))
    assert pairs[0].parameters[0] is pairs[0].layer.lora_embedding_A["default"]


def test_conv2d():
    """A (r, channels·kh·kw) and B (out, r): their product is the delta of the flattened kernel."""
    pairs, left_out = find_pairs(conv_net())
    assert left_out == {}
    conv = pairs[0]
    assert (conv.name, tuple(conv.A.shape), tuple(conv.B.shape)) == ("conv", (4, 54), (8, 4))
    assert tuple(conv.parameters[0].shape) == (4, 6, 3, 3)
    delta = conv.layer.get_delta_weight("default").flatten(1)
    assert torch.allclose(conv.scaling * conv.B @ conv.A, delta, atol=1e-6)


MODELS = {
    "linear": lambda twins: (twins.peft_model("llama", target_modules=["q_proj"]), twins.token_ids()),
    "Conv1D": lambda twins: (twins.peft_model("gpt2", target_modules=["c_attn"]), twins.token_ids()),
    "Embedding": lambda twins: (twins.peft_model("llama", target_modules=["embed_tokens"]), twins.token_ids()),
    "Conv2d": lambda twins: (conv_net(target_modules=["conv"]), twins.net_input(2, 6, 8, 8)),
}


def outputs(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    y = model(x)
    return (y if isinstance(y, torch.Tensor) else y.logits).detach()


@pytest.mark.parametrize("kind", MODELS)
def test_writing_into_a_pair_writes_the_model(kind, twins):
    model, x = MODELS[kind](twins)
    pairs, _ = find_pairs(model)
    for pair in pairs:
        for parameter in pair.parameters:
            nn.init.normal_(parameter, std=0.1)
    before = outputs(model, x)
    for pair in pairs:
        pair.A.mul_(2)
    doubled_A = outputs(model, x)
    for pair in pairs:
        pair.A.div_(2)
        pair.B.mul_(2)
    doubled_B = outputs(model, x)
    assert (doubled_A - before).abs().max() > 1e-3
    if kind in ("Embedding", "Conv2d"):  # one layer: 2 A and 2 B are the same delta
        assert torch.allclose(doubled_A, doubled_B, atol=1e-5)
    for pair in pairs:
        pair.B.zero_()
    assert not any(pair.parameters[1].any() for pair in pairs)
    for pair in pairs:
        pair.layer.enable_adapters(False)
    off = outputs(model, x)
    for pair in pairs:
        pair.layer.enable_adapters(True)
    assert torch.allclose(outputs(model, x), off, atol=1e-6)


@pytest.mark.parametrize("kind", MODELS)
def test_a_pair_follows_its_parameter(kind, twins):
    """A parameter that gets another storage (method.merged(), FSDP) is seen by a pair found before."""
    pairs, _ = find_pairs(MODELS[kind](twins)[0])
    for pair in pairs:
        for parameter, view in zip(pair.parameters, ("A", "B"), strict=True):
            parameter.data = torch.full_like(parameter, 0.25)
            assert getattr(pair, view).data_ptr() == parameter.data_ptr()
            assert (getattr(pair, view) == 0.25).all()


def test_scalings(twins):
    """alpha/r, or alpha/√r for rsLoRA, by layer where patterns say so; a tensor (hotswap) is read out."""
    rank_pattern, alpha_pattern = {"q_proj": 2}, {"v_proj": 9}
    model = twins.peft_model(
        "llama", r=4, lora_alpha=6, target_modules=["q_proj", "v_proj"], use_rslora=True,
        rank_pattern=rank_pattern, alpha_pattern=alpha_pattern,
    )  # fmt: skip
    pairs, _ = find_pairs(model)
    assert [pair.scaling for pair in pairs] == [6 / math.sqrt(2), 9 / math.sqrt(4)] * 2
    pairs[0].layer.scaling["default"] = torch.tensor(0.5)
    scaling = find_pairs(model)[0][0].scaling
    assert isinstance(scaling, float)
    assert scaling == 0.5


def test_adapters_by_name(twins):
    model = twins.peft_model("llama", target_modules=["q_proj", "v_proj"])
    model.add_adapter("second", twins.config(r=6, target_modules=["v_proj", "embed_tokens"]))
    assert adapter_names(model) == ["default", "second"]
    assert [pair.A.shape[0] for pair in find_pairs(model)[0]] == [3] * 4
    second, left_out = find_pairs(model, "second")
    assert [pair.A.shape[0] for pair in second] == [6] * 3
    assert left_out == {}


def test_unknown_adapter(twins):
    model = twins.peft_model("llama", target_modules=["q_proj"])
    model.add_adapter("second", twins.config(target_modules=["embed_tokens"]))
    with pytest.raises(ValueError, match=r"no LoRA adapter 'third': it has 'default', 'second'$"):
        find_pairs(model, "third")
    with pytest.raises(ValueError, match="it has no LoRA layers; add some, or call patch"):
        find_pairs(tiny_model("llama"))


def test_left_out_dora_and_bias(twins):
    pairs, left_out = find_pairs(twins.net(use_dora=True))
    assert (pairs, left_out) == ([], {"proj": "DoraLinearVariant trains more than A and B"})
    pairs, left_out = find_pairs(twins.net(lora_bias=True))
    assert (pairs, left_out) == ([], {"proj": "lora_bias trains more than A and B"})


def test_left_out_is_by_adapter(twins):
    """A DoRA adapter beside a plain one: each question has its own answer."""
    model = twins.net()
    peft.inject_adapter_in_model(twins.config(target_modules=["proj"], use_dora=True), model, adapter_name="dora")
    assert [pair.name for pair in find_pairs(model)[0]] == ["proj"]
    assert list(find_pairs(model, "dora")[1]) == ["proj"]


def test_left_out_grouped_convolution():
    pairs, left_out = find_pairs(conv_net(groups=2))
    assert [pair.name for pair in pairs] == ["head"]
    assert left_out == {"conv": "A (4, 6, 3, 3) and B (8, 2, 1, 1) are not (r, n) and (m, r)"}


def test_left_out_experts():
    """target_parameters: one A and B hold those of all experts, nested wrappers when two parameters are adapted."""
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "num_key_value_heads": 2}
    config = hf.MixtralConfig(vocab_size=32, num_hidden_layers=1, num_local_experts=4, **sizes)
    experts = [f"mlp.experts.{name}" for name in ("gate_up_proj", "down_proj")]
    lora = peft.LoraConfig(r=2, target_modules=["q_proj"], target_parameters=experts)
    pairs, left_out = find_pairs(peft.get_peft_model(hf.MixtralForCausalLM(config), lora))
    assert [pair.name.rsplit(".", 1)[1] for pair in pairs] == ["q_proj"]
    assert list(left_out.values()) == ["ParamWrapper packs several experts into one A and B"] * 2


def test_left_out_adalora():
    config = peft.AdaLoraConfig(target_modules=["q_proj"], total_step=10)
    pairs, left_out = find_pairs(peft.get_peft_model(tiny_model("llama"), config))
    assert pairs == []
    assert list(left_out.values()) == ["SVDLinear keeps no plain A and B"] * 2


def test_left_out_tied_adapters():
    """PEFT's ensure_weight_tying: lm_head's A is the embedding's B transposed; written through one of them only."""
    model = tiny_model("llama", tie_word_embeddings=True)
    targets = ["embed_tokens", "lm_head", "q_proj"]
    model = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=targets, ensure_weight_tying=True))
    pairs, left_out = find_pairs(model)
    assert [pair.name.rsplit(".", 1)[1] for pair in pairs] == ["embed_tokens", "q_proj", "q_proj"]
    embedding = "base_model.model.model.embed_tokens"
    assert left_out == {"base_model.model.lm_head": f"shares its weights with {embedding} (tied adapters)"}
    pairs[0].B.fill_(0.5)
    assert (model.get_submodule("base_model.model.lm_head").lora_A["default"].weight == 0.5).all()


def test_left_out_parametrized(twins):
    """The weight of a parametrized A is computed anew at every access: writing into it would be lost."""

    class Twice(nn.Module):
        def forward(self, weight):
            return 2 * weight

    model = twins.net()
    parametrize.register_parametrization(model.proj.lora_A["default"], "weight", Twice())
    pairs, left_out = find_pairs(model)
    assert pairs == []
    assert left_out == {"proj": "lora_A or lora_B is parametrized: its weight is computed, not kept"}
