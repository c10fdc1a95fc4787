"""OPCM (arXiv 2501.09522): independent fine-tunes, each projected off what the merge holds already, then rescaled."""

from __future__ import annotations

from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from .base import Method
from .extended import fresh, refuse_shards
from .products import product_svd
from .showing import Weights

# Singular values below this part of the largest are what rounding left of zero: their vectors are arbitrary.
_ROUNDING = 1e-6


class OPCM(Method):
    """Δ_t = (λ_{t−1} Δ_{t−1} + P(τ_t)) / λ_t with the task vectors τ = s · B A of adapters trained from scratch.

    With Δ_{t−1} = U diag(σ) Vᵀ and k the number of its largest σ whose sum stays within alpha of Σ σ, P takes out of
    τ_t the coefficients C = Uᵀ τ_t V of the k × k block and of the whole diagonal. λ_t = ‖numerator‖ / mean_{j ≤ t}
    ‖τ_j‖ over the whole model (Frobenius), λ_1 = 1: the merge stays as large as the mean task vector. All of it by QR
    of the factors and an SVD between them, in fp64; no m×n delta. Only singular values that are not zero count.

    alpha: 0.5 in the paper; 0 removes the diagonal alone. seed: of the fresh A that each further task starts from,
    with B = 0. `lambdas` holds 1/λ_t. The merge is exact, so its rank, and that of the exported adapter, is T · r.
    Each of a mixture's experts is a layer. Raises ValueError for an alpha outside [0, 1], and for convolutions.
    """

    name = "opcm"

    def __init__(
        self, model: nn.Module, alpha: float = 0.5, adapter: str = "default", seed: int = 0, beside: str = "keep"
    ) -> None:
        super().__init__(model, adapter=adapter, beside=beside)
        if not 0.0 <= alpha <= 1.0:
            raise ValueError(f"alpha must lie in [0, 1], not {alpha}")
        wide = [pair.name for pair in self.pairs if any(p.dim() != 2 for p in pair.parameters)]
        if wide:
            raise ValueError(f"opcm cannot treat {len(wide)} layers that are no matrices: {', '.join(wide[:8])}")
        self.alpha, self.seed = float(alpha), int(seed)
        self._merged: list[tuple[Tensor, Tensor]] = []
        self._lambda, self._norms = 1.0, 0.0  # λ of the last task, and the sum of ‖τ‖ over the tasks

    def _begin(self, task: int) -> None:
        refuse_shards(self)  # which have no room for the merge's rank
        if task > 1:
            for pair in self.pairs:
                pair.A.copy_(fresh(pair.A, f"{self.seed}/{task}/{pair.name}"))
                pair.B.zero_()

    def _end(self, task: int) -> float:
        live = self._each([(pair.A, pair.B) for pair in self.pairs])
        norms = self._norms + self._norm(live)
        if task == 1:
            self._merged, self._norms = [(pair.A.clone(), pair.B.clone()) for pair in self.pairs], norms
            return 1.0
        sums = [
            added(A_old, B_old, A, B, self._lambda, self.alpha)
            for (A_old, B_old), (A, B) in zip(self._each(self._merged), live, strict=True)
        ]
        mean = norms / task
        scale = self._norm(sums) / mean if mean > 0 else 1.0
        by = scale or 1.0  # a sum that is zero stays zero
        rest = iter(sums)
        merged = []
        for pair in self.pairs:
            own, rank = list(islice(rest, pair.experts)), task * pair.rank
            A = pair.join("A", [_padded(A, rank, 0) for A, _ in own])
            B = pair.join("B", [_padded(B / by, rank, 1) for _, B in own])
            merged.append((A.to(pair.A.dtype), B.to(pair.B.dtype)))
        self._merged, self._lambda, self._norms = merged, scale, norms
        return 1.0 / by

    def _each(self, factors: list[tuple[Tensor, Tensor]]) -> list[tuple[Tensor, Tensor]]:
        """The matrices of layers and experts, in fp64."""
        return [
            (A.double(), B.double())
            for pair, (As, Bs) in zip(self.pairs, factors, strict=True)
            for A, B in zip(pair.split("A", As), pair.split("B", Bs), strict=True)
        ]

    def _norm(self, factors: list[tuple[Tensor, Tensor]]) -> float:
        scalings = [pair.scaling for pair in self.pairs for _ in range(pair.experts)]
        squares = [
            scaling**2 * ((A @ A.T) * (B.T @ B)).sum().clamp(min=0)
            for scaling, (A, B) in zip(scalings, factors, strict=True)
        ]
        return float(torch.stack(squares).sum().sqrt())

    def _merged_weights(self) -> Weights:
        return list(self._merged) or super()._merged_weights()

    def _stacked(self) -> int:
        return len(self._merged[0][0]) // len(self.pairs[0].A) if self._merged else 1

    def _options(self) -> dict[str, Any]:
        return {"alpha": self.alpha, "seed": self.seed}

    def _state(self) -> dict[str, Tensor]:
        state: dict[str, Tensor] = {}
        for pair, (A, B) in zip(self.pairs, self._merged, strict=False):
            state |= {f"{pair.name}.A_merged": A, f"{pair.name}.B_merged": B}
        if state:
            state[f"{self.pairs[0].name}.scales"] = torch.tensor([self._lambda, self._norms], dtype=torch.float64)
        return state

    def _load_state(self, tensors: dict[str, Tensor]) -> None:
        merged: list[tuple[Tensor, Tensor]] = []
        for pair in self.pairs if tensors else ():
            A, B = (tensors.get(f"{pair.name}.{factor}_merged") for factor in "AB")
            if A is None or B is None or (B.shape[0], *A.shape) != (pair.B.shape[0], B.shape[1], pair.A.shape[1]):
                raise ValueError(f"the saved merge of {pair.name} does not fit its A {tuple(pair.A.shape)}")
            merged.append((A.to(pair.A), B.to(pair.B)))
        scales = tensors.get(f"{self.pairs[0].name}.scales")
        if (scales is None) != (not merged):
            raise ValueError("the saved merge lacks its scales")
        self._lambda, self._norms = (1.0, 0.0) if scales is None else scales.tolist()
        self._merged = merged


def added(A_old: Tensor, B_old: Tensor, A: Tensor, B: Tensor, factor: float, alpha: float) -> tuple[Tensor, Tensor]:
    """(A, B) whose product is factor · B_old A_old + P(B A), of the rank of the old product plus r."""
    U, S, Vh = product_svd(A_old, B_old)
    count = int((_ROUNDING * S[:1] < S).sum())
    U, S, V = U[:, :count], S[:count], Vh[:count].T
    top = int((S.cumsum(0) <= alpha * S.sum()).sum())
    C = (U.T @ B) @ (A @ V)
    removed = torch.diag(C.diagonal())
    removed[:top, :top] = C[:top, :top]
    return torch.cat([V.T, A]), torch.cat([U @ (torch.diag(factor * S) - removed), B], 1)


def _padded(factor: Tensor, rank: int, axis: int) -> Tensor:
    """Zeros up to `rank`: all layers of an exported adapter have their configured rank T times."""
    missing = rank - factor.shape[axis]
    return nn.functional.pad(factor, (0, 0, 0, missing) if axis == 0 else (0, missing))
