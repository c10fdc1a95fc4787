"""PEFT's DoRA layers, patched: numbers, dtypes, what falls back, adapters, copies, checkpointing, compile, training."""

from __future__ import annotations

import copy
import pickle

import peft
import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.pytorch_utils import Conv1D

import slao_kernels
from slao_kernels.layers import FusedLoraLinear
from slao_kernels.testing import error_ratio

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False"),
]

BF16_RATIO = 1.5  # our error over PEFT's, both against fp64; see test_patching.py
BASES = {
    "bias": lambda: nn.Linear(24, 20),
    "no bias": lambda: nn.Linear(24, 20, bias=False),
    "Conv1D": lambda: Conv1D(20, 24),
}
FUSED = {"lora_linear": 1, "lora_linear_backward": 1, "dora_norm": 1, "dora_scale": 1, "dora_scale_backward": 1}


def layer(twins, base=BASES["bias"], **options) -> nn.Module:
    """One DoRA layer whose magnitude is not where it started."""
    model = twins.net(base, use_dora=True, **options)
    own = model.proj.lora_magnitude_vector["default"].weight
    own.data *= 1 + 0.2 * torch.randn(own.shape, generator=torch.Generator().manual_seed(9))
    return model


def pair(twins, *args, **options) -> tuple[nn.Module, nn.Module, slao_kernels.PatchReport]:
    """(patched, unpatched, report)"""
    model, twin = layer(twins, *args, **options), layer(twins, *args, **options)
    report = slao_kernels.patch(model, strict=True)
    assert (report.patched, report.skipped, report.notes) == (["proj"], {}, {})
    return model, twin, report


@pytest.mark.parametrize("shape", [(2, 5, 24), (1, 24), (33, 24), (0, 24)], ids=str)
@pytest.mark.parametrize("options", [{}, {"use_rslora": True, "r": 5}], ids=str)
@pytest.mark.parametrize("base", BASES)
def test_same_numbers(base, options, shape, twins):
    """Output and every gradient, the base's own and the magnitude's included."""
    model, twin, report = pair(twins, BASES[base], **options)
    for net in (model, twin):
        net.proj.requires_grad_(True)
    x = twins.net_input(*shape)
    with twins.CountOps() as ops:
        found = twins.net_step(model, x)
    assert ops.counts == FUSED
    assert "proj.lora_magnitude_vector.default.weight" in found
    twins.check_close(found, twins.net_step(twin, x))
    twins.check_close(twins.net_step(model, x), twins.net_step(twin, x))
    assert report.fallbacks == {}


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
def test_no_further_from_fp64_than_peft(base, adapter, autocast, precision, twins):
    base, adapter, autocast = (n and getattr(torch, n) for n in (base, adapter, autocast))

    def build() -> nn.Module:
        model = layer(twins, lambda: nn.Linear(256, 192))
        nn.init.normal_(model.proj.lora_B["default"].weight, std=0.05, generator=torch.Generator().manual_seed(3))
        model.proj.to(adapter)
        model.proj.base_layer.to(base)
        return model

    model, twin, oracle, narrow = (build() for _ in range(4))
    slao_kernels.patch(model, precision=precision)
    x = twins.net_input(8, 16, 256, dtype=base)
    expected = twins.net_step(oracle.double(), x.double())
    with torch.autocast("cpu", autocast or torch.bfloat16, enabled=autocast is not None), twins.CountOps() as ops:
        found, theirs = twins.net_step(model, x), twins.net_step(twin, x)
        same_dtype = twins.net_step(narrow.to(base), x) if precision == "base" else theirs
    wide = precision == "adapter" and autocast is None and adapter != base
    branch = "lora_add" if wide else "lora_linear"
    assert ops.counts == {name.replace("lora_linear", branch): count for name, count in FUSED.items()}
    assert {n: v.dtype for n, v in found.items()} == {n: v.dtype for n, v in theirs.items()}
    for name, value in expected.items():
        ours = error_ratio(found[name], value)
        other = max(error_ratio(step[name], value) for step in (theirs, same_dtype))
        assert ours <= max(BF16_RATIO * other, 1e-6), f"{name}: {ours:.2e}, PEFT's {other:.2e}"


