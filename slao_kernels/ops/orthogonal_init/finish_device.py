"""The last Triton kernels of orthogonal_init_: R, the report, and matrices whose rows are nearly dependent.

The latter go through Gram-Schmidt, each row twice, by one program: slow, rare, and safe for any finite input. A row
without a direction of its own is replaced by a unit vector. Every row that one step writes the next one reads, in other
threads; hence the barriers.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..tables_device import load, store, word
from .device import COLS, FACTORS, FLAGGED, INDEX, NOT_FINITE, ONE, ROWS, TWO, nowhere_bad, rows_at, view


@triton.jit
def _power(exponent):
    """2^exponent in fp64, for exponents of normal numbers."""
    return ((exponent + 1023).to(tl.int64) << 52).to(tl.float64, bitcast=True)


@triton.jit
def _scaled(b, exponent):
    """b 2^exponent, in two steps because the power alone may not be a number."""
    half = exponent // 2
    return b * _power(half) * _power(exponent - half)


@triton.jit
def _row(x, kind, row, col, cols, i, start, TYPE: tl.constexpr, N: tl.constexpr):
    o_n = start + tl.arange(0, N)
    return load(x, kind, i * row + o_n * col, o_n < cols, TYPE, tl.float64)


@triton.jit
def _write_row(x, kind, row, col, cols, i, start, b, TYPE: tl.constexpr, N: tl.constexpr):
    o_n = start + tl.arange(0, N)
    store(x, kind, i * row + o_n * col, b, o_n < cols, TYPE)


@triton.jit
def _length(x, kind, row, col, cols, i, TYPE: tl.constexpr, N: tl.constexpr):
    b_sum = tl.zeros((N,), dtype=tl.float64)
    for start in range(0, cols, N):
        b_x = _row(x, kind, row, col, cols, i, start, TYPE, N)
        b_sum += b_x * b_x
    return tl.sqrt(tl.sum(b_sum, axis=0))


@triton.jit
def _project(
    x, kind, row, col, cols, i, triangle, width, exponent, KEEP: tl.constexpr, TYPE: tl.constexpr, S: tl.constexpr,
    N: tl.constexpr,
):  # fmt: skip
    """Row i loses its part along the rows before it; KEEP: that part's coordinates are added to R's column i."""
    for first in range(0, i, S):
        o_k = first + tl.arange(0, S)
        b_sums = tl.zeros((S,), dtype=tl.float64)
        for start in range(0, cols, N):
            b_X = rows_at(x, kind, row, col, cols, i, first, start, TYPE, False, S, N)  # rows before i only
            b_x = _row(x, kind, row, col, cols, i, start, TYPE, N)
            b_sums += tl.sum(b_X * b_x[None, :], axis=1)
        tl.debug_barrier()
        for start in range(0, cols, N):
            b_X = rows_at(x, kind, row, col, cols, i, first, start, TYPE, False, S, N)
            b_x = _row(x, kind, row, col, cols, i, start, TYPE, N)
            b_x -= tl.sum(b_X * b_sums[:, None], axis=0)
            _write_row(x, kind, row, col, cols, i, start, b_x, TYPE, N)
        if KEEP:
            p = triangle + o_k * width + i
            tl.store(p, tl.load(p, mask=o_k < i, other=0.0) + _scaled(b_sums, exponent), mask=o_k < i)
        tl.debug_barrier()


@triton.jit
def _lightest(x, kind, row, col, cols, i, TYPE: tl.constexpr, S: tl.constexpr, N: tl.constexpr):
    """The column in which the rows before i have the least weight, the first of equals."""
    least, column = tl.full((), float("inf"), tl.float64), tl.full((), 0, tl.int32)
    for start in range(0, cols, N):
        o_n = start + tl.arange(0, N)
        b_weight = tl.zeros((N,), dtype=tl.float64)
        for first in range(0, i, S):
            b_X = rows_at(x, kind, row, col, cols, i, first, start, TYPE, False, S, N)
            b_weight += tl.sum(b_X * b_X, axis=0)
        b_weight = tl.where(o_n < cols, b_weight, float("inf"))
        here = tl.min(b_weight, axis=0)
        if here < least:
            least = here
            column = tl.min(tl.where(b_weight == here, o_n, 0x7FFFFFFF), axis=0).to(tl.int32)
    return column


@triton.jit
def _complete(x, kind, row, col, cols, r, triangle, width, TYPE: tl.constexpr, S: tl.constexpr, N: tl.constexpr):
    """x's rows become orthonormal, R's columns are written. Whether a row had to be replaced."""
    deficient = 0
    # As in reference.py: what is left of a row after projection, below one rounding error of the row.
    eps = tl.where(kind == 0, 2.0**-50, 2.0**-23).to(tl.float64)
    for i in range(r):
        for first in range(0, width, S):
            tl.store(triangle + (first + tl.arange(0, S)) * width + i, tl.zeros((S,), dtype=tl.float64))
        b_most = tl.zeros((N,), dtype=tl.float64)
        for start in range(0, cols, N):
            b_most = tl.maximum(b_most, tl.abs(_row(x, kind, row, col, cols, i, start, TYPE, N)))
        # Near 1 neither squares nor what is left of the row leave the range of the numbers.
        largest = tl.max(b_most, axis=0)
        exponent = ((largest.to(tl.int64, bitcast=True) >> 52) & 0x7FF).to(tl.int32) - 1023
        if largest == 0.0:
            exponent = tl.full((), 0, tl.int32)
        tl.debug_barrier()
        for start in range(0, cols, N):
            b_x = _scaled(_row(x, kind, row, col, cols, i, start, TYPE, N), -exponent)
            _write_row(x, kind, row, col, cols, i, start, b_x, TYPE, N)
        tl.debug_barrier()
        length = _length(x, kind, row, col, cols, i, TYPE, N)
        for _ in range(2):
            _project(x, kind, row, col, cols, i, triangle, width, exponent, True, TYPE, S, N)
        left = _length(x, kind, row, col, cols, i, TYPE, N)
        if left > eps * length:
            tl.store(triangle + i * width + i, _scaled(left, exponent))
        else:
            deficient = 1
            column = _lightest(x, kind, row, col, cols, i, TYPE, S, N)
            tl.debug_barrier()
            for start in range(0, cols, N):
                b_unit = tl.where(start + tl.arange(0, N) == column, 1.0, 0.0).to(tl.float64)
                _write_row(x, kind, row, col, cols, i, start, b_unit, TYPE, N)
            tl.debug_barrier()
            for _ in range(2):
                _project(x, kind, row, col, cols, i, triangle, width, exponent, False, TYPE, S, N)
            left = _length(x, kind, row, col, cols, i, TYPE, N)
        tl.debug_barrier()
        inverse = 1 / left
        for start in range(0, cols, N):
            b_x = _row(x, kind, row, col, cols, i, start, TYPE, N) * inverse
            _write_row(x, kind, row, col, cols, i, start, b_x, TYPE, N)
        tl.debug_barrier()
    return deficient


@triton.jit(do_not_specialize=["count", "total"])
def triangle_kernel(table, ws, states, count, total, S: tl.constexpr):
    """R = Lᵀ, or (L₁ L₂)ᵀ after two passes: A = L₁ (L₂ Q). It takes the place of L₁⁻¹, which nobody needs any more."""
    i = tl.program_id(0)
    found = tl.load(states + word(table, count, INDEX, i))
    blocks = tl.cdiv(word(table, count, ROWS, i), S)
    factors, width = ws + word(table, count, FACTORS, i), blocks * S
    o_i, o_j = tl.arange(0, S)[:, None], tl.arange(0, S)[None, :]
    wanted = (found == ONE) | (found == TWO)
    if wanted & nowhere_bad(states, total):
        triangle = factors + width * width
        for i_r in range(blocks):
            for j_r in range(i_r + 1):
                b_L = tl.load(factors + (i_r * S + o_i) * width + j_r * S + o_j)
                if found == TWO:
                    b_L = tl.zeros((S, S), dtype=tl.float64)
                    for k_r in range(j_r, i_r + 1):
                        b_first = tl.load(factors + (i_r * S + o_i) * width + k_r * S + o_j)
                        b_second = tl.load(factors + 2 * width * width + (k_r * S + o_i) * width + j_r * S + o_j)
                        b_L = tl.dot(b_first, b_second, b_L, out_dtype=tl.float64)
                if j_r < i_r:
                    tl.store(triangle + (i_r * S + o_i) * width + j_r * S + o_j, tl.zeros((S, S), dtype=tl.float64))
                tl.store(triangle + (j_r * S + o_j) * width + i_r * S + o_i, b_L)


@triton.jit(do_not_specialize=["count", "total"])
def finish_kernel(
    table, ws, states, status, count, total, TYPE: tl.constexpr, LATER_TYPE: tl.constexpr,
    S: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """One program a matrix: its status, and its rows and R where they are nearly dependent."""
    i = tl.program_id(0)
    index, r, cols = word(table, count, INDEX, i), word(table, count, ROWS, i), word(table, count, COLS, i)
    found = tl.load(states + index)
    blocks = tl.cdiv(r, S)
    factors, width = ws + word(table, count, FACTORS, i), blocks * S
    deficient = 0
    wanted = found == FLAGGED
    if wanted & nowhere_bad(states, total):
        a, kind, row, col, _ = view(table, count, i, ws, False, False)
        x, x_kind, x_row, x_col, _ = view(table, count, i, ws, True, False)
        if kind >= 2:
            for at in range(r):
                for start in range(0, cols, N):
                    b_x = _row(a, kind, row, col, cols, at, start, TYPE, N)
                    _write_row(x, x_kind, x_row, x_col, cols, at, start, b_x, LATER_TYPE, N)
            tl.debug_barrier()
        triangle = factors + width * width
        deficient = _complete(x, x_kind, x_row, x_col, cols, r, triangle, width, LATER_TYPE, S, N)
        if kind >= 2:
            for at in range(r):
                for start in range(0, cols, N):
                    b_x = _row(x, x_kind, x_row, x_col, cols, at, start, LATER_TYPE, N)
                    _write_row(a, kind, row, col, cols, at, start, b_x, TYPE, N)
    tl.store(status + index, tl.where(found == NOT_FINITE, 2, deficient))
