"""find_pairs: every LoRA pair as two matrices that share the adapter's memory, and why a layer has none."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import changes
import peft
import pytest
import torch
import twins
from torch import Tensor, nn

from slao_kernels.adapters import adapter_names, find_pairs, lora_layers
from slao_kernels.testing import tiny_model

pytestmark = pytest.mark.usefixtures("one_thread")


class ConvNet(nn.Module):
    def __init__(self, groups: int = 1) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(6, 8, 3, groups=groups), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.conv(x).mean((-2, -1)))


def conv_net(groups: int = 1, **options: Any) -> nn.Module:
    options = {"r": 3, "lora_alpha": 5, "target_modules": ["conv", "head"], "init_lora_weights": False, **options}
    return peft.inject_adapter_in_model(peft.LoraConfig(**options), ConvNet(groups)).eval()


def model_of(kind: str, *targets: str, **options: Any) -> Callable[[], nn.Module]:
    return lambda: twins.peft_model(kind, target_modules=list(targets), **options)


def embedding(pair: Any) -> tuple[Tensor, Tensor]:
    return pair.layer.lora_embedding_A["default"], pair.layer.lora_embedding_B["default"]


def weights(pair: Any) -> tuple[Tensor, Tensor]:
    return pair.layer.lora_A["default"].weight, pair.layer.lora_B["default"].weight


BLOCK = [("q_proj", (3, 32), (32, 3)), ("k_proj", (3, 32), (16, 3)), ("down_proj", (3, 64), (32, 3))]
# The model, and of each pair its name, A's and B's shapes: (r, n) and (m, r), also of transformers'
# Conv1D, which stores W as (in, out), and of a convolution, where n is channels·kh·kw.
MODELS: dict[str, tuple[Callable[[], nn.Module], list[Any]]] = {
    "linear": (model_of("llama", "q_proj", "k_proj", "down_proj"), BLOCK * 2),
    "Conv1D": (model_of("gpt2", "c_attn", fan_in_fan_out=True), [("c_attn", (3, 32), (96, 3))] * 2),
    "Embedding": (model_of("llama", "embed_tokens"), [("embed_tokens", (3, 128), (32, 3))]),
    "Conv2d": (lambda: conv_net(target_modules=["conv"]), [("conv", (3, 54), (8, 3))]),
}
every_kind = pytest.mark.parametrize("kind", MODELS)


@every_kind
def test_pairs(kind):
    """Names and order of the walk, PEFT's scaling and delta; the parameters are the model's own."""
    make, expected = MODELS[kind]
    model = make()
    pairs, left_out = find_pairs(model)
    assert left_out == {}
    assert [pair.name for pair in pairs] == [name for name, _ in lora_layers(model)]
    assert [(p.name.rpartition(".")[2], tuple(p.A.shape), tuple(p.B.shape)) for p in pairs] == expected
    for pair in pairs:
        assert model.get_submodule(pair.name) is pair.layer
        own = embedding(pair) if kind == "Embedding" else weights(pair)
        assert all(a is b for a, b in zip(pair.parameters, own, strict=True))
        assert pair.scaling == 5 / 3
        assert not pair.A.requires_grad
        delta, theirs = pair.scaling * pair.B @ pair.A, pair.layer.get_delta_weight("default").flatten(1)
        assert torch.allclose(delta, theirs.t() if kind in ("Conv1D", "Embedding") else theirs, atol=1e-6)


@every_kind
def test_a_pair_follows_its_parameter(kind):
    """A parameter that gets another storage (method.merged(), FSDP) is seen by a pair found before; what is written
    into the pair is in the parameter."""
    for pair in find_pairs(MODELS[kind][0]())[0]:
        for parameter, view in zip(pair.parameters, ("A", "B"), strict=True):
            parameter.data = torch.full_like(parameter, 0.25)
            assert getattr(pair, view).data_ptr() == parameter.data_ptr()
            assert (getattr(pair, view) == 0.25).all()
            getattr(pair, view)[1:].mul_(2)
            assert (parameter[1:] == 0.5).all()


def test_a_tensor_as_scaling():
    """PEFT's hotswap has them: it is read out."""
    model = twins.net()
    model.proj.scaling["default"] = torch.tensor(0.5)
    scaling = find_pairs(model)[0][0].scaling
    assert (type(scaling), scaling) == (float, 0.5)


