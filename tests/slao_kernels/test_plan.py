"""A patched layer's plan: whatever changes about the layer, its parts, x or the process, it is not used where it no
longer holds, and the result is what an unpatched layer makes of the same change.

A condition that eligibility.py asks and plan.py does not compare is a red test here.
"""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from collections.abc import Callable
from typing import Any

import changes
import pytest
import torch
import twins
from plans import KINDS, NARROW, PEFTS, Pair, outcome
from torch import Tensor, nn
from torch.autograd import forward_ad

import slao_kernels

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore")]


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


def dual(run: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(run(forward_ad.make_dual(x, torch.ones_like(x)))).tangent


def within(make: Callable[[], Any]) -> Callable[..., Tensor]:
    def run(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        with make():
            return function(x)

    return run


PROCESS: dict[str, Callable[[Callable[[Tensor], Tensor], Tensor], Tensor]] = {
    "autocast": within(lambda: torch.autocast("cpu", torch.bfloat16)),
    "autocast to fp16": within(lambda: torch.autocast("cpu", torch.float16)),
    "use_backend": within(lambda: slao_kernels.use_backend("reference")),
    "grad": lambda run, x: torch.func.grad(lambda v: run(v).square().sum())(x),
    "vmap": lambda run, x: torch.func.vmap(run, randomness="different")(x),
    "jvp": lambda run, x: torch.func.jvp(run, (x,), (torch.ones_like(x),))[1],
    "forward mode": dual,
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
