"""The exact fold in torch's elementwise operations, a few rows at a time: any device, the fallback and the oracle.

d = s B A is a sum of r products, each a multiplication and an addition of its own: no GEMM, whose order of sums may
depend on threads, shapes and settings (TF32). So its bits depend on A, B and s alone. csrc/cpu/exact_fold.cpp says how
the code works; the names are its own.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .kept import Layer, Streams, bits_of, bits_sum

# Elements of W in one slice, with a stream of its own: a GPU takes its time to begin. A dozen temporaries of this size.
_BLOCKS = {"cpu": 1 << 17, "cuda": 1 << 20}
_FRACTION = {torch.bfloat16: 7, torch.float16: 10, torch.float32: 23, torch.float64: 52}
Slice = tuple[Tensor, Tensor, Tensor]  # the fields (bytes); places of the exceptions, and their bits


def mark() -> str:
    """Whether this thread takes denormals for zeros (torch.set_flush_denormal)."""
    return "denormals are numbers" if (torch.full((1,), 2.0**-140) * 1.5).any() else "denormals are zeros"


def groups(layers: Sequence[Layer]) -> list[list[int]]:
    """Which layers go into one call of `fold`."""
    return [[index] for index in range(len(layers))]


def fold(layers: Sequence[Layer]) -> tuple[Streams, list[int]]:
    """W <- W + d for each layer; (what `unfold` needs, the sums of what was written)."""
    done: list[list[Slice]] = []
    sums = []
    try:
        for layer in layers:
            done.append([])
            sums.append(_fold_one(layer, done[-1]))
    except BaseException:
        unfold(layers[: len(done)], Streams([], done))
        raise
    flat = [tensor for slices in done for one in slices for tensor in one]
    return Streams([], done, sum(tensor.nbytes for tensor in flat)), sums


def unfold(layers: Sequence[Layer], streams: Streams) -> None:
    """W again, of as many of each layer's slices as there are streams of."""
    for layer, slices in zip(layers, streams.parts, strict=True):
        for rows, one in zip(_rows(layer.W), slices, strict=False):
            W = layer.W[rows]
            back, width = _back(W, _delta(layer, rows), W.dtype)
            W.copy_(_decode(one, back, width.flatten()))


def sums(layers: Sequence[Layer]) -> list[int]:
    """`bits_sum` of every W."""
    return [sum(bits_sum(bits_of(W[rows]), rows.start) for rows in _rows(W)) % (1 << 64) for W, *_ in layers]


def _rows(W: Tensor) -> list[slice]:
    step = max(1, _BLOCKS.get(W.device.type, 1 << 17) // max(1, W.shape[1]))
    return [slice(start, min(start + step, W.shape[0])) for start in range(0, W.shape[0], step)]


def _fold_one(layer: Layer, slices: list[Slice]) -> int:
    total = 0
    for rows in _rows(layer.W):
        d, W = _delta(layer, rows), layer.W[rows]
        now = (W.to(d.dtype) + d).to(W.dtype)
        back, width = _back(now, d, W.dtype)
        encoded = _encode(W.contiguous(), back, width.flatten())
        total += bits_sum(bits_of(now), rows.start)
        slices.append(encoded)
        W.copy_(now)
    return total % (1 << 64)


def _delta(layer: Layer, rows: slice) -> Tensor:
    W, A, B, s = layer
    wide = torch.promote_types(torch.float32, torch.promote_types(W.dtype, torch.promote_types(A.dtype, B.dtype)))
    b, d = B[rows].to(wide) * s, W.new_zeros(W[rows].shape, dtype=wide)
    for k in range(A.shape[0]):
        d += b[:, k, None] * A[k].to(wide)
    return d


def _back(now: Tensor, d: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(now - d rounded to dtype, how many bits the distance of what was from it takes)."""
    a, b = now.to(d.dtype), -d
    high = a + b
    fraction, size = _FRACTION[dtype], 8 * now.element_size()
    if d.dtype == dtype:  # the rounding error of a difference is exact: Knuth's TwoSum
        part = high - a
        low = (a - (high - part)) + (b - part)
        tie = (low != 0) & ((high + 2 * low) - high == 2 * low)
    elif d.dtype == torch.float32:
        dropped = 23 - fraction
        tie = (bits_of(high) & ((1 << dropped) - 1)) == 1 << (dropped - 1)
    else:
        tie = torch.zeros_like(d, dtype=torch.bool)
    back = torch.where(high == high, high, torch.nan).to(dtype).contiguous()  # a NaN's bits may differ from run to run
    magnitude = (1 << (size - 1)) - 1
    rest = bits_of(back).long() & magnitude
    top = ((bits_of(now.contiguous()).long() & magnitude) >> fraction).clamp(min=1)
    bottom = ((rest - (rest != 0).long()) >> fraction).clamp(min=1)
    k = (top - bottom).clamp(min=0)
    width = torch.where(k == 0, 2 * tie.long(), torch.where(k >= fraction, size, k + 1))
    return back, width


def _ordered(bits: Tensor) -> Tensor:
    """The bits of floats as integers that grow with them; its own inverse."""
    size = 8 * bits.element_size()
    return bits ^ ((bits >> (size - 1)) & ((1 << (size - 1)) - 1))


def _places(width: Tensor) -> tuple[Tensor, Tensor]:
    """For every bit of the stream: which element it is of, and which of its bits."""
    owner = torch.repeat_interleave(width)
    first = width.cumsum(0) - width
    return owner, torch.arange(len(owner), device=width.device) - first[owner]


def _signed(code: Tensor, width: Tensor) -> Tensor:
    spare = (64 - width).clamp(max=63)
    return (code << spare) >> spare


def _encode(was: Tensor, back: Tensor, width: Tensor) -> Slice:
    code = (_ordered(bits_of(was)).long() - _ordered(bits_of(back)).long()).flatten()
    owner, bit = _places(width)
    bits = torch.nn.functional.pad((code[owner] >> bit) & 1, (0, -len(owner) % 8)).view(-1, 8)
    fields = (bits << torch.arange(8, device=bits.device)).sum(1).to(torch.uint8)
    held = _wrapped(_signed(torch.where(width > 0, code, 0), width), was.dtype)
    missed = (held != _wrapped(code, was.dtype)).nonzero().flatten()
    return fields, missed.int(), bits_of(was).flatten()[missed]


def _decode(one: Slice, back: Tensor, width: Tensor) -> Tensor:
    fields, places, values = one
    owner, bit = _places(width)
    if -(-len(owner) // 8) != len(fields):
        raise RuntimeError("unfold_: this torch does not repeat the arithmetic of the fold")
    bits = ((fields[:, None].long() >> torch.arange(8, device=fields.device)) & 1).flatten()[: len(owner)]
    code = torch.zeros_like(width).index_add_(0, owner, bits << bit)
    was = _wrapped(_ordered(bits_of(back)).flatten().long() + _signed(code, width), back.dtype)
    was = _ordered(was)
    was[places.long()] = values
    return was.view(back.shape).view(back.dtype)


def _wrapped(numbers: Tensor, dtype: torch.dtype) -> Tensor:
    """As integers of the dtype's size, the higher bits dropped."""
    return numbers.to({2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize])
