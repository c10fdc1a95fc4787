"""The LoRA branch is written into the base's result only where nobody else has that result: values and gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import twins
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import slao_kernels
from slao_kernels.holders import FRESH, holders, writable
from slao_kernels.ops.lora_linear.autograd import add, call_for

pytestmark = pytest.mark.usefixtures("one_thread")


class Base(nn.Linear):
    """`kind` says what the result is, `kept` is what the base or somebody else keeps of it."""

    kind = "fresh"

    def __init__(self) -> None:
        super().__init__(20, 20)
        self.kept: list[Tensor] = []
        self.made = 0  # the address of the result's memory

    def forward(self, x: Tensor) -> Tensor:
        y = RESULTS[self.kind][0](self, super().forward, x)
        self.made = y.data_ptr()
        return y

    def keep(self, y: Tensor, what: Callable[[Tensor], Tensor] = lambda y: y) -> Tensor:
        self.kept.append(what(y))
        return y

    def once(self, y: Tensor) -> Tensor:
        if not self.kept:
            self.kept.append(y.detach())
        return self.kept[0]

    def hooked(self, y: Tensor) -> Tensor:
        if y.requires_grad:
            y.register_hook(lambda g: self.kept.append(g) or g)
        return y


def within_inference(base: Base, f: Any, x: Tensor) -> Tensor:
    """Kept from an evaluation, say: autograd refuses to write into it."""
    with torch.inference_mode():
        return f(x)


class Exp(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, saves=False):
        ctx.y = y = x.exp()  # neither saved nor an alias: only a reference
        if saves:
            ctx.y = None
            ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx, dy):
        return dy * (ctx.saved_tensors[0] if ctx.y is None else ctx.y), None


# What a base makes of x, f being its linear product; and whether that is written into: always, only where no node has
# saved it (there are none without gradients), or never. With saved-tensor hooks of its own, checkpoint keeps no result
# for its backward: it computes it again.
ALWAYS, UNSAVED, NEVER = (True, True), (False, True), (False, False)  # with gradients, without
RESULTS: dict[str, tuple[Callable[[Base, Any, Tensor], Tensor], tuple[bool, bool]]] = {
    "fresh": (lambda base, f, x: f(x), ALWAYS),
    "scaled": (lambda base, f, x: f(x) * 2, ALWAYS),
    "checkpointed": (lambda base, f, x: checkpoint(f, x, use_reentrant=False), ALWAYS),
    "checkpointed, reentrant": (lambda base, f, x: checkpoint(f, x, use_reentrant=True), ALWAYS),
    "checkpointed tanh": (lambda base, f, x: checkpoint(lambda x: f(x).tanh(), x, use_reentrant=False), ALWAYS),
    "hooked": (lambda base, f, x: base.hooked(f(x)), ALWAYS),
    "relu": (lambda base, f, x: f(x).relu(), UNSAVED),
    "tanh": (lambda base, f, x: f(x).tanh(), UNSAVED),
    "function": (lambda base, f, x: Exp.apply(f(x) / 10), UNSAVED),
    "saving function": (lambda base, f, x: Exp.apply(f(x) / 10, True), UNSAVED),
    "used too": (lambda base, f, x: base.keep(f(x), torch.square), UNSAVED),
    "identity": (lambda base, f, x: x, NEVER),
    "view": (lambda base, f, x: torch.cat([f(x)] * 2)[: x.shape[0]], NEVER),
    "cached": (lambda base, f, x: base.once(f(x)), NEVER),
    "alias kept": (lambda base, f, x: base.keep(f(x), torch.detach), NEVER),
    "kept": (lambda base, f, x: base.keep(f(x)), NEVER),
    "kept by a hook": (lambda base, f, x: f(x), NEVER),  # feature extraction
    "transposed": (lambda base, f, x: f(x).t().contiguous().t(), NEVER),
    "leaf": (lambda base, f, x: base.keep(f(x).detach().requires_grad_()), NEVER),
    "expanded": (lambda base, f, x: f(x[:1]).expand(x.shape[0], -1), NEVER),
    "inference": (within_inference, NEVER),
    "numpy's memory": (lambda base, f, x: torch.from_numpy(f(x).detach().numpy().copy()), NEVER),
}


def pair(kind: str) -> list[nn.Module]:
    """[patched, unpatched]"""
    models = [twins.net(Base) for _ in range(2)]
    for net in models:
        base = net.proj.base_layer
        base.kind = kind
        if kind == "kept by a hook":
            base.register_forward_hook(lambda base, args, y: base.kept.append(y))
        base.requires_grad_(True)
    slao_kernels.patch(models[0])
    return models


@pytest.mark.parametrize("kind", RESULTS)
def test_values_gradients_and_what_others_hold(kind):
    """As PEFT's, which never writes into the result; and what the base has kept stays as it was."""
    model, twin = pair(kind)
    x = twins.net_input(7, 20)
    steps, kept = [], []
    for net in (model, twin):
        leaf = x.clone().requires_grad_()
        y = net(leaf)
        base = net.proj.base_layer
        loss = y.square().sum() + sum(k.sum() for k in base.kept if k.requires_grad)
        loss.backward()
        grads = {n: p.grad for n, p in net.named_parameters() if p.grad is not None}
        steps.append({"y": y.detach(), "x": leaf.grad if leaf.grad is not None else torch.zeros(1), **grads})
        kept.append({str(i): k.detach() for i, k in enumerate(base.kept)})
        steps[-1] |= {f"kept {i}": k.grad for i, k in enumerate(base.kept) if k.is_leaf and k.grad is not None}
    twins.check_close(*steps)
    if kept[1]:
        twins.check_close(*kept)


