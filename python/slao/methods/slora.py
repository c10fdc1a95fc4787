"""SLoRA (ACL 2026, long papers, 247), its online form: a new pair a task, cut to what lies near the weights' own."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import base_weights
from .extended import refuse_shards
from .inclora import IncLoRA


class SLoRA(IncLoRA):
    """IncLoRA that cuts each pair, when its task ends, to the leading singular triplets of B A that `kept` counts.

    Its measure is the overlap of the left singular vectors of B A with the r leading ones of W + s Σ B A, as the task
    found it: what lies off them is taken for noise that disturbs earlier tasks ("SLoRA-Pre"; "-Post" cuts all pairs
    after the last task). Every number of triplets from 1 to r is weighed; the authors' code weighs tenths of r.

    strength: what the cut pair is multiplied by. The authors' code trains with alpha = 2 r and merges with alpha = r,
    which is 0.5. A task ends with an SVD of every layer's W and of the r × r core of B A. State: IncLoRA's.
    Raises ValueError for a strength that is not finite and above 0, and for layers over quantised, sharded or other
    bases than matrices.
    """

    name = "slora"

    def __init__(
        self,
        model: nn.Module,
        strength: float = 1.0,
        adapter: str = "default",
        seed: int = 0,
        beside: str = "keep",
        max_pairs: int | None = None,
    ) -> None:
        if not 0.0 < strength < float("inf"):
            raise ValueError(f"strength must be finite and above 0, not {strength}")
        super().__init__(model, adapter=adapter, seed=seed, beside=beside, max_pairs=max_pairs)
        self.strength = float(strength)

    def _check(self) -> None:
        base_weights.refuse(self, {pair.name: base_weights.why_not(pair.layer, self.adapter) for pair in self.pairs})

    def _begin(self, task: int) -> None:
        self._refuse()
        super()._begin(task)

    def _end(self, task: int) -> float:
        self._refuse()
        for index, pair in enumerate(self.pairs):
            weight = base_weights.found(self, index)
            leading = torch.linalg.svd(weight, False)[0][:, : pair.rank]
            U, S, Vh = product_svd(pair.A.to(weight), pair.B.to(weight))
            count = kept(U, leading)
            none = pair.rank - count  # rows and columns that hold zeros from now on
            pair.A.copy_(F.pad(Vh[:count], (0, 0, 0, none)))
            pair.B.copy_(F.pad(self.strength * U[:, :count] * S[:count], (0, none)))
        return 1.0

    def _refuse(self) -> None:
        refuse_shards(self)
        self._check()  # the base may have been sharded or quantised since

    def _options(self) -> dict[str, Any]:
        return super()._options() | {"strength": self.strength}


def product_svd(A: Tensor, B: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """U (m, k), S (k), Vh (k, n) of B A from A (r, n) and B (m, r), k = min(r, m, n): QR of both, SVD of the core."""
    Q_A, R_A = torch.linalg.qr(A.T)
    Q_B, R_B = torch.linalg.qr(B)
    U, S, Vh = torch.linalg.svd(R_B @ R_A.T, False)
    return Q_B @ U, S, Vh @ Q_A.T


def kept(U: Tensor, leading: Tensor) -> int:
    """How many of the columns of U (m, k) are kept: those with which ‖[U_c, random]ᵀ leading‖²_F is largest.

    leading: (m, l) orthonormal. [U_c, random] is U's first c columns, completed to k orthonormal ones. The authors'
    code completes them by what an SVD returns for singular values of zero: any vectors off U_c. Here stands the
    expectation over all such, so that a direction counts for keeping only where it lies nearer to `leading` than
    chance; U_c alone would never be cut, since every column adds to the norm. The smallest number of equals.
    """
    rows, columns = U.shape
    count = torch.arange(1, columns + 1, device=U.device)
    inside = (leading.T @ U).square().sum(0).cumsum(0)
    by_chance = (columns - count) * (leading.shape[1] - inside) / (rows - count).clamp(min=1)
    return 1 + int((inside + by_chance).argmax())
