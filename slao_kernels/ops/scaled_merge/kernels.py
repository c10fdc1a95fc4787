"""scaled_merge_ in Triton: one launch for all pairs with fp64 destinations, one for all others."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
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
WARPS = 8
STEP = 1024


@dataclass
class Launch:
    """One launch: pairs that are computed in one precision."""

    table: device_tables.Table
    programs: int
    count: int
    owners: list[int]  # the pair that each record is of
    dst_type: object
    src_type: object
    compute: object
    block: int

    def run(self, weights: list[float], where: torch.device) -> None:
        numbers = device_tables.numbers([weights[owner] for owner in self.owners], where)
        device_tables.launch(
            device.merge_kernel,
            self.programs,
            where,
            self.table.get(),
            numbers.get(),
            self.count,
            warps=WARPS,
            DST_TYPE=self.dst_type,
            SRC_TYPE=self.src_type,
            COMPUTE=self.compute,
            BLOCK=self.block,
            STEP=STEP,
            SEARCH=device_tables.search(self.count),
        )


_plans: device_tables.Kept[list[Launch]] = device_tables.Kept()


def scaled_merge_(
    merged: list[Tensor], finetuned: list[Tensor], lam: list[float], prepared: list[Launch] | None = None
) -> None:
    """As `reference.scaled_merge_`; see device.py.

    prepared: `tables` of the same lists, which the caller has kept.
    """
    if not merged:
        return
    launches = tables(merged, finetuned) if prepared is None else prepared
    for launch in launches:
        launch.run(lam, merged[0].device)
    native.written(merged)


def tables(merged: list[Tensor], finetuned: list[Tensor]) -> list[Launch]:
    """The launches for these tensors; the weights are not in them, since they change from task to task."""
    return _plans.of_tensors(merged + finetuned, len(merged), lambda: _plan(merged, finetuned))


def _plan(merged: list[Tensor], finetuned: list[Tensor]) -> list[Launch]:
    groups: dict[bool, tuple[list[int], list[Sequence[int]]]] = {}
    for owner, (target, source) in enumerate(zip(merged, finetuned, strict=True)):
        if target.numel():
            owners, records = groups.setdefault(target.dtype == torch.float64, ([], []))
            for record in _records(target, source):
                owners.append(owner)
                records.append(record)
    where = merged[0].device
    return [_launch(wide, owners, records, where) for wide, (owners, records) in groups.items()]


def _launch(wide: bool, owners: list[int], records: list[Sequence[int]], where: torch.device) -> Launch:
    dst_type, src_type = (device_tables.uniform(record[row] for record in records) for row in (3, 4))
    size = block(dst_type, src_type, wide)
    table, programs = device_tables.columns(records, [-(-record[2] // size) for record in records], where)
    compute = tl.float64 if wide else tl.float32
    return Launch(table, programs, len(records), owners, dst_type, src_type, compute, size)


def block(dst_type: Any, src_type: Any, wide: bool) -> int:
    """Elements that a program of these types takes; None: several."""
    return _BLOCKS[8 if wide else max(kind.primitive_bitwidth // 8 if kind else 4 for kind in (dst_type, src_type))]


def _records(target: Tensor, source: Tensor) -> Iterator[Sequence[int]]:
    """The rows of device.py from DST on."""
    if target.is_contiguous() and source.is_contiguous():
        dst, _, size, _, _, dst_kind = native.row(target)
        src, *_, src_kind = native.row(source)
        aligned = int(dst % 16 == 0 and src % 16 == 0)
        yield dst, src, size, dst_kind, src_kind, aligned, 0, size, 0, 0, 0, 0
        return
    for pair in native.strided(target, source):
        dst, rows, cols, dst_row, dst_col, dst_kind = pair[:6]
        src, _, _, src_row, src_col, src_kind = pair[6:]
        yield dst, src, rows * cols, dst_kind, src_kind, 0, 1, cols, dst_row, dst_col, src_row, src_col
