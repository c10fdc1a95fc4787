"""Every kind of layer, patched, beside PEFT's: output and every gradient, dtypes, shapes, what is frozen, modes."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial

import foreign
import pytest
import torch
import twins
from kinds import ADD, DROPPING, PLAIN, SCALE, all_kinds, build, compiled, grid, operators, pair, x_of
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

import slao_kernels
from slao_kernels.testing import TOLERANCE, error_ratio

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]

# Our error over PEFT's, both against fp64. Both are rounding noise of many elements; two correct orders of summation
# differ by less. Noises of fp32 size (1e-6) are equally good whatever their ratio.
RATIO = 1.5
SHAPES = [(2, 5, 64), (1, 64), (33, 64), (64,), (0, 64), (3, 0, 64), (1, 1, 1, 64)]


@pytest.mark.parametrize("shape", grid(SHAPES, SHAPES[:1]))
@all_kinds
def test_same_numbers(kind, shape):
    """fp32, everything trains: PEFT's numbers by our operators, with and without a dispatch mode looking on (which
    rules adding in place out); once more by a layer that has been through unpatch."""
    if kind.startswith("DoRA") and len(shape) == 1:
        pytest.skip("PEFT's DoRA makes two dimensions of one")
    if kind.startswith("bitsandbytes") and 0 in shape:
        pytest.skip("bitsandbytes takes no empty batch")
    model, twin, report = pair(kind)
    assert type(model.proj).__name__ == foreign.KINDS.get(kind, ["FusedLoraLinear"])[0]
    for net in (model, twin) if kind in PLAIN else ():
        net.proj.requires_grad_(True)
    x = x_of(*shape)
    found = twins.check_same(model, twin, x, ops=operators(kind))
    twins.check_close(twins.net_step(model, x), found)
    assert report.fallbacks == {}
    assert slao_kernels.unpatch(model) == 1
    assert type(model.proj) is type(twin.proj)
    assert vars(model.proj).keys() == vars(twin.proj).keys()
    twins.check_equal(twins.net_step(model, x), twins.net_step(twin, x))


# dtype of the base, the adapters, autocast, x
CASTS = [
    ("bfloat16", "float32", None, "bfloat16"),
    ("float32", "float32", None, "float32"),
    ("bfloat16", "bfloat16", None, "bfloat16"),
    ("float16", "float32", None, "float16"),
    ("float32", "bfloat16", None, "float32"),
    ("float32", "float64", None, "float32"),
    ("float32", "float32", "bfloat16", "float32"),
    ("float32", "float32", "bfloat16", "bfloat16"),
    ("bfloat16", "float32", "bfloat16", "float32"),
    ("bfloat16", "float32", "bfloat16", "bfloat16"),
    ("bfloat16", "bfloat16", "bfloat16", "float32"),
    ("float32", "float32", "float16", "float32"),
]


def one_step(function: Callable[[Tensor], Tensor], x: Tensor, dy: Tensor, net: nn.Module | None) -> dict[str, Tensor]:
    named = {} if net is None else {name: p for name, p in net.named_parameters() if "lora_" in name}
    x = x.clone().requires_grad_()
    y = function(x)
    grads = torch.autograd.grad(y, [x, *named.values()], dy.to(y.dtype))
    return {"y": y.detach(), **dict(zip(["x", *named], grads, strict=True))}


def exact(kind: str, twin: nn.Module, x: Tensor, dy: Tensor) -> dict[str, Tensor]:
    """In fp64: the whole layer, or the branch on top of what a base that has to be called made of x and dy."""
    if kind in PLAIN:
        with torch.autocast("cpu", enabled=False):
            wide = copy.deepcopy(twin).double()
            return one_step(wide, x.double(), dy.double(), wide)
    layer = twin.proj
    alone = one_step(layer.base_layer, x, dy, None)
    A, B = (part["default"].weight.detach().double() for part in (layer.lora_A, layer.lora_B))
    x, dy, s = (x.double().flatten(0, -2), dy.double().flatten(0, -2), layer.scaling["default"])
    g = s * dy @ B
    return {
        "y": alone["y"].double() + (s * x @ A.T @ B.T).view(alone["y"].shape),
        "x": alone["x"].double() + (g @ A).view(alone["x"].shape),
        "proj.lora_A.default.weight": g.T @ x,
        "proj.lora_B.default.weight": s * dy.T @ (x @ A.T),
    }


@pytest.mark.parametrize("precision", ["base", "adapter"])
@pytest.mark.parametrize("dtypes", grid(CASTS, [CASTS[0], CASTS[6]]))
@all_kinds
def test_no_further_from_fp64_than_peft(kind, dtypes, precision):
    """PEFT's dtypes; errors no larger than PEFT's computed in the same dtype, forward and each gradient."""
    base, adapter, autocast, of_x = (name and getattr(torch, name) for name in dtypes)
    size = (256, 192)
    model, twin, report = pair(kind, base, adapter, size, precision=precision)
    narrow = build(kind, base, base, size)
    x = x_of(8, 16, 256, dtype=of_x)
    dy = torch.randn(8, 16, 192, generator=torch.Generator().manual_seed(5)).to(autocast or base)
    with torch.autocast("cpu", autocast or torch.bfloat16, enabled=autocast is not None):
        expected = exact(kind, twin, x, dy)
        with twins.CountOps() as ops:
            found = one_step(model, x, dy, model)
        theirs = one_step(twin, x, dy, twin)
        # precision="base" computes in the base's dtype, as PEFT does with adapters cast to it.
        same = one_step(narrow, x, dy, narrow) if precision == "base" else theirs
    wide = precision == "adapter" and autocast is None and torch.promote_types(adapter, base) != base
    added = (wide and kind.startswith("DoRA")) or (precision == "adapter" and kind.startswith("lora_bias"))
    scale = {name: count for name, count in operators(kind).items() if name in SCALE}
    assert ops.counts == ({**ADD, **scale} if added else operators(kind))
    assert {n: v.dtype for n, v in found.items()} == {n: v.dtype for n, v in theirs.items()}
    assert report.fallbacks == {}
    for name, value in expected.items():
        ours, other = error_ratio(found[name], value), max(error_ratio(step[name], value) for step in (theirs, same))
        assert ours <= max(RATIO * other, 1e-6), f"{name}: {ours:.2e}, PEFT's {other:.2e}"


FROZEN = [(True, "lora_A"), (False, "lora_B"), (True, "none"), (False, "bias"), (False, "lora_A weight"), (True, "all")]


@pytest.mark.parametrize("frozen", grid(FROZEN, FROZEN[:3]))
@all_kinds
def test_frozen_parts(kind, frozen):
    """Only what asks for a gradient gets one, and only then is there a node."""
    of_x, trained = frozen[0], frozen[1].split()
    steps = []
    for net in pair(kind)[:2]:
        for name, parameter in net.proj.named_parameters():
            if parameter.is_floating_point() and not (kind in foreign.KINDS and name.startswith("base_layer")):
                parameter.requires_grad_(trained == ["all"] or any(part in name for part in trained))
        leaf = x_of().requires_grad_(of_x)
        y = net(leaf)
        leaves = [p for p in net.proj.parameters() if p.requires_grad]
        assert y.requires_grad is (of_x or bool(leaves))
        assert y.requires_grad or y.grad_fn is None
        if y.requires_grad:
            y.square().sum().backward()
        grads = {name: p.grad for name, p in net.proj.named_parameters() if p.grad is not None}
        steps.append({"y": y.detach(), **grads, **({"x": leaf.grad} if of_x else {})})
    twins.check_close(*steps)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@all_kinds
def test_without_gradients(kind, mode):
    """In eval mode, in a net of its own: bitsandbytes packs 4-bit weights for it on some processors, and cannot train
    them then. And training goes on afterwards."""
    model, twin, report = pair(kind, lora_dropout=0.4 if kind in DROPPING else 0.0)
    model.eval()
    twin.eval()
    with mode():
        with twins.CountOps() as ops:
            y = model(x_of())
        assert ops.counts == {name: n for name, n in operators(kind).items() if not name.endswith("backward")}
        twins.check_close({"y": y}, {"y": twin(x_of())})
    assert y.grad_fn is None
    assert y.is_inference() == (mode is torch.inference_mode)
    if kind != "bitsandbytes, 4 bits":
        twins.check_close(twins.net_step(model, x_of()), twins.net_step(twin, x_of()))
    assert report.fallbacks == {}


class Use(nn.Module):
    """The layer as the inside of something."""

    def __init__(self, inner: nn.Module, run: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        self.inner, self.run = inner, run

    def forward(self, x: Tensor) -> Tensor:
        return self.run(self.inner, x)


def twice(inner: nn.Module, x: Tensor, run: Callable[..., Tensor] = lambda f, x: f(x)) -> Tensor:
    """Two calls, one of them on the other's output."""
    y = run(inner, x)
    return y + run(lambda v: inner(torch.cat([v, v], -1)).tanh(), y)


