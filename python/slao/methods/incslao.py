"""IncLoRA, answered by a running average as SLAO's: fresh pairs are added while training, their sums are averaged."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..schedules import MergeStats, Schedule, lambdas_of, make_schedule, schedule_name
from .inclora import IncLoRA
from .products import average, merged_from, merged_state, split
from .showing import Weights


class IncSLAO(IncLoRA):
    """IncLoRA trains; after task i M <- M + λ(i) (Σ − M), Σ the sum of all pairs; answers come from M, at fixed rank.

    SLAO averages the B of one pair that is trained on and on. Here each task has a fresh pair beside the finished ones,
    so that it learns more, and the products are averaged, so that it forgets less. Not a published method: measured in
    bench/experiments.md.

    schedule: λ(i), as SLAO's. max_pairs: as IncLoRA's, of the finished pairs that a task trains beside.
    merged_pairs: M is kept to the rank of so many pairs, by QR of the factors in all layers at once. seed: of each A.
    State: max_pairs + merged_pairs + 1 pairs a layer, whatever the number of tasks; 2 and 3 take four times what SLAO
    does. The export has the rank of M.
    Raises ValueError for numbers of pairs below 1, an unknown schedule, and layers that cannot take frozen pairs.
    """

    name = "incslao"
    averages = True

    def __init__(
        self,
        model: nn.Module,
        schedule: str | float | Schedule = "inv_sqrt",
        max_pairs: int | None = 2,
        merged_pairs: int = 3,
        adapter: str = "default",
        seed: int = 0,
        beside: str = "keep",
    ) -> None:
        if merged_pairs < 1:
            raise ValueError(f"merged_pairs must be at least 1, not {merged_pairs}")
        self.schedule, self.merged_pairs = make_schedule(schedule), merged_pairs
        self._schedule_name = schedule_name(schedule)
        self._merged: list[tuple[Tensor, Tensor]] = []  # M of each layer; none before the first task's end
        self._measured: list[float] | None = None
        super().__init__(model, adapter=adapter, seed=seed, beside=beside, max_pairs=max_pairs)

    def _end(self, task: int) -> float | list[float]:
        self._measured = None
        if task == 1:
            self._merged = [(pair.A.clone(), pair.B.clone()) for pair in self.pairs]
            return 1.0
        sums = self._sums()
        names = [name for pair in self.pairs for name in pair.names]
        both = split(self.pairs, sums), split(self.pairs, self._merged)
        stats = MergeStats(task, self.names[-1], names, *both[0], *both[1], list(self.lambdas))
        lam, weights = lambdas_of(self.schedule, stats)
        if stats.seen:
            self._measured = stats.cosine()
        self._merged = average(self.pairs, self._merged, sums, weights, self.merged_pairs)
        return lam

    def _new_to_merged(self) -> list[float] | None:
        return self._measured

    def _merged_weights(self) -> Weights:
        if not self._merged:
            return super()._merged_weights()
        return [(None, torch.zeros_like(pair.B)) for pair in self.pairs]  # M is in the frozen pairs' place

    def _exported_weights(self) -> Weights:
        return [*self._merged] if self._merged else super()._exported_weights()

    def _stacked(self) -> int:
        return len(self._merged[0][0]) // len(self.pairs[0].A) if self._merged else super()._stacked()

    @contextmanager
    def _swapped_in(self, weights: Callable[[], Weights]) -> Iterator[None]:
        frozen = [(layer, layer.slao_frozen_A, layer.slao_frozen_B) for layer in self.layers if self._merged]
        try:
            for (layer, _, _), pair, (A, B) in zip(frozen, self.pairs, self._merged, strict=False):
                # The model may have got another dtype or device since (half(), to()).
                layer.slao_frozen_A, layer.slao_frozen_B = (
                    part.to(own.device, own.dtype) for part, own in zip((A, B), pair.parameters, strict=True)
                )
            with super()._swapped_in(weights):
                yield
        finally:
            for layer, A, B in frozen:
                layer.slao_frozen_A, layer.slao_frozen_B = A, B

    def _options(self) -> dict[str, Any]:
        return super()._options() | {"schedule": self._schedule_name, "merged_pairs": self.merged_pairs}

    def _state(self) -> dict[str, Tensor]:
        return super()._state() | merged_state(self.pairs, self._merged)

    def _load_state(self, tensors: dict[str, Tensor]) -> None:
        found = merged_from(self.pairs, tensors, self.merged_pairs)
        super()._load_state(tensors)
        self._merged = found
