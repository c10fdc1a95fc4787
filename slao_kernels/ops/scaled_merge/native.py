"""scaled_merge_ in the compiled core: all pairs in one sweep over memory."""

from __future__ import annotations

from torch import Tensor

from ... import native


def scaled_merge_(
    merged: list[Tensor], finetuned: list[Tensor], lam: list[float], prepared: native.Tables | None = None
) -> None:
    """As `reference.scaled_merge_`; see csrc/cpu/scaled_merge.cpp and csrc/cuda/scaled_merge.cu.

    prepared: `tables` of the same lists, which the caller has kept.
    """
    native.run("scaled_merge", merged, tables(merged, finetuned) if prepared is None else prepared, lam)


def tables(merged: list[Tensor], finetuned: list[Tensor]) -> native.Tables:
    """The records without their weights, which change from task to task."""
    records: list[tuple[int, ...]] = []
    owners: list[int] = []
    for owner, (target, source) in enumerate(zip(merged, finetuned, strict=True)):
        for record in native.pairs(target, source):
            records.append(record)
            owners.append(owner)
    return native.table(records), owners
