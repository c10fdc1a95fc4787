"""How alike the A, and the B, of different tasks are, layer by layer: the SLAO paper's asymmetry (arXiv 2512.23017)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from slao_kernels import sharding
from slao_kernels.ops.checks import not_finite

from . import checkpoint
from .methods import Method

FACTORS = ("A", "B")
MEASURES = ("cosine", "overlap")
# Singular values below this share of the largest are the rounding of an fp32 factor, and no direction of their own.
_RANK_TOLERANCE = 1e-6


class Similarity:
    """Keeps the A and B that every task trained (before any merge), and compares those of all pairs of tasks.

    Give one to `slao.train.train(similarity=...)`, or call `record(method)` between a task's last step and
    `method.end_task()` in a loop of your own. Kept on the CPU in the adapter's dtype: one adapter's memory a task.
    What is compared is the pair that trains: C-LoRA's routing and pairs that are frozen have no part in it.
    """

    def __init__(self) -> None:
        self.tasks: list[str] = []
        self.layers: list[str] = []
        self._trained: list[list[tuple[Tensor, Tensor]]] = []

    def record(self, method: Method) -> None:
        """Keep a copy of A (r, n) and B (m, r) of every layer and expert, as the task that runs has trained them.

        Every rank calls it. ValueError, with nothing kept, where no task runs, where layers or shapes are others than
        in the tasks before, or where a weight is NaN or infinite.
        """
        if not method.in_task:
            raise ValueError("record(method) belongs between a task's training and end_task(); no task is running")
        with sharding.whole(method.model, method.adapter, method.pairs, write=False) as (pairs, _):
            both = [two for pair in pairs for two in zip(pair.split("A", pair.A), pair.split("B", pair.B), strict=True)]
            trained = [(A.to("cpu", copy=True), B.to("cpu", copy=True)) for A, B in both]
            layers = [name for pair in pairs for name in pair.names]
        self._append(method.names[-1], layers, trained)

    def _append(self, task: str, layers: list[str], trained: list[tuple[Tensor, Tensor]]) -> None:
        if self.tasks:
            before = list(zip(self.layers, map(_shapes, self._trained[0]), strict=True))
            differing = sorted({name for name, _ in {*before} ^ {*zip(layers, map(_shapes, trained), strict=True)}})
            if differing:
                raise ValueError(
                    f"task {task!r} has other layers or shapes than {self.tasks[0]!r}, so they cannot be compared: "
                    f"{', '.join(differing[:8])}"
                )
        broken = sorted({layers[index // 2] for index in not_finite([weight for pair in trained for weight in pair])})
        if broken:
            raise ValueError(f"task {task!r} diverged: NaN or infinite weights in {', '.join(broken[:8])}")
        self.tasks.append(task)
        self.layers = layers
        self._trained.append(trained)

    def table(self) -> dict[str, Any]:
        """JSON-able, for T tasks and L layers: {"tasks", "layers", "shapes": {"A": [L][r, n], "B": [L][m, r]},
        "cosine": {"A": [L][T][T], "B": ...}, "overlap": {"A": [L][T][T], "B": ...}}.

        cosine: of the flattened factors. It depends on the basis: M A and B M⁻¹ are the same adapter, with other ones.
        overlap: ‖Q_iᵀ Q_j‖²_F / r for orthonormal bases Q of A's row space and of B's column space, which no change of
        basis moves: 1 for the same space, 0 for orthogonal ones, `chance` of it for random ones. r is the larger of
        the two ranks. None where a factor is zero. Computed in fp64.
        """
        content: dict[str, Any] = {"tasks": list(self.tasks), "layers": list(self.layers)}
        content["shapes"] = {}
        content |= {measure: {} for measure in MEASURES}
        for which, factor in enumerate(FACTORS):
            by_layer = [[pairs[index][which].double() for pairs in self._trained] for index in range(len(self.layers))]
            content["shapes"][factor] = [list(weights[0].shape) for weights in by_layer]
            content["cosine"][factor] = [_numbers(_cosines(weights)) for weights in by_layer]
            spaces = [[weight.T if factor == "A" else weight for weight in weights] for weights in by_layer]
            content["overlap"][factor] = [_numbers(_overlaps(weights)) for weights in spaces]
        return content

    # On the disk: a file a task, written before the state that names it, and never again.

    def save(self, folder: str | Path) -> list[str]:
        """Write the last recorded task below `folder`; returns what the state has to remember for `read`."""
        with sharding.together():
            if sharding.is_first() and self.tasks:
                keys = [f"{layer}.{factor}" for layer in self.layers for factor in FACTORS]
                weights = [weight for pair in self._trained[-1] for weight in pair]
                meta = {"task": self.tasks[-1], "layers": self.layers}
                checkpoint.write_state(_path(folder, len(self.tasks)), dict(zip(keys, weights, strict=True)), meta)
        return list(self.tasks)

    @classmethod
    def read(cls, folder: str | Path, saved: Sequence[str] | None) -> Similarity:
        """What `save` left in `folder`; `saved`: what it returned last, None if the state does not know of it.

        Raises ValueError where that is None, or where a task's file is absent, damaged or another task's.
        """
        if saved is None:
            raise ValueError(
                f"the state in {folder} was written without similarity, so the trained A and B of its tasks are not "
                "there: go on without it, or start afresh in another folder"
            )
        found = cls()
        for index, task in enumerate(saved, 1):
            path = _path(folder, index)
            tensors, meta = checkpoint.read_state(path)
            if meta.get("task") != task:
                raise ValueError(f"{path} is of task {meta.get('task')!r}, the state says {task!r}")
            layers = list(meta["layers"])
            found._append(task, layers, [(tensors[f"{name}.A"], tensors[f"{name}.B"]) for name in layers])
        return found

    def take(self, other: Similarity) -> None:
        """Hold what `other` holds (of which nothing is copied)."""
        self.tasks, self.layers, self._trained = other.tasks, other.layers, other._trained


def by_layer(table: dict[str, Any], measure: str, factor: str) -> dict[str, list[float | None]]:
    """{"consecutive": [L], "all": [L]}: means of `Similarity.table` over the pairs of tasks (i, i + 1), and over all
    pairs i < j. None where every pair's is None, so with fewer than two tasks."""
    count = len(table["tasks"])
    pairs = {
        "consecutive": [(i, i + 1) for i in range(count - 1)],
        "all": [(i, j) for j in range(count) for i in range(j)],
    }
    matrices = table[measure][factor]
    return {name: [_mean([matrix[i][j] for i, j in some]) for matrix in matrices] for name, some in pairs.items()}


