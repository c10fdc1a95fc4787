"""Deltas cut to a rank: which rank, and what was lost of each layer. `compress` and `extract` share it."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

# What vLLM takes as max_lora_rank.
SERVED = (1, 8, 16, 32, 64, 128, 256, 320, 512)
RECORD = "layers.json"  # in the written folder


@dataclass(frozen=True)
class Limit:
    """How much is kept of a layer: `rank` singular values; or, with `keep`, as few as hold that part of ‖Δ‖² (and no
    more than `rank`, if that is given too)."""

    rank: int | None = None
    keep: float | None = None

    def __post_init__(self) -> None:
        if self.rank is None and self.keep is None:
            raise ValueError("say how much to keep: a rank (--rank 16), or a part of the squared norm (--keep 0.99)")
        if self.rank is not None and self.rank < 1:
            raise ValueError(f"rank must be at least 1, not {self.rank}")
        if self.keep is not None and not 0 < self.keep <= 1:
            raise ValueError(f"keep must lie in (0, 1], not {self.keep}")

    def most(self, shape: tuple[int, int]) -> int:
        """The largest rank that a layer of this shape may get."""
        return min(self.rank or min(shape), *shape)

    def chosen(self, values: Tensor, total: float) -> int:
        """The rank, given the leading singular values and ‖Δ‖²; at least 1."""
        most = min(self.rank or len(values), len(values))
        if self.keep is None:
            return most
        kept = values.double().square().cumsum(0)
        # Not more for what the roundings of a sum of these squares leave open.
        return min(most, 1 + int((kept < self.keep * total * (1 - 1e-14)).sum()))


@dataclass(frozen=True)
class CutLayer:
    """One written layer. norm: ‖Δ‖ (Frobenius) before it was cut. lost: ‖Δ − B A‖ / ‖Δ‖ of A and B as they are stored,
    their rounding included; 0 for a Δ that is zero."""

    rank: int
    norm: float
    lost: float


@dataclass(frozen=True)
class CutAdapter:
    """What was written. layers: by name, in the order of the file. notes: what else is to be said, a line each."""

    folder: Path
    layers: dict[str, CutLayer]
    notes: tuple[str, ...] = ()

    @property
    def lost(self) -> float:
        """‖Δ − B A‖ / ‖Δ‖ over all layers together."""
        total = sum(layer.norm**2 for layer in self.layers.values())
        lost = sum((layer.lost * layer.norm) ** 2 for layer in self.layers.values())
        return math.sqrt(lost / total) if total else 0.0

    def record(self, folder: Path) -> None:
        """Write it into `folder` as JSON."""
        layers = {name: vars(layer) for name, layer in self.layers.items()}
        content = {"lost": self.lost, "layers": layers, "notes": self.notes}
        (folder / RECORD).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")

    def cells(self) -> tuple[list[str], list[list[str]]]:
        """Header and rows of the table of layers."""
        rows = [
            [name, str(layer.rank), f"{layer.norm:.3g}", f"{layer.lost:.3%}"] for name, layer in self.layers.items()
        ]
        return ["layer", "rank", "norm", "lost"], rows

    def summary(self) -> list[str]:
        """The lines below it: the notes, and the whole."""
        ranks = sorted({layer.rank for layer in self.layers.values()})
        rank = f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {ranks[0]} to {ranks[-1]}"
        return [
            *self.notes,
            f"{self.folder}: {len(self.layers)} layers, {rank}, which leave out {self.lost:.3%} of the whole (norms; "
            f"{self.lost**2:.3%} of the squares); {served(ranks[-1])}",
        ]

    def __str__(self) -> str:
        header, rows = self.cells()
        width = max(map(len, self.layers))
        lines = [f"{name:{width}} {rank:>5} {norm:>9} {lost:>9}" for name, rank, norm, lost in [header, *rows]]
        return "\n".join([*lines, *self.summary()])


def served(rank: int) -> str:
    fits = next((most for most in SERVED if most >= rank), None)
    return f"vLLM takes it with --max-lora-rank {fits}" if fits else f"vLLM takes no rank above {SERVED[-1]}"


def balanced(A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
    """The same B A with rows of A (r, n) as long as the columns of B (m, r): in 16 bits neither leaves its range."""
    down, up = A.norm(dim=1), B.norm(dim=0)
    factor = torch.where((down > 0) & (up > 0), (up / down).sqrt(), 1.0)
    return A * factor[:, None], B / factor
