"""SLoRA (ACL 2026, long papers, 247), its online form: a new pair a task, cut when the task ends."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import base_weights
from .extended import refuse_shards
from .inclora import IncLoRA
from .products import product_svd


class SLoRA(IncLoRA):
    """IncLoRA that cuts each pair, when its task ends, to the leading singular triplets of B A, as many as `kept` says.

    Those whose left vectors together lie nearest to the r leading ones of W + s Σ B A, as the task found it: the rest
    is taken for noise that disturbs earlier tasks ("SLoRA-Pre"; "-Post" cuts all pairs after the last task). Every
    number from 1 to r is weighed. The authors' code weighs tenths of r, and takes for each the triplets of a random
    sketch of so many columns, which are near the leading ones.

    strength: what the cut pair is multiplied by. The authors' code trains with alpha = 2 r and merges with alpha = r,
    which is 0.5. A task ends with an SVD of every layer's W and of the r × r core of B A. State: IncLoRA's.
    Raises ValueError for a strength that is not finite and above 0, for layers over quantised, sharded or other bases
    than matrices, and for an adapter that is trained before the first task.
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
        if task == 1:
            base_weights.refuse_trained(self)
        super()._begin(task)

    def _end(self, task: int) -> float:
        self._refuse()
        cuts = [self._cut_pair(index) for index in range(len(self.pairs))]  # all, before one is written
        for pair, (A, B) in zip(self.pairs, cuts, strict=True):
            pair.A.copy_(A)
            pair.B.copy_(B)
        return 1.0

    def _cut_pair(self, index: int) -> tuple[Tensor, Tensor]:
        """A and B of the layer after the cut, zeros in the rows and columns that it leaves out."""
        pair, weight = self.pairs[index], base_weights.found(self, index, self.frozen(index))
        leading = torch.linalg.svd(weight, False)[0][:, : pair.rank]
        U, S, Vh = product_svd(pair.A.to(weight), pair.B.to(weight))
        rank = int(S.gt(S[0] * pair.rank * torch.finfo(S.dtype).eps).sum())
        count = kept(U, leading, rank)
        none = pair.rank - count
        return F.pad(Vh[:count], (0, 0, 0, none)), F.pad(self.strength * U[:, :count] * S[:count], (0, none))

    def _refuse(self) -> None:
        refuse_shards(self)
        self._check()  # the base may have been sharded or quantised since

    def _options(self) -> dict[str, Any]:
        return super()._options() | {"strength": self.strength}


def kept(U: Tensor, leading: Tensor, rank: int) -> int:
    """How many of the first `rank` columns of U (m, k) are kept: with which ‖[U_c, random]ᵀ leading‖²_F is largest.

    leading: (m, l) orthonormal. [U_c, random] is U's first c columns, completed to k orthonormal ones. The authors'
    code completes them by what an SVD returns for singular values of zero: any vectors off U_c. Here stands the
    expectation over all such, so that a column adds to it where it lies nearer to `leading` than chance; U_c alone
    would never be cut, since every column adds to its norm. All, where k = m: nothing lies off them. 1 at least.
    """
    rows, columns = U.shape
    if columns == rows:
        return max(rank, 1)
    count = torch.arange(1, columns + 1, device=U.device)
    inside = (leading.T @ U).square().sum(0).cumsum(0)
    by_chance = (columns - count) * (leading.shape[1] - inside) / (rows - count)
    return 1 + int((inside + by_chance)[: max(rank, 1)].argmax())
