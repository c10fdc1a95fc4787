"""The Triton kernel of scaled_merge_; kernels.py builds its table and launches it. Names as in tables_device.py."""

from __future__ import annotations

import triton
import triton.language as tl

from ..tables_device import INTERPRETED, advance, find, load, store, word

# Rows of the table: two records of csrc/tensor_table.h, of which the second's size is not read. DENSE is 1 for a pair
# that is contiguous on both sides, ALIGNED where both start at multiples of 16 bytes besides.
FIRST, DST, ROWS, COLS, DST_ROW, DST_COL, DST_KIND = (tl.constexpr(row) for row in range(7))
SRC, SRC_ROW, SRC_COL, SRC_KIND, DENSE, ALIGNED = (tl.constexpr(row) for row in (7, 10, 11, 12, 13, 14))


@triton.jit
def _copy(dst, src, o_dst, o_src, mask, kind, ALIGNED: tl.constexpr):
    """Elements of one dtype, bit for bit: a NaN keeps its payload."""
    if kind == 0:
        _copy_bits(dst, src, o_dst, o_src, mask, tl.int64, ALIGNED)
    elif kind == 1:
        _copy_bits(dst, src, o_dst, o_src, mask, tl.int32, ALIGNED)
    else:
        _copy_bits(dst, src, o_dst, o_src, mask, tl.int16, ALIGNED)


@triton.jit
def _copy_bits(dst, src, o_dst, o_src, mask, TYPE: tl.constexpr, ALIGNED: tl.constexpr):
    store(dst, 0, o_dst, load(src, 0, o_src, mask, TYPE, TYPE, ALIGNED), mask, TYPE, ALIGNED)


@triton.jit
def _fma(a, b, c):
    """a b + c, rounded once: where the terms cancel, rounding twice would be more than a unit away from torch's."""
    if INTERPRETED and b.dtype == tl.float32:  # Triton 3.6's interpreter rounds twice
        found = (a.to(tl.float64) * b.to(tl.float64) + c.to(tl.float64)).to(tl.float32)
    else:
        found = tl.fma(tl.broadcast_to(a, b.shape), b, c)
    return found


@triton.jit
def _merge(
    dst, src, o_dst, o_src, mask, lam, dst_kind, src_kind,
    DST_TYPE: tl.constexpr, SRC_TYPE: tl.constexpr, COMPUTE: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    if (lam == 1.0) & (dst_kind == src_kind):
        _copy(dst, src, o_dst, o_src, mask, dst_kind, ALIGNED)
    else:
        b_src = load(src, src_kind, o_src, mask, SRC_TYPE, COMPUTE, ALIGNED)
        b = b_src
        if lam != 1.0:  # where it is, the formula would let a NaN in dst through
            b_dst = load(dst, dst_kind, o_dst, mask, DST_TYPE, COMPUTE, ALIGNED)
            # torch's formula, from the nearer end.
            if lam < 0.5:
                b = _fma(lam.to(COMPUTE), b_src - b_dst, b_dst)
            else:
                b = _fma((lam - 1.0).to(COMPUTE), b_src - b_dst, b_src)
        store(dst, dst_kind, o_dst, b, mask, DST_TYPE, ALIGNED)


@triton.jit(do_not_specialize=["count"])
def merge_kernel(
    table, weights, count,
    DST_TYPE: tl.constexpr, SRC_TYPE: tl.constexpr, COMPUTE: tl.constexpr, BLOCK: tl.constexpr, STEP: tl.constexpr,
    SEARCH: tl.constexpr,
):  # fmt: skip
    """dst <- dst + weights[i] (src - dst) for each record i of `table`; a program takes BLOCK elements of one.

    All at once where they are aligned and inside; else STEP at a time, since offsets and masks take registers too.
    """
    unit = tl.program_id(0)
    i = find(table, count, unit, SEARCH)
    lam = tl.load(weights + i)
    if lam != 0.0:
        dst, src, cols = word(table, count, DST, i), word(table, count, SRC, i), word(table, count, COLS, i)
        size = word(table, count, ROWS, i) * cols
        dst_kind, src_kind = word(table, count, DST_KIND, i), word(table, count, SRC_KIND, i)
        begin = (unit - word(table, count, FIRST, i)) * BLOCK
        if (word(table, count, ALIGNED, i) == 1) & (begin + BLOCK <= size):
            dst, src = advance(dst, dst_kind, begin, DST_TYPE), advance(src, src_kind, begin, SRC_TYPE)
            o = tl.arange(0, BLOCK)
            _merge(dst, src, o, o, None, lam, dst_kind, src_kind, DST_TYPE, SRC_TYPE, COMPUTE, True)
        else:
            for start in range(begin, tl.minimum(begin + BLOCK, size), STEP):
                o = start + tl.arange(0, STEP)
                o_dst, o_src = o, o
                if word(table, count, DENSE, i) == 0:
                    o_row, o_col = o // cols, o % cols
                    o_dst = o_row * word(table, count, DST_ROW, i) + o_col * word(table, count, DST_COL, i)
                    o_src = o_row * word(table, count, SRC_ROW, i) + o_col * word(table, count, SRC_COL, i)
                _merge(dst, src, o_dst, o_src, o < size, lam, dst_kind, src_kind, DST_TYPE, SRC_TYPE, COMPUTE, False)
