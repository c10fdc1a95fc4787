"""Training a patched model: dtypes, autocast, checkpointing, compile, frozen parts, threads; as with PEFT's layers."""

from __future__ import annotations

import threading
from functools import partial

import pytest
import torch
from peft import inject_adapter_in_model
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

import slao_kernels
from slao_kernels.testing import error_ratio

pytestmark = pytest.mark.usefixtures("one_thread")

BF16_RATIO = 1.5  # our error over PEFT's, both against fp64; see test_patching.py


def pair(twins, *args, **options) -> tuple[nn.Module, nn.Module]:
    """(patched, unpatched)"""
    model, twin = twins.net(*args, **options), twins.net(*args, **options)
    assert slao_kernels.patch(model).patched == ["proj"]
    return model, twin


# base dtype, adapter dtype, autocast dtype, dtype of x
CASTS = [
    ("bfloat16", "float32", None, "bfloat16"),
    ("bfloat16", "bfloat16", None, "bfloat16"),
    ("float32", "bfloat16", None, "float32"),
    ("float32", "float64", None, "float32"),
    ("float16", "float32", None, "float16"),
    ("float32", "float32", "bfloat16", "float32"),
    ("float32", "float32", "bfloat16", "bfloat16"),
    ("bfloat16", "float32", "bfloat16", "float32"),
    ("bfloat16", "bfloat16", "bfloat16", "float32"),
    ("float32", "float32", "float16", "float32"),
]


def wide_layer(twins, base: torch.dtype, adapter: torch.dtype) -> nn.Module:
    """One layer large enough for its rounding errors to have a size, B as after training."""
    model = twins.net(lambda: nn.Linear(256, 192))
    nn.init.normal_(model.proj.lora_B["default"].weight, std=0.05, generator=torch.Generator().manual_seed(3))
    model.proj.to(adapter)
    model.proj.base_layer.to(base)
    return model


@pytest.mark.parametrize("precision", ["base", "adapter"])
@pytest.mark.parametrize(("base", "adapter", "autocast", "input_dtype"), CASTS)
def test_dtypes(base, adapter, autocast, input_dtype, precision, twins):
    """Output and gradients have PEFT's dtypes, and are no further from fp64 than PEFT's computed in the same dtype."""
    base, adapter, autocast, input_dtype = (n and getattr(torch, n) for n in (base, adapter, autocast, input_dtype))
    model, twin, oracle, narrow = (wide_layer(twins, base, adapter) for _ in range(4))
    slao_kernels.patch(model, precision=precision)
    x = twins.net_input(8, 16, 256, dtype=input_dtype)
    expected = twins.net_step(oracle.double(), x.double())
    with torch.autocast("cpu", autocast or torch.bfloat16, enabled=autocast is not None), twins.CountOps() as ops:
        found, theirs = twins.net_step(model, x), twins.net_step(twin, x)
        # precision="base" computes in the base's dtype, as PEFT does with adapters cast to it.
        same_dtype = twins.net_step(narrow.to(base), x) if precision == "base" else theirs
    assert ops.counts == {"lora_linear": 1, "lora_linear_backward": 1}
    assert {n: v.dtype for n, v in found.items()} == {n: v.dtype for n, v in theirs.items()}
    for name, value in expected.items():
        ours = error_ratio(found[name], value)
        other = max(error_ratio(step[name], value) for step in (theirs, same_dtype))
        # Rounding noises of fp32 size are equally good whatever their ratio.
        assert ours <= max(BF16_RATIO * other, 1e-6), f"{name}: {ours:.2e}, PEFT's {other:.2e}"


@pytest.mark.parametrize("kind", ["llama", "gpt2", "t5"])
@pytest.mark.parametrize("base", [torch.float32, torch.bfloat16], ids=str)
def test_whole_model_under_autocast(base, kind, twins):
    model, twin = (twins.peft_model(kind, base) for _ in range(2))
    layers = len(slao_kernels.patch(model).patched)
    wide = twins.step(twins.peft_model(kind, base).double())
    with torch.autocast("cpu", torch.bfloat16), twins.CountOps() as ops:
        found = twins.step(model)
        theirs = twins.step(twin)
    assert ops.forward == layers
    assert {n: v.dtype for n, v in found.items()} == {n: v.dtype for n, v in theirs.items()}
    assert error_ratio(found["logits"], wide["logits"]) <= BF16_RATIO * error_ratio(theirs["logits"], wide["logits"])

    def mean_error(of: dict[str, Tensor]) -> float:
        return sum(error_ratio(of[n], v) ** 2 for n, v in wide.items() if n != "logits") ** 0.5

    assert mean_error(found) <= BF16_RATIO * mean_error(theirs)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(reentrant, twins):
    model, twin = (twins.peft_model("llama") for _ in range(2))
    layers = len(slao_kernels.patch(model).patched)
    for net in (model, twin):
        net.train()
        net.enable_input_require_grads()
        net.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    with twins.CountOps() as ops:
        found = twins.step(model)
    assert ops.counts["lora_linear"] > layers  # forward, and again in the backward pass
    assert ops.counts["lora_linear_backward"] == layers
    twins.check_close(found, twins.step(twin))


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_layer_under_autocast(reentrant, twins):
    model, twin = pair(twins)
    with torch.autocast("cpu", torch.bfloat16):
        found, expected = (
            twins.net_step(net, twins.net_input(), run=partial(checkpoint, use_reentrant=reentrant))
            for net in (Checkpointed(model), Checkpointed(twin))
        )
    twins.check_close(found, expected, 2e-2)


