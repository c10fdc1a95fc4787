"""PEFT's LoRA classes over quantised bases, patched: numbers, adapters, reports, and the class given back.

Copies, files, checkpointing, autocast, compile and training of the same kinds: test_called_base_training.py.
"""

from __future__ import annotations

import peft
import pytest
import torch
from torch import Tensor, nn

import slao_kernels
from slao_kernels import layers
from slao_kernels.testing import error_ratio

pytestmark = pytest.mark.usefixtures("one_thread")

KINDS = [
    "subclass of nn.Linear",
    "GPTQ, stand-in",
    "AWQ, stand-in",
    "AQLM, stand-in",
    "Transformer Engine, stand-in",
    "bitsandbytes, 4 bits",
    "bitsandbytes, 8 bits",
    "torchao, int8",
    "HQQ, 8 bits",
]
MERGING = ["subclass of nn.Linear", "bitsandbytes, 4 bits", "bitsandbytes, 8 bits", "HQQ, 8 bits"]
BF16_RATIO = 1.5  # our error over PEFT's, both against fp64; see test_patching.py
ADD = {"lora_add": 1, "lora_add_backward": 1}


@pytest.fixture
def pair(foreign):
    """pair(kind, ...): (patched, unpatched, report)"""

    def build(kind: str, *args, precision: str = "base", **options):
        model, twin = (foreign.net(kind, *args, **options) for _ in range(2))
        report = slao_kernels.patch(model, strict=True, precision=precision)
        assert (report.patched, report.skipped, report.fallbacks) == (["proj"], {}, {})
        assert type(model.proj).__name__ == foreign.KINDS[kind][0]
        return model, twin, report

    return build


def test_all_kinds_are_listed(foreign):
    assert list(foreign.KINDS) == KINDS


