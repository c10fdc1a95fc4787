"""A patched layer's plan: whatever changes about the layer, its parts, x or the process, it is not used where it no
longer holds, and the result is what an unpatched layer makes of the same change.

A condition that eligibility.py asks and plan.py does not compare is a red test here.
"""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import changes
import peft
import pytest
import torch
import twins
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import slao_kernels
from slao_kernels import extension

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore")]

NARROW = 2e-2  # two bf16 (or fp16) chains of one layer: a few units of 2^-8 apart

# The kinds of plan: options of the adapter, base layer.
KINDS: dict[str, tuple[dict[str, Any], Callable[[], nn.Module]]] = {
    "linear": ({}, lambda: nn.Linear(24, 20)),
    "dropout": ({"lora_dropout": 0.25}, lambda: nn.Linear(24, 20)),
    "Conv1D": ({}, lambda: Conv1D(20, 24)),
    "several": ({}, lambda: nn.Linear(24, 20, bias=False)),
    "lora_bias": ({"lora_bias": True}, lambda: nn.Linear(24, 20)),
    "DoRA": ({"use_dora": True}, lambda: nn.Linear(24, 20)),
    "called base": ({"lora_dropout": 0.25}, lambda: changes.Doubling(24, 20)),
    "extended": ({}, lambda: nn.Linear(24, 20)),
    "refused": ({}, lambda: nn.Linear(24, 20)),
    "disabled": ({}, lambda: nn.Linear(24, 20)),
}
# Plans of PEFT's own forward: what changes beside their cause need not be noticed.
PEFTS = ("refused", "disabled")


def build(kind: str, patched: bool) -> nn.Module:
    """One layer with two adapters, all of which trains; the active ones name one more that this layer does not have."""
    options, base = KINDS[kind]
    net = twins.net(base, **options)
    torch.manual_seed(3)
    other = twins.config(r=2, target_modules=["proj"], init_lora_weights=False)
    peft.inject_adapter_in_model(other, net, adapter_name="other")
    changes.set_adapter("default", "listed", *(["other"] if kind == "several" else []))(net.proj)
    if patched:
        assert slao_kernels.patch(net, strict=True).patched == ["proj"]
    if kind == "extended":
        layer = extension.extend(net.proj, "default")
        layer.slao_core = torch.randn(3, 3, generator=torch.Generator().manual_seed(4))
        layer.slao_core_delta = nn.Parameter(torch.randn(3, 3, generator=torch.Generator().manual_seed(5)))
    elif kind == "refused":
        net.proj.lora_A["default"].register_forward_hook(changes.half)
    elif kind == "disabled":
        net.proj.enable_adapters(False)
    return net


def outcome(net: nn.Module, x: Tensor) -> dict[str, Any]:
    """The result and every gradient under one seed, or the error."""

    def run() -> dict[str, Any]:
        torch.manual_seed(2)
        parameters = {name: p for name, p in net.proj.named_parameters() if p.requires_grad}
        leaves = [*parameters.values(), *([x] if x.requires_grad else [])]
        y = net(x)
        grads = torch.autograd.grad(y.float().square().sum(), leaves, allow_unused=True)
        named = {n: g for n, g in zip([*parameters, "x"], grads, strict=False) if g is not None}
        return {"type": type(y), "y": y.detach(), **named}

    return twins.attempt(run)


def compare(found: dict[str, Any], expected: dict[str, Any]) -> None:
    tensors = [value for value in expected.values() if isinstance(value, Tensor)]
    if any(value.device.type == "meta" for value in tensors):
        found, expected = (
            {n: (v.shape, v.dtype) if n != "type" else v for n, v in d.items()} for d in (found, expected)
        )
    narrow = any(value.dtype in (torch.bfloat16, torch.float16) for value in tensors)
    twins.check_close(found, expected, NARROW if narrow else twins.FP32_RATIO)