USES: dict[str, Callable[[nn.Module, Tensor], Tensor]] = {
    "overwritten": lambda inner, x: inner(x).mul_(3).add_(1),
    "used twice": twice,
    "checkpointed": partial(twice, run=partial(checkpoint, use_reentrant=False)),
    "checkpointed, reentrant": partial(twice, run=partial(checkpoint, use_reentrant=True)),
}


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("autocast", [False, True], ids=["", "autocast"])
@pytest.mark.parametrize("use", USES)
@all_kinds
def test_uses(kind, use, autocast, dropout):
    if dropout and kind not in DROPPING:
        pytest.skip("PEFT's own forward then: test_eligibility.py")
    model, twin, report = pair(kind, lora_dropout=dropout)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        for _ in range(2):
            nets = (Use(net, USES[use]) for net in (model, twin))
            # bf16: two calls one after the other, rounded a few times to 2^-8 each.
            twins.check_close(*(twins.net_step(net, x_of()) for net in nets), 3e-2 if autocast else twins.FP32_RATIO)
    assert report.fallbacks == {}


@all_kinds
def test_compile(kind):
    """One graph forward, one backward, no break; dropout is none in eval mode."""
    model, twin, report = pair(kind, lora_dropout=0.1 if kind in DROPPING else 0.0)
    for net in (model, twin):
        net.proj.lora_dropout.eval()
    step = compiled(model)
    for _ in range(2):
        twins.check_close(step(x_of()), twins.net_step(twin, x_of()))
    assert report.fallbacks == {}


