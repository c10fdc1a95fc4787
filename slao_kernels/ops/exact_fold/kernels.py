"""The exact fold in Triton: W is read to measure the stream, then read and written once; back it is read and written.

The stream is measured first so that it is allocated as long as it is, and before anything is written.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ... import native
from .. import tables
from . import device
from .kept import Layer, Streams

# The tile of W, by what is computed in: a thread has 16 elements, four in a column, so that five loads serve 16
# products; in fp64 four, two in a column, since some of its kernels spill with more. Compiled for, not timed. The
# interpreter takes its time to begin a tile.
TILES = {tl.float32: (32, 128), tl.float64: (16, 64)}
if tables.INTERPRETED:
    TILES = dict.fromkeys(TILES, (64, 512))
# Without fused multiply-add a product and a sum are one rounding each, in every kernel.
OPTIONS = {"num_warps": 8, "enable_fp_fusion": False}
_DENSE = 16  # rows that begin at multiples of so many elements are loaded and stored 16 bytes at once


def mark() -> str:
    """The streams' format, and what has compiled the arithmetic."""
    tiles = f"tiles {TILES[tl.float32]} and {TILES[tl.float64]}"
    return f"{tiles}, {'interpreted by ' if tables.INTERPRETED else ''}Triton {triton.__version__}"


def groups(layers: Sequence[Layer]) -> list[list[int]]:
    """Which layers go into one call of `fold`: all that one set of constants serves."""
    found: dict[Any, list[int]] = {}
    for index, layer in enumerate(layers):
        found.setdefault(_kind(layer), []).append(index)
    return list(found.values())


def fold(layers: Sequence[Layer]) -> tuple[Streams, list[int]]:
    """As `reference.fold`, of layers of one group. An error comes before anything is written."""
    call = _call(layers)
    found = torch.empty(call.programs, dtype=torch.int32, device=call.device)
    call.run(device.measure_kernel, found)
    starts, words = _starts(found)
    word = torch.int64 if layers[0].W.itemsize == 8 else torch.int32
    stream = torch.zeros(words, dtype=word, device=call.device)
    totals = torch.zeros(len(layers), dtype=torch.int64, device=call.device)
    call.run(device.fold_kernel, found, starts, _words(stream), totals)
    native.written([layer.W for layer in layers])
    return Streams([], (stream, found), stream.nbytes + found.nbytes), _unsigned(totals)


def unfold(layers: Sequence[Layer], streams: Streams) -> None:
    """As `reference.unfold`."""
    call = _call(layers)
    stream, found = streams.parts
    damaged = torch.zeros(1, dtype=torch.int32, device=call.device)
    call.run(device.unfold_kernel, found, _starts(found)[0], _words(stream), damaged)
    native.written([layer.W for layer in layers])
    if damaged.item():
        raise RuntimeError("unfold_: Triton did not repeat the arithmetic of the fold, or a stream is damaged")


def sums(layers: Sequence[Layer]) -> list[int]:
    """As `reference.sums`."""
    found = [0] * len(layers)
    for owners in groups(layers):
        call = _call([layers[owner] for owner in owners])
        totals = torch.zeros(len(owners), dtype=torch.int64, device=call.device)
        call.run(device.sum_kernel, totals)
        for owner, total in zip(owners, _unsigned(totals), strict=True):
            found[owner] = total
    return found


@dataclass
class _Call:
    """Layers of one group as the kernels take them. factors: A and s B, which the table has addresses of."""

    table: tables.Table
    count: int
    programs: int
    constants: dict[str, Any]
    device: torch.device
    factors: list[Tensor]

    def run(self, kernel: Any, *more: Tensor) -> None:
        """On the current stream."""
        arguments = self.table.get(), self.count, *more
        tables.launch(kernel, (self.programs,), self.device, *arguments, **self.constants, **OPTIONS)


def _call(layers: Sequence[Layer]) -> _Call:
    code, compute, _ = _kind(layers[0])
    constants = constants_of(code, compute, all(_kind(layer)[2] for layer in layers))  # W may be laid out otherwise now
    factors, records, tiles = [], [], []
    for W, A, B, s in layers:
        A, B = A.to(compute).contiguous(), (B.to(compute) * s).contiguous()
        A = A if A.data_ptr() % 16 == 0 else A.clone()
        factors += [A, B]
        records.append((*native.matrix(W)[:5], A.data_ptr(), len(A), B.data_ptr()))
        tiles.append(-(-W.shape[0] // constants["BLOCK_M"]) * -(-W.shape[1] // constants["BLOCK_N"]))
    table, programs = tables.columns(records, tiles, W.device)
    constants["SEARCH"] = tables.search(len(records))
    return _Call(table, len(records), programs, constants, W.device, factors)


def constants_of(code: int, compute: torch.dtype, dense: bool) -> dict[str, Any]:
    """The kernels' constants but SEARCH. code: W's dtype, as tables have it."""
    wide = tl.float64 if compute == torch.float64 else tl.float32
    block_m, block_n = TILES[wide]
    constants = {"TYPE": tables.TYPES[code], "COMPUTE": wide, "DENSE": dense}
    return constants | {"BLOCK_M": block_m, "BLOCK_N": block_n}


def _kind(layer: Layer) -> tuple[int, torch.dtype, bool]:
    """What decides the constants. Dense: W's and A's rows begin at multiples of 16 bytes."""
    address, _, cols, row, col, code = native.matrix(layer.W)
    dense = col == 1 and address % 16 == 0 and cols % _DENSE == row % _DENSE == 0 and max(cols, row) < 1 << 31
    double = torch.float64 in (layer.W.dtype, layer.A.dtype, layer.B.dtype)
    return code, torch.float64 if double else torch.float32, dense


def _starts(found: Tensor) -> tuple[Tensor, int]:
    """(the first word of each tile's stream, the number of all)"""
    words = found.long() >> 2
    ends = words.cumsum(0)
    return ends - words, int(ends[-1]) if len(ends) else 0


def _words(stream: Tensor) -> Tensor:
    """As the kernels shift them: without a sign. A keep has them with one, since torch pickles no others."""
    return stream.view(torch.uint64 if stream.itemsize == 8 else torch.uint32)


def _unsigned(totals: Tensor) -> list[int]:
    return [total % (1 << 64) for total in totals.tolist()]
