"""SD-LoRA (arXiv 2501.13198): frozen directions of the tasks before, whose magnitudes go on training."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from slao_kernels.adapters import scales_of_columns, stack

from .extended import refuse_shards
from .inclora import IncLoRA
from .showing import Weights


class SDLoRA(IncLoRA):
    """W' = W + s · (B A + Σ_k α_k B_k A_k / ‖B_k A_k‖): the new pair trains, and so do all magnitudes α_k.

    A task's end changes nothing of what the model computes: the next task freezes the trained pair as a direction and
    starts α_k at ‖B_k A_k‖ (Frobenius, by r×r traces). The paper's α of the running task is here the size of B A. A
    pair that stayed zero has no direction and stays zero. `merged()` within a task has the α of its start. The exported
    adapter has α in its B. State and growth are IncLoRA's and one number a task and layer.
    """

    name = "sdlora"
    adds_parameters = True

    def __init__(self, model: nn.Module, adapter: str = "default", seed: int = 0, beside: str = "keep") -> None:
        super().__init__(model, adapter=adapter, beside=beside, seed=seed)
        self._before: list[Tensor] = []  # the α that the running task began with

    def _directions(self) -> tuple[list[tuple[Tensor, Tensor]], list[Tensor]]:
        """Per layer the frozen pairs with the trained one as their last, of size 1, and the magnitudes of them all."""
        frozen, scales = [], []
        for index, (pair, layer) in enumerate(zip(self.pairs, self.layers, strict=True)):
            As, Bs = ([one.double() for one in pair.split(factor, getattr(pair, factor))] for factor in "AB")
            norms = [((A @ A.T) * (B.T @ B)).sum().clamp(min=0).sqrt() for A, B in zip(As, Bs, strict=True)]
            # 1/√‖B A‖ to each: neither factor leaves the range of its dtype. A zero pair stays zero.
            parts = [torch.where(norm > 0, norm.rsqrt(), 0.0) for norm in norms]
            A, B = (
                pair.join(factor, [one * part for one, part in zip(each, parts, strict=True)])
                for factor, each in (("A", As), ("B", Bs))
            )
            old_A, old_B = self.frozen(index)
            frozen.append((stack(pair.experts, "A", old_A, A.to(old_A)), stack(pair.experts, "B", old_B, B.to(old_B))))
            old, new = layer.slao_frozen_scale, torch.stack(norms).to(pair.B.dtype)
            scales.append(new if old is None else torch.cat([old.detach(), new]))
        return frozen, scales

    def _begin(self, task: int) -> None:
        refuse_shards(self)  # the magnitudes would be no part of what is sharded
        if task > 1:
            frozen, scales = self._directions()
            self._start(frozen, self._fresh(task))
            for layer, scale in zip(self.layers, scales, strict=True):
                layer.slao_frozen_scale = nn.Parameter(scale)
        self._before = [scale.detach().clone() for scale in self._scales()]

    def _end(self, task: int) -> float:
        self._before = []
        return 1.0

    def _scales(self) -> list[nn.Parameter]:
        return [layer.slao_frozen_scale for layer in self.layers if isinstance(layer.slao_frozen_scale, nn.Parameter)]

    @contextmanager
    def _swapped_in(self, weights: Callable[[], Weights]) -> Iterator[None]:
        swapped = [(scale, scale.data) for scale in self._scales()] if self._before else []
        try:
            for (scale, _), before in zip(swapped, self._before, strict=True):
                scale.data = before.to(scale.device, scale.dtype)  # the model may have changed since
            with super()._swapped_in(weights):
                yield
        finally:
            for scale, trained in swapped:
                scale.data = trained

    def _scaled(self, index: int) -> tuple[Tensor, Tensor]:
        A, B = self.frozen(index)
        scale = self._before[index] if self._before else self.layers[index].slao_frozen_scale
        return (
            (A, B)
            if scale is None
            else (A, B * scales_of_columns(scale.detach(), self.pairs[index].experts, B.shape[1]))
        )

    def _state(self) -> dict[str, Tensor]:
        state = super()._state()
        for pair, scale in zip(self.pairs, self._scales(), strict=False):
            state[f"{pair.name}.frozen_scale"] = scale.detach()
        for pair, before in zip(self.pairs, self._before, strict=False):
            state[f"{pair.name}.scale_before"] = before
        return state

    def _load_state(self, tensors: dict[str, Tensor]) -> None:
        for pair in self.pairs:
            frozen, scale = tensors.get(f"{pair.name}.frozen_A"), tensors.get(f"{pair.name}.frozen_scale")
            if (0 if frozen is None else len(frozen)) != (0 if scale is None else len(scale) * pair.rank):
                raise ValueError(f"the saved magnitudes of {pair.name} do not fit its frozen pairs")
        super()._load_state(tensors)
        self._before = []
        for pair, layer in zip(self.pairs, self.layers, strict=True):
            scale, before = (tensors.get(f"{pair.name}.{key}") for key in ("frozen_scale", "scale_before"))
            layer.slao_frozen_scale = None if scale is None else nn.Parameter(scale.to(pair.B))
            if before is not None:
                self._before.append(before.to(pair.B))