@pytest.mark.parametrize("shape", [(2, 5, 64), (1, 64), (33, 64)], ids=str)
@pytest.mark.parametrize("options", [{}, {"lora_dropout": 0.4}, {"r": 7, "use_rslora": True}], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_same_numbers(kind, options, shape, twins, pair):
    """fp32: output and every gradient are PEFT's, with and without a dispatch mode looking on (which rules in place
    out); PEFT's class comes back."""
    model, twin, report = pair(kind, **options)
    x = twins.net_input(*shape)
    expected = twins.net_step(twin, x)
    with twins.CountOps() as ops:
        found = twins.net_step(model, x)
    assert ops.counts == ADD
    twins.check_close(found, expected)
    twins.check_close(twins.net_step(model, x), expected)
    assert list(report.notes) == ["proj"]
    assert report.notes["proj"].startswith("base layer called: ")
    assert report.fallbacks == {}
    assert slao_kernels.unpatch(model) == 1
    assert type(model.proj) is type(twin.proj)
    assert vars(model.proj).keys() == vars(twin.proj).keys()
    twins.check_equal(twins.net_step(model, x), twins.net_step(twin, x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_evaluation(kind, dtype, twins, pair):
    """In a net of its own: bitsandbytes packs 4-bit weights for it on some processors, and cannot train them then."""
    model, twin, report = pair(kind, dtype, lora_dropout=0.4)
    x = twins.net_input(2, 5, 64, dtype=dtype)
    with torch.no_grad():
        for _ in range(2):
            found, expected = model.eval()(x), twin.eval()(x)
            assert found.dtype == expected.dtype
            assert error_ratio(found, expected) <= (1e-6 if dtype == torch.float32 else 8e-3)  # 2 ulp of bf16
    assert report.fallbacks == {}


@pytest.mark.parametrize("kind", KINDS)
def test_state_and_identity_stay(kind, foreign):
    model, twin = foreign.net(kind), foreign.net(kind)
    parameters, theirs = dict(model.named_parameters()), type(model.proj)
    slao_kernels.patch(model)
    assert list(model.state_dict()) == list(twin.state_dict())
    assert all(p is parameters[name] for name, p in model.named_parameters())
    assert len(parameters) == len(dict(model.named_parameters()))
    assert isinstance(model.proj, theirs)
    assert layers.peft_class(model.proj) is theirs
    again = slao_kernels.patch(model)
    assert again.patched == ["proj"]
    assert list(again.notes) == ["proj"]
    assert layers.peft_class(model.proj) is theirs


def exact(model: nn.Module, x: Tensor, dy: Tensor, y: Tensor, dx: Tensor) -> dict[str, Tensor]:
    """In fp64, on top of what the base itself made of x and dy: y = base + s B A x, and every gradient."""
    layer = model.proj
    A, B = (part["default"].weight.detach().double() for part in (layer.lora_A, layer.lora_B))
    x, dy, s = (x.double().flatten(0, -2), dy.double().flatten(0, -2), layer.scaling["default"])
    g = s * dy @ B
    return {
        "y": y.double() + (s * x @ A.T @ B.T).view(y.shape),
        "x": dx.double() + (g @ A).view(dx.shape),
        "proj.lora_A.default.weight": g.T @ x,
        "proj.lora_B.default.weight": s * dy.T @ (x @ A.T),
    }


def one_step(function, x: Tensor, dy: Tensor, parameters: dict[str, Tensor]) -> dict[str, Tensor]:
    x = x.clone().requires_grad_()
    y = function(x)
    grads = torch.autograd.grad(y, [x, *parameters.values()], dy)
    return {"y": y.detach(), "x": grads[0], **dict(zip(parameters, grads[1:], strict=True))}


CASTS = [("float32", "float32"), ("bfloat16", "float32"), ("bfloat16", "bfloat16"), ("float16", "float32")]


@pytest.mark.parametrize("precision", ["base", "adapter"])
@pytest.mark.parametrize(("base", "adapter"), CASTS)
@pytest.mark.parametrize("kind", KINDS)
def test_no_further_from_fp64_than_peft(kind, base, adapter, precision, foreign, twins, pair):
    """Dtypes as PEFT's; errors no larger than PEFT's, computed in the same dtype, forward and each gradient."""
    base, adapter = getattr(torch, base), getattr(torch, adapter)
    size = (256, 192)
    model, twin, report = pair(kind, base, adapter, size, precision=precision)
    narrow = foreign.net(kind, base, base, size)
    x = twins.net_input(8, 16, 256, dtype=base)
    dy = torch.randn(8, 16, 192, generator=torch.Generator().manual_seed(5)).to(base)
    alone = one_step(model.proj.base_layer, x, dy, {})
    parameters = [{n: p for n, p in net.named_parameters() if "lora_" in n} for net in (model, twin, narrow)]
    expected = exact(model, x, dy, alone["y"], alone["x"])
    found, theirs, same = (
        one_step(net, x, dy, own) for net, own in zip((model, twin, narrow), parameters, strict=True)
    )
    assert {n: v.dtype for n, v in found.items()} == {n: v.dtype for n, v in theirs.items()}
    assert report.fallbacks == {}
    for name, value in expected.items():
        ours = error_ratio(found[name], value)
        other = error_ratio(theirs[name], value)
        if precision == "base":  # computed in the base's dtype, as PEFT does with adapters of that dtype
            other = max(other, error_ratio(same[name], value))
        # Rounding noises of fp32 size are equally good whatever their ratio.
        assert ours <= max(BF16_RATIO * other, 1e-6), f"{name}: {ours:.2e}, PEFT's {other:.2e}"


@pytest.mark.parametrize("kind", KINDS)
def test_lora_bias(kind, twins, foreign, pair):
    if kind in ("torchao, int8", "HQQ, 8 bits"):  # PEFT has none there
        with pytest.raises(ValueError, match="does not support lora_bias"):
            foreign.net(kind, lora_bias=True)
        return
    model, twin, _ = pair(kind, lora_bias=True)
    x = twins.net_input(2, 5, 64)
    with twins.CountOps() as ops:
        found = twins.net_step(model, x)
    assert ops.counts == ADD
    assert "proj.lora_B.default.bias" in found
    twins.check_close(found, twins.net_step(twin, x))


@pytest.mark.parametrize("kind", KINDS)
def test_several_adapters(kind, foreign, twins, pair):
    """Added, active together, one of them, deleted."""
    model, twin, report = pair(kind)
    for net in (model, twin):
        torch.manual_seed(4)
        net.proj.update_layer("other", r=5, lora_alpha=3, config=foreign.config(r=5, lora_alpha=3))
    x = twins.net_input(2, 5, 64)
    for active in (["default", "other"], ["other"], ["default"]):
        for net in (model, twin):
            net.proj.set_adapter(active)
        with twins.CountOps() as ops:
            found = twins.net_step(model, x)
        assert ops.counts == ADD
        twins.check_close(found, twins.net_step(twin, x))
    for net in (model, twin):
        net.proj.set_adapter(["other"])
        net.proj.delete_adapter("default")
    twins.check_close(twins.net_step(model, x), twins.net_step(twin, x))
    assert report.fallbacks == {}


@pytest.mark.parametrize("kind", KINDS)
def test_disabled(kind, twins, pair):
    model, twin, _ = pair(kind)
    x = twins.net_input(2, 5, 64)
    for net in (model, twin):
        net.proj.enable_adapters(False)
    with twins.CountOps() as ops:
        assert torch.equal(model(x), twin(x))
    assert ops.counts == {}
    for net in (model, twin):
        net.proj.enable_adapters(True)
    twins.check_close(twins.net_step(model, x), twins.net_step(twin, x))


@pytest.mark.filterwarnings("ignore:(Merge|Unmerge) lora module")
@pytest.mark.parametrize("kind", MERGING)
def test_merged_and_back(kind, twins, pair):
    """PEFT's merge, bit for bit; merged layers run PEFT's forward, unmerged ones ours again."""
    model, twin, _ = pair(kind)
    x = twins.net_input(2, 5, 64)
    for net in (model, twin):
        net.proj.merge()
    with twins.CountOps() as ops:
        assert torch.equal(model(x), twin(x))
    assert ops.counts == {}
    for net in (model, twin):
        net.proj.unmerge()
    with twins.CountOps() as ops:
        found = twins.net_step(model, x)
    assert ops.counts == ADD
    twins.check_close(found, twins.net_step(twin, x))


@pytest.mark.parametrize("kind", ["bitsandbytes, 4 bits", "bitsandbytes, 8 bits", "HQQ, 8 bits"])
def test_mixed_batch(kind, twins, pair, told):
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
def test_classes_that_take_only_x(kind, twins, pair):
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


@pytest.mark.parametrize("kind", KINDS)
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


def test_an_unknown_lora_class_is_skipped(foreign, twins, told):
    """Nobody knows what a subclass computes."""
    from peft.tuners.lora.gptq import GPTQLoraLinear

    class Mine(GPTQLoraLinear):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    model, twin = foreign.net("GPTQ, stand-in"), foreign.net("GPTQ, stand-in")
    model.proj.__class__ = twin.proj.__class__ = Mine
    report = slao_kernels.patch(model)
    assert report.patched == []
    assert report.skipped["proj"].endswith("Mine has no fused forward")
    twins.check_equal(twins.net_step(model, twins.net_input(2, 5, 64)), twins.net_step(twin, twins.net_input(2, 5, 64)))
    assert len(told()) == 1


def test_a_subclass_of_a_fused_class_is_no_fused_layer(foreign):
    """As above: what it computes is its own."""
    model = foreign.net("GPTQ, stand-in")
    slao_kernels.patch(model)
    fused = type(model.proj)
    model.proj.__class__ = type("Mine", (fused,), {})
    assert slao_kernels.unpatch(model) == 0
    assert list(slao_kernels.patch(model).skipped) == ["proj"]


def test_names_of_no_class():
    with pytest.raises(AttributeError, match="has no attribute 'FusedNothing'"):
        layers.FusedNothing  # noqa: B018
    assert peft.__name__ not in vars(layers)


def test_classes_are_made_once():
    assert layers.FusedGPTQLoraLinear is layers.FusedGPTQLoraLinear
    assert layers.FusedGPTQLoraLinear.__module__ == "slao_kernels.layers"
    assert layers.FusedGPTQLoraLinear.__qualname__ == "FusedGPTQLoraLinear"
