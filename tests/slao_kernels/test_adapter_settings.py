"""Settings of an adapter that change the formula, all fused: lora_bias, rsLoRA, rank_pattern, alpha_pattern."""

from __future__ import annotations

import math
import re

import peft
import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.pytorch_utils import Conv1D

import slao_kernels
from slao_kernels.layers import FusedLoraLinear
from slao_kernels.testing import TOLERANCE, error_ratio

pytestmark = pytest.mark.usefixtures("one_thread")

BF16_RATIO = 1.5  # our error over PEFT's, both against fp64; see test_patching.py
BASES = {
    "bias": lambda: nn.Linear(24, 20),
    "no bias": lambda: nn.Linear(24, 20, bias=False),
    "Conv1D": lambda: Conv1D(20, 24),
}


def biased(twins, base=BASES["bias"], **options) -> nn.Module:
    """One layer whose adapter has a bias that is far from zero."""
    model = twins.net(base, lora_bias=True, **options)
    nn.init.normal_(model.proj.lora_B["default"].bias, generator=torch.Generator().manual_seed(9))
    return model


def two(twins, base=BASES["bias"], **options) -> tuple[nn.Module, nn.Module, slao_kernels.PatchReport]:
    """(patched, its unpatched twin, the report)"""
    model, twin = biased(twins, base, **options), biased(twins, base, **options)
    report = slao_kernels.patch(model)
    assert (report.patched, report.skipped, report.fallbacks) == (["proj"], {}, {})
    return model, twin, report


def check_same(twins, model: nn.Module, twin: nn.Module, report, *shape: int) -> None:
    """PEFT's numbers, by our operators, both ways."""
    x = twins.net_input(*shape)
    with twins.CountOps() as ops:
        found = twins.net_step(model, x)
    assert ops.counts == {"lora_linear": 1, "lora_linear_backward": 1}
    assert report.fallbacks == {}
    twins.check_close(found, twins.net_step(twin, x))


@pytest.mark.parametrize("shape", [(2, 5, 24), (24,), (1, 24), (0, 24), (33, 24)], ids=str)
@pytest.mark.parametrize("base", BASES)
def test_lora_bias(base, shape, twins):
    model, twin, report = two(twins, BASES[base])
    for net in (model, twin):
        net.proj.requires_grad_(True)  # the base's own bias and weight too: each gets its own gradient
    check_same(twins, model, twin, report, *shape)


@pytest.mark.parametrize("options", [{"lora_dropout": 0.4}, {"use_rslora": True, "r": 5}], ids=["dropout", "rsLoRA"])
def test_lora_bias_with(options, twins):
    model, twin, report = two(twins, **options)
    check_same(twins, model, twin, report)


@pytest.mark.parametrize(
    "trained", [("lora_B.default.bias",), ("lora_A",), ("lora_B.default.weight", "base_layer.bias")]
)
def test_lora_bias_partly_frozen(trained, twins):
    model, twin, report = two(twins)
    for net in (model, twin):
        for name, parameter in net.proj.named_parameters():
            parameter.requires_grad_(any(part in name for part in trained))
    found = twins.net_step(model, twins.net_input())
    assert {name.removeprefix("proj.") for name in found} >= {name for name in trained if name.endswith("bias")}
    twins.check_close(found, twins.net_step(twin, twins.net_input()))
    assert report.fallbacks == {}


@pytest.mark.parametrize("tensor_scaling", [False, True])
@pytest.mark.parametrize("other", [{"lora_bias": True}, {}], ids=["both", "one of two"])
def test_lora_bias_of_several_adapters(other, tensor_scaling, twins):
    """Σ scaling · bias; a scaling that is a tensor (hotswap) is used as one."""
    model, twin, report = two(twins)
    for net in (model, twin):
        torch.manual_seed(4)
        config = twins.config(r=5, target_modules=["proj"], init_lora_weights=False, **other)
        peft.inject_adapter_in_model(config, net, "other")
        net.proj.set_adapter(["default", "other"])
        if tensor_scaling:
            net.proj.scaling = {name: torch.tensor(value) for name, value in net.proj.scaling.items()}
    check_same(twins, model, twin, report)


