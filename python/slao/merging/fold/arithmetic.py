"""What one parameter becomes: W + Σ s B A and its kin, computed in fp32 (fp64 where something is) and rounded once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import reduce

import torch
from torch import Tensor

from slao_kernels import fold_

from ...folders import Source
from .stored import Piece

Part = Callable[[], Tensor]  # what an adapter has beside A and B, read when it is needed


@dataclass(frozen=True)
class Low:
    """A layer's A and B of one adapter; what they are multiplied with."""

    source: Source
    layer: str
    factor: float


@dataclass
class Change:
    """Of one parameter, in the order in which it is applied. value: what replaces it. low: A and B of adapters.

    transposed: the parameter is stored as (in, out), so that A and B belong to its transpose. experts: how many are
    packed into A and B, 0 for a layer. magnitude: DoRA's. plus: what is added, a bias's part and its scaling. rows:
    the rows that are replaced. shape: of `value`.
    """

    value: Part | None = None
    shape: tuple[int, ...] | None = None
    low: list[Low] = field(default_factory=list)
    transposed: bool = False
    experts: int = 0
    magnitude: Part | None = None
    plus: list[tuple[Part, float]] = field(default_factory=list)
    rows: tuple[Part, tuple[int, ...]] | None = None


def changed(weight: Tensor, change: Change, piece: Piece, dtype: torch.dtype) -> Tensor:
    """The stored tensor `weight`, which is written into, or what replaces it, after `change`, in `dtype`."""
    if change.value is not None:
        weight = _part(change.value(), piece)
        if change.low or change.magnitude is not None or change.rows is not None:
            weight = weight.clone()  # what a file holds is not written into
    if (weight.dtype != dtype and change.low) or change.magnitude is not None or change.plus:
        weight = weight.to(torch.promote_types(weight.dtype, torch.float32))
    if change.low:
        _fold(weight, change, piece)
    if change.magnitude is not None:
        weight = _normed(weight, change, piece)
    for part, factor in change.plus:
        weight = weight + factor * part().to(weight.dtype)
    weight = weight.to(dtype)
    if change.rows is not None:
        part, indices = change.rows
        weight[torch.tensor(indices, dtype=torch.long)] = part().to(dtype)
    return weight


def _fold(weight: Tensor, change: Change, piece: Piece) -> None:
    """In place; a delta of one layer (or expert) after another."""
    A, B, factor = _stacked(change.low, change.experts)
    if not change.experts:
        pairs, views = [(A, B)], [_matrix(weight, change.transposed)]
    else:
        indices = range(change.experts) if piece.index is None else [piece.index]
        pairs = [(A[index], B[index]) for index in indices]
        views = [_matrix(expert, change.transposed) for expert in weight.view(len(pairs), *weight.shape[-2:])]
    if not piece.whole:
        part = slice(piece.start, piece.start + weight.shape[piece.dim])
        by_rows = (piece.dim == 0) != change.transposed
        pairs = [(A, B[part]) if by_rows else (A[:, part], B) for A, B in pairs]
    fold_(views, [A for A, _ in pairs], [B for _, B in pairs], factor)


def _matrix(weight: Tensor, transposed: bool) -> Tensor:
    """(out, in) of a layer's weight, a view; a convolution's with its kernel as in."""
    return weight.t() if transposed else weight.flatten(1)


def _stacked(low: Sequence[Low], experts: int) -> tuple[Tensor, Tensor, float]:
    """A and B, and a factor, whose product is the sum of all; of experts (E, r, in) and (E, out, r).

    Several adapters' A and B are put side by side, so that their sum is rounded once.
    """
    pairs = [each.source.read(each.layer) for each in low]
    if experts:  # PEFT has A as (E r, in), expert after expert, and B as (out, r E), rank after rank
        pairs = [(A.view(experts, -1, A.shape[1]), B.view(B.shape[0], -1, experts).permute(2, 0, 1)) for A, B in pairs]
    if len(pairs) == 1:
        return *pairs[0], low[0].factor
    wide = reduce(torch.promote_types, [tensor.dtype for pair in pairs for tensor in pair], torch.float32)
    As = [A.to(wide) for A, _ in pairs]
    Bs = [(B.double() * each.factor).to(wide) for (_, B), each in zip(pairs, low, strict=True)]
    return torch.cat(As, -2), torch.cat(Bs, -1), 1.0


def _normed(weight: Tensor, change: Change, piece: Piece) -> Tensor:
    """DoRA (arXiv 2402.09353, equation 5): m · (W + s B A) / ‖W + s B A‖, a norm for each output. In place."""
    assert change.magnitude is not None
    magnitude = change.magnitude().flatten().to(weight.dtype)
    view = _matrix(weight, change.transposed)
    if not piece.whole:
        magnitude = magnitude[piece.start : piece.start + len(view)]
    view *= (magnitude / torch.linalg.vector_norm(view, dim=1))[:, None]
    return weight


def _part(value: Tensor, piece: Piece) -> Tensor:
    value = value if piece.index is None else value[piece.index]
    return value if piece.whole else value.narrow(piece.dim, piece.start, piece.stored.shape[piece.dim])
