"""What surrounds torch's Cholesky where a matrix has more rows than one program holds: G before it, the verdict after.

Names as in device.py.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..tables_device import word
from . import device
from .device import COLS, FACTORS, FLAGGED, INDEX, KIND, PARTIALS, PIVOT, ROWS, TOO_SMALL, overflowed, verdict


@triton.jit(do_not_specialize=["count", "blocks"])
def gather_kernel(table, ws, count, blocks, S: tl.constexpr, CHUNK: tl.constexpr):
    """A block of G, into the place of L₂; the unit matrix behind the last row, zeros in blocks above the diagonal."""
    unit = tl.program_id(0)
    i, piece = unit // (blocks * blocks), unit % (blocks * blocks)
    i_r, j_r = piece // blocks, piece % blocks
    r, width = word(table, count, ROWS, i), blocks * S
    o_i, o_j = i_r * S + tl.arange(0, S)[:, None], j_r * S + tl.arange(0, S)[None, :]
    b_G = tl.zeros((S, S), dtype=tl.float64)
    if j_r <= i_r:
        first = word(table, count, PARTIALS, i) + piece * S * S
        chunks = tl.cdiv(word(table, count, COLS, i), CHUNK)
        b_G = device.sum_of_partials(ws, first, blocks * blocks * S * S, chunks, S)
        b_G = tl.where((o_i == o_j) & (o_i >= r), 1.0, b_G)
    factors = ws + word(table, count, FACTORS, i) + 2 * width.to(tl.int64) * width
    tl.store(factors + o_i * width + o_j, b_G)


@triton.jit(do_not_specialize=["count", "blocks"])
def decide_kernel(table, ws, states, info, count, blocks, S: tl.constexpr):
    """The state of one matrix, from G, L, L⁻¹, and `info`: whether torch's factorisation went through."""
    i = tl.program_id(0)
    r, kind, width = word(table, count, ROWS, i), word(table, count, KIND, i), blocks * S
    size = width.to(tl.int64) * width
    factors = ws + word(table, count, FACTORS, i)
    squares, finite, good = tl.zeros((S,), dtype=tl.float64), 1, 1
    for j_r in range(blocks):
        o_j = j_r * S + tl.arange(0, S)
        b_d = tl.load(factors + 2 * size + o_j * (width + 1))
        b_pivot = tl.load(factors + o_j * (width + 1))
        finite = tl.minimum(finite, tl.min(tl.where(b_d < float("inf"), 1, 0), axis=0))
        b_good = (b_pivot * b_pivot > PIVOT * b_d) & (b_d >= TOO_SMALL)
        good = tl.minimum(good, tl.min(tl.where(b_good, 1, 0), axis=0))
        for i_r in range(j_r, blocks):
            o_i = i_r * S + tl.arange(0, S)
            b_M = tl.load(factors + size + o_i[:, None] * width + o_j[None, :])
            b_squares = tl.where((o_i < r)[:, None] & (o_j < r)[None, :], b_M * b_M * b_d[None, :], 0.0)
            squares += tl.sum(b_squares, axis=1)
    found = verdict(tl.sum(squares, axis=0) - r + 2, kind)
    if (good == 0) | (tl.load(info + i) != 0):
        found = tl.full((), FLAGGED, tl.int32)
    if finite == 0:
        found = overflowed(table, count, i, ws, S)
    tl.store(states + word(table, count, INDEX, i), found)
