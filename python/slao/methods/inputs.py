"""What a method may know of a layer's inputs: their second moments, seen by hooks while rows pass through the model."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from slao_kernels.adapters import LoraPair

from ..modes import eval_mode

# Keys of a batch that are answers, not inputs: a bare encoder would not take them.
_NO_INPUT = ("labels", "task")


def input_grams(model: nn.Module, pairs: Sequence[LoraPair], batches: Iterable[dict[str, Tensor]]) -> list[Tensor]:
    """G = Σ x xᵀ (n, n) in fp64 of every pair's layer, over all tokens of `batches` but padding.

    batches: as the model takes them, on its device; labels are left out. model: in eval mode meanwhile, and not
    changed. What consecutive layers read together (query, key and value) is multiplied once.
    """
    grams = [torch.zeros((pair.A.shape[1],) * 2, dtype=torch.float64, device=pair.A.device) for pair in pairs]
    mask: Tensor | None = None
    last: tuple[Any, int, Tensor] | None = None  # the input that was read last, its version, and its Gram matrix

    def hook(gram: Tensor) -> Any:
        def add(module: nn.Module, inputs: tuple[Any, ...]) -> None:
            nonlocal last
            x = inputs[0]
            version = -1 if x.is_inference() else x._version  # those have none, and are never changed in place
            if last is None or last[0] is not x or last[1] != version:
                # A layer that sees (rows, tokens, n) sees padding; one that sees something else (a pooler) does not.
                rows = x[mask.bool()] if mask is not None and x.shape[:-1] == mask.shape else x.flatten(0, -2)
                rows = rows.double()
                last = x, version, rows.T @ rows
            gram.add_(last[2])

        return add

    handles = [pair.layer.register_forward_pre_hook(hook(gram)) for pair, gram in zip(pairs, grams, strict=True)]
    try:
        with torch.no_grad(), eval_mode(model):
            for batch in batches:
                mask, last = batch.get("attention_mask"), None
                model(**{key: value for key, value in batch.items() if key not in _NO_INPUT})
    finally:
        for handle in handles:
            handle.remove()
    return grams
