"""Models where only some layers can be fused, or weights are shared or moved: attention, experts, tied, offloaded."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from datetime import timedelta

import peft
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import slao_kernels
from slao_kernels.layers import FusedLoraLinear
from slao_kernels.testing import error_ratio, tiny_model

pytestmark = pytest.mark.usefixtures("one_thread")

TARGETS = ["q_proj", "down_proj"]


class Attention(nn.Module):
    """nn.MultiheadAttention and a projection: PEFT adapts both, with a class of its own for the first."""

    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(24, 24)
        self.mha = nn.MultiheadAttention(24, 4, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.proj(x)
        return self.mha(x, x, x)[0]


def injected(twins, module: type[nn.Module], **options) -> nn.Module:
    torch.manual_seed(0)
    return peft.inject_adapter_in_model(twins.config(init_lora_weights=False, **options), module()).train()


def test_multihead_attention_is_left_alone(twins):
    model, twin = (injected(twins, Attention, target_modules=["proj", "mha"]) for _ in range(2))
    report = slao_kernels.patch(model)
    assert report.skipped["mha"] == "lora.layer.MultiheadAttention has no fused forward"
    assert "proj" in report.patched
    x = twins.net_input()
    with twins.CountOps() as ops:
        found = twins.net_step(model, x)
    # PEFT merges what is inside the attention for the call: out_proj's own forward never runs.
    assert ops.counts == {"lora_linear": 1, "lora_linear_backward": 1}
    twins.check_close(found, twins.net_step(twin, x))


def mixtral() -> nn.Module:
    import transformers as hf

    torch.manual_seed(0)
    settings = {"vocab_size": 128, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
    settings |= {"num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 4, "pad_token_id": 0}
    return hf.MixtralForCausalLM(hf.MixtralConfig(**settings)).eval()


def test_experts_are_left_alone(twins):
    """target_parameters: ParamWrapper stays PEFT's, with a reason, beside fused projections."""
    parameters = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    options = {"target_modules": ["q_proj", "o_proj"], "target_parameters": parameters}
    model, twin = (peft.get_peft_model(mixtral(), twins.config(**options)) for _ in range(2))
    for net in (model, twin):
        twins.train_a_little(net)
    report = slao_kernels.patch(model)
    assert len(report.patched) == 2
    assert list(report.skipped.values()) == ["lora.layer.ParamWrapper has no fused forward"] * 2
    with twins.CountOps() as ops:
        found = twins.step(model)
    assert ops.forward == 2
    twins.check_close(found, twins.step(twin))


@pytest.mark.parametrize("ensure", [False, True], ids=["two adapters", "one tied adapter"])
def test_tied_weights(ensure, twins):
    """Head and embedding are one matrix; with ensure_weight_tying their adapters are views of each other too."""
    options = {"target_modules": ["q_proj", "embed_tokens", "lm_head"], "ensure_weight_tying": ensure}
    nets = []
    for _ in range(2):
        base = tiny_model("llama", tie_word_embeddings=True)
        torch.manual_seed(0)
        nets.append(twins.train_a_little(peft.get_peft_model(base, twins.config(**options))))
        for name, parameter in nets[-1].named_parameters():
            if "lora_embedding" in name:
                nn.init.normal_(parameter, std=0.02, generator=torch.Generator().manual_seed(5))
    model, twin = nets
    report = slao_kernels.patch(model)
    assert "base_model.model.lm_head" in report.patched
    assert report.skipped == {"base_model.model.model.embed_tokens": "lora.layer.Embedding has no fused forward"}
    head, embedding = model.base_model.model.lm_head, model.base_model.model.model.embed_tokens
    assert head.base_layer.weight is embedding.base_layer.weight
    with twins.CountOps() as ops:
        found = twins.step(model)
    assert ops.forward == 3
    twins.check_close(found, twins.step(twin))


def test_replicated_layers(twins):
    """layer_replication: blocks share their base weights, each with an adapter of its own."""
    options = {"target_modules": TARGETS, "layer_replication": [[0, 2], [1, 2]]}
    model, twin = (twins.peft_model("llama", **options) for _ in range(2))
    assert len(slao_kernels.patch(model).patched) == 6
    blocks = model.base_model.model.model.layers
    assert blocks[1].mlp.down_proj.base_layer.weight is blocks[2].mlp.down_proj.base_layer.weight
    with twins.CountOps() as ops:
        found = twins.step(model)
    assert ops.forward == 6
    twins.check_close(found, twins.step(twin))