def test_a_change_of_magnitude_below_bf16_is_seen(twins):
    """The factor stays fp32: a magnitude that is 1 ‰ off shows in a bf16 layer's mean output, as in PEFT's."""
    models = [layer(twins, lambda: nn.Linear(256, 64, bias=False).to(torch.bfloat16)) for _ in range(2)]
    for net in models:
        net.proj.lora_magnitude_vector.float()
    slao_kernels.patch(models[0])
    x = twins.net_input(512, 256, dtype=torch.bfloat16)
    for net in models:
        before = net(x).double()
        net.proj.lora_magnitude_vector["default"].weight.data *= 1.001
        growth = net(x).double().norm() / before.norm()
        assert abs(growth - 1.001) < 2e-4


def test_dropout_while_training_is_pefts(twins, told):
    """PEFT then runs the base on the dropped x too. In eval mode it is fused; known from the start."""
    reason = "DoRA with lora_dropout=0.4 while training: PEFT scales the base of the dropped x"
    model, twin, report = pair(twins, lora_dropout=0.4)
    assert report.fallbacks == {"proj": reason}
    twins.check_peft_runs(model, twin, report.fallbacks, reason, told)
    model.eval()
    twin.eval()
    x = twins.net_input()
    with twins.CountOps() as ops:
        found = twins.net_step(model, x)
    assert ops.counts == FUSED
    twins.check_close(found, twins.net_step(twin, x))


def add_other(twins, net: nn.Module, **options) -> None:
    torch.manual_seed(4)
    config = twins.config(r=5, target_modules=["proj"], init_lora_weights=False, **options)
    peft.inject_adapter_in_model(config, net, "other")


@pytest.mark.parametrize("other", [{}, {"use_dora": True}], ids=["LoRA", "DoRA"])
def test_beside_another_adapter(other, twins, told):
    """Both active: PEFT's, in its order. One at a time: fused, whichever it is."""
    model, twin, report = pair(twins)
    for net in (model, twin):
        add_other(twins, net, **other)
    x = twins.net_input()
    for name in ("default", "other"):
        for net in (model, twin):
            net.proj.set_adapter(name)
        with twins.CountOps() as ops:
            found = twins.net_step(model, x)
        assert ops.counts["lora_linear"] == 1
        twins.check_close(found, twins.net_step(twin, x))
    for net in (model, twin):
        net.proj.set_adapter(["other", "default"])
    twins.check_peft_runs(model, twin, report.fallbacks, "DoRA beside other active adapters", told)


def hook_on_magnitude(net: nn.Module) -> None:
    net.proj.lora_magnitude_vector["default"].register_forward_hook(lambda module, args, output: output / 2)


def hook_on_base(net: nn.Module) -> None:
    net.proj.base_layer.register_forward_hook(lambda module, args, output: output / 2)


def bias_of_B(net: nn.Module) -> None:
    """PEFT's config refuses it, and its forward would count it into the norm."""
    net.proj.lora_B["default"].bias = nn.Parameter(torch.ones(20))


LEFT = {
    "hook on the magnitude": (hook_on_magnitude, {}, "DoRA's magnitude has hooks"),
    "hook on the base": (hook_on_base, {}, "DoRA over a base layer that has to be called"),
    "bias of B": (bias_of_B, {}, "DoRA with lora_bias"),
}


@pytest.mark.parametrize("what", LEFT)
def test_left_to_peft(what, twins, told):
    alter, options, reason = LEFT[what]
    model, twin = layer(twins, **options), layer(twins, **options)
    for net in (model, twin):
        alter(net)
    report = slao_kernels.patch(model)
    assert (report.patched, report.skipped) == ([], {"proj": reason})
    twins.check_peft_runs(model, twin, report.skipped, reason, told)


@pytest.mark.parametrize("what", ["hook on the magnitude", "hook on the base"])
def test_left_to_peft_after_patch(what, twins, told):
    alter, _, reason = LEFT[what]
    model, twin, report = pair(twins)
    for net in (model, twin):
        alter(net)
    twins.check_peft_runs(model, twin, report.fallbacks, reason, told)