@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no grad"])
@pytest.mark.parametrize("kind", RESULTS)
def test_which_results_are_overwritten(kind, grad):
    model, _ = pair(kind)
    x = twins.net_input(7, 20)
    with torch.set_grad_enabled(grad):
        y = model(x.requires_grad_(grad))
    taken = y.data_ptr() == model.proj.base_layer.made
    assert taken is RESULTS[kind][1][not grad]


def overwritten(y: Tensor, x: Tensor, A: Tensor, B: Tensor) -> Tensor:
    """The branch written into y, whoever else has it."""
    call = call_for(x, [None, None, A, B], 0.5, made=y.dtype)
    return add(call)(call, y, x, A, B, True)


def test_a_saved_result_must_not_be_overwritten():
    """What the rule is for: written into all the same, such a base's backward raises."""
    t = torch.randn(7, 20, requires_grad=True)
    A, B = torch.randn(3, 20, requires_grad=True), torch.randn(20, 3)
    for base in (torch.tanh, torch.relu, torch.sigmoid, torch.exp):
        y = base(t)
        assert holders(y) != FRESH
        out = overwritten(y, t, A, B)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            out.sum().backward()
    y = Exp.apply(t)  # and one that autograd does not watch is silently wrong
    assert holders(y) != FRESH
    (wrong,) = torch.autograd.grad(overwritten(y, t.detach(), A, B).sum(), t)
    assert not torch.allclose(wrong, t.exp())


NOT_WRITABLE = {
    "view": lambda: torch.randn(3, 4).view(4, 3),
    "expanded": lambda: torch.randn(1, 4).expand(3, 4),
    "transposed": lambda: torch.randn(4, 3).t(),
    "leaf": lambda: torch.randn(3, 4, requires_grad=True),
    "numpy's memory": lambda: torch.from_numpy(torch.randn(3, 4).numpy().copy()),
    "empty": lambda: torch.randn(0, 4),
}


@pytest.mark.parametrize("kind", NOT_WRITABLE)
def test_not_writable(kind):
    """Whoever holds it."""
    assert writable(torch.randn(3, 4))
    assert not writable(NOT_WRITABLE[kind]())
