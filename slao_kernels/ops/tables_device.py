"""What Triton's kernels over a table of records share: finding a record, and elements of any dtype in and out.

A table (tables.py builds it) is rows of 64-bit words, one column a record; row 0 is each record's first program, so
that one launch serves matrices of any number and size. A record's addresses are integers in it, and its dtypes codes:
0 fp64, 1 fp32, 2 bf16, 3 fp16. Where a whole table has one dtype the kernels get it as a constant (a TYPE that is not
None) and have no branch for the others.

Names: b_ a block of values, p_ pointers, o_ offsets, m_ masks.

Triton's interpreter truncates where it should round to bf16, knows no fp64 to bf16, and widens some bf16 wrongly;
there, bf16 is converted in integers.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton import knobs

INTERPRETED = tl.constexpr(bool(knobs.runtime.interpret))


@triton.jit
def find(table, count, unit, SEARCH: tl.constexpr):
    """The record that program `unit` works on: the last whose first program is not beyond it.

    All first programs are read side by side and counted: one wait for memory, where a binary search has eight.
    """
    found = tl.full((), -1, tl.int32)
    for start in range(0, count, SEARCH):
        o = start + tl.arange(0, SEARCH)
        b_first = tl.load(table + o, mask=o < count, other=0x7FFFFFFF)
        found += tl.sum((b_first <= unit).to(tl.int32), axis=0)
    return found


@triton.jit
def word(table, count, row: tl.constexpr, record):
    """One word of a record."""
    return tl.load(table + row * count + record)


@triton.jit
def advance(address, kind, elements, TYPE: tl.constexpr):
    """The address of a later element: offsets from there fit 32 bits, which halves the registers that they take."""
    if TYPE is not None:
        found = address + elements * (TYPE.primitive_bitwidth // 8)
    else:
        found = address + elements * tl.where(kind == 0, 8, tl.where(kind == 1, 4, 2))
    return found


@triton.jit
def _pointer(address, TYPE: tl.constexpr, ALIGNED: tl.constexpr):
    if INTERPRETED and TYPE == tl.bfloat16:
        p = address.to(tl.pointer_type(tl.int16))
    else:
        p = address.to(tl.pointer_type(TYPE))
    if ALIGNED:
        p = tl.multiple_of(p, 16)
    return p


@triton.jit
def _load(address, o, mask, TYPE: tl.constexpr, COMPUTE: tl.constexpr, ALIGNED: tl.constexpr):
    p = _pointer(address, TYPE, ALIGNED) + o
    if mask is None:
        b = tl.load(p)
    else:
        b = tl.load(p, mask=mask, other=0)
    if TYPE == tl.bfloat16:
        if INTERPRETED:
            b = (b.to(tl.int32) << 16).to(tl.float32, bitcast=True)
        b = b.to(tl.float32)
    return b.to(COMPUTE)


@triton.jit
def load(address, kind, o, mask, TYPE: tl.constexpr, COMPUTE: tl.constexpr, ALIGNED: tl.constexpr = False):
    """The elements at offsets `o` where `mask` holds, else 0, as COMPUTE. ALIGNED: `address` is a multiple of 16.

    mask None: all of them.

    TYPE None: `kind` says at run time what they are.
    """
    if TYPE is not None:
        b = _load(address, o, mask, TYPE, COMPUTE, ALIGNED)
    elif kind == 1:
        b = _load(address, o, mask, tl.float32, COMPUTE, ALIGNED)
    elif kind == 2:
        b = _load(address, o, mask, tl.bfloat16, COMPUTE, ALIGNED)
    elif kind == 3:
        b = _load(address, o, mask, tl.float16, COMPUTE, ALIGNED)
    else:
        b = _load(address, o, mask, tl.float64, COMPUTE, ALIGNED)
    return b


@triton.jit
def load_factor(address, kind, o, mask, TYPE: tl.constexpr, COMPUTE: tl.constexpr, ALIGNED: tl.constexpr = False):
    """`load` for the operand of a product.

    Triton before 3.8 aborts on an fp64 product ("fp64 don't support largeK MMA") whose operand it sees being loaded in
    16 bits. It does not look into a branch, so there is one, which is always taken.
    """
    if TYPE is not None and COMPUTE == tl.float64 and TYPE.primitive_bitwidth == 16:
        b = tl.zeros(o.shape, dtype=COMPUTE)
        if kind >= 2:
            b = load(address, kind, o, mask, TYPE, COMPUTE, ALIGNED)
    else:
        b = load(address, kind, o, mask, TYPE, COMPUTE, ALIGNED)
    return b


@triton.jit
def _bf16_bits(b):
    """fp32 as the nearest bf16, ties to even, as int16."""
    b_bits = b.to(tl.int32, bitcast=True)
    b_near = (b_bits + 0x7FFF + ((b_bits >> 16) & 1)) >> 16
    return tl.where(b != b, (b_bits >> 16) | 0x40, b_near).to(tl.int16)


@triton.jit
def rounded(b, TYPE: tl.constexpr):
    """fp32 as TYPE. The interpreter truncates to bf16: it is given what bf16 has."""
    if INTERPRETED and TYPE == tl.bfloat16:
        b = (_bf16_bits(b).to(tl.int32) << 16).to(tl.float32, bitcast=True)
    return b.to(TYPE)


@triton.jit
def to_odd(b):
    """fp64 as fp32 towards zero, the last bit set when that was inexact: rounding it again equals rounding once."""
    b_near = b.to(tl.float32)
    b_back = b_near.to(tl.float64)
    b_bits = b_near.to(tl.int32, bitcast=True)
    b_bits = tl.where(tl.abs(b_back) > tl.abs(b), b_bits - 1, b_bits)
    b_bits = tl.where(b_back == b, b_bits, b_bits | 1)
    return tl.where(b != b, b_near, b_bits.to(tl.float32, bitcast=True))


@triton.jit
def _store(address, o, b, mask, TYPE: tl.constexpr, ALIGNED: tl.constexpr):
    p = _pointer(address, TYPE, ALIGNED) + o
    if TYPE.primitive_bitwidth == 16:
        b = to_odd(b) if b.dtype == tl.float64 else b
    if INTERPRETED and TYPE == tl.bfloat16:
        tl.store(p, _bf16_bits(b), mask=mask)
    else:
        tl.store(p, b.to(TYPE), mask=mask)


@triton.jit
def store(address, kind, o, b, mask, TYPE: tl.constexpr, ALIGNED: tl.constexpr = False):
    """The opposite of `load`, rounded once."""
    if TYPE is not None:
        _store(address, o, b, mask, TYPE, ALIGNED)
    elif kind == 1:
        _store(address, o, b, mask, tl.float32, ALIGNED)
    elif kind == 2:
        _store(address, o, b, mask, tl.bfloat16, ALIGNED)
    elif kind == 3:
        _store(address, o, b, mask, tl.float16, ALIGNED)
    else:
        _store(address, o, b, mask, tl.float64, ALIGNED)
