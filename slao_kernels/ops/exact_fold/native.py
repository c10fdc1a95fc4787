"""The exact fold in the compiled core, csrc/cpu/exact_fold.cpp: every weight read and written once, on all threads."""

from __future__ import annotations

import array
from collections.abc import Sequence

import torch

from ... import native
from .kept import Layer, Streams

# Weights in one call: their streams are written where they could be longest, which is address space, not memory.
_GROUP = 1 << 24
# The core reads whole words, and never beyond a stream's end; an empty tensor has no address.
_SPARE = 8


def mark() -> str:
    """The instruction set: another one's sums may differ in the last bit."""
    return native.instruction_set()


def groups(layers: Sequence[Layer]) -> list[list[int]]:
    """Which layers go into one call of `fold`."""
    found: list[list[int]] = []
    size = 0
    for index, layer in enumerate(layers):
        size += layer.W.numel()
        if size > _GROUP or not found:
            found.append([])
            size = layer.W.numel()
        found[-1].append(index)
    return found


def fold(layers: Sequence[Layer]) -> tuple[Streams, list[int]]:
    """As `reference.fold`. MemoryError comes before anything is written."""
    core, (table, scalings) = native.core(), _table(layers)
    pieces, most = core.exact_plan(table, scalings, "auto")
    lengths, sums = array.array("q", bytes(8 * pieces)), array.array("Q", bytes(8 * len(layers)))
    room = torch.empty(most + _SPARE, dtype=torch.uint8)
    threads = torch.get_num_threads()
    used = core.exact_fold(table, scalings, room.data_ptr(), lengths, sums, threads, "auto")
    native.written([layer.W for layer in layers])
    try:
        stream = room[: used + _SPARE].clone()
    except (MemoryError, RuntimeError):  # W is written: what it takes to undo that must not get lost
        stream = room
    return Streams([], (stream, lengths), stream.nbytes + 8 * pieces), sums.tolist()


def unfold(layers: Sequence[Layer], streams: Streams) -> None:
    """As `reference.unfold`."""
    stream, lengths = streams.parts
    threads = torch.get_num_threads()
    fine = native.core().exact_unfold(*_table(layers), stream.data_ptr(), lengths, threads, "auto")
    native.written([layer.W for layer in layers])
    if not fine:
        raise RuntimeError(
            "unfold_: the compiled core did not repeat the arithmetic of the fold, or a stream is damaged"
        )


def sums(layers: Sequence[Layer]) -> list[int]:
    """As `reference.sums`."""
    found = array.array("Q", bytes(8 * len(layers)))
    native.core().exact_sums(*_table(layers), found, torch.get_num_threads(), "auto")
    return found.tolist()


def _table(layers: Sequence[Layer]) -> tuple[array.array[int], array.array[float]]:
    records = (native.matrix(W) + native.matrix(A) + native.matrix(B) for W, A, B, _ in layers)
    return native.table(records), array.array("d", [layer.scaling for layer in layers])
