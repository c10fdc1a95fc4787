"""A model that moves under its method, and calls that fail half way and are made again."""

from __future__ import annotations

import dataclasses
import logging
from typing import Any

import pytest
import torch
from peft import LoraConfig
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import slao_kernels
from slao import make_method
from slao.methods import METHODS
from slao.methods.base import Method

KINDS = {name: {} for name in METHODS if name != "joint"} | {"slao product": {"merge": "product"}}
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
X = torch.randn(5, 8, generator=torch.Generator().manual_seed(9))


def made(kind: str, **options: Any) -> Method:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 12), nn.Tanh(), nn.Linear(12, 10), nn.Tanh(), nn.Linear(10, 3))
    lora = LoraConfig(
        r=2, lora_alpha=4, target_modules=["0", "2"], modules_to_save=["4"] if "beside" in options else None
    )
    slao_kernels.patch(model, lora)
    return make_method(kind.partition(" ")[0], model, **KINDS[kind], **options)


def device_of(method: Method) -> torch.device:
    return method.pairs[0].A.device


def observe(method: Method, task: int) -> None:
    rows = torch.randn(32, 8, generator=torch.Generator().manual_seed(50 + task))
    method.observe([{"input": rows.to(device_of(method))}])


def begin(method: Method, task: int) -> None:
    observe(method, task)
    method.begin_task(str(task))


def trained(method: Method, task: int) -> None:
    optimizer = torch.optim.SGD([p for p in method.model.parameters() if p.requires_grad], 0.1)
    generator = torch.Generator().manual_seed(task)
    method.model.train()
    for _ in range(3):
        rows, labels = torch.randn(16, 8, generator=generator), torch.randint(0, 3, (16,), generator=generator)
        found = method.model(rows.to(device_of(method)))
        loss = nn.functional.cross_entropy(found, labels.to(found.device))
        penalty = method.penalty()
        (loss if penalty is None else loss + penalty).backward()
        optimizer.step()
        optimizer.zero_grad()


def end(method: Method, task: int) -> None:
    observe(method, task)
    method.end_task()


def answers(method: Method) -> torch.Tensor:
    method.model.eval()
    with torch.no_grad(), method.merged():
        return method.model(X.to(device_of(method))).cpu()


def kept(value: Any) -> list[torch.Tensor]:
    """The tensors that an attribute of a method holds."""
    if isinstance(value, torch.Tensor):
        return [value]
    if dataclasses.is_dataclass(value):
        value = [getattr(value, field.name) for field in dataclasses.fields(value)]
    values = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
    return [tensor for one in values for tensor in kept(one)]


@pytest.mark.parametrize("kind", KINDS)
def test_all_that_is_kept_is_in_the_state_and_so_follows_the_model(kind):
    method = made(kind)
    for task in range(2):
        begin(method, task)
        trained(method, task)
        if task == 0:
            end(method, task)
    if method.penalty() is not None:
        method._state()  # EWC counts its last pass
    known = {tensor.data_ptr() for tensor in (*method._state().values(), *method.model.state_dict().values())}
    # The model's own; a memory that is taken where it fits alone; what a step leaves for the next.
    own = (
        "model",
        "pairs",
        "layers",
        "beside",
        "_parameters",
        "_spare",
        "_body",
        "_last",
        "_pulls",
        "_factor",
        "_grams",
    )
    left = {
        name: len(tensors)
        for name, value in vars(method).items()
        if name not in own and (tensors := [t for t in kept(value) if t.numel() and t.data_ptr() not in known])
    }
    assert left == {}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", KINDS)