class Pair:
    """A patched net that has run once, so that it has a plan, and its unpatched twin."""

    def __init__(self, kind: str) -> None:
        self.kind, self.x = kind, twins.net_input()
        self.net, self.twin = build(kind, True), build(kind, False)
        self.settle()

    def settle(self) -> None:
        """Both alike, and the plan holds."""
        self.check(self.x)
        self.plan = self.net.proj.__dict__["slao_plan"]
        assert self.holds(self.x)

    def holds(self, x: Any) -> bool:
        return self.plan.tensors(self.net.proj.__dict__, x) is not None

    def check(self, x: Tensor) -> None:
        compare(outcome(self.net, x), outcome(self.twin, x))

    @contextmanager
    def changed(self, change: changes.Change) -> Iterator[None]:
        undos = [change(net.proj) for net in (self.net, self.twin)]
        try:
            yield
        finally:
            for undo in undos:
                undo()


@pytest.fixture(params=KINDS)
def pair(request) -> Pair:
    return Pair(request.param)


def value(net: nn.Module) -> dict[str, Tensor]:
    torch.manual_seed(2)
    return {"y": net(twins.net_input()).detach()}


@pytest.mark.parametrize("what", ["of_parts", "of_the_layer", "of_hooks"])
def test_changes_of_the_layer(what, pair):
    """One at a time, each applied and undone: noticed both times, and PEFT's numbers (or its error) both times."""
    walk, wrong = dict(getattr(changes, what)(pair.twin.proj)), []
    assert len(walk) > 3
    for name, change in walk.items():
        try:
            with pair.changed(change):
                assert pair.kind in PEFTS or not pair.holds(pair.x), "not noticed"
                pair.check(pair.x)
            pair.settle()
        except Exception as error:
            wrong.append(f"{name}: {error!s:.300}")
            pair = Pair(pair.kind)
    assert not wrong, "\n".join(wrong)


def test_what_a_plan_reads_anew(pair):
    """Tensors of the same kind in the same places are no reason to plan again: the next call takes those there are."""
    if pair.kind in PEFTS:
        pytest.skip("PEFT's own forward reads them")
    for alter in (
        lambda m: m.weight.data.mul_(1.5),
        lambda m: setattr(m.weight, "data", m.weight.data * 1.5),
        lambda m: setattr(m, "weight", nn.Parameter(m.weight.detach() * 1.5)),
        lambda m: m.weight.requires_grad_(False),
    ):
        before = outcome(pair.net, pair.x)["y"]
        for net in (pair.net, pair.twin):
            for part in ("base", "lora_A", "lora_B"):
                alter(changes.PARTS[part](net.proj))
        assert pair.holds(pair.x)
        pair.check(pair.x)
        assert pair.net.proj.base_layer.weight.requires_grad != torch.equal(outcome(pair.net, pair.x)["y"], before)


HOLDS: dict[str, Callable[[Tensor], Tensor]] = {
    "requires a gradient": lambda x: x.clone().requires_grad_(),
    "other numbers": lambda x: 2 * x,
    "one token, two dimensions": lambda x: x[:1, 0].clone(),
    "no tokens": lambda x: x[:0].clone(),
    "more tokens": lambda x: torch.cat([x, x]),
    "strides": lambda x: x.repeat_interleave(2, -1)[..., ::2],
}
OTHERS: dict[str, Callable[[Tensor], Any]] = {
    "Parameter": lambda x: nn.Parameter(x.clone()),
    "subclass": lambda x: x.as_subclass(changes.Tagged),
    "bf16": lambda x: x.bfloat16(),
    "fp64": lambda x: x.double(),
    "integers": lambda x: x.long(),
    "features": lambda x: x[..., :-1],
    "one number": lambda x: x[0, 0, 0].clone(),
    "meta": lambda x: x.to("meta"),
    "no tensor": lambda x: None,
}


@pytest.mark.parametrize("what", {**HOLDS, **OTHERS})
def test_changes_of_x(what, pair):
    x = {**HOLDS, **OTHERS}[what](pair.x)
    assert pair.holds(x) is (what in HOLDS)
    if x is not None:
        pair.check(x)
    pair.settle()


