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
from . import device, finish_device

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
    rows: list[int]  # of each
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

    def launch(
        self, kernel: Any, programs: int, ws: Tensor, *arguments: Any, warps: int | None = None, **constants: Any
    ) -> None:
        """The kernel on table and workspace, with what else it takes. SEARCH, TYPE, ...: to those that have them."""
        known = {"S": self.side, "SEARCH": device_tables.search(len(self.owners)), "DENSE": self.dense}
        known |= {"TYPE": self.kind, "LATER_TYPE": LATER.get(self.kind, self.kind), "CHUNK": CHUNK}
        constants = {name: known[name] for name in known if name in kernel.arg_names} | constants
        warps = TILES[self.side][3] if warps is None else warps
        arguments = self.table.get(), ws, *arguments
        device_tables.launch(kernel, (programs,), ws.device, *arguments, num_warps=warps, **constants)


@dataclass
class Plan:
    groups: list[Group]
    words: int  # of the workspace


def orthogonal_init_(As: list[Tensor], r: list[Tensor], status: Tensor, prepared: Plan | None = None) -> None:
    """As `reference.orthogonal_init_`. prepared: `tables` of As, which the caller has kept."""
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
            sizes = len(group.owners), len(states)
            columns = TILES[group.side][1]
            group.launch(device.apply_kernel, group.apply_programs, ws, states, *sizes, LATER=later, N=columns)
    for group in plan.groups:
        count, step = len(group.owners), TILES[group.side][2]
        step = _INTERPRETED_STEP if device_tables.INTERPRETED else step
        group.launch(finish_device.finish_kernel, count, ws, states, found, count, len(states), N=step)
        if r:
            group.launch(finish_device.triangle_kernel, count, ws, states, count, len(states))
            triangles = zip(group.factors_in(ws)[:, 1], group.rows, strict=True)
            parts = [triangle[:rows, :rows] for triangle, rows in triangles]
            torch._foreach_copy_([r[owner] for owner in group.owners], parts)
    if found is not status:
        status.copy_(found)
    native.written(As)  # whether or not the device finds a NaN; nobody has waited to know


def _gram(group: Group, ws: Tensor, states: Tensor, later: bool) -> None:
    constants = {"LATER": later, "K": TILES[group.side][0], "LARGE": group.blocks > 1}
    if later:
        constants["TYPE"] = LATER.get(group.kind, group.kind)
    sizes = len(group.owners), len(states)
    group.launch(device.gram_kernel, group.gram_programs, ws, states, *sizes, **constants)


def _factor(group: Group, ws: Tensor, states: Tensor, later: bool) -> None:
    count = len(group.owners)
    if group.blocks == 1:
        warps = FACTOR_WARPS[group.side]
        group.launch(device.factor_kernel, count, ws, states, count, len(states), warps=warps, LATER=later)
        return
    group.launch(device.gather_kernel, count * group.blocks**2, ws, count, group.blocks)
    factors = group.factors_in(ws)
    L, info = torch.linalg.cholesky_ex(factors[:, 2])
    unit = torch.eye(L.shape[-1], dtype=L.dtype, device=L.device)
    inverse = torch.linalg.solve_triangular(L, unit.expand_as(L), upper=False)
    slot = 2 if later else 0
    factors[:, slot].copy_(L)
    factors[:, slot + 1].copy_(inverse)
    if not later:
        group.launch(device.decide_kernel, count, ws, states, info, count, group.blocks)


def _side(rows: int) -> int:
    return 16 if rows <= 16 else 32 if rows <= 32 else 64


def tables(As: list[Tensor]) -> Plan:
    """The launches for these matrices."""
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
    gram_programs, apply_programs = list[int](), list[int]()
    records: list[Sequence[int]] = []
    dense = True
    for at, owner in enumerate(owners):
        data, rows, cols, row, col, kind = matrix = native.matrix(As[owner])
        dense &= col == 1 and data % 16 == 0 and row % 16 == 0 and cols % 16 == 0
        factors, partials = first + at * 4 * height * height, words
        gram_programs.append(-(-cols // CHUNK) * blocks * blocks)
        apply_programs.append(-(-cols // width))
        words += gram_programs[-1] * side * side
        scratch = words
        words += -(-rows * cols // 4) * 2 if kind >= 2 else 0  # fp32
        records.append((*matrix, owner, factors, partials, scratch))
    firsts, applied = device_tables.firsts(apply_programs)
    records = [(at, *record) for at, record in zip(firsts, records, strict=True)]
    table, total = device_tables.columns(records, gram_programs, As[0].device)
    rows_of = [As[owner].shape[0] for owner in owners]
    kind = device_tables.uniform(record[6] for record in records)
    return Group(table, owners, rows_of, side, blocks, total, applied, first, kind, dense), words
