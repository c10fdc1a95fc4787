"""IncLoRA: a new LoRA pair for every task; those of the tasks before are frozen and added. The rank grows."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from slao_kernels.adapters import stack

from .base import Method
from .extended import extend_all, fresh
from .products import fitting, nearest
from .showing import Weights

if TYPE_CHECKING:
    from slao_kernels.extension import Extended


class IncLoRA(Method):
    """W' = W + s · Σ_t B_t A_t: pair t is trained in task t and frozen after it, by `slao_kernels.extension`.

    The first task is ordinary LoRA; each further one starts with a fresh A (PEFT's init) and B = 0, so where the last
    one ended. `merged()` is the sum of all finished pairs; the exported adapter stacks them to rank T · r, with the
    same scaling. seed: of the fresh A. State: T · r rows and columns a layer, growing with every task.
    max_pairs: no more than the rank of so many pairs is kept of the finished ones: where there are more, the product
    that they are the nearest to (Eckart and Young, by QR of the factors), which as a whole is frozen in their place.
    The state and the export then stop growing.
    Raises ValueError for layers that cannot take frozen pairs.
    """

    name = "inclora"

    def __init__(
        self,
        model: nn.Module,
        adapter: str = "default",
        seed: int = 0,
        beside: str = "keep",
        max_pairs: int | None = None,
    ) -> None:
        if max_pairs is not None and max_pairs < 1:
            raise ValueError(f"max_pairs must be at least 1, or None for all, not {max_pairs}")
        self.seed, self.max_pairs = int(seed), max_pairs
        super().__init__(model, adapter=adapter, beside=beside)
        self.layers: list[Extended] = extend_all(self)

    def _begin(self, task: int) -> None:
        if task > 1:
            self._start(self._with_last(), self._fresh(task))

    def _start(self, frozen: list[tuple[Tensor, Tensor]], As: list[Tensor]) -> None:
        """Freeze these and train from these A and B = 0. All of it was computed before: a failure changes nothing."""
        for pair, layer, (frozen_A, frozen_B), A in zip(self.pairs, self.layers, frozen, As, strict=True):
            layer.slao_frozen_A, layer.slao_frozen_B = frozen_A, frozen_B
            pair.A.copy_(A)
            pair.B.zero_()

    def _with_last(self) -> list[tuple[Tensor, Tensor]]:
        """Per layer the frozen pairs and, as their last, the trained one; cut if they are too many."""
        sums = self._sums()
        if self.max_pairs is not None and self._frozen_pairs() + 1 > self.max_pairs:
            return nearest(self.pairs, [sums], self.max_pairs)  # of the sum of all pairs, of the rank of so many
        return sums

    def _sums(self) -> list[tuple[Tensor, Tensor]]:
        """Per layer all pairs in one, the live one last."""
        sums = []
        for index, pair in enumerate(self.pairs):
            A, B = self.frozen(index)
            sums.append((stack(pair.experts, "A", A, pair.A), stack(pair.experts, "B", B, pair.B)))
        return sums

    def _fresh(self, task: int) -> list[Tensor]:
        """Per layer a new A, as PEFT draws it."""
        return [fresh(pair.A, f"{self.seed}/{task}/{pair.name}").to(pair.A) for pair in self.pairs]

    def frozen(self, index: int) -> tuple[Tensor, Tensor]:
        """(R, n) and (m, R): the frozen pairs of layer `index`, R = 0 where there are none yet."""
        pair, layer = self.pairs[index], self.layers[index]
        if layer.slao_frozen_A is None or layer.slao_frozen_B is None:
            return pair.A[:0], pair.B[:, :0]
        return layer.slao_frozen_A, layer.slao_frozen_B

    def _merged_weights(self) -> Weights:
        # The frozen pairs are in the model as it is; that of a running task is left out.
        return [(None, torch.zeros_like(pair.B) if self.in_task else None) for pair in self.pairs]

    def _exported_weights(self) -> Weights:
        """All pairs in one, oldest first."""
        out: Weights = []
        for index, (pair, (_, live_B)) in enumerate(zip(self.pairs, self._merged_weights(), strict=True)):
            A, B = self._scaled(index)
            out.append(
                (stack(pair.experts, "A", A, pair.A), stack(pair.experts, "B", B, pair.B if live_B is None else live_B))
            )
        return out

    def _scaled(self, index: int) -> tuple[Tensor, Tensor]:
        """The frozen pairs as a plain adapter has them."""
        return self.frozen(index)

    def _frozen_pairs(self) -> int:
        return self.frozen(0)[0].shape[0] // self.pairs[0].A.shape[0]

    def _stacked(self) -> int:
        return 1 + self._frozen_pairs()

    def _options(self) -> dict[str, Any]:
        return {"seed": self.seed} | ({} if self.max_pairs is None else {"max_pairs": self.max_pairs})

    def _state(self) -> dict[str, Tensor]:
        state: dict[str, Tensor] = {}
        for index, pair in enumerate(self.pairs):
            A, B = self.frozen(index)
            if len(A):
                state |= {f"{pair.name}.frozen_A": A, f"{pair.name}.frozen_B": B}
        return state

    def _load_state(self, tensors: dict[str, Tensor]) -> None:
        found = [fitting(pair, tensors, "frozen_{}") for pair in self.pairs]
        for (A, B, _), pair, layer in zip(found, self.pairs, self.layers, strict=True):
            layer.slao_frozen_A = None if A is None else A.to(pair.A)
            layer.slao_frozen_B = None if B is None else B.to(pair.B)
