"""interference: inner products, cosines and norms of several adapters' task vectors, without ever forming one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from . import checks, gram, several

# A squared norm below this part of ‖A‖² ‖B‖² is what the roundings of a sum that is zero leave.
_ROUNDING = 2.0**-46


@dataclass(frozen=True)
class Interference:
    """How the task vectors s B A of T adapters lie to each other, in L layers. fp64, on the adapters' device.

    layers: L names. gram: (L, T, T), the inner products ⟨sᵢ Bᵢ Aᵢ, sⱼ Bⱼ Aⱼ⟩ (entries multiplied and summed).
    """

    layers: list[str]
    gram: Tensor

    @property
    def norms(self) -> Tensor:
        """(L, T): ‖s B A‖, Frobenius."""
        return self.gram.diagonal(dim1=-2, dim2=-1).sqrt()

    @property
    def cosines(self) -> Tensor:
        """(L, T, T), in [-1, 1]. A task vector that is zero has cosine 0 with all, itself included."""
        norms = self.norms
        products = norms[:, :, None] * norms[:, None, :]
        return torch.where(products == 0, 0.0, self.gram / products).clamp(-1, 1)

    def whole(self) -> Interference:
        """The same of the whole model: its layers' task vectors as one long vector, L = 1."""
        return Interference(["model"], self.gram.sum(0, keepdim=True))


def interference(adapters: Sequence[several.Adapter], *, model: nn.Module | None = None) -> Interference:
    """Inner products of the adapters' task vectors s B A, in every layer: how much tasks get in each other's way.

    adapters: T adapters, each (As, Bs, scalings) with lists over the layers and one scaling or one a layer, or a
    sequence over the layers of (A, B), (A, B, scaling) or LoraPair; or T names of adapters of `model`. A is (r, n),
    B (m, r), of any floating dtypes and strides, on one device; ranks may differ between adapters and layers, and be 0
    (so counts a layer that one of a model's adapters leaves out). Nothing is changed, autograd does not record it.
    Returns an `Interference`.

    By traces of r×r products, tr((Bᵢᵀ Bⱼ)(Aⱼ Aᵢᵀ)), in fp64 on every device, a few layers at a time: no m×n delta.
    The error of a cosine is about 1e-16 κᵢ κⱼ with κ = ‖B‖ ‖A‖ / ‖B A‖ (some 1 to 10 for trained adapters), and a
    task vector with κ > 8e6 cannot be told from zero and counts as zero. On a GPU nothing is waited for.
    Values are not inspected: a NaN shows in the rows and columns of its adapter, and nowhere else.
    Raises ValueError that names every offender (shape, dtype, device, length, a layer of the model with no plain A
    and B).
    Source: task vectors, arXiv 2212.04089, section 4 (their cosines).
    """
    problems = checks.Problems("interference")
    adapters = list(adapters)
    layers = several.read(problems, adapters, model)
    problems.raise_if_any()
    count = len(adapters)
    if not layers or not count:
        return Interference([], torch.zeros(0, count, count, dtype=torch.float64))
    with torch.no_grad():
        rows: list[Tensor] = [layers[0].As[0]] * len(layers)
        for members, left, right in _products(layers):
            for index, row in zip(members, _traces(left, right, layers[members[0]].ranks), strict=True):
                rows[index] = row
        factors = torch.tensor([layer.scalings for layer in layers], dtype=torch.float64)
        factors = factors.to(rows[0].device, non_blocking=True)
        gram = torch.stack(rows) * (factors[:, :, None] * factors[:, None, :])
    return Interference([layer.name for layer in layers], gram)


def _products(layers: list[several.Layer]) -> Iterator[tuple[list[int], Tensor, Tensor]]:
    """(indices of layers of the same ranks, their A Aᵀ, their Bᵀ B), (L, R, R) in fp64."""
    if gram.has(layers[0].As[0].device):
        yield from several.grams(layers)
        return
    for members, A, B in several.stacks(layers):
        yield members, A @ A.mT, B.mT @ B


def _traces(left: Tensor, right: Tensor, ranks: tuple[int, ...]) -> Tensor:
    """(L, T, T) of A Aᵀ and Bᵀ B (L, R, R): tr((Bᵢᵀ Bⱼ)(Aⱼ Aᵢᵀ)) sums block (i, j) of their entrywise product."""
    gram = _sums(_sums(left * right, ranks).mT, ranks).mT
    # ‖A‖² ‖B‖² of each adapter.
    sizes = _sums(left.diagonal(dim1=-2, dim2=-1), ranks) * _sums(right.diagonal(dim1=-2, dim2=-1), ranks)
    nothing = (gram.diagonal(dim1=-2, dim2=-1) <= _ROUNDING * sizes) & sizes.isfinite()
    return gram.masked_fill(nothing[:, :, None] | nothing[:, None, :], 0)


def _sums(matrix: Tensor, ranks: tuple[int, ...]) -> Tensor:
    """(..., R) -> (..., T): each adapter's columns added up. Not by a product with zeros: they would spread a NaN."""
    return torch.stack([part.sum(-1) for part in matrix.split(ranks, dim=-1)], dim=-1)
