"""What may come between a leader's call and its siblings': always PEFT's numbers, and when it ends the group."""

from __future__ import annotations

import copy

import peft
import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

import slao_kernels
from slao_kernels import groups
from slao_kernels.layers import FusedLoraLinear

pytestmark = pytest.mark.usefixtures("one_thread", "small_groups")


def usual(net: Block, x: Tensor) -> Tensor:
    return net.o(torch.tanh(net.q(x) * net.k(x) + net.v(x)))


class Block(nn.Module):
    """q, k and v of one x; `run` is what a test makes of them."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(16, 16) for _ in range(4))
        self.run = usual

    def forward(self, x: Tensor) -> Tensor:
        return self.run(self, x)


@pytest.fixture
def pair(twins):
    """(a block whose group {q, k, v} is on, its unpatched twin)"""
    torch.manual_seed(0)
    twin = peft.inject_adapter_in_model(twins.config(target_modules=["q", "k", "v", "o"]), Block()).train()
    twins.train_a_little(twin)
    model = copy.deepcopy(twin)
    slao_kernels.patch(model)
    for _ in range(2):
        with twins.CountOps() as ops:
            twins.net_step(model, block_input())
    assert ops.grouped == [3]
    return model, twin


def block_input() -> Tensor:
    return torch.randn(5, 16, generator=torch.Generator().manual_seed(1))


def check(twins, pair, grouped: list[int]) -> None:
    model, twin = pair
    with twins.CountOps() as ops:
        found = twins.net_step(model, block_input())
    twins.check_close(found, twins.net_step(twin, block_input()))
    assert ops.grouped == grouped


def other_x(net, x):
    return net.o(net.q(x) * net.k(x * 2) + net.v(x))


def equal_x(net, x):
    return net.o(net.q(x) * net.k(x.clone()) + net.v(x))


def written_x(net, x):
    x = x * 1.0
    with torch.no_grad():
        q = net.q(x)
        x.mul_(2)
    return net.o(q * net.k(x) + net.v(x))


def other_grad_mode(net, x):
    with torch.no_grad():
        q = net.q(x)
    return net.o(q * net.k(x) + net.v(x))


def written_weight(net, x):
    with torch.no_grad():
        q = net.q(x)
        net.k.lora_B["default"].weight.mul_(1.5)
        k = net.k(x)
        net.k.lora_B["default"].weight.div_(1.5)
    return net.o(q * k + net.v(x))


def other_scaling(net, x):
    q = net.q(x)
    net.k.scaling["default"] *= 3
    k = net.k(x)
    net.k.scaling["default"] /= 3
    return net.o(q * k + net.v(x))


def no_value(net, x):
    return net.o(net.q(x) * net.k(x))


def twice(net, x):
    return net.o(net.q(x) * net.k(x) + net.q(x))


def checkpointed_sibling(net, x):
    q = net.q(x)
    return net.o(q * checkpoint(lambda z: torch.tanh(net.k(z)), x, use_reentrant=False) + net.v(x))


def checkpointed_leader(net, x):
    q = checkpoint(lambda z: torch.tanh(net.q(z)), x, use_reentrant=False)
    return net.o(q * net.k(x) + net.v(x))


def caught_exception(net, x):
    net.q(x)
    try:
        raise RuntimeError("in mid-forward")
    except RuntimeError:
        pass
    return usual(net, x.clone())


def late_hook(net, x):
    q = net.q(x)
    handle = net.k.lora_A["default"].register_forward_hook(lambda module, args, out: out * 2)
    k = net.k(x)
    handle.remove()
    return net.o(q * k + net.v(x))


def late_disable(net, x):
    q = net.q(x)
    net.k.enable_adapters(False)
    k = net.k(x)
    net.k.enable_adapters(True)
    return net.o(q * k + net.v(x))


ENDING = [other_x, equal_x, written_x, other_grad_mode, written_weight, other_scaling, no_value, twice]
ENDING += [checkpointed_sibling, checkpointed_leader, caught_exception, late_hook, late_disable]


@pytest.mark.parametrize("run", ENDING, ids=lambda run: run.__name__)
def test_ends_the_group_and_stays_right(run, pair, twins):
    model, twin = pair
    model.run = twin.run = run
    for _ in range(3):
        twins.check_close(twins.net_step(model, block_input()), twins.net_step(twin, block_input()))
        for net in (model, twin):  # what late_disable froze
            for name, parameter in net.named_parameters():
                parameter.requires_grad_("lora_" in name)
    model.run = twin.run = usual
    check(twins, pair, [])
    assert groups.describe(model) == []


def any_order(net, x):
    q, v = net.q(x), net.v(x)
    return net.o(q * net.k(x) + v)


def again(net, x):
    return net.o(net.q(x) * net.k(x) + net.v(x) + net.k(x))


def whole_twice(net, x):
    return usual(net, x) + usual(net, x)


def sibling_only(net, x):
    return net.o(net.k(x))


KEEPING = {any_order: [3], again: [3], whole_twice: [3, 3], sibling_only: []}


@pytest.mark.parametrize("run", KEEPING, ids=lambda run: run.__name__)
def test_keeps_the_group(run, pair, twins):
    model, twin = pair
    model.run = twin.run = run
    for _ in range(2):
        check(twins, pair, KEEPING[run])
    model.run = twin.run = usual
    check(twins, pair, [3])


def set_adapter(net):
    for name in "qkvo":
        getattr(net, name).set_adapter("other")


def merge_k(net):
    net.k.merge()


def merge_all(net):
    for name in "qkvo":
        getattr(net, name).merge()


def disable_all(net):
    for name in "qkvo":
        getattr(net, name).enable_adapters(False)


CHANGES = {set_adapter: [3], merge_k: [], merge_all: [], disable_all: []}


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_adapters_change_between_steps(change, pair, twins):
    for net in pair:
        torch.manual_seed(5)
        options = {"r": 5, "target_modules": ["q", "k", "v", "o"], "init_lora_weights": False}
        peft.inject_adapter_in_model(twins.config(**options), net, "other")
        net.train()
    check(twins, pair, [3])
    for net in pair:
        change(net)
    check(twins, pair, CHANGES[change])


def test_new_parameters_and_functional_call(pair, twins):
    """Parameters from outside are what a group computes with."""
    grads = []
    for net in pair:
        values = {n: (p.detach() * 1.5).requires_grad_() for n, p in net.named_parameters()}
        y = functional_call(net, values, (block_input(),))
        grads.append(dict(zip(values, torch.autograd.grad(y.square().sum(), list(values.values())), strict=True)))
    twins.check_close(*grads)
    check(twins, pair, [3])


def test_model_in_another_dtype(pair, twins):
    """.to() gives the same Parameter objects another dtype."""
    model, twin = pair
    for net in (model, twin):
        net.double()
    x = block_input().double()
    with twins.CountOps() as ops:
        twins.check_close(twins.net_step(model, x), twins.net_step(twin, x))
    assert ops.grouped == [3]


def test_sibling_on_another_device_or_dtype(pair, twins):
    """The leader must not fail over a sibling that it cannot read."""
    model, twin = pair
    for net in (model, twin):
        net.v.base_layer.to("meta")
        net.run = lambda net, x: net.q(x) * net.k(x)
    check(twins, pair, [])


def test_outputs_in_place(pair, twins):
    for net in pair:
        net.run = lambda net, x: net.o(net.q(x).mul_(2).add_(net.k(x).mul_(3)) * net.v(x))
    check(twins, pair, [3])


def test_separate_backwards(pair, twins):
    """Two losses on two outputs of one x, each with a backward of its own."""
    grads = []
    for net in pair:
        net.zero_grad()
        x = block_input()
        q, k, v = net.q(x), net.k(x), net.v(x)
        q.square().sum().backward()
        (k * v).sum().backward()
        grads.append({n: p.grad for n, p in net.named_parameters() if p.grad is not None})
    twins.check_close(*grads)


def test_compiled_layers_run_alone(pair, twins, monkeypatch):
    model, twin = pair
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    x = block_input()
    with monkeypatch.context() as only_here:
        only_here.setattr(groups, "call", None)
        found = {name.removeprefix("_orig_mod."): value for name, value in twins.net_step(compiled, x).items()}
    twins.check_close(found, twins.net_step(twin, x))
    check(twins, pair, [3])


def test_uncollected_outputs_last_until_the_next_call(pair):
    model, _ = pair
    model.q(block_input())
    assert groups._thread.slot is not None
    model.k(block_input())
    assert groups._thread.slot is None


def test_x_is_saved_once(pair):
    """By the group, for three layers; o saves its own."""
    model, _ = pair
    x = block_input().requires_grad_()
    saved: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.data_ptr()) or t, lambda t: t):
        _ = [layer(x) for layer in (model.q, model.k, model.v)]
    assert saved.count(x.data_ptr()) == 1


def test_two_models_on_one_x_stay_apart(twins):
    """Student and teacher see the same input: no group across them."""
    models = [peft.inject_adapter_in_model(twins.config(target_modules=["q"]), Block()) for _ in range(2)]
    for model in models:
        slao_kernels.patch(model)
    x = block_input()
    for _ in range(3):
        with twins.CountOps() as ops:
            for model in models:
                model.q(x)
        assert ops.counts == {"lora_linear": 2}
    assert all(type(model.q) is FusedLoraLinear for model in models)
