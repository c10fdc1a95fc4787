"""A model with other weights in its A and B for a while."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from torch import Tensor, nn

from slao_kernels import sharding
from slao_kernels.adapters import LoraPair

# Per pair A and B; None where the trained one stands for it.
Weights = list[tuple[Tensor | None, Tensor | None]]


@contextmanager
def swapped(pairs: Sequence[LoraPair], weights: Callable[[], Weights]) -> Iterator[None]:
    """Within the block the parameters' storages are those of `weights`, and their gradients are set aside."""
    trained: list[tuple[Tensor, Tensor, Tensor | None]] = []
    try:
        for pair, shown in zip(pairs, weights(), strict=True):
            for parameter, weight in zip(pair.parameters, shown, strict=True):
                if weight is not None:
                    trained.append((parameter, parameter.data, parameter.grad))
                    # A stack of pairs has another rank, which a matrix takes as it is, and a gradient does not.
                    parameter.grad = None
                    # The model may have got another dtype since (half()), and PEFT's forward wants one for A and B.
                    weight = weight.to(parameter.dtype)
                    parameter.data = weight if parameter.dim() == 2 else weight.view(parameter.shape)
        yield
    finally:
        for parameter, data, gradient in trained:
            parameter.data, parameter.grad = data, gradient


@contextmanager
def overwritten(
    model: nn.Module, trained: Sequence[LoraPair], shown: Sequence[LoraPair], adapter: str
) -> Iterator[None]:
    """The same for shards, which have no whole storage to swap: `trained` is written back from whole copies."""
    sharding.write(model, shown, adapter)
    try:
        yield
    finally:
        sharding.write(model, trained, adapter)
