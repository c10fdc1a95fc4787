"""The Triton kernels of the exact fold; kernels.py builds their table and launches them. Names as in tables_device.py.

The code is that of csrc/cpu/exact_fold.cpp, written by tiles of W (M, N), each on words of its own. Where what was does
not fit the width that is foreseen (NaN, infinity, -0, ties that nobody looks at), all widths of the tile are at least 2
bits, or all bits: the tile's floor. So there are no exceptions beside the fields.

d is made by `_delta` in every kernel: products and sums of their own, compiled without fused multiply-add
(kernels.py), no sum of which depends on the tile. W is read and written as integers, so that no NaN is touched.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..tables_device import find, rounded, to_odd, word

# Rows of the table. W (M, N) by its strides; A (R, N) and s B (M, R), in what is computed in, are dense.
FIRST, W, M, N, W_ROW, W_COL, A, R, B = (tl.constexpr(row) for row in range(9))
LANES = tl.constexpr(8)  # as many as there are warps
# bits_sum's, in kept.py.
GOLDEN, FIRST_MIX, SECOND_MIX, SPREAD = (
    tl.constexpr(number) for number in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB, 0xD1342543DE82EF95)
)


@triton.constexpr_function
def integer(TYPE):
    """The signed integers of a type's size."""
    return {16: tl.int16, 32: tl.int32, 64: tl.int64}[TYPE.primitive_bitwidth]


@triton.constexpr_function
def wide(TYPE):
    """Those in which its bits are worked on, sign-extended: no GPU counts in 16 bits."""
    return tl.int64 if TYPE.primitive_bitwidth == 64 else tl.int32


@triton.constexpr_function
def word_of(TYPE):
    """The words of a stream of such codes."""
    return tl.uint64 if TYPE.primitive_bitwidth == 64 else tl.uint32