def test_adapters_by_name():
    model = model_of("llama", "q_proj", "v_proj")()
    model.add_adapter("second", twins.config(r=6, target_modules=["v_proj", "embed_tokens"]))
    assert adapter_names(model) == ["default", "second"]
    assert [pair.A.shape[0] for pair in find_pairs(model)[0]] == [3] * 4
    second, left_out = find_pairs(model, "second")
    assert [pair.A.shape[0] for pair in second] == [6] * 3
    assert left_out == {}
    with pytest.raises(ValueError, match=r"no LoRA adapter 'third': it has 'default', 'second'$"):
        find_pairs(model, "third")
    with pytest.raises(ValueError, match="it has no LoRA layers; add some, or call patch"):
        find_pairs(tiny_model("llama"))


def two_kinds() -> nn.Module:
    """A DoRA adapter beside a plain one."""
    model = twins.net()
    peft.inject_adapter_in_model(twins.config(target_modules=["proj"], use_dora=True), model, adapter_name="dora")
    return model


def experts() -> nn.Module:
    """target_parameters: one A and B hold those of all experts, nested wrappers when two parameters are adapted."""
    adapted = [f"mlp.experts.{name}" for name in ("gate_up_proj", "down_proj")]
    lora = peft.LoraConfig(r=2, target_modules=["q_proj"], target_parameters=adapted)
    return peft.get_peft_model(tiny_model("mixtral", num_hidden_layers=1), lora)


def parametrized() -> nn.Module:
    """The weight of a parametrized A is computed anew at every access: writing into it would be lost."""
    model = twins.net()
    changes.parametrized(model.proj.lora_A["default"])
    return model


def tied() -> nn.Module:
    """PEFT's ensure_weight_tying: lm_head's A is the embedding's B transposed; written through one of them only."""
    config = peft.LoraConfig(r=4, target_modules=["embed_tokens", "lm_head", "q_proj"], ensure_weight_tying=True)
    return peft.get_peft_model(tiny_model("llama", tie_word_embeddings=True), config)


def adalora() -> nn.Module:
    return peft.get_peft_model(tiny_model("llama"), peft.AdaLoraConfig(target_modules=["q_proj"], total_step=10))


DORA = ["DoraLinearVariant trains more than A and B"]
TIED = ["shares its weights with base_model.model.model.embed_tokens (tied adapters)"]
GROUPED = ["A (4, 6, 3, 3) and B (8, 2, 1, 1) are not (r, n) and (m, r)"]
# The model, which layers have a pair, why others have none.
LEFT_OUT: dict[str, tuple[Callable[[], nn.Module], list[str], list[str]]] = {
    "DoRA": (lambda: twins.net(use_dora=True), [], DORA),
    "lora_bias": (lambda: twins.net(lora_bias=True), [], ["lora_bias trains more than A and B"]),
    "LoRA beside DoRA": (two_kinds, ["proj"], []),
    "DoRA beside LoRA": (two_kinds, [], DORA),
    "grouped convolution": (lambda: conv_net(groups=2, r=4), ["head"], GROUPED),
    "AdaLoRA": (adalora, [], ["SVDLinear keeps no plain A and B"] * 2),
    "tied": (tied, ["embed_tokens", "q_proj", "q_proj"], TIED),
    "parametrized": (parametrized, [], ["lora_A or lora_B is parametrized: its weight is computed, not kept"]),
}


def test_experts_are_one_pair_of_all_of_them():
    """PEFT's layout, as its get_delta_weight reads it."""
    pairs, left_out = find_pairs(experts())
    assert left_out == {}
    assert [pair.name.rpartition("layers.0.")[2] for pair in pairs] == [
        "self_attn.q_proj", "mlp.experts", "mlp.experts.base_layer",
    ]  # fmt: skip
    assert [(pair.experts, len(pair.names)) for pair in pairs] == [(1, 1), (4, 4), (4, 4)]
    for pair in pairs[1:]:
        nn.init.normal_(pair.parameters[1])
        delta = pair.layer.get_delta_weight("default")
        for whole, A, B in zip(delta, pair.split("A", pair.A), pair.split("B", pair.B), strict=True):
            assert torch.allclose(pair.scaling * B @ A, whole, atol=1e-6)
            assert A.shape[0] == B.shape[1] == 2
        pair.split("B", pair.B)[3].zero_()
        assert not pair.layer.get_delta_weight("default")[3].any(), "views write the adapter"


@pytest.mark.parametrize("what", LEFT_OUT)
def test_left_out(what):
    make, names, reasons = LEFT_OUT[what]
    model = make()
    pairs, left_out = find_pairs(model, "dora" if what.startswith("DoRA beside") else "default")
    assert [pair.name.rpartition(".")[2] for pair in pairs] == names
    assert list(left_out.values()) == reasons
    assert all(hasattr(model.get_submodule(name), "base_layer") for name in left_out)
    if what == "tied":
        pairs[0].B.fill_(0.5)
        assert (model.get_submodule(*left_out).lora_A["default"].weight == 0.5).all()