@pytest.mark.parametrize("safe", [False, True])
@pytest.mark.parametrize("base", BASES)
def test_merged_and_back(base, safe, twins):
    model, twin, _ = pair(twins, BASES[base])
    x = twins.net_input()
    expected = twin(x)
    for net in (model, twin):
        net.proj.merge(safe_merge=safe)
    with twins.CountOps() as ops:
        assert torch.equal(model(x), twin(x))
    assert ops.counts == {}
    assert error_ratio(model(x), expected) <= 1e-5
    for net in (model, twin):
        net.proj.unmerge()
    twins.check_close(twins.net_step(model, x), twins.net_step(twin, x))


def test_scaling_as_a_tensor(twins):
    model, twin, _ = pair(twins)
    for net in (model, twin):
        net.proj.scaling["default"] = torch.tensor(net.proj.scaling["default"])
    twins.check_close(twins.net_step(model, twins.net_input()), twins.net_step(twin, twins.net_input()))


@pytest.mark.parametrize(
    "make_copy", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"]
)
def test_copies(make_copy, twins):
    model, twin, _ = pair(twins)
    copied = make_copy(model)
    with twins.CountOps() as ops:
        found = twins.net_step(copied, twins.net_input())
    assert ops.counts == FUSED
    twins.check_close(found, twins.net_step(twin, twins.net_input()))
    assert slao_kernels.unpatch(copied) == 1
    twins.check_equal(twins.net_step(copied, twins.net_input()), twins.net_step(twin, twins.net_input()))
    assert list(copied.state_dict()) == list(twin.state_dict())


class Checkpointed(nn.Module):
    def __init__(self, inner: nn.Module, reentrant: bool) -> None:
        super().__init__()
        self.inner, self.reentrant = inner, reentrant

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.inner, x, use_reentrant=self.reentrant)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(reentrant, twins):
    model, twin, _ = pair(twins)
    found, expected = (twins.net_step(Checkpointed(net, reentrant), twins.net_input()) for net in (model, twin))
    twins.check_close(found, expected)


def test_compile(twins):
    model, twin, _ = pair(twins)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    found = {n.removeprefix("_orig_mod."): v for n, v in twins.net_step(compiled, twins.net_input()).items()}
    twins.check_close(found, twins.net_step(twin, twins.net_input()))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients(mode, twins):
    model, twin, _ = pair(twins)
    with mode(), twins.CountOps() as ops:
        y = model(twins.net_input())
    assert ops.counts == {"lora_linear": 1, "dora_norm": 1, "dora_scale": 1}
    twins.check_close({"y": y}, {"y": twin(twins.net_input()).detach()})
    twins.check_close(twins.net_step(model, twins.net_input()), twins.net_step(twin, twins.net_input()))


def test_the_output_may_be_overwritten(twins):
    model, twin, _ = pair(twins)
    grads = []
    for net in (model, twin):
        net(twins.net_input()).mul_(3).square().sum().backward()
        grads.append({n: p.grad for n, p in net.named_parameters() if p.grad is not None})
    twins.check_close(*grads)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_training_a_whole_model(kind, twins, tmp_path):
    """Steps of AdamW: PEFT's losses and adapters; saved as PEFT saves."""
    models = [twins.peft_model(kind, use_dora=True) for _ in range(2)]
    report = slao_kernels.patch(models[0], strict=True)
    losses: list[list[float]] = [[], []]
    for model, found in zip(models, losses, strict=True):
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
        for _ in range(5):
            optimizer.zero_grad()
            loss = model(input_ids=twins.token_ids(), labels=twins.token_ids()).loss
            loss.backward()
            optimizer.step()
            found.append(loss.item())
    assert losses[0][-1] < losses[0][0]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    with twins.CountOps() as ops:
        twins.check_close(twins.step(models[0]), twins.step(models[1]), 2e-2)  # AdamW turns roundings into signs
    assert ops.counts["dora_norm"] == ops.counts["lora_linear"] == len(report.patched)
    assert report.fallbacks == {}
    assert all(type(models[0].get_submodule(name)) is FusedLoraLinear for name in report.patched)
    models[0].save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(twins.base_model(kind), tmp_path)
    ids = twins.token_ids()
    twins.check_close({"y": loaded(ids).logits.detach()}, {"y": models[0].eval()(ids).logits.detach()})
