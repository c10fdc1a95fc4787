"""Whose tensor a base's result is: lora_add overwrites only what nobody else holds, by count."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from slao_kernels.ops.lora_linear import add


def counted(y: Tensor) -> bool:
    return add.holders(y) == add.FRESH


def test_a_fresh_tensor_is_alone():
    assert add.FRESH is not None
    y = torch.randn(3, 4)
    assert counted(y) is False  # `counted` holds it too: the count belongs to the frame that made it
    assert add.holders(y) == add.FRESH
    assert add.writable(y)


def held_by_python():
    y = torch.randn(3, 4)
    return y, [y]


def held_by_a_view():
    y = torch.randn(3, 4)
    return y, y[0]


def held_by_detach():
    y = torch.randn(3, 4)
    return y, y.detach()


def saved_by_its_own_node():
    return torch.randn(3, 4, requires_grad=True).tanh(), None


def saved_by_another_node():
    y = torch.randn(3, 4, requires_grad=True) * 2
    return y, y.square()


def saved_by_a_function():
    class Exp(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            y = x.exp()
            ctx.save_for_backward(y)
            return y

        @staticmethod
        def backward(ctx, dy):
            return dy * ctx.saved_tensors[0]

    return Exp.apply(torch.randn(3, 4, requires_grad=True)), None


def kept_by_a_function():
    class Exp(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.y = x.exp()
            return ctx.y

        @staticmethod
        def backward(ctx, dy):
            return dy * ctx.y

    return Exp.apply(torch.randn(3, 4, requires_grad=True)), None


def kept_for_its_gradient():
    y = torch.randn(3, 4, requires_grad=True) * 2
    kept = {"y": y}
    y.retain_grad()
    return y, kept


HELD = [
    held_by_python,
    held_by_a_view,
    held_by_detach,
    saved_by_its_own_node,
    saved_by_another_node,
    saved_by_a_function,
    kept_by_a_function,
    kept_for_its_gradient,
]


@pytest.mark.parametrize("held", HELD, ids=lambda f: f.__name__)
def test_a_tensor_with_another_holder_is_not_alone(held):
    y, keep = held()
    assert add.holders(y) != add.FRESH
    del keep


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
    assert not add.writable(NOT_WRITABLE[kind]())


def test_inference_tensors_are_writable_in_inference_mode_only():
    with torch.inference_mode():
        y = torch.randn(3, 4)
        assert add.writable(y)
    assert not add.writable(y)