def summary(table: dict[str, Any]) -> dict[str, dict[str, dict[str, float | None]]]:
    """[measure][factor]: the means of `by_layer` over all layers, and the mean of `chance` of an overlap."""
    found: dict[str, dict[str, dict[str, float | None]]] = {}
    for measure in MEASURES:
        found[measure] = {}
        for factor in FACTORS:
            found[measure][factor] = {name: _mean(row) for name, row in by_layer(table, measure, factor).items()}
            if measure == "overlap":
                found[measure][factor]["chance"] = _mean(chance(table, factor))
    return found


def chance(table: dict[str, Any], factor: str) -> list[float]:
    """[L]: what the overlap of two random subspaces is on average, r/n of A and r/m of B."""
    return [min(shape) / shape[1 if factor == "A" else 0] for shape in table["shapes"][factor]]


def _mean(values: Sequence[float | None]) -> float | None:
    there = [value for value in values if value is not None]
    return fmean(there) if there else None


def _cosines(weights: Sequence[Tensor]) -> Tensor:
    """(T, T); NaN where a factor is zero."""
    rows = torch.stack([weight.flatten() for weight in weights])
    rows = rows / torch.linalg.vector_norm(rows, dim=1, keepdim=True)
    return (rows @ rows.T).clamp(-1.0, 1.0)


def _overlaps(weights: Sequence[Tensor]) -> Tensor:
    """(T, T) of the column spaces of (n, r) matrices; NaN where one is zero."""
    bases = []
    for weight in weights:
        U, sigma, _ = torch.linalg.svd(weight, full_matrices=False)
        bases.append(U[:, sigma > _RANK_TOLERANCE * sigma[:1]])
    ranks = torch.tensor([basis.shape[1] for basis in bases])
    owner = torch.eye(len(bases), dtype=torch.float64).repeat_interleave(ranks, 0)  # (sum of ranks, T)
    stacked = torch.cat(bases, 1)
    sums = owner.T @ (stacked.T @ stacked).square() @ owner
    found = (sums / torch.maximum(ranks[:, None], ranks[None])).clamp(0.0, 1.0)
    nothing = ranks == 0
    return found.masked_fill(nothing[:, None] | nothing[None], float("nan"))


def _numbers(matrix: Tensor) -> list[list[float | None]]:
    return [[None if value != value else value for value in row] for row in matrix.tolist()]  # NaN


def _shapes(pair: tuple[Tensor, Tensor]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    return tuple(pair[0].shape), tuple(pair[1].shape)


def _path(folder: str | Path, index: int) -> Path:
    return Path(folder) / "trained" / f"{index:04d}.safetensors"