@triton.jit
def _tile(
    table, count, unit, TYPE: tl.constexpr, DENSE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    SEARCH: tl.constexpr,
):  # fmt: skip
    """(record, its columns, first row, first column, mask of the rows (BLOCK_M, 1), of the columns (1, BLOCK_N), the
    elements' addresses) of a program's tile"""
    i = find(table, count, unit, SEARCH)
    cols, stride, step = word(table, count, N, i), word(table, count, W_ROW, i), word(table, count, W_COL, i)
    if DENSE:
        # Triton 3.6 forgets what it is told of a call's result.
        cols, stride = tl.multiple_of(cols.to(tl.int32), 16), tl.multiple_of(stride.to(tl.int32), 16)
        cols, stride, step = cols.to(tl.int64), stride.to(tl.int64), 1
    tile, across = unit - word(table, count, FIRST, i).to(tl.int32), tl.cdiv(cols, BLOCK_N).to(tl.int32)
    row, col = (tile // across).to(tl.int64) * BLOCK_M, (tile % across).to(tl.int64) * BLOCK_N
    o_m, o_n = row + tl.arange(0, BLOCK_M)[:, None], col + tl.arange(0, BLOCK_N)[None, :]
    p = word(table, count, W, i).to(tl.pointer_type(integer(TYPE)))
    p = tl.multiple_of(p, 16) if DENSE else p
    return i, cols, row, col, o_m < word(table, count, M, i), o_n < cols, p + (o_m * stride + o_n * step)


@triton.jit
def _delta(
    table, count, i, cols, row, col, m_m, m_n, COMPUTE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr
):  # fmt: skip
    """d = s B A of a tile, one product after another. A begins at a multiple of 16 bytes.

    Rows by LANES, so that what a thread has loaded of A serves several of its rows.
    """
    r = word(table, count, R, i)
    p_A = tl.multiple_of(word(table, count, A, i).to(tl.pointer_type(COMPUTE)), 16)
    p_A = tl.broadcast_to((p_A + col + tl.arange(0, BLOCK_N))[None, None, :], (1, LANES, BLOCK_N))
    p_B = word(table, count, B, i).to(tl.pointer_type(COMPUTE)) + row * r
    p_B += tl.reshape(tl.arange(0, BLOCK_M) * r, (BLOCK_M // LANES, LANES, 1))
    m_m, m_n = tl.reshape(m_m, (BLOCK_M // LANES, LANES, 1)), m_n[None]
    b_d = tl.zeros((BLOCK_M // LANES, LANES, BLOCK_N), dtype=COMPUTE)
    for k in range(r):
        b_d += tl.load(p_B + k, mask=m_m, other=0) * tl.load(p_A + k * cols, mask=m_n, other=0)
    return tl.reshape(b_d, (BLOCK_M, BLOCK_N))


@triton.jit
def _number(b, TYPE: tl.constexpr, COMPUTE: tl.constexpr):
    """Of its bits."""
    if TYPE == tl.bfloat16:
        b = (b << 16).to(tl.float32, bitcast=True)
    else:
        b = b.to(integer(TYPE)).to(TYPE, bitcast=True)
    return b.to(COMPUTE)


@triton.jit
def _nearest(b, TYPE: tl.constexpr):
    """The bits of the number rounded once to TYPE."""
    if TYPE.primitive_bitwidth == 16 and b.dtype == tl.float64:
        b = to_odd(b)
    return rounded(b, TYPE).to(integer(TYPE), bitcast=True).to(wide(TYPE))


@triton.jit
def _ordered(b, TYPE: tl.constexpr):
    """The bits of floats as integers that grow with them; its own inverse."""
    SIZE: tl.constexpr = TYPE.primitive_bitwidth
    return b ^ ((b >> (SIZE - 1)) & ((1 << (SIZE - 1)) - 1))


@triton.jit
def _wrapped(b, TYPE: tl.constexpr):
    """Modulo 2^size, as a signed number."""
    return b.to(integer(TYPE)).to(wide(TYPE))


@triton.jit
def _signed(b, b_width):
    """The lowest bits of b as a signed number; 0 of no bits."""
    BITS: tl.constexpr = b.dtype.primitive_bitwidth
    b_spare = ((BITS - b_width) & (BITS - 1)).to(b.dtype)
    return tl.where(b_width == 0, 0, (b << b_spare) >> b_spare)


@triton.jit
def _back(b_now, b_d, TYPE: tl.constexpr, COMPUTE: tl.constexpr):
    """(bits of now - d rounded to TYPE, how many bits the distance of what was from it takes: lines.h says why)"""
    b_a, b_b = _number(b_now, TYPE, COMPUTE), -b_d
    b_high = b_a + b_b
    FRACTION: tl.constexpr = TYPE.fp_mantissa_width
    SIZE: tl.constexpr = TYPE.primitive_bitwidth
    if TYPE == COMPUTE:  # the rounding error of a difference is exact: Knuth's TwoSum
        b_part = b_high - b_a
        b_low = (b_a - (b_high - b_part)) + (b_b - b_part)
        b_tie = (b_low != 0) & ((b_high + 2 * b_low) - b_high == 2 * b_low)
    else:
        HALF: tl.constexpr = 1 << (COMPUTE.fp_mantissa_width - FRACTION - 1)
        b_tie = (b_high.to(integer(COMPUTE), bitcast=True) & (2 * HALF - 1)) == HALF
    QUIET: tl.constexpr = ((1 << (SIZE - 1)) - 1) ^ ((1 << (FRACTION - 1)) - 1)
    b_back = tl.where(b_high == b_high, _nearest(b_high, TYPE), QUIET)
    MAGNITUDE: tl.constexpr = (1 << (SIZE - 1)) - 1
    b_rest = b_back & MAGNITUDE
    b_rest = tl.where(b_rest == 0, 0, b_rest - 1)
    b_k = (tl.maximum((b_now & MAGNITUDE) >> FRACTION, 1) - tl.maximum(b_rest >> FRACTION, 1)).to(tl.int32)
    b_some = tl.where(b_k >= FRACTION, SIZE, b_k + 1)
    return b_back, tl.where(b_k > 0, b_some, tl.where(b_tie, 2, 0))


@triton.jit
def _raised(b_width, floor, m, TYPE: tl.constexpr):
    """Of each element of W, at least the tile's floor. floor: 0, 1 for 2 bits, 2 for all bits."""
    return tl.where(m, tl.maximum(b_width, tl.where(floor == 2, TYPE.primitive_bitwidth, 2 * floor)), 0)


@triton.jit
def _words(b_width, TYPE: tl.constexpr):
    """That the tile's fields take."""
    return tl.cdiv(tl.sum(b_width), word_of(TYPE).primitive_bitwidth)


@triton.jit
def _fields(stream, start, b_width, TYPE: tl.constexpr):
    """(the word in which each field begins, its bit there, whether it goes on in the next word)"""
    BITS: tl.constexpr = word_of(TYPE).primitive_bitwidth
    b_rows = tl.sum(b_width, axis=1)
    b_bit = (tl.cumsum(b_rows, axis=0) - b_rows)[:, None] + tl.cumsum(b_width, axis=1) - b_width
    b_shift = b_bit % BITS
    return stream + start + b_bit // BITS, b_shift, b_shift + b_width > BITS


@triton.jit
def _mixed(b):
    """SplitMix64."""
    b = (b.to(tl.uint64) + 1) * GOLDEN
    b = (b ^ (b >> 30)) * FIRST_MIX
    b = (b ^ (b >> 27)) * SECOND_MIX
    return b ^ (b >> 31)


@triton.jit
def _add_sum(sums, i, b, row, col, m, TYPE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """sums[i] += `bits_sum` of the tile's bits, in any order: it is modulo 2^64."""
    b_key = _mixed(col + tl.arange(0, BLOCK_N))[None, :]
    b_factor = _mixed(row + tl.arange(0, BLOCK_M) + (1 << 32)) | 1
    b = b.to(tl.uint64)
    if TYPE.primitive_bitwidth < 64:
        b = b & ((1 << TYPE.primitive_bitwidth) - 1)
    b = b ^ b_key
    b = (b ^ (b >> 32)) * SPREAD
    b = tl.where(m, b ^ (b >> 32), 0)
    tl.atomic_add(sums + i, tl.sum(tl.sum(b, axis=1) * b_factor).to(tl.int64), sem="relaxed")


@triton.jit
def _folded(b_was, b_d, TYPE: tl.constexpr, COMPUTE: tl.constexpr):
    """(bits of was + d rounded, code, width before the floor)"""
    b_now = _nearest(_number(b_was, TYPE, COMPUTE) + b_d, TYPE)
    b_back, b_width = _back(b_now, b_d, TYPE, COMPUTE)
    return b_now, _wrapped(_ordered(b_was, TYPE) - _ordered(b_back, TYPE), TYPE), b_width


@triton.jit(do_not_specialize=["count"])
def measure_kernel(
    table, count, found, TYPE: tl.constexpr, COMPUTE: tl.constexpr, DENSE: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, SEARCH: tl.constexpr,
):  # fmt: skip
    """found[tile] <- 4 times the words that its stream will take, plus its floor. W stays."""
    unit = tl.program_id(0)
    i, cols, row, col, m_m, m_n, p = _tile(table, count, unit, TYPE, DENSE, BLOCK_M, BLOCK_N, SEARCH)
    b_d = _delta(table, count, i, cols, row, col, m_m, m_n, COMPUTE, BLOCK_M, BLOCK_N)
    m = m_m & m_n
    _, b_code, b_width = _folded(tl.load(p, mask=m, other=0).to(wide(TYPE)), b_d, TYPE, COMPUTE)
    b_missed = (_signed(b_code, b_width) != b_code) & m
    floor = tl.max(tl.where(b_missed, tl.where((b_code >= -2) & (b_code <= 1), 1, 2), 0))
    tl.store(found + unit, _words(_raised(b_width, floor, m, TYPE), TYPE) * 4 + floor)


@triton.jit(do_not_specialize=["count"])
def fold_kernel(
    table, count, found, starts, stream, sums, TYPE: tl.constexpr, COMPUTE: tl.constexpr, DENSE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SEARCH: tl.constexpr,
):  # fmt: skip
    """W <- W + d; the stream, which is zeros before; the sums of what was written.

    Fields share words, so they are written by atomic ORs of bits that no two have in common: in any order the same.
    """
    unit = tl.program_id(0)
    i, cols, row, col, m_m, m_n, p = _tile(table, count, unit, TYPE, DENSE, BLOCK_M, BLOCK_N, SEARCH)
    b_d = _delta(table, count, i, cols, row, col, m_m, m_n, COMPUTE, BLOCK_M, BLOCK_N)
    m = m_m & m_n
    b_now, b_code, b_width = _folded(tl.load(p, mask=m, other=0).to(wide(TYPE)), b_d, TYPE, COMPUTE)
    tl.store(p, b_now.to(integer(TYPE)), mask=m)
    _add_sum(sums, i, b_now, row, col, m, TYPE, BLOCK_M, BLOCK_N)
    WORD: tl.constexpr = word_of(TYPE)
    BITS: tl.constexpr = WORD.primitive_bitwidth
    b_width = _raised(b_width, tl.load(found + unit) & 3, m, TYPE)
    p, b_shift, m_next = _fields(stream, tl.load(starts + unit), b_width, TYPE)
    b_spare = ((BITS - b_width) & (BITS - 1)).to(WORD)
    b_field = (b_code.to(WORD, bitcast=True) << b_spare) >> b_spare
    tl.atomic_or(p, b_field << b_shift.to(WORD), mask=b_width > 0, sem="relaxed")
    tl.atomic_or(p + 1, b_field >> ((BITS - b_shift) & (BITS - 1)).to(WORD), mask=m_next, sem="relaxed")


@triton.jit(do_not_specialize=["count"])
def unfold_kernel(
    table, count, found, starts, stream, damaged, TYPE: tl.constexpr, COMPUTE: tl.constexpr, DENSE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SEARCH: tl.constexpr,
):  # fmt: skip
    """W <- what it was; damaged[0] <- 1, and the tile stays, where its fields do not take the words that it has."""
    unit = tl.program_id(0)
    i, cols, row, col, m_m, m_n, p = _tile(table, count, unit, TYPE, DENSE, BLOCK_M, BLOCK_N, SEARCH)
    b_d = _delta(table, count, i, cols, row, col, m_m, m_n, COMPUTE, BLOCK_M, BLOCK_N)
    m = m_m & m_n
    b_back, b_width = _back(tl.load(p, mask=m, other=0).to(wide(TYPE)), b_d, TYPE, COMPUTE)
    measured = tl.load(found + unit)
    b_width = _raised(b_width, measured & 3, m, TYPE)
    if _words(b_width, TYPE) == measured >> 2:
        WORD: tl.constexpr = word_of(TYPE)
        BITS: tl.constexpr = WORD.primitive_bitwidth
        p_field, b_shift, m_next = _fields(stream, tl.load(starts + unit), b_width, TYPE)
        b_field = tl.load(p_field, mask=b_width > 0, other=0) >> b_shift.to(WORD)
        b_more = tl.load(p_field + 1, mask=m_next, other=0) << ((BITS - b_shift) & (BITS - 1)).to(WORD)
        b_code = _signed((b_field | b_more).to(wide(TYPE), bitcast=True), b_width)
        b_was = _ordered(_wrapped(_ordered(b_back, TYPE) + b_code, TYPE), TYPE)
        tl.store(p, b_was.to(integer(TYPE)), mask=m)
    else:
        tl.store(damaged, 1)


@triton.jit(do_not_specialize=["count"])
def sum_kernel(
    table, count, sums, TYPE: tl.constexpr, COMPUTE: tl.constexpr, DENSE: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, SEARCH: tl.constexpr,
):  # fmt: skip
    """sums[i] += `bits_sum` of each W."""
    i, _, row, col, m_m, m_n, p = _tile(table, count, tl.program_id(0), TYPE, DENSE, BLOCK_M, BLOCK_N, SEARCH)
    m = m_m & m_n
    _add_sum(sums, i, tl.load(p, mask=m, other=0).to(wide(TYPE)), row, col, m, TYPE, BLOCK_M, BLOCK_N)
