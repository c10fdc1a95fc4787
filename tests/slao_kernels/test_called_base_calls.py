"""One call of a layer whose base is called: what the LoRA branch cannot take, arguments, results of all kinds."""

from __future__ import annotations

import pytest
import torch
from changes import Doubling, Tagged, half
from torch import Tensor, nn

import slao_kernels

pytestmark = pytest.mark.usefixtures("one_thread")

ADD = {"lora_add": 1, "lora_add_backward": 1}


def test_branch_reasons_still_hold(twins, told):
    """What the LoRA branch cannot take goes to PEFT's forward, over such a base as over any other."""
    model, twin = twins.net(lambda: Doubling(24, 20)), twins.net(lambda: Doubling(24, 20))
    report = slao_kernels.patch(model)
    for net in (model, twin):
        net.proj.lora_B["default"].register_forward_hook(half)
    twins.check_peft_runs(model, twin, report.fallbacks, "lora_B has hooks", told)


def test_an_input_on_another_device_or_without_dimensions(twins):
    """PEFT's own errors, with the reason reported."""
    for bad, reason in (
        (twins.net_input().to("meta"), "adapter 'default' is on cpu, x on meta"),
        (torch.tensor(1.0), "x is a 0-dimensional tensor of torch.float32"),
    ):
        model, twin = twins.net(lambda: Doubling(24, 20)), twins.net(lambda: Doubling(24, 20))
        report = slao_kernels.patch(model)
        with pytest.raises(Exception) as theirs:
            twin(bad)
        with pytest.raises(type(theirs.value)) as ours:
            model(bad)
        assert str(ours.value) == str(theirs.value)
        assert report.fallbacks == {"proj": reason}


class Scaled(nn.Linear):
    """A base that takes more than x."""

    def forward(self, x: Tensor, by: float = 1.0, *, shift: float = 0.0) -> Tensor:
        return by * super().forward(x) + shift


def test_other_arguments_reach_the_base(twins):
    model, twin = (twins.net(lambda: Scaled(24, 20)) for _ in range(2))
    report = slao_kernels.patch(model)
    for args, kwargs in (((), {}), ((3.0,), {}), ((), {"shift": 2.0}), ((3.0,), {"shift": 2.0, "alora_offsets": None})):
        with twins.CountOps() as ops:
            found = twins.net_step(model, twins.net_input(), *args, **kwargs)
        assert ops.counts == ADD
        twins.check_close(found, twins.net_step(twin, twins.net_input(), *args, **kwargs))
    assert report.fallbacks == {}


@pytest.mark.parametrize("name", ["adapter_names", "alora_offsets"])
def test_arguments_of_pefts_own(name, twins, told):
    model, twin = (twins.net(lambda: Doubling(24, 20)) for _ in range(2))
    report = slao_kernels.patch(model)
    value = ["default", "__base__"] if name == "adapter_names" else [1, 2]
    reason = f"called with {name} beside x"
    twins.check_peft_runs(model, twin, report.fallbacks, reason, told, twins.net_input(), **{name: value})


class Returning(nn.Linear):
    """A base whose result is something else."""

    what = "tuple"

    def forward(self, x: Tensor) -> object:
        y = super().forward(x)
        return {"tuple": (y, None), "broadcast": y.sum((0, 1)), "subclass": y.as_subclass(Tagged)}[self.what]


@pytest.mark.parametrize("what", ["broadcast", "subclass"])
def test_results_that_the_node_does_not_take(what, twins, told):
    """torch's operations add the branch then: the base is not called a second time."""
    model, twin = (twins.net(lambda: Returning(24, 20), lora_bias=True) for _ in range(2))
    report = slao_kernels.patch(model)
    calls = []
    for net in (model, twin):
        net.proj.base_layer.what = what
    model.proj.base_layer.register_forward_pre_hook(lambda *_: calls.append(1))
    with twins.CountOps() as ops:
        found = model(twins.net_input())
    assert ops.counts == {}
    assert len(calls) == 1
    expected = twin(twins.net_input())
    assert type(found) is type(expected)
    twins.check_close({"y": found.detach()}, {"y": expected.detach()})
    reason = {"broadcast": "the base layer made (20,) of torch.float32", "subclass": "the base layer returned a Tagged"}
    assert report.fallbacks["proj"].startswith(reason[what])
    assert len(told()) == 1


def test_a_tuple_is_refused_as_by_peft(twins):
    model, twin = (twins.net(lambda: Returning(24, 20)) for _ in range(2))
    slao_kernels.patch(model)
    errors = []
    for net in (twin, model):
        with pytest.raises(AttributeError) as caught:
            net(twins.net_input())
        errors.append(str(caught.value))
    assert errors[0] == errors[1]
