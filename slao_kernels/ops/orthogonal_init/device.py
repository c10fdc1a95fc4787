"""The Triton kernels of orthogonal_init_ for matrices that are not nearly dependent; kernels.py puts them together.

Names as in tables_device.py. S: rows of a block, of which a matrix has `blocks`; its factors L and L⁻¹ are stored
whole, padded to blocks, with zeros above the diagonal and ones on it behind the matrix's last row. All arithmetic is in
fp64. LATER: the second pass, and how rows are stored between two passes, which must not be in 16 bits.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..tables_device import find, load_factor, store, word

# Rows of the table. Where FACTORS, PARTIALS and SCRATCH lie is in doubles of the workspace.
FIRST_GRAM, FIRST_APPLY, A, ROWS, COLS, ROW, COL, KIND = (tl.constexpr(row) for row in range(8))
INDEX, FACTORS, PARTIALS, SCRATCH = (tl.constexpr(row) for row in range(8, 12))

# What is known of a matrix: one pass is enough, two are, its rows are nearly dependent, it has a NaN or an infinity.
ONE, TWO, FLAGGED, NOT_FINITE = (tl.constexpr(state) for state in (1, 2, 3, 4))

# The bounds of csrc/cuda/orthogonal_init/plan.h, with their reasons there.
PIVOT, ONE_PASS, ONE_PASS_16, TOO_SMALL = (tl.constexpr(bound) for bound in (1e-12, 8.0, 1e4, 2.0**-900))
_STATES = tl.constexpr(1024)  # read in one step


@triton.jit
def nowhere_bad(states, total):
    """Whether no matrix of the call, in whatever launch, has a NaN or an infinity."""
    bad = 0
    for start in range(0, total, _STATES):
        o = start + tl.arange(0, _STATES)
        bad = tl.maximum(bad, tl.max((tl.load(states + o, mask=o < total, other=0) == NOT_FINITE).to(tl.int32), axis=0))
    return bad == 0


@triton.jit
def view(table, count, i, ws, LATER: tl.constexpr, DENSE: tl.constexpr):
    """(address, kind, row stride, column stride, columns) of a matrix; LATER: of where its rows lie between two passes.
    DENSE: nothing that would break a vector."""
    a, kind, row = word(table, count, A, i), word(table, count, KIND, i), word(table, count, ROW, i)
    col, cols = word(table, count, COL, i), word(table, count, COLS, i)
    if LATER:
        short = kind >= 2
        a = tl.where(short, ws.to(tl.int64) + word(table, count, SCRATCH, i) * 8, a)
        kind, row, col = tl.where(short, 1, kind), tl.where(short, cols, row), tl.where(short, 1, col)
    if DENSE:
        row, cols = tl.multiple_of(row, 16), tl.multiple_of(cols, 16)
    return a, kind, row, col, cols


@triton.jit
def rows_at(
    a, kind, row, col, cols, r, first, start, TYPE: tl.constexpr, DENSE: tl.constexpr, S: tl.constexpr, N: tl.constexpr
):
    """(S, N) of a view from row `first` and column `start` on, zeros outside."""
    o_r, o_n = first + tl.arange(0, S), start + tl.arange(0, N)
    o = o_r[:, None] * row + (o_n[None, :] if DENSE else o_n[None, :] * col)
    return load_factor(a, kind, o, (o_r < r)[:, None] & (o_n < cols)[None, :], TYPE, tl.float64, DENSE)


@triton.jit(do_not_specialize=["count", "total"])
def gram_kernel(
    table, ws, states, count, total, LATER: tl.constexpr, TYPE: tl.constexpr, DENSE: tl.constexpr,
    S: tl.constexpr, K: tl.constexpr, CHUNK: tl.constexpr, LARGE: tl.constexpr, SEARCH: tl.constexpr,
):  # fmt: skip
    """A block of A Aᵀ over CHUNK columns, into the partials; of the rows between two passes where LATER."""
    unit = tl.program_id(0)
    i = find(table, count, unit, SEARCH)
    wanted = True
    if LATER:
        wanted = (tl.load(states + word(table, count, INDEX, i)) == TWO) & nowhere_bad(states, total)
    r = word(table, count, ROWS, i)
    blocks = tl.cdiv(r, S)
    local = unit - word(table, count, FIRST_GRAM, i)
    chunk, piece = local // (blocks * blocks), local % (blocks * blocks)
    i_r, j_r = piece // blocks, piece % blocks
    if wanted & (j_r <= i_r):
        a, kind, row, col, cols = view(table, count, i, ws, LATER, DENSE)
        b_G = tl.zeros((S, S), dtype=tl.float64)
        for start in range(chunk * CHUNK, tl.minimum((chunk + 1) * CHUNK, cols), K):
            b_x = rows_at(a, kind, row, col, cols, r, i_r * S, start, TYPE, DENSE, S, K)
            b_y = b_x
            if LARGE:
                b_y = rows_at(a, kind, row, col, cols, r, j_r * S, start, TYPE, DENSE, S, K)
            b_G = tl.dot(b_x, tl.trans(b_y), b_G, out_dtype=tl.float64)
        o = tl.arange(0, S)[:, None] * S + tl.arange(0, S)[None, :]
        tl.store(ws + word(table, count, PARTIALS, i) + local * S * S + o, b_G)


@triton.jit
def sum_of_partials(ws, first, stride, chunks, S: tl.constexpr):
    """(S, S): `chunks` partials from `first` on, each `stride` further, in order."""
    o = tl.arange(0, S)[:, None] * S + tl.arange(0, S)[None, :]
    b_G = tl.zeros((S, S), dtype=tl.float64)
    for chunk in range(chunks):
        b_G += tl.load(ws + first + chunk * stride + o)
    return b_G


@triton.jit
def overflowed(table, count, i, ws, S: tl.constexpr):
    """What a matrix is whose Gram is not finite: fp64 can overflow its own squares, other dtypes cannot."""
    a, kind, row, col, cols = view(table, count, i, ws, False, False)
    r, found = word(table, count, ROWS, i), tl.full((), NOT_FINITE, tl.int32)
    if kind == 0:
        bad = 0
        for first in range(0, r, S):
            for start in range(0, cols, 16):
                b_x = rows_at(a, kind, row, col, cols, r, first, start, tl.float64, False, S, 16)
                b_bad = (tl.abs(b_x) < float("inf")) == 0
                bad = tl.maximum(bad, tl.max(tl.max(b_bad.to(tl.int32), axis=1), axis=0))
        found = tl.where(bad == 0, FLAGGED, NOT_FINITE).to(tl.int32)
    return found


@triton.jit
def verdict(condition, kind):
    """From a bound of 1/σ²_min of the matrix with its rows scaled to length 1."""
    return tl.where(condition > tl.where(kind >= 2, ONE_PASS_16, ONE_PASS), TWO, ONE)


@triton.jit(do_not_specialize=["count", "total"])
def factor_kernel(table, ws, states, count, total, LATER: tl.constexpr, S: tl.constexpr, CHUNK: tl.constexpr):
    """G = L Lᵀ and L⁻¹ of one matrix of up to S rows, in registers, and what they say about it.

    Row operations that turn G into L, done to the unit matrix too, turn that into L⁻¹.
    """
    i = tl.program_id(0)
    index = word(table, count, INDEX, i)
    wanted = True
    if LATER:
        wanted = (tl.load(states + index) == TWO) & nowhere_bad(states, total)
    if wanted:
        r, chunks = word(table, count, ROWS, i), tl.cdiv(word(table, count, COLS, i), CHUNK)
        o_i, o_j = tl.arange(0, S)[:, None], tl.arange(0, S)[None, :]
        b_G = sum_of_partials(ws, word(table, count, PARTIALS, i), S * S, chunks, S)
        b_G = tl.where((o_i == o_j) & (o_i >= r), 1.0, tl.where(o_i >= o_j, b_G, tl.trans(b_G)))
        b_d = tl.sum(tl.where(o_i == o_j, b_G, 0.0), axis=0)[None, :]  # (1, S), squared lengths of rows
        b_L = tl.zeros((S, S), dtype=tl.float64)
        b_M = tl.where(o_i == o_j, 1.0, 0.0).to(tl.float64)
        good = tl.min(tl.where(b_d < float("inf"), 1, 0), axis=1)  # (1,); not so for a NaN
        finite = tl.min(good, axis=0)
        bad = 0
        for j in range(r):
            b_row = tl.sum(tl.where(o_i == j, b_G, 0.0), axis=0)[None, :]
            b_col = tl.sum(tl.where(o_j == j, b_G, 0.0), axis=1)[:, None]
            pivot = tl.sum(tl.sum(tl.where((o_i == j) & (o_j == j), b_G, 0.0), axis=1), axis=0)
            squared = tl.sum(tl.sum(tl.where((o_i == 0) & (o_j == j), b_d, 0.0), axis=1), axis=0)
            if (pivot > PIVOT * squared) & (squared >= TOO_SMALL):
                inverse = 1 / tl.sqrt(pivot)
            else:
                bad = 1
                inverse = pivot * 0.0 + 1.0
            b_l = tl.where(o_i >= j, b_col * inverse, 0.0)  # (S, 1)
            b_L = tl.where(o_j == j, b_l, b_L)
            b_m = tl.sum(tl.where(o_i == j, b_M, 0.0), axis=0)[None, :] * inverse
            b_M = tl.where(o_i == j, b_m, tl.where(o_i > j, b_M - b_l * b_m, b_M))
            b_G -= b_l * (b_row * inverse)
        b_L = tl.where((o_i == o_j) & (o_i >= r), 1.0, b_L)
        factors = ws + word(table, count, FACTORS, i) + (2 * S * S if LATER else 0) + o_i * S + o_j
        tl.store(factors, b_L)
        tl.store(factors + S * S, b_M)
        if not LATER:
            kind = word(table, count, KIND, i)
            b_squares = tl.where((o_i < r) & (o_j < r), b_M * b_M * b_d, 0.0)
            found = verdict(tl.sum(tl.sum(b_squares, axis=1), axis=0) - r + 2, kind)
            if bad == 1:
                found = tl.full((), FLAGGED, tl.int32)
            if finite == 0:
                found = overflowed(table, count, i, ws, S)
            tl.store(states + index, found)


@triton.jit(do_not_specialize=["count", "total"])
def apply_kernel(
    table, ws, states, count, total, LATER: tl.constexpr, TYPE: tl.constexpr, LATER_TYPE: tl.constexpr,
    DENSE: tl.constexpr, S: tl.constexpr, N: tl.constexpr, SEARCH: tl.constexpr,
):  # fmt: skip
    """L⁻¹ times the matrix, N columns of it, in place: no other program reads or writes those.

    Block after block of rows from the last on, since a row of the product needs only rows up to its own.
    """
    unit = tl.program_id(0)
    i = find(table + FIRST_APPLY * count, count, unit, SEARCH)
    found = tl.load(states + word(table, count, INDEX, i))
    wanted = (found == TWO) | (found == ONE)
    if LATER:
        wanted = found == TWO
    if wanted & nowhere_bad(states, total):
        start, r = (unit - word(table, count, FIRST_APPLY, i)) * N, word(table, count, ROWS, i)
        x, x_kind, x_row, x_col, cols = view(table, count, i, ws, LATER, DENSE)
        a, kind, row, col, _ = view(table, count, i, ws, False, DENSE)
        p, p_kind, p_row, p_col, _ = view(table, count, i, ws, True, DENSE)
        X_TYPE: tl.constexpr = LATER_TYPE if LATER else TYPE
        blocks = tl.cdiv(r, S)
        width = blocks * S
        o_i, o_j, o_n = tl.arange(0, S), tl.arange(0, S), start + tl.arange(0, N)
        inverse = ws + word(table, count, FACTORS, i) + (3 if LATER else 1) * width * width
        for back in range(blocks):
            i_r = blocks - 1 - back
            b_q = tl.zeros((S, N), dtype=tl.float64)
            for j_r in range(i_r + 1):
                b_M = tl.load(inverse + (i_r * S + o_i[:, None]) * width + j_r * S + o_j[None, :])
                b_x = rows_at(x, x_kind, x_row, x_col, cols, r, j_r * S, start, X_TYPE, DENSE, S, N)
                b_q = tl.dot(b_M, b_x, b_q, out_dtype=tl.float64)
            tl.debug_barrier()  # all threads have read the rows that are overwritten now
            o_r = i_r * S + o_i
            m = (o_r < r)[:, None] & (o_n < cols)[None, :]
            if LATER or found == ONE:
                o = o_r[:, None] * row + (o_n[None, :] if DENSE else o_n[None, :] * col)
                store(a, kind, o, b_q, m, TYPE, DENSE)
            else:
                o_later = o_r[:, None] * p_row + (o_n[None, :] if DENSE else o_n[None, :] * p_col)
                store(p, p_kind, o_later, b_q, m, LATER_TYPE, DENSE)


# Matrices of more rows than one program holds: G before torch's Cholesky, the verdict after it.


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
        b_G = sum_of_partials(ws, first, blocks * blocks * S * S, chunks, S)
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
