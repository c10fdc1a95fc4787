"""OSF (arXiv 2504.07097) in LoRA's terms: a new pair a task, off the leading singular directions of the weights."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor, nn

from slao_kernels import exact_merge

from . import base_weights
from .extended import refuse_shards
from .inclora import IncLoRA


class OSF(IncLoRA):
    """IncLoRA whose pair changes nothing between the leading singular vectors of W + s Σ B A, as the task finds it.

    With U (m, k) and V (n, k) those vectors, Uᵀ B = 0 and A V = 0: so Uᵀ ΔW = 0 and ΔW V = 0. What W does most stays
    as it is, the tasks before included. OSF trains W's smaller singular triplets whole, with gradients projected off
    the larger ones; here gradients of A and B are projected so in every step, and at the task's end A and B
    themselves, since Adam's steps are not multiples of gradients.

    keep: the part of a layer's min(m, n) directions that is held, a half in PEFT's OSF. A task begins with an SVD of
    every layer's W in fp32. State: IncLoRA's, and while a task runs U and V.
    Raises ValueError for a part outside (0, 1), for layers over quantised, sharded or other bases than matrices, and
    for an adapter that is trained before the first task.
    """

    name = "osf"

    def __init__(
        self,
        model: nn.Module,
        keep: float = 0.5,
        adapter: str = "default",
        seed: int = 0,
        beside: str = "keep",
        max_pairs: int | None = None,
    ) -> None:
        if not 0.0 < keep < 1.0:
            raise ValueError(f"keep must lie in (0, 1), not {keep}")
        super().__init__(model, adapter=adapter, seed=seed, beside=beside, max_pairs=max_pairs)
        self.keep = float(keep)
        self._held: list[tuple[Tensor, Tensor]] = []  # U and V of each layer while a task runs
        self._hooks: list[Any] = []

    def _check(self) -> None:
        base_weights.refuse(self, {pair.name: _why_not(pair.layer, self.adapter) for pair in self.pairs})

    def _begin(self, task: int) -> None:
        refuse_shards(self)
        self._check()  # the base may have been sharded since
        if task == 1:
            base_weights.refuse_trained(self)
        frozen = self._with_last() if task > 1 else [self.frozen(index) for index in range(len(self.pairs))]
        held = [self._leading(index, pairs) for index, pairs in enumerate(frozen)]
        if task > 1:
            self._start(frozen, [_off(V, A.T).T for (_, V), A in zip(held, self._fresh(task), strict=True)])
        self._hold(held)
        if task == 1:
            self._project()

    def _hold(self, held: list[tuple[Tensor, Tensor]]) -> None:
        """Project gradients off these from now on; with none no more."""
        for hook in self._hooks:
            hook.remove()
        self._held, self._hooks = held, []
        for index, pair in enumerate(self.pairs if held else []):
            for side, parameter in enumerate(pair.parameters):
                if parameter.requires_grad:
                    self._hooks.append(parameter.register_hook(_projector(weakref.ref(self), index, side)))

    def _leading(self, index: int, frozen: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        U, _, Vh = torch.linalg.svd(base_weights.found(self, index, frozen), False)
        count = max(1, int(self.keep * len(Vh)))
        return U[:, :count].clone(), Vh[:count].T.clone()

    def _project(self) -> None:
        for pair, (U, V) in zip(self.pairs, self._held, strict=True):
            pair.A.copy_(_off(V, pair.A.T).T)
            pair.B.copy_(_off(U, pair.B))

    def _end(self, task: int) -> float:
        refuse_shards(self)
        self._project()
        self._hold([])
        return 1.0

    def _options(self) -> dict[str, Any]:
        return super()._options() | {"keep": self.keep}

    def _state(self) -> dict[str, Tensor]:
        both = zip(self.pairs, self._held, strict=False)  # between tasks there are none
        held = {f"{pair.name}.held_{key}": part for pair, two in both for key, part in zip("UV", two, strict=True)}
        return super()._state() | held

    def _load_state(self, tensors: dict[str, Tensor]) -> None:
        held = []
        for pair in self.pairs if any(key.endswith(".held_U") for key in tensors) else ():
            U, V = (tensors.get(f"{pair.name}.held_{key}") for key in "UV")
            if U is None or V is None or (len(U), len(V)) != (len(pair.B), pair.A.shape[1]):
                raise ValueError(f"the saved directions of {pair.name} do not fit its A {tuple(pair.A.shape)}")
            held.append((U.to(pair.B.device), V.to(pair.A.device)))
        if held:
            refuse_shards(self)
        super()._load_state(tensors)
        self._hold(held)


def _why_not(layer: Any, adapter: str) -> str | None:
    reason = base_weights.why_not(layer, adapter)
    if reason is None and min(getattr(*exact_merge.place(layer)).shape) < 2:
        return "its weight has one direction alone, which would be held"
    return reason


def _off(basis: Tensor, columns: Tensor) -> Tensor:
    """Columns less what of them lies in the basis; computed in the basis' dtype, in theirs."""
    wide = columns.to(basis.dtype)
    return (wide - basis @ (basis.T @ wide)).to(columns.dtype)


def _projector(method: weakref.ref[OSF], index: int, side: int) -> Any:
    """A hook that a parameter can keep without keeping the method."""

    def hook(gradient: Tensor) -> Tensor | None:
        own = method()
        if own is None or not own._held:
            return None
        if own._held[index][0].device != gradient.device:
            own._follow()
        basis = own._held[index][1 - side]
        return _off(basis, gradient.T).T if side == 0 else _off(basis, gradient)

    return hook
