"""fold_ in Triton: one launch for all weights whose products have one dtype. W is read and written once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ... import native
from .. import tables as device_tables
from . import device

# The tile of W, by the products' factors: as many sums as 8 warps hold without a spill where fp32 products run on the
# ordinary cores, which want their factors in registers too. Compiled for, not timed.
_TILES = {tl.float64: (64, 32), tl.float32: (64, 128), tl.bfloat16: (128, 128), tl.float16: (128, 128)}
WARPS = 8
STEP = 16  # rows at a time at a matrix's edges; the least that a product may have
_STRIDE = 16  # FULL's rows begin at multiples of so many elements
_REACH = 2**31 // 128


@dataclass
class Launch:
    """One launch: weights whose products' factors have one dtype."""

    table: device_tables.Table
    programs: int
    owners: list[int]  # the weight that each record is of
    constants: dict[str, Any]

    def run(self, scalings: list[float], where: torch.device) -> None:
        numbers = device_tables.numbers([scalings[owner] for owner in self.owners], where)
        arguments = self.table.get(), numbers.get(), len(self.owners)
        device_tables.launch(device.fold_kernel, self.programs, where, *arguments, warps=WARPS, **self.constants)


_plans: device_tables.Kept[list[Launch]] = device_tables.Kept()


def fold_(
    weights: list[Tensor],
    As: list[Tensor],
    Bs: list[Tensor],
    scalings: list[float],
    prepared: list[Launch] | None = None,
) -> None:
    """As `reference.fold_`; see device.py. prepared: `tables` of the same lists, which the caller has kept."""
    if not weights:
        return
    for launch in tables(weights, As, Bs) if prepared is None else prepared:
        launch.run(scalings, weights[0].device)
    native.written(weights)


def tables(weights: list[Tensor], As: list[Tensor], Bs: list[Tensor]) -> list[Launch]:
    """The launches for these tensors, kept; the scalings are not in them."""
    return _plans.of_tensors(weights + As + Bs, len(weights), lambda: _plan(weights, As, Bs))


def _plan(weights: list[Tensor], As: list[Tensor], Bs: list[Tensor]) -> list[Launch]:
    groups: dict[tuple[Any, Any], tuple[list[int], list[Sequence[int]]]] = {}
    for owner, (W, A, B) in enumerate(zip(weights, As, Bs, strict=True)):
        if W.numel() and len(A):
            owners, records = groups.setdefault(_types(W, A, B), ([], []))
            owners.append(owner)
            records.append(_record(W, A, B))
    return [_launch(*types, *group, weights[0].device) for types, group in groups.items()]


def _types(W: Tensor, A: Tensor, B: Tensor) -> tuple[Any, Any]:
    """The dtypes of the products' factors and of their sums. Products of two bf16 or two fp16 are exact in fp32."""
    if torch.float64 in (W.dtype, A.dtype, B.dtype):
        return tl.float64, tl.float64
    short = A.dtype == B.dtype and A.dtype != torch.float32 and not device_tables.INTERPRETED
    return (tl.bfloat16 if A.dtype == torch.bfloat16 else tl.float16) if short else tl.float32, tl.float32


def _record(W: Tensor, A: Tensor, B: Tensor) -> Sequence[int]:
    """The rows of device.py from W on."""
    if W.stride(1) != 1 and W.stride(0) == 1:  # stored (in, out): Wᵀ += s Aᵀ Bᵀ walks it in memory order
        W, A, B = W.t(), B.t(), A.t()
    w, rows, cols, w_row, w_col, w_kind = native.matrix(W)
    a, r, _, a_row, a_col, a_kind = native.matrix(A)
    b, _, _, b_row, b_col, b_kind = native.matrix(B)
    full = int(w_col == 1 and w % 16 == 0 and w_row % _STRIDE == 0 and w_row < _REACH)
    return w, w_kind, rows, cols, w_row, w_col, full, r, a, a_kind, a_row, a_col, b, b_kind, b_row, b_col


def _launch(operand: Any, compute: Any, owners: list[int], records: list[Sequence[int]], where: torch.device) -> Launch:
    w_type, a_type, b_type = (device_tables.uniform(record[at] for record in records) for at in (1, 9, 13))
    constants = constants_of(w_type, a_type, b_type, operand, compute, max(record[7] for record in records))
    block_m, block_n = constants["BLOCK_M"], constants["BLOCK_N"]
    programs = [-(-record[2] // block_m) * -(-record[3] // block_n) for record in records]
    table, total = device_tables.columns(records, programs, where)
    return Launch(table, total, owners, constants | {"SEARCH": device_tables.search(len(records))})


def constants_of(w_type: Any, a_type: Any, b_type: Any, operand: Any, compute: Any, r: int) -> dict[str, Any]:
    """The kernel's constants but SEARCH, for ranks of up to r. A type None: several."""
    block_m, block_n = _TILES[operand]
    if None in (w_type, a_type, b_type):  # a branch for each dtype takes registers too
        block_m //= 2
    return {
        "W_TYPE": w_type,
        "A_TYPE": a_type,
        "B_TYPE": b_type,
        "OPERAND": operand,
        "COMPUTE": compute,
        "BLOCK_M": block_m,
        "BLOCK_N": block_n,
        "STEP": STEP,
        "BLOCK_R": 16 if operand in (tl.float32, tl.float64) else min(32, max(16, triton.next_power_of_2(r))),
    }
