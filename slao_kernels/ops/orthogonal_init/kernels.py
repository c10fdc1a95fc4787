"""orthogonal_init_ in Triton: A <- L⁻¹A with A Aᵀ = L Lᵀ, by Cholesky QR with an fp64 Gram matrix, and again on what
one pass leaves less orthonormal than Householder's Q.

Seven launches, none of which the host waits for: Gram, factors, product; the same again, where the programs of
matrices that are done leave at once; and the end (finish_device.py), with one more where R is wanted. What a matrix
needs is found on the device, by the first factors; a single NaN or infinity in any matrix makes all launches after them
write nothing. Matrices of up to 16, 32 and 64 rows, and of each dtype, have launches of their own. Above 64 rows torch
factors them, all of one (padded) height at once.

Sums are taken in an order that depends on shapes alone: a program's part of the Gram has a place of its own, and the
launch after it adds them up. A counter and a fence would save that launch, but not safely on every GPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from ... import native
from .. import tables as device_tables
from . import device, finish_device, large_device

CHUNK = 1024  # columns of one program's Gram; fixed, so that a result does not depend on what else is in the list
# By the rows of a block: columns that a Gram's product takes at once, columns of a program's product, of the end's
# steps, and warps. Compiled for, not timed.
TILES = {16: (64, 64, 16, 4), 32: (32, 32, 16, 4), 64: (16, 32, 16, 8)}
_INTERPRETED_STEP = 256  # of the end's: each costs the same there, however long it is
FACTOR_WARPS = {16: 2, 32: 4, 64: 16}  # each step waits for all of them: one where one holds the matrix
LATER = {tl.bfloat16: tl.float32, tl.float16: tl.float32}


@dataclass
class Group:
    """Matrices of one dtype and of the same blocks."""

    table: device_tables.Table
    owners: list[int]
    shapes: list[tuple[int, int]]
    side: int
    blocks: int
    gram_programs: int
    apply_programs: int
    factors: int  # where they begin in the workspace
    kind: Any
    dense: bool

    def factors_in(self, ws: Tensor) -> Tensor:
        """(matrices, 4, height, height): L₁, L₁⁻¹ (at the end R), L₂, L₂⁻¹."""
        height = self.side * self.blocks
        size = len(self.owners) * 4 * height * height
        return ws[self.factors : self.factors + size].view(-1, 4, height, height)


@dataclass
class Plan:
    groups: list[Group]
    words: int  # of the workspace


_plans: device_tables.Kept[Plan] = device_tables.Kept()


def orthogonal_init_(
    As: list[Tensor], r: list[Tensor], status: Tensor, keep: Sequence[Tensor] = (), prepared: Plan | None = None
) -> None:
    """As `reference.orthogonal_init_`. keep: none. prepared: `tables` of As, which the caller has kept."""
    assert not keep
    if not As:
        return
    where = As[0].device
    plan = tables(As) if prepared is None else prepared
    # From torch's allocator on the current stream: capturable, and free for reuse behind the last launch.
    ws = torch.empty(plan.words, dtype=torch.float64, device=where)
    states = torch.empty(len(As), dtype=torch.int32, device=where)
    found = status if status.is_contiguous() else torch.empty_like(status, memory_format=torch.contiguous_format)
    for later in (False, True):
        # Every matrix is looked at before any is written.
        for group in plan.groups:
            _gram(group, ws, states, later)
            _factor(group, ws, states, later)
        for group in plan.groups:
            _apply(group, ws, states, later)
    for group in plan.groups:
        _finish(group, ws, states, found)
        if r:
            _triangles(group, ws, states)
            triangles = zip(group.factors_in(ws)[:, 1], group.shapes, strict=True)
            parts = [triangle[:rows, :rows] for triangle, (rows, _) in triangles]
            torch._foreach_copy_([r[owner] for owner in group.owners], parts)
    if found is not status:
        status.copy_(found)
    native.written(As)  # whether or not the device finds a NaN; nobody has waited to know


def tables(As: list[Tensor]) -> Plan:
    """The launches for these matrices, kept."""
    return _plans.of_tensors(As, None, lambda: _plan(As))


def types(group: Group) -> dict[str, Any]:
    return {"TYPE": group.kind, "LATER_TYPE": LATER.get(group.kind, group.kind)}


def _gram(group: Group, ws: Tensor, states: Tensor, later: bool) -> None:
    wide, _, _, warps = TILES[group.side]
    device_tables.launch(
        device.gram_kernel,
        group.gram_programs,
        ws.device,
        *(group.table.get(), ws, states, len(group.owners), len(states)),
        warps=warps,
        LATER=later,
        TYPE=types(group)["LATER_TYPE" if later else "TYPE"],
        DENSE=group.dense,
        S=group.side,
        K=wide,
        CHUNK=CHUNK,
        LARGE=group.blocks > 1,
        SEARCH=device_tables.search(len(group.owners)),
    )


def _factor(group: Group, ws: Tensor, states: Tensor, later: bool) -> None:
    count = len(group.owners)
    table, constants = group.table.get(), {"S": group.side, "CHUNK": CHUNK}
    if group.blocks == 1:
        arguments = table, ws, states, count, len(states), later
        warps = FACTOR_WARPS[group.side]
        device_tables.launch(device.factor_kernel, count, ws.device, *arguments, warps=warps, **constants)
        return
    warps = TILES[group.side][3]
    programs = count * group.blocks**2
    gather = large_device.gather_kernel
    device_tables.launch(gather, programs, ws.device, table, ws, count, group.blocks, warps=warps, **constants)
    factors = group.factors_in(ws)
    L, info = torch.linalg.cholesky_ex(factors[:, 2])
    unit = torch.eye(L.shape[-1], dtype=L.dtype, device=L.device)
    inverse = torch.linalg.solve_triangular(L, unit.expand_as(L), upper=False)
    slot = 2 if later else 0
    factors[:, slot].copy_(L)
    factors[:, slot + 1].copy_(inverse)
    if not later:
        decide = large_device.decide_kernel
        given = table, ws, states, info, count, group.blocks
        device_tables.launch(decide, count, ws.device, *given, warps=warps, S=group.side)


def _apply(group: Group, ws: Tensor, states: Tensor, later: bool) -> None:
    device_tables.launch(
        device.apply_kernel,
        group.apply_programs,
        ws.device,
        *(group.table.get(), ws, states, len(group.owners), len(states)),
        warps=TILES[group.side][3],
        LATER=later,
        DENSE=group.dense,
        S=group.side,
        N=TILES[group.side][1],
        SEARCH=device_tables.search(len(group.owners)),
        **types(group),
    )


def _finish(group: Group, ws: Tensor, states: Tensor, status: Tensor) -> None:
    device_tables.launch(
        finish_device.finish_kernel,
        len(group.owners),
        ws.device,
        *(group.table.get(), ws, states, status, len(group.owners), len(states)),
        warps=TILES[group.side][3],
        S=group.side,
        N=_INTERPRETED_STEP if device_tables.INTERPRETED else TILES[group.side][2],
        **types(group),
    )


def _triangles(group: Group, ws: Tensor, states: Tensor) -> None:
    arguments = group.table.get(), ws, states, len(group.owners), len(states)
    warps = TILES[group.side][3]
    device_tables.launch(
        finish_device.triangle_kernel, len(group.owners), ws.device, *arguments, warps=warps, S=group.side
    )


def _side(rows: int) -> int:
    return 16 if rows <= 16 else 32 if rows <= 32 else 64


def _plan(As: list[Tensor]) -> Plan:
    members: dict[tuple[int, int, torch.dtype], list[int]] = {}
    for owner, A in enumerate(As):
        side = _side(A.shape[0])
        members.setdefault((side, -(-A.shape[0] // side), A.dtype), []).append(owner)
    groups, words = [], 0
    for (side, blocks, _), owners in members.items():
        group, words = _group(As, owners, side, blocks, words)
        groups.append(group)
    return Plan(groups, words)


def _group(As: list[Tensor], owners: list[int], side: int, blocks: int, words: int) -> tuple[Group, int]:
    """The group, and where the workspace goes on. Offsets are even: vectors of 16 bytes."""
    height, first, width = side * blocks, words, TILES[side][1]
    words += len(owners) * 4 * height * height
    gram_programs: list[int] = []
    records: list[Sequence[int]] = []
    applied = 0
    dense = True
    for at, owner in enumerate(owners):
        data, rows, cols, row, col, kind = native.matrix(As[owner])
        dense &= col == 1 and data % 16 == 0 and row % 16 == 0 and cols % 16 == 0
        factors, partials = first + at * 4 * height * height, words
        chunks = -(-cols // CHUNK)
        gram_programs.append(chunks * blocks * blocks)
        words += gram_programs[-1] * side * side
        scratch = words
        words += -(-rows * cols // 4) * 2 if kind >= 2 else 0  # fp32
        records.append((applied, data, kind, rows, cols, row, col, owner, factors, partials, scratch))
        applied += -(-cols // width)
    if applied > 0x7FFFFFFF:
        raise ValueError(f"{applied} tiles are more than one launch can have; pass fewer tensors in one call")
    table, total = device_tables.columns(records, gram_programs, As[0].device)
    shapes = [(As[owner].shape[0], As[owner].shape[1]) for owner in owners]
    kind = device_tables.uniform(record[2] for record in records)
    return Group(table, owners, shapes, side, blocks, total, applied, first, kind, dense), words
