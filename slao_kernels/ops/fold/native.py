"""fold_ in the compiled core: every weight read and written once."""

from __future__ import annotations

from torch import Tensor

from ... import native


def fold_(
    weights: list[Tensor],
    As: list[Tensor],
    Bs: list[Tensor],
    scalings: list[float],
    prepared: native.Tables | None = None,
) -> None:
    """As `reference.fold_`; see csrc/cpu/fold.cpp and csrc/cuda/fold.cu.

    prepared: `tables` of the same lists, which the caller has kept.
    """
    native.run("fold", weights, tables(weights, As, Bs) if prepared is None else prepared, scalings)


def tables(weights: list[Tensor], As: list[Tensor], Bs: list[Tensor]) -> native.Tables:
    """The records of every weight that has elements, without their scalings."""
    owners = [owner for owner, W in enumerate(weights) if W.numel()]
    triples = ((weights[owner], As[owner], Bs[owner]) for owner in owners)
    return native.table(native.matrix(W) + native.matrix(A) + native.matrix(B) for W, A, B in triples), owners