@pytest.mark.parametrize("how", ["hooked A", "PEFT's class"])
def test_patched_beside_unpatched(how, twins):
    """Of the layers that share x, one runs PEFT's forward: the others go on, alone or together."""
    model, twin = (twins.peft_model("llama", target_modules=["q_proj", "k_proj", "v_proj"]) for _ in range(2))
    names = slao_kernels.patch(model).patched
    layer = model.get_submodule(names[1])
    if how == "hooked A":
        layer.lora_A["default"].register_forward_hook(lambda *_: None)
    else:
        layer.__class__ = FusedLoraLinear.peft_class
    expected = twins.step(twin)
    for _ in range(3):  # groups are learned in the first forwards
        with twins.CountOps() as ops:
            twins.check_close(twins.step(model), expected)
        assert ops.forward == 5


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("low", [False, True], ids=["", "low_cpu_mem_usage"])
def test_loaded_adapters(low, when, twins, tmp_path):
    """from_pretrained and load_adapter, where low_cpu_mem_usage puts A and B on meta until they are loaded."""
    twin = twins.peft_model("llama", target_modules=TARGETS)
    twin.save_pretrained(tmp_path)
    model = peft.PeftModel.from_pretrained(
        twins.base_model("llama"), tmp_path, is_trainable=True, low_cpu_mem_usage=low
    )
    if when == "before":
        slao_kernels.patch(model)
    model.load_adapter(tmp_path, "other", is_trainable=True, low_cpu_mem_usage=low)
    assert len(slao_kernels.patch(model).patched) == 4
    model.set_adapter("other")
    with twins.CountOps() as ops:
        found = twins.step(model)
    assert ops.forward == 4
    expected = {name.replace(".default.", ".other."): value for name, value in twins.step(twin).items()}
    twins.check_close(found, expected)


@pytest.mark.parametrize("when", ["patch first", "offload first"])
def test_accelerate_offload(when, twins):
    """Every leaf's weight is on meta but for its own call: only the modules themselves know when it is there."""
    from accelerate import cpu_offload
    from accelerate.hooks import remove_hook_from_submodules

    model, twin = (twins.peft_model("llama", target_modules=TARGETS).requires_grad_(False) for _ in range(2))
    if when == "patch first":
        slao_kernels.patch(model)
    cpu_offload(model, execution_device=torch.device("cpu"))
    report = slao_kernels.patch(model)
    ids = twins.token_ids()
    assert error_ratio(model(ids).logits, twin(ids).logits) <= twins.FP32_RATIO
    assert len(report.skipped) + len(report.fallbacks) > 0  # A and B are hooked
    remove_hook_from_submodules(model)
    assert len(slao_kernels.patch(model).patched) == 4
    with twins.CountOps() as ops:
        assert error_ratio(model(ids).logits, twin(ids).logits) <= twins.FP32_RATIO
    assert ops.forward == 4


@pytest.fixture
def one_rank() -> Iterator[None]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"tcp://127.0.0.1:{free.getsockname()[1]}"
    dist.init_process_group("gloo", init_method=address, world_size=1, rank=0, timeout=timedelta(seconds=60))
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("parts", [["base_layer"], ["base_layer", "lora_B.default"]], ids=["base", "base and B"])
def test_tensor_parallel(parts, one_rank, twins):
    """torch's own column-wise plan: sharded weights are DTensors and hooks turn x and y; only the modules know how."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor
    from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

    model, twin = twins.net(), twins.net()
    plan = {f"proj.{part}": ColwiseParallel() for part in parts}
    parallelize_module(model, init_device_mesh("cpu", (1,)), plan)
    assert isinstance(model.proj.base_layer.weight, DTensor)
    report = slao_kernels.patch(model)
    if len(parts) == 1:
        assert report.notes["proj"].startswith("base layer called: ")
    else:
        assert report.skipped["proj"] == "lora_B has hooks"  # a DTensor alone may be whole by the time it runs (FSDP2)
    x = twins.net_input()
    found, expected = twins.net_step(model, x), twins.net_step(twin, x)
    plain = {name: value.full_tensor() if isinstance(value, DTensor) else value for name, value in found.items()}
    twins.check_close(plain, expected)


# options of LoraConfig -> the reason why PEFT's forward runs (None: fused). A pair is a config class of PEFT's.
VARIANTS = {
    "DoRA": ({"use_dora": True}, None),
    "rsLoRA": ({"use_rslora": True}, None),
    "lora_bias": ({"lora_bias": True}, None),
    "MiCA": ({"init_lora_weights": "mica"}, "MiCA"),
    "PiSSA": ({"init_lora_weights": "pissa"}, None),
    "OLoRA": ({"init_lora_weights": "olora"}, None),
    "VeLoRA": ({"velora_config": ("VeloraConfig", {"num_groups": 2, "init_type": "random"})}, "VeLoRA"),
    "BD-LoRA": ({"use_bdlora": ("BdLoraConfig", {"target_modules_bd_a": ["proj"], "nblocks": 2})}, "BdLora"),
    "Monte-CLoRA": ({"monteclora_config": ("MontecloraConfig", {})}, "Monteclora"),
    "aLoRA": ({"alora_invocation_tokens": [1]}, "ALora"),
}


@pytest.mark.parametrize("kind", VARIANTS)
def test_variants(kind, twins):
    options, reason = VARIANTS[kind]
    nets = []
    for _ in range(2):
        made = {k: getattr(peft, v[0])(**v[1]) if isinstance(v, tuple) else v for k, v in options.items()}
        nets.append(twins.net(lambda: nn.Linear(24, 20), r=4, **made))
        for name, parameter in nets[-1].named_parameters():
            if "lora_B" in name:
                nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(5))
    model, twin = nets
    report = slao_kernels.patch(model)
    x = twins.net_input()
    with twins.CountOps() as ops:
        found = twins.net_step(model, x)
    twins.check_close(found, twins.net_step(twin, x))
    if reason is None:
        assert (report.patched, report.skipped) == (["proj"], {})
        assert ops.counts
    else:
        assert reason.lower() in report.skipped["proj"].lower()
        assert ops.counts == {}
