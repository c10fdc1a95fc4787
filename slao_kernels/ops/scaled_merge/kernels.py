"""scaled_merge_ in Triton: one launch for all pairs with fp64 destinations, one for all others."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from ... import native
from .. import tables as device_tables
from . import device

# Elements of a program, by the bytes of the larger side's: 16 KB, that is 4 vectors of 16 bytes for each of 256
# threads. Reasoned, not measured.
_BLOCKS = {8: 2048, 4: 4096, 2: 8192}
STEP = 1024


def scaled_merge_(
    merged: list[Tensor],
    finetuned: list[Tensor],
    lam: list[float],
    prepared: list[device_tables.Launch] | None = None,
) -> None:
    """As `reference.scaled_merge_`; see device.py.

    prepared: `tables` of the same lists, which the caller has kept.
    """
    device_tables.run(tables(merged, finetuned) if prepared is None else prepared, merged, lam)


def tables(merged: list[Tensor], finetuned: list[Tensor]) -> list[device_tables.Launch]:
    """The launches for these tensors; the weights are not in them, since they change from task to task."""
    groups: dict[bool, tuple[list[int], list[Sequence[int]]]] = {}
    for owner, (target, source) in enumerate(zip(merged, finetuned, strict=True)):
        if target.numel():
            owners, records = groups.setdefault(target.dtype == torch.float64, ([], []))
            for record in _records(target, source):
                owners.append(owner)
                records.append(record)
    return [_launch(wide, *group, merged[0].device) for wide, group in groups.items()]


def _launch(wide: bool, owners: list[int], records: list[Sequence[int]], where: torch.device) -> device_tables.Launch:
    dst_type, src_type = (device_tables.uniform(record[row] for record in records) for row in (5, 11))
    constants = constants_of(dst_type, src_type, wide)
    programs = [-(-record[1] * record[2] // constants["BLOCK"]) for record in records]
    table, total = device_tables.columns(records, programs, where)
    return device_tables.Launch(device.merge_kernel, table, total, owners, constants)


def constants_of(dst_type: Any, src_type: Any, wide: bool) -> dict[str, Any]:
    """The kernel's constants but SEARCH. A type None: several."""
    size = 8 if wide else max(kind.primitive_bitwidth // 8 if kind else 4 for kind in (dst_type, src_type))
    return {
        "DST_TYPE": dst_type,
        "SRC_TYPE": src_type,
        "COMPUTE": tl.float64 if wide else tl.float32,
        "BLOCK": _BLOCKS[size],
        "STEP": STEP,
    }


def _records(target: Tensor, source: Tensor) -> Iterator[Sequence[int]]:
    """The rows of device.py from DST on: the compiled core's, and how a program may walk over them."""
    for record in native.pairs(target, source):
        dense = record[1] == 1 and record[4] == record[10] == 1
        aligned = dense and record[0] % 16 == 0 and record[6] % 16 == 0
        yield *record, int(dense), int(aligned)