# base dtype, adapter dtype, autocast
CASTS = [
    ("float32", "float32", None),
    ("bfloat16", "float32", None),
    ("bfloat16", "bfloat16", None),
    ("float16", "float32", None),
    ("float32", "float32", "bfloat16"),
    ("bfloat16", "float32", "bfloat16"),
]


@pytest.mark.parametrize("precision", ["base", "adapter"])
@pytest.mark.parametrize(("base", "adapter", "autocast"), CASTS)
def test_lora_bias_dtypes(base, adapter, autocast, precision, twins):
    """PEFT's dtypes; no further from fp64 than PEFT computed in the same dtype, the bias's gradient included."""
    base, adapter, autocast = (n and getattr(torch, n) for n in (base, adapter, autocast))

    def layer() -> nn.Module:
        model = biased(twins, lambda: nn.Linear(256, 192))
        model.proj.to(adapter)
        model.proj.base_layer.to(base)
        return model

    model, twin, oracle, narrow = (layer() for _ in range(4))
    slao_kernels.patch(model, precision=precision)
    x = twins.net_input(8, 16, 256, dtype=base)
    expected = twins.net_step(oracle.double(), x.double())
    with torch.autocast("cpu", autocast or torch.bfloat16, enabled=autocast is not None), twins.CountOps() as ops:
        found, theirs = twins.net_step(model, x), twins.net_step(twin, x)
        same_dtype = twins.net_step(narrow.to(base), x) if precision == "base" else theirs
    op = "lora_linear" if precision == "base" else "lora_add"  # a wide bias joins the wide branch there
    assert ops.counts == {op: 1, f"{op}_backward": 1}
    assert {n: v.dtype for n, v in found.items()} == {n: v.dtype for n, v in theirs.items()}
    assert "proj.lora_B.default.bias" in expected
    for name, value in expected.items():
        ours = error_ratio(found[name], value)
        other = max(error_ratio(step[name], value) for step in (theirs, same_dtype))
        assert ours <= max(BF16_RATIO * other, 1e-6), f"{name}: {ours:.2e}, PEFT's {other:.2e}"


@pytest.mark.parametrize("reentrant", [False, True])
def test_lora_bias_checkpointed(reentrant, twins):
    class Checkpointed(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: Tensor) -> Tensor:
            return checkpoint(self.inner, x, use_reentrant=reentrant)

    model, twin, _ = two(twins)
    x = twins.net_input()
    twins.check_close(twins.net_step(Checkpointed(model), x), twins.net_step(Checkpointed(twin), x))


def test_lora_bias_compiled(twins):
    model, twin, _ = two(twins)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    found = {n.removeprefix("_orig_mod."): v for n, v in twins.net_step(compiled, twins.net_input()).items()}
    twins.check_close(found, twins.net_step(twin, twins.net_input()))


def test_lora_bias_merged_and_back(twins):
    model, twin, report = two(twins)
    x = twins.net_input()
    expected = twin(x)
    for net in (model, twin):
        net.proj.merge()
    with twins.CountOps() as ops:
        assert torch.equal(model(x), twin(x))
    assert ops.counts == {}
    assert error_ratio(model(x), expected) <= 1e-6
    for net in (model, twin):
        net.proj.unmerge()
    check_same(twins, model, twin, report)


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_lora_bias_in_a_whole_model(kind, twins):
    model, twin = (twins.peft_model(kind, lora_bias=True) for _ in range(2))
    for net in (model, twin):
        for name, parameter in net.named_parameters():
            if "lora_B" in name and name.endswith("bias"):
                nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(len(name)))
    report = slao_kernels.patch(model)
    for _ in range(3):
        with twins.CountOps() as ops:
            found = twins.step(model)
        assert ops.counts == dict.fromkeys(("lora_linear", "lora_linear_backward"), len(report.patched))
        twins.check_close(found, twins.step(twin))
    assert (report.skipped, report.fallbacks) == ({}, {})


