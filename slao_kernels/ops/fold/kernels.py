"""fold_ in Triton: one launch for all weights whose products have one dtype. W is read and written once."""

from __future__ import annotations

from collections.abc import Sequence
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
STEP = 16  # rows at a time at a matrix's edges; the least that a product may have
_STRIDE = 16  # FULL's rows begin at multiples of so many elements
_REACH = 2**31 // 128


def fold_(
    weights: list[Tensor],
    As: list[Tensor],
    Bs: list[Tensor],
    scalings: list[float],
    prepared: list[device_tables.Launch] | None = None,
) -> None:
    """As `reference.fold_`; see device.py. prepared: `tables` of the same lists, which the caller has kept."""
    device_tables.run(tables(weights, As, Bs) if prepared is None else prepared, weights, scalings)


def tables(weights: list[Tensor], As: list[Tensor], Bs: list[Tensor]) -> list[device_tables.Launch]:
    """The launches for these tensors; the scalings are not in them."""
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
    """The rows of device.py from W on: the compiled core's, and FULL."""
    if W.stride(1) != 1 and W.stride(0) == 1:  # stored (in, out): Wᵀ += s Aᵀ Bᵀ walks it in memory order
        W, A, B = W.t(), B.t(), A.t()
    w = native.matrix(W)
    full = w[4] == 1 and w[0] % 16 == 0 and w[3] % _STRIDE == 0 and w[3] < _REACH
    return *w, *native.matrix(A), *native.matrix(B), int(full)


def _launch(
    operand: Any, compute: Any, owners: list[int], records: list[Sequence[int]], where: torch.device
) -> device_tables.Launch:
    w_type, a_type, b_type = (device_tables.uniform(record[at] for record in records) for at in (5, 11, 17))
    constants = constants_of(w_type, a_type, b_type, operand, compute, max(record[7] for record in records))
    block_m, block_n = constants["BLOCK_M"], constants["BLOCK_N"]
    programs = [-(-record[1] // block_m) * -(-record[2] // block_n) for record in records]
    table, total = device_tables.columns(records, programs, where)
    return device_tables.Launch(device.fold_kernel, table, total, owners, constants)


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
