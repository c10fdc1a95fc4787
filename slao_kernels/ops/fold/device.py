"""The Triton kernel of fold_; kernels.py builds its table and launches it. Names as in tables_device.py.

W is (M, N) here, with M the slower in memory; B (M, R), A (R, N).
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..tables_device import advance, find, load, load_factor, store, word

# Rows of the table: three records of csrc/tensor_table.h. FULL is 1 where W's rows are dense and begin at multiples of
# 16 bytes.
FIRST, W, M, N, W_ROW, W_COL, W_KIND = (tl.constexpr(row) for row in range(7))
A, R, A_ROW, A_COL, A_KIND = (tl.constexpr(row) for row in (7, 8, 10, 11, 12))
B, B_ROW, B_COL, B_KIND, FULL = (tl.constexpr(row) for row in (13, 16, 17, 18, 19))


@triton.jit
def _product(
    table, count, i, row, col, A_TYPE: tl.constexpr, B_TYPE: tl.constexpr, OPERAND: tl.constexpr,
    COMPUTE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """B A of record i for rows from `row` and columns from `col` on: (BLOCK_M, BLOCK_N)."""
    p_A, p_B = word(table, count, A, i), word(table, count, B, i)
    a_kind, b_kind, r = word(table, count, A_KIND, i), word(table, count, B_KIND, i), word(table, count, R, i)
    a_row, a_col = word(table, count, A_ROW, i), word(table, count, A_COL, i)
    b_row, b_col = word(table, count, B_ROW, i), word(table, count, B_COL, i)
    o_m, o_n = row + tl.arange(0, BLOCK_M), col + tl.arange(0, BLOCK_N)
    m_m, m_n = o_m < word(table, count, M, i), o_n < word(table, count, N, i)
    b_sum = tl.zeros((BLOCK_M, BLOCK_N), dtype=COMPUTE)
    for start in range(0, r, BLOCK_R):
        o_r = start + tl.arange(0, BLOCK_R)
        m_r = o_r < r
        o_B = o_m[:, None] * b_row + o_r[None, :] * b_col
        b_B = load_factor(p_B, b_kind, o_B, m_m[:, None] & m_r[None, :], B_TYPE, OPERAND)  # (M, R)
        o_A = o_r[:, None] * a_row + o_n[None, :] * a_col
        b_A = load_factor(p_A, a_kind, o_A, m_r[:, None] & m_n[None, :], A_TYPE, OPERAND)  # (R, N)
        b_sum = tl.dot(b_B, b_A, b_sum, input_precision="ieee", out_dtype=COMPUTE)
    return b_sum


@triton.jit(do_not_specialize=["count"])
def fold_kernel(
    table, scalings, count, W_TYPE: tl.constexpr, A_TYPE: tl.constexpr, B_TYPE: tl.constexpr,
    OPERAND: tl.constexpr, COMPUTE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, STEP: tl.constexpr,
    BLOCK_R: tl.constexpr, SEARCH: tl.constexpr,
):  # fmt: skip
    """W <- W + scalings[i] B A for each record i of `table`; a program takes a tile (BLOCK_M, BLOCK_N) of one.

    All at once where it is inside a FULL matrix; else STEP rows at a time, since offsets and masks take registers too.
    OPERAND: the dtype of the products' factors; COMPUTE: of their sums, and of W meanwhile.
    """
    unit = tl.program_id(0)
    i = find(table, count, unit, SEARCH)
    w, kind, s = word(table, count, W, i), word(table, count, W_KIND, i), tl.load(scalings + i).to(COMPUTE)
    rows, cols, stride = word(table, count, M, i), word(table, count, N, i), word(table, count, W_ROW, i)
    tile, across = unit - word(table, count, FIRST, i), tl.cdiv(cols, BLOCK_N)
    row, col = tile // across * BLOCK_M, tile % across * BLOCK_N
    if (word(table, count, FULL, i) == 1) & (row + BLOCK_M <= rows) & (col + BLOCK_N <= cols):
        w = advance(w, kind, row * stride + col, W_TYPE)
        o_row = tl.arange(0, BLOCK_M) * tl.multiple_of(stride.to(tl.int32), 16)
        o = o_row[:, None] + tl.arange(0, BLOCK_N)[None, :]
        b_w = load(w, kind, o, None, W_TYPE, COMPUTE, True)
        b = _product(table, count, i, row, col, A_TYPE, B_TYPE, OPERAND, COMPUTE, BLOCK_M, BLOCK_N, BLOCK_R)
        store(w, kind, o, b_w + s * b, None, W_TYPE, True)
    else:
        o_n = col + tl.arange(0, BLOCK_N)
        for start in range(row, tl.minimum(row + BLOCK_M, rows), STEP):
            o_m = start + tl.arange(0, STEP)
            m = (o_m < rows)[:, None] & (o_n < cols)[None, :]
            o_w = o_m[:, None] * stride + o_n[None, :] * word(table, count, W_COL, i)
            b_part = load(w, kind, o_w, m, W_TYPE, COMPUTE)
            b_sum = _product(table, count, i, start, col, A_TYPE, B_TYPE, OPERAND, COMPUTE, STEP, BLOCK_N, BLOCK_R)
            store(w, kind, o_w, b_part + s * b_sum, m, W_TYPE)
