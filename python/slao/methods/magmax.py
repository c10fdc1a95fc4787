"""MagMax (arXiv 2407.06322): sequential fine-tuning; of every entry the largest change of any task is kept."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .base import Method
from .showing import Weights


class MagMax(Method):
    """θ_merged = θ_0 + scale · τ: in every entry of A and B the τ_t = θ_t − θ_0 of largest |τ_t|, ties to the newer.

    θ_0 is the adapter before the first task, θ_t it after task t; training goes on from θ_t. The published method does
    this with all weights of a model, here it is done with the factors. scale: 0.5 in the paper (of B A, where A starts
    at random and B at zero, it is then half of B's change times A_0 plus half of A's).
    State: besides the live A and B two more of each a layer (θ_0 and τ), whatever the number of tasks.
    Raises ValueError for a scale that is not in (0, 1].
    """

    name = "magmax"

    def __init__(self, model: nn.Module, scale: float = 0.5, adapter: str = "default", beside: str = "keep") -> None:
        super().__init__(model, adapter=adapter, beside=beside)
        if not 0.0 < scale <= 1.0:
            raise ValueError(f"scale must lie in (0, 1], not {scale}")
        self.scale = float(scale)
        self._start: dict[str, Tensor] = {}
        self._change: dict[str, Tensor] = {}

    def _begin(self, task: int) -> None:
        if task == 1:
            self._start = {key: value.clone() for key, value in self._live_tensors().items()}
            self._change = {key: torch.zeros_like(value) for key, value in self._start.items()}

    def _end(self, task: int) -> float:
        change = {}
        for key, value in self._live_tensors().items():
            new, old = value - self._start[key], self._change[key]
            change[key] = torch.where(new.abs() >= old.abs(), new, old)
        self._change = change
        return 1.0

    def _merged_weights(self) -> Weights:
        if not self._start:
            return super()._merged_weights()
        merged = {key: start + self.scale * self._change[key] for key, start in self._start.items()}
        return [(merged[f"{pair.name}.A"], merged[f"{pair.name}.B"]) for pair in self.pairs]

    def _options(self) -> dict[str, Any]:
        return {"scale": self.scale}

    def _state(self) -> dict[str, Tensor]:
        kinds = {"start": self._start, "change": self._change}
        return {f"{key}_{kind}": tensor for kind, tensors in kinds.items() for key, tensor in tensors.items()}

    def _load_state(self, tensors: dict[str, Tensor]) -> None:
        loaded: list[dict[str, Tensor]] = []
        for kind in ("start", "change"):
            found: dict[str, Tensor] = {}
            for key, live in self._live_tensors().items() if tensors else ():
                saved = tensors.get(f"{key}_{kind}")
                # Its dtype is the model's of when it was made: half() since then leaves it as exact as it was.
                if saved is None or saved.shape != live.shape or not saved.is_floating_point():
                    raise ValueError(f"the saved {kind} of {key} does not fit its {tuple(live.shape)}")
                found[key] = saved.to(live.device)
            loaded.append(found)
        self._start, self._change = loaded