@pytest.mark.parametrize("kind", ["lora_bias", "subclass of nn.Linear"])
def test_lora_bias_by_inductor(kind):
    """torch 2.13 has miscompiled scaled additions inside autograd functions, and Inductor before 2.11 LoRA's gradients:
    like the layer that is not compiled, and fp64."""
    torch._dynamo.reset()
    model, twin, _ = pair(kind, lora_bias=True)
    wide, x, dy = copy.deepcopy(twin).double(), x_of(7, 64), x_of(7, 32).cos()
    expected = one_step(wide, x.double(), dy.double(), wide)
    for call in (model, torch.compile(model, fullgraph=True, backend="inductor")):
        found = one_step(call, x, dy, model)
        for name, value in expected.items():
            assert error_ratio(found[name], value) <= TOLERANCE[torch.float32], name


@pytest.mark.parametrize("kind", ["two adapters", "DoRA"])
def test_a_tensor_as_scaling(kind):
    """As PEFT's hotswap has it, eager and compiled."""
    model, twin, _ = pair(kind)
    for net in (model, twin):
        net.proj.scaling = {name: torch.tensor(value) for name, value in net.proj.scaling.items()}
    expected = twins.check_same(model, twin, ops=operators(kind))
    twins.check_close(compiled(model)(x_of()), expected)


@all_kinds
def test_functional_call(kind):
    """Parameters handed in from outside, as plain tensors with a graph."""
    grads = []
    for net in pair(kind)[:2]:
        values = {n: (p.detach() * 1.5).requires_grad_() for n, p in net.named_parameters() if "lora_" in n}
        y = functional_call(net, values, (x_of(),))
        grads.append(dict(zip(values, torch.autograd.grad(y.square().sum(), values.values()), strict=True)))
    twins.check_close(*grads)
