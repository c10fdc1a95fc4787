"""A model with other weights in its A and B for a while."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from slao_kernels import exact_merge, inventory, sharding
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
        torch.clear_autocast_cache()  # which knows a parameter's 16-bit copy by the parameter, not by its storage
        yield
    finally:
        for parameter, data, gradient in trained:
            parameter.data, parameter.grad = data, gradient
        torch.clear_autocast_cache()


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


@contextmanager
def folded(model: nn.Module, pairs: Sequence[LoraPair], adapter: str) -> Iterator[None]:
    """Within the block the pairs are folded into their base weights, which then get their bits back.

    ValueError, with nothing changed, names every layer that cannot be.
    """
    shared = Counter(id(parameter) for _, parameter in model.named_parameters(remove_duplicate=False))
    refused = {}
    for pair in pairs:
        layer: Any = pair.layer
        reason = exact_merge.why_not(layer, [adapter])
        if reason is None and shared[id(getattr(*exact_merge.place(layer)))] > 1:
            reason = "its base weight is tied to another module's, which would change as well"
        if reason is not None:
            refused[pair.name] = reason
    if refused:
        some = "; ".join(f"{name}: {why}" for name, why in list(refused.items())[:8])
        raise ValueError(f"merged(fold=True): {len(refused)} layers cannot be folded, merged() can show them: {some}")
    done: list[LoraPair] = []
    try:
        for pair in pairs:
            exact_merge.merge(pair.layer, [adapter])
            done.append(pair)
        yield
    finally:
        for layer in inventory.present(model, done):
            if not exact_merge.unmerge(layer):
                exact_merge.forget(
                    layer, "PEFT's own unmerge was called inside merged(fold=True); patch the model first"
                )