def test_the_model_moves_before_within_and_between_tasks(kind, device, tmp_path):
    """As in the recipes: the method is made, or loaded, on the CPU, and a Trainer takes the model to the GPU."""
    options: dict[str, Any] = {"beside": "merge"} if METHODS[kind.partition(" ")[0]].averages else {}
    moved, still = made(kind, **options), made(kind, **options)
    for task in range(3):
        for method in (moved, still):
            begin(method, task)
        moved.model.to("cpu" if task == 1 else device)
        for method in (moved, still):
            trained(method, task)
            end(method, task)
        moved.model.to(device)
    # Two devices sum in other orders, and nine steps of training carry that on; a CPU's moves change nothing.
    torch.testing.assert_close(answers(moved), answers(still), rtol=1e-3, atol=1e-3)
    still.save(tmp_path)
    later = made(kind, **options)
    later.load(tmp_path)
    later.model.to(device)
    begin(later, 3)
    trained(later, 3)
    end(later, 3)
    begin(still, 3)
    trained(still, 3)
    end(still, 3)
    torch.testing.assert_close(answers(later), answers(still), rtol=1e-3, atol=1e-3)


class NoMemory(Exception):
    """What a device says that has none left."""


class Failing(TorchDispatchMode):
    """No memory is left for the `at`-th new tensor of more than a few numbers; writes and views need none."""

    def __init__(self, at: int) -> None:
        super().__init__()
        self.at, self.count = at, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        new = all(one.alias_info is None for one in func._schema.returns)
        if new and isinstance(found, torch.Tensor) and found.numel() > 4:
            self.count += 1
            if self.count == self.at:
                raise NoMemory
        return found


def again(kind: str, call: str, at: int) -> tuple[list[torch.Tensor], int]:
    """(answers after the third task and the fourth, new tensors of `call`), whose `at`-th fails at first."""
    method = made(kind)
    for task in range(2):
        begin(method, task)
        trained(method, task)
        end(method, task)
    failing = Failing(at)
    before = answers(method)
    for step in (begin, trained, end):
        if step.__name__ != call:
            step(method, 2)
            continue
        observe(method, 2)
        run = (lambda: method.begin_task("2")) if call == "begin" else method.end_task
        try:
            with failing:
                run()
        except NoMemory:
            if call == "begin":
                torch.testing.assert_close(answers(method), before)
            observe(method, 2)
            run()
    found = [answers(method)]
    begin(method, 3)
    trained(method, 3)
    end(method, 3)
    return [*found, answers(method)], failing.count


@pytest.mark.parametrize("call", ["begin", "end"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_call_that_failed_half_way_is_made_again(kind, call):
    right, count = again(kind, call, -1)
    for at in sorted({1 + round(part * (count - 1) / 7) for part in range(8)} if count else ()):
        found, _ = again(kind, call, at)
        for mine, theirs in zip(found, right, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6, msg=f"tensor {at} of {count}")


def test_inputs_with_nan_leave_inflora_as_it_was(caplog):
    method, twin = made("inflora"), made("inflora")
    for one in (method, twin):
        begin(one, 0)
        trained(one, 0)
        end(one, 0)
    bad = torch.ones(4, 8)
    bad[0, 0] = torch.nan
    method.observe([{"input": bad}])
    with pytest.raises(RuntimeError, match="eigh"):
        method.begin_task("1")
    assert torch.equal(answers(method), answers(twin))
    for one in (method, twin):
        begin(one, 1)
        trained(one, 1)
    assert torch.equal(answers(method), answers(twin))
    # set_adapter() and the like turn gradients on again.
    method.pairs[0].parameters[0].requires_grad_(True)
    with caplog.at_level(logging.WARNING, "slao"):
        end(method, 1)
    assert "inflora: A of 1 layers trained in task '1'" in caplog.text


def test_ewc_sees_an_adapter_that_trains_only_since(caplog):
    method = made("ewc")
    for pair in method.pairs:
        for parameter in pair.parameters:
            parameter.requires_grad_(False)
    late = make_method("ewc", method.model)
    for pair in late.pairs:
        for parameter in pair.parameters:
            parameter.requires_grad_(True)
    begin(late, 0)
    trained(late, 0)
    end(late, 0)
    assert all(float(late.fisher[f"{pair.name}.B"].sum()) > 0 for pair in late.pairs)
    begin(late, 1)
    with caplog.at_level(logging.WARNING, "slao"):
        late.end_task()
    assert "no gradient of task '1' was seen" in caplog.text