class Around(nn.Module):
    """torch.jit.trace takes parameters that train of a module only."""

    def __init__(self, net: nn.Module, run: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.net, self.run = net, run

    def forward(self, x: Tensor) -> Tensor:
        return self.run(x)


def traced(run: Callable[[Tensor], Tensor], x: Tensor, net: nn.Module) -> Tensor:
    torch.jit.trace(Around(net, run), x, check_trace=False)
    return net(x)


def within(make: Callable[[], Any]) -> Callable[..., Tensor]:
    def run(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        with make():
            return function(x)

    return run


PROCESS: dict[str, Callable[[Callable[[Tensor], Tensor], Tensor], Tensor]] = {
    "autocast": within(lambda: torch.autocast("cpu", torch.bfloat16)),
    "autocast to fp16": within(lambda: torch.autocast("cpu", torch.float16)),
    "use_backend": within(lambda: slao_kernels.use_backend("reference")),
    **changes.TRANSFORMS,
    "jit trace": traced,
}


@pytest.mark.parametrize("what", PROCESS)
def test_changes_of_the_process(what, pair):
    held, answers = [], []

    def run(x: Tensor) -> Tensor:
        if net is pair.net:
            held.append(pair.holds(x))
        return net(x)

    for net in (pair.net, pair.twin):
        torch.manual_seed(2)
        answers.append(PROCESS[what](run, pair.x, *([net] if what == "jit trace" else [])).detach())
    assert held[0] is False
    narrow = answers[1].dtype in (torch.bfloat16, torch.float16)
    if what == "vmap" and "lora_dropout" in KINDS[pair.kind][0]:
        assert answers[0].shape == answers[1].shape  # each draws its own masks
    else:
        twins.check_close({"y": answers[0]}, {"y": answers[1]}, NARROW if narrow else twins.FP32_RATIO)
    pair.settle()


def test_autocast_to_another_dtype(pair):
    with torch.autocast("cpu", torch.bfloat16):
        pair.settle()
    with torch.autocast("cpu", torch.float16):
        assert not pair.holds(pair.x)
        pair.check(pair.x)


def test_grad_modes_share_a_plan(pair):
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            assert pair.holds(pair.x)
            twins.check_close(*map(value, (pair.net, pair.twin)))


# --- copies, replicas, memory ----------------------------------------------------------------------------------------


def replica(net: nn.Module) -> nn.Module:
    """What nn.DataParallel makes of a module for one of its devices: parameters are plain attributes."""
    copies = {module: module._replicate_for_data_parallel() for module in net.modules()}
    for module, made in copies.items():
        made._former_parameters = {}
        for key, child in module._modules.items():
            made._modules[key] = copies[child]
        for key, parameter in module._parameters.items():
            if parameter is None:
                made._parameters[key] = None
            else:
                setattr(made, key, parameter.clone())
        for key, buffer in module._buffers.items():
            made._buffers[key] = buffer
    return copies[net]


COPIES = {
    "deepcopy": copy.deepcopy,
    "copy": lambda net: changes.attribute("proj", copy.copy)(net) and net,
    "pickle": lambda net: pickle.loads(pickle.dumps(net)),
    "replica": replica,
}


@pytest.mark.parametrize("how", COPIES)
def test_copies(how, pair):
    """A copy makes its own plan, and the original's does not serve it, whichever of them is changed afterwards."""
    net = pair.net if how == "copy" else None
    original = pair.net.proj
    copied = COPIES[how](pair.net)
    assert copied.proj is not original
    assert copied.proj.__dict__.get("slao_plan") in ((None, pair.plan) if how in ("copy", "replica") else (None,))
    assert pair.plan.tensors(copied.proj.__dict__, pair.x) is None
    for _ in range(2):
        twins.check_close(*map(value, (copied, pair.twin)))
    if net is not None:
        net.proj = original
    if how in ("deepcopy", "pickle"):
        copied.proj.base_layer.weight.data.zero_()
        copied.proj.scaling["default"] = 0.0
    pair.settle()


def test_plans_do_not_keep_a_layer(pair):
    """No circle through the layer: it is gone with its last name, and its memory with it, without a collection."""
    layer, weight = weakref.ref(pair.net.proj), weakref.ref(pair.net.proj.lora_A["default"].weight)
    gc.collect()
    gc.disable()
    try:
        plan, pair.net = pair.plan, None
        assert layer() is None
        assert weight() is not None  # by the dictionaries in the plan that this test still has
        del plan
        pair.plan = None
        assert weight() is None
    finally:
        gc.enable()
