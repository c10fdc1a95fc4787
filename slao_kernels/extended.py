"""What a layer that a method extended has beside A and B, and keeps out of state dicts (see extension.py)."""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor

from .adapters import scales_of_columns, stack, through

logger = logging.getLogger("slao_kernels")
_said: set[str] = set()

NAMES = ("slao_core", "slao_core_delta", "slao_frozen_A", "slao_frozen_B", "slao_frozen_scale")


class Extended:
    """What one of a layer's adapters has beside A and B, whatever class of PEFT's the layer is of.

    Of experts everything is laid out as PEFT lays out A and B (`LoraPair.split`), and there is a core for each.
    """

    slao_adapter: str
    slao_before: type
    # (r, r) each, or (experts, r, r): the frozen one, and the one that trains and alone carries A's and B's gradient
    # (C-LoRA).
    slao_core: Tensor | None
    slao_core_delta: Tensor | None
    # (R, n), (m, R): frozen pairs, stacked; (T,) or None: one factor for each r of them, which may train. Of experts
    # (experts R, n), (m, R experts) and (T experts,), the factors of a pair's experts together.
    slao_frozen_A: Tensor | None
    slao_frozen_B: Tensor | None
    slao_frozen_scale: Tensor | None

    def slao_stack(self: Any) -> tuple[Tensor, Tensor]:
        """A (r + R, n) and B (m, r + R): the pair that trains, and below and beside it the frozen ones, if any."""
        A, B = self.lora_A[self.slao_adapter].weight, self.lora_B[self.slao_adapter].weight
        frozen_A, frozen_B = self.slao_frozen_A, self.slao_frozen_B
        if frozen_A is None or frozen_B is None:
            return A, B
        count, scale = getattr(self, "num_experts", 1), self.slao_frozen_scale
        if scale is not None:
            frozen_B = frozen_B * scales_of_columns(scale, count, frozen_B.shape[1])
        return stack(count, "A", A, frozen_A), stack(count, "B", B, frozen_B.to(B.dtype))

    def slao_product(self: Any) -> tuple[Tensor, Tensor]:
        """(A, B) in fp32 at least, without a graph, whose B A times the scaling is the whole branch."""
        A, B = (factor.detach() for factor in self.slao_stack())
        wide = torch.promote_types(B.dtype, torch.float32)
        cores = [core.detach().to(wide) for core in (self.slao_core, self.slao_core_delta) if core is not None]
        return A.to(wide), through(B.to(wide), sum(cores[1:], cores[0])) if cores else B.to(wide)

    def refuse_beside(self: Any, active: list[str]) -> None:
        """ValueError where another adapter is active as well."""
        others = [name for name in active if name != self.slao_adapter]
        if others:
            raise ValueError(
                f"adapter {self.slao_adapter!r} has a core or frozen pairs and cannot be active beside {others}; "
                "choose one with set_adapter"
            )

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)  # type: ignore[misc]
        left = [destination.pop(prefix + name, None) for name in NAMES]
        if any(tensor is not None for tensor in left):
            _say_once()

    def _load_from_state_dict(self: Any, state_dict: Any, prefix: str, *args: Any) -> None:
        stores: tuple[dict[str, Any], ...] = (self._parameters, self._buffers)
        kept = [{name: store.pop(name) for name in NAMES if name in store} for store in stores]
        try:
            super()._load_from_state_dict(state_dict, prefix, *args)  # type: ignore[misc]
        finally:
            for store, tensors in zip(stores, kept, strict=True):
                store.update(tensors)


def _say_once() -> None:
    if not _said:
        _said.add("said")
        logger.warning(
            "a state dict (so PEFT's own save_pretrained too) holds A and B of an extended layer, not the core or "
            "the frozen pairs that its method gave it: the method's save() keeps them,"
            " its save_pretrained() exports all"
        )
