"""InfLoRA (arXiv 2404.00228): IncLoRA whose A looks only where earlier tasks' inputs do not; B alone is trained."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from slao_kernels import sharding

from . import dual_gpm
from .extended import refuse_shards
from .inclora import IncLoRA
from .inputs import input_grams

logger = logging.getLogger("slao")


class InfLoRA(IncLoRA):
    """IncLoRA with A = Uᵀ/√3 fixed, U the r main directions of the task's inputs off the space of earlier tasks.

    With the inputs x of a layer over the task's training rows (padding aside), G = Σ x xᵀ and P the projection off the
    inputs of the tasks before, U are the leading eigenvectors of P G P: the left singular vectors of the projected
    inputs. So B A x = 0 for every x in the old space. At a task's end that space takes in, with the inputs of the
    trained model, as few directions as hold `threshold` of their energy (DualGPM; the paper raises its threshold from
    task to task, here it is one number).

    It has to see the inputs: `observe(batches)` before `begin_task` and again before `end_task`, as `slao.train` and
    `SlaoCallback` do. On several ranks G is the sum over their batches.
    Where fewer than r directions are left, the rows of A that remain are zero, and a warning says so.
    State: IncLoRA's, and at most n/2 vectors of length n a layer in fp64; while observing n² numbers a layer.
    Raises ValueError for a threshold outside (0, 1], and for a task that was not observed.
    """

    name = "inflora"
    observes = True

    def __init__(
        self, model: nn.Module, threshold: float = 0.95, adapter: str = "default", beside: str = "keep"
    ) -> None:
        if not 0.0 < threshold <= 1.0:
            raise ValueError(f"threshold must lie in (0, 1], not {threshold}")
        super().__init__(model, adapter=adapter, beside=beside)
        self.threshold = float(threshold)
        self.bases = [dual_gpm.empty(pair.A.shape[1], pair.A.device) for pair in self.pairs]
        self._grams: list[Tensor] = []

    def _check(self) -> None:
        mixed = [pair.name for pair in self.pairs if pair.experts > 1]
        if mixed:
            some = ", ".join(mixed[:8])
            raise ValueError(f"inflora cannot treat {len(mixed)} layers of experts, whose inputs no hook sees: {some}")
        if getattr(getattr(self.model, "config", None), "is_encoder_decoder", False):
            raise ValueError("inflora cannot treat encoder-decoder models, whose layers do not see the same tokens")

    def observe(self, batches: Iterable[dict[str, Tensor]]) -> None:
        """Sum x xᵀ of every layer over `batches` (on the model's device), without training. Weights are as they are."""
        refuse_shards(self)
        with sharding.together():
            grams = input_grams(self.model, self.pairs, batches)
        sharding.add_over_ranks(grams)
        self._grams = grams

    def _observed(self, before: str) -> list[Tensor]:
        if not self._grams:
            raise ValueError(f"inflora needs the task's inputs: call observe(batches) before {before}()")
        grams, self._grams = self._grams, []
        return [gram.to(pair.A.device) for gram, pair in zip(grams, self.pairs, strict=True)]

    def _begin(self, task: int) -> None:
        refuse_shards(self)  # A has to stop training in the model itself
        grams = self._observed("begin_task")
        As, short = [], []
        for pair, basis, gram in zip(self.pairs, self.bases, grams, strict=True):
            r, n = pair.A.shape
            values, vectors = dual_gpm.largest_first(basis.off(gram))
            count = min(r, n, int((values > 1e-10 * gram.trace()).sum()))
            As.append(F.pad(vectors[:, :count].T / 3**0.5, (0, 0, 0, r - count)).to(pair.A))
            if count < r:
                short.append(f"{pair.name} ({count} of {r})")
        if task > 1:
            self._start(self._with_last(), As)
        else:
            for pair, A in zip(self.pairs, As, strict=True):
                pair.A.copy_(A)
                pair.B.zero_()
        self._train_A(False)
        if short:
            logger.warning("inputs off the old space have fewer directions than r in %s", ", ".join(short[:8]))

    def _end(self, task: int) -> float:
        grams = self._observed("end_task")
        if trained := [pair.name for pair in self.pairs if pair.parameters[0].requires_grad]:
            logger.warning(
                "inflora: A of %d layers trained in task %r (set_adapter() turns gradients on) and may look into the "
                "inputs of earlier tasks now: %s",
                len(trained),
                self.names[-1],
                ", ".join(trained[:4]),
            )
        self.bases = [basis.extended(gram, self.threshold) for basis, gram in zip(self.bases, grams, strict=True)]
        self._train_A(True)
        return 1.0

    def load(self, folder: str | Path) -> dict[str, Any]:
        extra = super().load(folder)
        self._train_A(not self.in_task)
        return extra

    def _train_A(self, on: bool) -> None:
        """A is frozen within a task. Between tasks it is not, so that the optimizers that Trainers make there, in this
        process or one that resumes, hold the same parameters."""
        for pair in self.pairs:
            pair.parameters[0].requires_grad_(on)

    def _options(self) -> dict[str, Any]:
        return {"threshold": self.threshold}

    def _state(self) -> dict[str, Tensor]:
        state = super()._state()
        for pair, basis in zip(self.pairs, self.bases, strict=True):
            state[f"{pair.name}.complement" if basis.complement else f"{pair.name}.space"] = basis.vectors
        return state

    def _load_state(self, tensors: dict[str, Tensor]) -> None:
        bases = []
        for pair in self.pairs:
            kinds = [kind for kind in ("space", "complement") if f"{pair.name}.{kind}" in tensors]
            vectors = tensors[f"{pair.name}.{kinds[0]}"] if kinds else None
            if vectors is None or vectors.dim() != 2 or vectors.shape[0] != pair.A.shape[1]:
                raise ValueError(f"the saved input space of {pair.name} does not fit its A {tuple(pair.A.shape)}")
            bases.append(dual_gpm.Basis(vectors.to(pair.A.device), kinds[0] == "complement"))
        super()._load_state(tensors)
        self.bases = bases