class Checkpointed(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor, run) -> Tensor:
        return run(self.inner, x)


@pytest.mark.parametrize("options", [{}, {"lora_dropout": 0.1}], ids=["plain", "dropout, eval"])
def test_compile(options, twins):
    """One graph forward, one backward; no recompilation and no break."""
    model, twin = pair(twins, **options)
    model.eval()
    twin.eval()
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    x = twins.net_input()
    found = {name.removeprefix("_orig_mod."): value for name, value in twins.net_step(compiled, x).items()}
    twins.check_close(found, twins.net_step(twin, x))


def test_compile_two_adapters_with_tensor_scaling(twins):
    model, twin = pair(twins)
    for net in (model, twin):
        torch.manual_seed(4)
        inject_adapter_in_model(twins.config(r=5, target_modules=["proj"], init_lora_weights=False), net, "other")
        net.proj.set_adapter(["default", "other"])
        net.proj.scaling = {name: torch.tensor(value) for name, value in net.proj.scaling.items()}
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    x = twins.net_input()
    found = {name.removeprefix("_orig_mod."): value for name, value in twins.net_step(compiled, x).items()}
    twins.check_close(found, twins.net_step(twin, x))


class InPlace(nn.Module):
    """A consumer that overwrites what the layer returned."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x).mul_(3).add_(1)


class UsedTwice(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(torch.tanh(self.inner(x))) + self.inner(x.flip(0))


@pytest.mark.parametrize("use", [InPlace, UsedTwice])
def test_uses_of_the_output(use, twins):
    model, twin = pair(twins, lambda: nn.Linear(20, 20))
    x = twins.net_input(3, 7, 20)
    with twins.CountOps() as ops:
        found = twins.net_step(use(model), x)
    assert ops.counts == dict.fromkeys(("lora_linear", "lora_linear_backward"), 3 if use is UsedTwice else 1)
    twins.check_close(found, twins.net_step(use(twin), x))


@pytest.mark.parametrize("trained", [("lora_A",), ("lora_B",), ("lora_A", "lora_B"), ("bias",), ("lora_A", "weight")])
@pytest.mark.parametrize("input_grad", [True, False])
def test_frozen_parts(trained, input_grad, twins):
    """Only what asks for a gradient gets one, and nothing else is computed."""
    model, twin = pair(twins)
    x = twins.net_input()
    steps = []
    for net in (model, twin):
        for name, parameter in net.proj.named_parameters():
            parameter.requires_grad_(any(part in name for part in trained))
        leaf = x.clone().requires_grad_(input_grad)
        y = net(leaf)
        y.square().sum().backward()
        grads = {name: p.grad for name, p in net.named_parameters() if p.grad is not None}
        steps.append({"y": y.detach(), **grads, **({"x": leaf.grad} if input_grad else {})})
    assert len(steps[0]) > 1
    twins.check_close(*steps)


def test_everything_frozen(twins):
    model, _ = pair(twins)
    model.requires_grad_(False)
    y = model(twins.net_input())
    assert not y.requires_grad
    assert y.grad_fn is None


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients(mode, twins):
    model, twin = pair(twins)
    with mode(), twins.CountOps() as ops:
        y = model(twins.net_input())
    assert ops.counts == {"lora_linear": 1}
    assert y.grad_fn is None
    assert y.is_inference() == (mode is torch.inference_mode)
    twins.check_close({"y": y}, {"y": twin(twins.net_input())})
    x = twins.net_input()
    twins.check_close(twins.net_step(model, x), twins.net_step(twin, x))  # and training goes on afterwards


@pytest.mark.parametrize("shape", [(24,), (0, 24), (3, 0, 24), (1, 1, 1, 24)], ids=str)
def test_shapes(shape, twins):
    model, twin = pair(twins)
    x = twins.net_input(*shape)
    twins.check_close(twins.net_step(model, x), twins.net_step(twin, x))


def test_functional_call(twins):
    """Parameters handed in from outside, as plain tensors with a graph."""
    model, twin = pair(twins)
    grads = []
    for net in (model, twin):
        values = {n: (p.detach() * 1.5).requires_grad_() for n, p in net.proj.named_parameters(prefix="proj")}
        y = functional_call(net, values, (twins.net_input(),))
        grads.append(dict(zip(values, torch.autograd.grad(y.square().sum(), values.values()), strict=True)))
    twins.check_close(*grads)


def test_threads(twins):
    """Two threads at once on one patched model: each its own input's gradients, bitwise as alone."""
    model, _ = pair(twins, lambda: nn.Linear(64, 64))
    inputs = [torch.randn(50, 64, generator=torch.Generator().manual_seed(seed)) for seed in (1, 2)]
    parameters = [p for p in model.proj.parameters() if p.requires_grad]

    def gradients(x: Tensor, autocast: bool) -> list[Tensor]:
        x = x.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            return list(torch.autograd.grad(model(x).float().square().sum(), [x, *parameters]))

    alone = [gradients(inputs[i], bool(i)) for i in range(2)]
    failed: list[str] = []

    def work(i: int) -> None:
        torch.set_num_threads(1)  # MKL keeps the number by thread; another one may sum in another order
        for _ in range(20):
            found = gradients(inputs[i], bool(i))
            if not all(torch.equal(a, b) for a, b in zip(found, alone[i], strict=True)):
                failed.append(f"thread {i}")

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failed == []
