"""Tables of pointers on a device for Triton's kernels, and how a kernel is launched.

A model's call has hundreds of addresses: too many for kernel parameters, and collecting them costs 60 to 180 µs of
the host's time (shared measurements of 448 tensors). So they are kept from call to call (repeated.py).

No call waits for the device. A new table goes up in one small asynchronous copy from pinned memory on the current
stream; another stream that uses it later waits for that copy, on the device. A CUDA graph cannot hold such a copy, so
a call has to have run once with the same tensors before it is captured, as Triton's kernels have to be compiled before
anyway; a table that a graph uses is kept for good. `torch.cuda.graph` waits for all copies before it captures.
"""

from __future__ import annotations

import array
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import knobs

from .. import native

INTERPRETED = bool(knobs.runtime.interpret)
# The codes of dtypes in a table, as slao_kernels/native.py has them.
TYPES = (tl.float64, tl.float32, tl.bfloat16, tl.float16)
_TORCH = {"q": torch.int64, "d": torch.float64}
# Records whose first programs one step of `tables_device.find` counts.
_SEARCH = 1024
WARPS = 8  # of a `Launch`

_in_graphs: set[Table] = set()


class Table:
    """Words, int64 ("q") or fp64 ("d"), on `device`; written once."""

    def __init__(self, words: array.array[Any], device: torch.device) -> None:
        host = torch.frombuffer(words, dtype=_TORCH[words.typecode])
        if device.type != "cuda":
            self._words = host.clone()
            return
        if torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                "this call is new to Triton's kernels: make it once with these tensors (and numbers) before you "
                "capture a graph; the table of their addresses cannot be uploaded during a capture"
            )
        with torch.cuda.device(device):
            self._words = torch.empty(host.shape, dtype=host.dtype, device=device)
            # torch keeps the pinned block until the copy has run.
            self._words.copy_(torch.empty(host.shape, dtype=host.dtype, pin_memory=True).copy_(host), non_blocking=True)
            self._stream = torch.cuda.current_stream()
            self._uploaded = torch.cuda.Event()
            self._uploaded.record()

    def get(self) -> Tensor:
        """The words, for a kernel on the current stream of their device."""
        words = self._words
        if words.is_cuda:
            if torch.cuda.is_current_stream_capturing():
                _in_graphs.add(self)
            elif (stream := torch.cuda.current_stream(words.device)) != self._stream:
                stream.wait_event(self._uploaded)
                words.record_stream(stream)
        return words


@lru_cache(maxsize=64)
def numbers(values: tuple[float, ...], device: torch.device) -> Table:
    """fp64 numbers on `device`: those that change while the tensors stay, such as a merge's weights."""
    return Table(array.array("d", values), device)


@dataclass
class Launch:
    """One launch of a kernel over records, each of which has a number."""

    kernel: Any
    table: Table
    programs: int
    owners: list[int]  # which of the call's tensors each record is of
    constants: dict[str, Any]

    def run(self, values: Sequence[float], where: torch.device) -> None:
        of_records = numbers(tuple([values[owner] for owner in self.owners]), where)
        constants = self.constants | {"SEARCH": search(len(self.owners))}
        arguments = self.table.get(), of_records.get(), len(self.owners)
        launch(self.kernel, (self.programs,), where, *arguments, **constants, num_warps=WARPS)


def run(launches: Sequence[Launch], changed: Sequence[Tensor], values: Sequence[float]) -> None:
    """All of them, with a number for each tensor that they change."""
    for one in launches:
        one.run(values, changed[0].device)
    native.written(changed)


def firsts(programs: Iterable[int]) -> tuple[list[int], int]:
    """(the first program of each record, their number in all), of the number of each record's."""
    found, total = [], 0
    for count in programs:
        found.append(total)
        total += count
    if total > 0x7FFFFFFF:
        raise ValueError(f"{total} tiles are more than one launch can have; pass fewer tensors in one call")
    return found, total


def columns(records: Sequence[Sequence[int]], programs: Iterable[int], device: torch.device) -> tuple[Table, int]:
    """(the table of `records`, each led by its first program; the number of programs). programs: of each record."""
    first, total = firsts(programs)
    rows = [first, *zip(*records, strict=True)]
    return Table(array.array("q", [value for row in rows for value in row]), device), total


def uniform(codes: Iterable[int]) -> Any:
    """Triton's dtype where all codes are one, else None: then the kernel looks at each record's."""
    found = set(codes)
    return TYPES[found.pop()] if len(found) == 1 else None


def search(count: int) -> int:
    """The constant SEARCH of `tables_device.find` for so many records."""
    return min(_SEARCH, max(16, triton.next_power_of_2(count)))


def launch(kernel: Any, grid: tuple[int, ...], device: torch.device, *arguments: Any, **options: Any) -> Any:
    """Run `kernel` on `device`, which need not be the current one; the compiled kernel, None of an empty grid.

    Multiply-add is fused unless the options say otherwise: its default differs between Triton's versions.
    """
    if 0 in grid:
        return None
    elsewhere = device.type == "cuda" and device.index != torch.cuda.current_device()
    with torch.cuda.device(device) if elsewhere else nullcontext():
        return kernel[grid](*arguments, **{"enable_fp_fusion": True, **options})
