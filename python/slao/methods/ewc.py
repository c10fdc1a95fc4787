"""EWC (arXiv 1612.00796) on the adapter: one LoRA, whose weights are held where earlier tasks' gradients were large."""

from __future__ import annotations

import logging
import weakref
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from slao_kernels import sharding

from .base import Method
from .extended import refuse_shards

logger = logging.getLogger("slao")


class EWC(Method):
    """One LoRA with λ/2 Σ F (θ − θ*)² in every step's loss: θ all entries of A and B, θ* those after the last task.

    F is the diagonal empirical Fisher information: the mean, over a task's training batches, of the squared gradient
    of the batch's mean loss, taken while training (no further pass over the data). At a task's end F <- decay · F + it:
    decay = 1 sums over all tasks with one anchor θ* (arXiv 1801.10112's online EWC has decay < 1). The gradient of the
    penalty, accumulation's factor and a loss scaler's are taken out of what is squared, so `penalty()` has to be in
    the loss (`slao.train` sees to it). A backward pass with an infinite gradient or NaN, for which a loss scaler skips
    the step, counts for nothing. On several ranks F is the mean of theirs; a task that is resumed in its middle
    has the squares of rank 0 up to there.

    weight: λ; what is right depends on the loss and the batch size, 100 is a start. State: F and θ*, and while a task
    runs the sum of its squares and those of the last batch: four more A and B a layer, whatever the number of tasks.
    Raises ValueError for a weight that is negative or not finite, or a decay outside [0, 1].
    """

    name = "ewc"

    def __init__(
        self,
        model: nn.Module,
        weight: float = 100.0,
        decay: float = 1.0,
        adapter: str = "default",
        beside: str = "keep",
    ) -> None:
        super().__init__(model, adapter=adapter, beside=beside)
        if not 0.0 <= weight < float("inf"):
            raise ValueError(f"weight must be a finite number of at least 0, not {weight}")
        if not 0.0 <= decay <= 1.0:
            raise ValueError(f"decay must lie in [0, 1], not {decay}")
        self.weight, self.decay = float(weight), float(decay)
        self._parameters = self._own_parameters()
        self.fisher = {key: _wide_zeros(parameter) for key, parameter in self._parameters.items()}
        self._anchor = {key: parameter.detach().clone() for key, parameter in self._parameters.items()}
        self._squares: dict[str, Tensor] = {}
        self._batches: dict[str, Tensor] = {}
        self._last: dict[str, Tensor] = {}  # the squares of the last backward pass, until all of them are known
        # Of the running backward pass: the penalty's factor in the loss, and the gradient that it gave each parameter.
        self._factor: Tensor | None = None
        self._pulls: dict[str, Tensor] = {}
        self._hooks: list[Any] = []

    def _own_parameters(self) -> dict[str, Tensor]:
        return {
            f"{pair.name}.{factor}": parameter
            for pair in self.pairs
            for factor, parameter in zip("AB", pair.parameters, strict=True)
        }

    def _begin(self, task: int) -> None:
        refuse_shards(self)  # hooks and anchors belong to whole parameters
        self._watch()
        self._squares = {key: _wide_zeros(parameter) for key, parameter in self._parameters.items()}
        self._batches = {
            key: torch.zeros((), dtype=torch.int64, device=parameter.device)
            for key, parameter in self._parameters.items()
        }
        if task == 1:
            self._anchor = {key: parameter.detach().clone() for key, parameter in self._parameters.items()}

    def _watch(self) -> None:
        """See the gradients of the parameters that there are now, which may train only since."""
        for hook in self._hooks:
            hook.remove()
        self._parameters = self._own_parameters()
        self._hooks = [
            parameter.register_hook(_observer(weakref.ref(self), key))
            for key, parameter in self._parameters.items()
            if parameter.requires_grad
        ]

    def load(self, folder: str | Path) -> dict[str, Any]:
        extra = super().load(folder)
        if self.in_task:
            self._watch()
        return extra

    def penalty(self) -> Tensor | None:
        # From the first task on, when F is zero: its backward pass tells how the step's loss is scaled.
        self._count_last()
        self._factor, self._pulls = None, {}
        first = next(iter(self._parameters))
        if self._anchor[first].device != self._parameters[first].device:
            self._follow()
        terms = []
        for key, parameter in self._parameters.items():
            moved = parameter - self._anchor[key]
            if moved.requires_grad:
                moved.register_hook(lambda gradient, key=key: self._pulls.update({key: gradient}))
            terms.append((self.fisher[key] * moved.square()).sum())
        total: Tensor = 0.5 * self.weight * torch.stack(terms).sum()
        if total.requires_grad:
            total.register_hook(self._take_factor)
        return total

    def _take_factor(self, gradient: Tensor) -> None:
        self._factor = gradient

    def _observe(self, key: str, gradient: Tensor) -> None:
        """The gradient of one backward pass in one parameter, before it is added to `.grad`."""
        if not self.in_task:
            return
        pull = self._pulls.pop(key, None)
        wide = gradient.to(self._squares[key].dtype)
        of_loss = wide if pull is None or self._factor is None else (wide - pull.to(wide.dtype)) / self._factor
        if key in self._last:  # of a pass without a penalty, after which nobody asked
            self._count_last()
        self._last[key] = of_loss.square()

    def _count_last(self) -> None:
        """Add the last pass to the sums if all of its squares are finite; without waiting for the device."""
        if not self._last:
            return
        device = next(iter(self._last.values())).device
        finite = torch.stack([square.isfinite().all().to(device) for square in self._last.values()]).all()
        for key, square in self._last.items():
            counts = finite.to(square.device)
            self._squares[key].add_(torch.where(counts, square, 0.0))
            self._batches[key] += counts
        self._last = {}

    def _end(self, task: int) -> float:
        self._count_last()
        counts = {key: int(self._batches[key]) for key in self._parameters}
        new = {key: self._squares[key] / max(count, 1) for key, count in counts.items()}
        if not any(counts.values()):
            logger.warning("ewc: no gradient of task %r was seen, so nothing of it will be held", self.names[-1])
        sharding.add_over_ranks(list(new.values()))
        fisher = {key: self.decay * self.fisher[key] + new[key] / sharding.ranks() for key in self._parameters}
        self._anchor = {key: parameter.detach().clone() for key, parameter in self._parameters.items()}
        self.fisher, self._squares, self._batches = fisher, {}, {}
        return 1.0

    def _options(self) -> dict[str, Any]:
        return {"weight": self.weight, "decay": self.decay}

    def _state(self) -> dict[str, Tensor]:
        self._count_last()
        kinds = {"fisher": self.fisher, "anchor": self._anchor, "squares": self._squares, "batches": self._batches}
        return {f"{key}_{kind}": tensor for kind, tensors in kinds.items() for key, tensor in tensors.items()}

    def _load_state(self, tensors: dict[str, Tensor]) -> None:
        for key, parameter in self._parameters.items():
            for kind in ("fisher", "anchor", "squares"):
                saved = tensors.get(f"{key}_{kind}")
                if saved is None and kind == "squares":
                    continue
                if saved is None or saved.shape != parameter.shape:
                    raise ValueError(f"the saved {kind} of {key} does not fit its {tuple(parameter.shape)}")

        def taken(kind: str) -> dict[str, Tensor]:
            found = {key: tensors.get(f"{key}_{kind}") for key in self._parameters}
            return {key: t.to(self._parameters[key].device) for key, t in found.items() if t is not None}

        self.fisher, self._anchor, self._squares = taken("fisher"), taken("anchor"), taken("squares")
        self._batches, self._last = taken("batches"), {}


def _wide_zeros(parameter: Tensor) -> Tensor:
    dtype = torch.promote_types(parameter.dtype, torch.float32)
    return torch.zeros_like(parameter, dtype=dtype, memory_format=torch.contiguous_format).detach()


def _observer(method: weakref.ref[EWC], key: str) -> Any:
    """A hook that a parameter can keep without keeping the method."""

    def hook(gradient: Tensor) -> None:
        alive = method()
        if alive is not None:
            alive._observe(key, gradient)

    return hook
