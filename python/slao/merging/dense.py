"""One delta as a matrix of the layer's size, and its cut to a rank, which `extract` and the merges of DoRA share."""

from __future__ import annotations

import math

from torch import Tensor

from . import product
from .cuts import Limit, balanced
from .factors import Pair

TOLERANCE = 5e-3  # of `product.leading`: residuals within 1 % of the best (bench/engines_svd.py)
_FIRST_RANK = 16  # that a search for a rank begins with
# Entries that are widened at once: larger blocks come from the kernel anew each time, a page fault every 4 KiB.
_PART = 1 << 18


def cut(delta: Tensor, limit: Limit) -> Pair:
    """A (r, n) and B (m, r) of a delta (m, n), fp32 or fp64, in its dtype."""
    m, n = delta.shape
    most = limit.most((m, n))
    rank = most if limit.keep is None else min(most, _FIRST_RANK)
    total = 0.0 if limit.keep is None else norm(delta) ** 2  # which only `keep` asks for
    while True:
        U, S, V = product.leading(delta, rank, TOLERANCE)
        if rank == most or limit.keep is None or float(S.double().square().sum()) >= limit.keep * total:
            break
        rank = min(2 * rank, most)
    r = limit.chosen(S, total)
    return balanced(V[:, :r].T, U[:, :r] * S[:r])


def norm(tensor: Tensor, other: Tensor | None = None) -> float:
    """‖tensor − other‖ in fp64, a part at a time."""
    parts = tensor.flatten().split(_PART)
    others = [None] * len(parts) if other is None else other.flatten().split(_PART)
    squares = [
        float((part.double() - (0 if its is None else its.double())).square().sum())
        for part, its in zip(parts, others, strict=True)
    ]
    return math.sqrt(sum(squares))


def residual(delta: Tensor, A: Tensor, B: Tensor) -> float:
    """‖delta − B A‖, a few rows at a time."""
    wide = A.double()
    parts = zip(blocks(delta), B.split(rows(delta)), strict=True)
    return math.sqrt(sum(float((part.double() - b.double() @ wide).square().sum()) for part, b in parts))


def blocks(matrix: Tensor) -> tuple[Tensor, ...]:
    return matrix.split(rows(matrix))


def rows(matrix: Tensor) -> int:
    """How many are widened at once."""
    return max(1, _PART // matrix.shape[1])
