"""merged(fold=True): the base layers alone answer with the merge, and then they have every bit back."""

from __future__ import annotations

import copy
import logging

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

import slao_kernels
from slao.methods import METHODS, make_method
from slao_kernels.testing import error_ratio

X = torch.randn(8, 16, generator=torch.Generator().manual_seed(9))
ROUNDING = {torch.float32: 1e-5, torch.bfloat16: 2e-2}  # of x, W' and y


def make(name: str = "slao", patched: bool = True):
    """After two tasks."""
    torch.manual_seed(0)
    model = get_peft_model(
        nn.Sequential(nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 16)), LoraConfig(r=4, target_modules=["0", "2"])
    )
    if patched:
        slao_kernels.patch(model)
    method = make_method(name, model)
    for task in range(2):
        for step in (lambda: method.begin_task(str(task)), method.end_task):  # noqa: B023
            method.observe([])
            if method.observes:
                method._grams = [torch.eye(16, dtype=torch.float64) for _ in method.pairs]
            step()
            with torch.no_grad():
                for parameter in method.model.parameters():
                    if parameter.requires_grad and method.in_task:
                        parameter.add_(torch.randn(parameter.shape) * 0.2)
    return method


def parts(method) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in method.model.named_parameters()}


def check_parts(method, before: dict[str, Tensor]) -> None:
    now = parts(method)
    assert now.keys() == before.keys()
    assert not [name for name in now if not torch.equal(now[name].view(torch.uint8), before[name].view(torch.uint8))]
    assert not any(pair.layer.merged_adapters or "slao_kept" in pair.layer.__dict__ for pair in method.pairs)


both = pytest.mark.parametrize("patched", [True, False], ids=["patched", "plain"])


@both
@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
@pytest.mark.parametrize("name", sorted(METHODS))
def test_the_base_alone_answers_as_the_merge_does(name, dtype, patched):
    method = make(name, patched)
    for pair in method.pairs:
        pair.layer.base_layer.to(dtype)
    method.model.to(dtype)
    before, x = parts(method), X.to(dtype)
    with torch.no_grad():
        trained = method.model(x)
        with method.merged():
            expected = method.model(x)
        for _ in range(3):
            with method.merged(fold=True) as model:
                y = model(x)
                h = x
                for layer in model.base_model.model:
                    h = layer.base_layer(h) if hasattr(layer, "base_layer") else layer(h)
                assert torch.equal(y, h)
                assert error_ratio(y, expected) <= ROUNDING[dtype]
        check_parts(method, before)
        assert torch.equal(method.model(x), trained)


@both
def test_an_error_inside_restores_too(patched):
    method = make(patched=patched)
    before = parts(method)
    with pytest.raises(KeyError), method.merged(fold=True):
        raise KeyError
    check_parts(method, before)


@both
def test_what_peft_does_inside(patched, caplog):
    """Unmerged or disabled there, exactly where the model is patched; elsewhere PEFT's rounding stays, and is told."""
    method = make(patched=patched)
    before = parts(method)
    with torch.no_grad(), method.merged():
        expected = method.model(X)
    slao_kernels.exact_merge._said.clear()
    with torch.no_grad(), method.merged(fold=True):
        method.model.unmerge_adapter()
        assert error_ratio(method.model(X), expected) <= 1e-5  # by A and B, which are the merge's as well
        with method.model.disable_adapter():
            assert error_ratio(method.model(X), expected) > 1e-2
    assert ("PEFT's own unmerge was called inside merged(fold=True)" in caplog.text) is not patched
    if patched:
        check_parts(method, before)
    with torch.no_grad(), method.merged(fold=True), method.model.disable_adapter():
        method.model(X)
    if patched:
        check_parts(method, before)


@both
def test_merge_and_unload_inside_keeps_the_merge(patched, caplog):
    method = make(patched=patched)
    with torch.no_grad():
        with method.merged():
            expected = method.model(X)
        with method.merged(fold=True):
            merged = method.model.merge_and_unload()
        assert error_ratio(merged(X), expected) <= 1e-5
    assert "rounding" not in caplog.text


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.mid, self.head = nn.Embedding(12, 16), nn.Linear(16, 16), nn.Linear(16, 12, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.mid(self.embed(ids)))


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (["mid", "head"], r"1 layers cannot be folded.*base_model.model.head: its base weight is tied to another"),
        (["mid", "embed"], r"1 layers cannot be folded.*base_model.model.embed: Embedding adds no product"),
    ],
)
def test_what_cannot_be_folded_is_named_before_anything_is_written(targets, message):
    torch.manual_seed(0)
    model = get_peft_model(Tied(), LoraConfig(r=2, target_modules=targets, init_lora_weights=False))
    slao_kernels.patch(model)
    method = make_method("slao", model)
    method.begin_task("a")
    method.end_task()
    before = parts(method)
    with pytest.raises(ValueError, match=message) as caught, method.merged(fold=True):
        pytest.fail("not refused")
    assert "\n" not in str(caught.value)
    check_parts(method, before)
    with method.merged():
        pass


def test_copies_and_logs_nothing_else(caplog):
    caplog.set_level(logging.DEBUG)
    method = make()
    with torch.no_grad(), method.merged(fold=True):
        twin = copy.deepcopy(method.model)
        assert torch.equal(twin(X), method.model(X))
    assert caplog.text == ""