# rsLoRA and patterns, by the formula of the papers instead of by PEFT's `scaling`.
R, ALPHA = 4, 6
SETTINGS = {
    "plain": {},
    "rsLoRA": {"use_rslora": True},
    "rank_pattern": {"rank_pattern": {"q_proj": 7, "layers.1.mlp.down_proj": 1}},
    "alpha_pattern": {"alpha_pattern": {"q_proj": 11, "layers.0.mlp.down_proj": 1}},
    "all": {
        "use_rslora": True,
        "rank_pattern": {"q_proj": 7, "layers.1.mlp.down_proj": 1},
        "alpha_pattern": {"q_proj": 11, "layers.0.mlp.down_proj": 1},
    },
}


def of_pattern(pattern: dict[str, int], name: str, otherwise: int) -> int:
    return next((value for key, value in pattern.items() if re.search(rf"(^|\.){re.escape(key)}$", name)), otherwise)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("settings", SETTINGS)
def test_scaling_by_the_formula(settings, dtype, twins):
    """Each layer alone: y = W x + alpha / r (or / √r) · B A x with its own alpha and r, in fp64; fused, both ways."""
    options = SETTINGS[settings]
    model = twins.peft_model("llama", dtype, r=R, lora_alpha=ALPHA, target_modules=["q_proj", "down_proj"], **options)
    report = slao_kernels.patch(model)
    assert len(report.patched) == 4
    assert (report.skipped, report.fallbacks) == ({}, {})
    seen = set()
    for name in report.patched:
        layer = model.get_submodule(name)
        assert type(layer) is FusedLoraLinear
        nn.init.normal_(layer.lora_B["default"].weight)  # the adapter's share is most of y
        A, B = (part["default"].weight for part in (layer.lora_A, layer.lora_B))
        r = of_pattern(options.get("rank_pattern", {}), name, R)
        alpha = of_pattern(options.get("alpha_pattern", {}), name, ALPHA)
        scaling = alpha / (math.sqrt(r) if options.get("use_rslora") else r)
        seen.add((r, scaling))
        assert A.shape[0] == B.shape[1] == r
        x = torch.randn(5, 7, A.shape[1], generator=torch.Generator().manual_seed(1)).to(dtype).requires_grad_()
        with twins.CountOps() as ops:
            layer(x).backward(torch.ones(5, 7, B.shape[0], dtype=dtype))
        assert ops.counts == {"lora_linear": 1, "lora_linear_backward": 1}
        wide = [p.detach().double().requires_grad_() for p in (x, A, B)]
        y = wide[0] @ layer.base_layer.weight.double().T + scaling * (wide[0] @ wide[1].T @ wide[2].T)
        y.sum().backward()
        # Adapters are fp32 on the bf16 base: they are rounded to bf16 too, and so is g.
        allowed = TOLERANCE[dtype] * (1 if dtype == torch.float32 else 2)
        assert error_ratio(layer(x), y) <= allowed
        for found, expected in zip((x, A, B), wide, strict=True):
            assert error_ratio(found.grad, expected.grad) <= allowed
        model.zero_grad()
    assert len(seen) == (1 if settings in ("plain", "rsLoRA") else 3)


@pytest.mark.parametrize("settings", SETTINGS)
def test_settings_while_training(settings, twins):
    """Six steps of SGD leave PEFT's and our adapters where they should be: equal."""
    models = [twins.peft_model("llama", r=R, lora_alpha=ALPHA, lora_bias=True, **SETTINGS[settings]) for _ in range(2)]
    report = slao_kernels.patch(models[0])
    losses = []
    for model in models:
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05)
        for _ in range(6):
            optimizer.zero_grad()
            loss = model(input_ids=twins.token_ids(), labels=twins.token_ids()).loss
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    assert losses[5] < losses[0] - 0.05
    assert losses[:6] == pytest.approx(losses[6:], rel=1e-5)
    ours, theirs = (dict(model.named_parameters()) for model in models)
    twins.check_close({n: p.detach() for n, p in ours.items()}, {n: p.detach() for n, p in theirs.items()})
    assert report.fallbacks == {}


def test_frozen_lora_bias_alone(twins):
    """Nothing but a frozen bias: no gradient at all, and no node."""
    model, twin, _ = two(twins)
    model.requires_grad_(False)
    y = model(twins.net_input())
    assert y.grad_fn is None
    twins.check_close({"y": y}, {"y": twin(twins.net_input()).detach()})
    with torch.no_grad():
        twins.check_close({"y": model(twins.net_input())}, {"y": y})
