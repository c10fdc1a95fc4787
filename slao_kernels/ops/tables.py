"""Tables of pointers on a device for Triton's kernels, kept from call to call, and how those kernels are launched.

A model's call has hundreds of addresses: too many for kernel parameters, and collecting them costs 60 to 180 µs of
the host's time (shared measurements of 448 tensors). So a table is kept by the data pointers that it was made from.

No call waits for the device. A new table goes up in one small asynchronous copy from pinned memory on the current
stream; another stream that uses it later waits for that copy, on the device. A CUDA graph cannot hold such a copy, so
a call has to have run once with the same tensors before it is captured, as Triton's kernels have to be compiled before
anyway; a table that a graph uses is kept for good. `torch.cuda.graph` waits for all copies before it captures.
"""

from __future__ import annotations

import array
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable, Sequence
from contextlib import nullcontext
from typing import Any, Generic, TypeVar

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import knobs

from . import checks

INTERPRETED = bool(knobs.runtime.interpret)
# The codes of dtypes in a table, as slao_kernels/native.py has them.
TYPES = (tl.float64, tl.float32, tl.bfloat16, tl.float16)
_TORCH = {"q": torch.int64, "d": torch.float64}
# Records whose first programs one step of `tables_device.find` counts.
_SEARCH = 1024

Plan = TypeVar("Plan")
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


class Kept(Generic[Plan]):
    """The latest results of a `build`, by what they were made from."""

    def __init__(self, most: int = 64) -> None:
        self._most = most
        self._plans: OrderedDict[Hashable, tuple[object, Plan]] = OrderedDict()

    def of_tensors(self, tensors: Sequence[Tensor], more: Hashable, build: Callable[[], Plan]) -> Plan:
        """What `build` makes of these tensors' addresses, shapes, strides, dtypes and devices, and of `more`."""
        seen = checks.description(tensors)
        if seen is None:
            return build()
        return self.get((more, *seen[0]), seen, build)

    def get(self, key: Hashable, seen: object, build: Callable[[], Plan]) -> Plan:
        """`key` alone is hashed; `seen` has to be equal too."""
        known = self._plans.get(key)
        if known is None or known[0] != seen:
            known = self._plans[key] = (seen, build())
        self._plans.move_to_end(key)
        if len(self._plans) > self._most:
            self._plans.popitem(last=False)
        return known[1]


_numbers: Kept[Table] = Kept()


def numbers(values: Sequence[float], device: torch.device) -> Table:
    """fp64 numbers on `device`: those that change while the tensors stay, such as a merge's weights."""
    return _numbers.get((device, *values), None, lambda: Table(array.array("d", values), device))


def columns(records: Sequence[Sequence[int]], units: Iterable[int], device: torch.device) -> tuple[Table, int]:
    """(the table of `records`, each led by its first program; the number of programs). units: programs a record."""
    firsts, total = [], 0
    for count in units:
        firsts.append(total)
        total += count
    if total > 0x7FFFFFFF:
        raise ValueError(f"{total} tiles are more than one launch can have; pass fewer tensors in one call")
    rows = [firsts, *zip(*records, strict=True)]
    return Table(array.array("q", [value for row in rows for value in row]), device), total


def uniform(codes: Iterable[int]) -> Any:
    """Triton's dtype where all codes are one, else None: then the kernel looks at each record's."""
    found = set(codes)
    return TYPES[found.pop()] if len(found) == 1 else None


def search(count: int) -> int:
    """The constant SEARCH of `tables_device.find` for so many records."""
    return min(_SEARCH, max(16, triton.next_power_of_2(count)))


def launch(kernel: Any, programs: int, device: torch.device, *arguments: Any, warps: int, **constants: Any) -> Any:
    """Run `kernel` on `device`, which need not be the current one; the compiled kernel."""
    if programs == 0:
        return None
    elsewhere = device.type == "cuda" and device.index != torch.cuda.current_device()
    with torch.cuda.device(device) if elsewhere else nullcontext():
        # Fused multiply-add, said out loud: its default differs between Triton's versions.
        return kernel[(programs,)](*arguments, **constants, num_warps=warps, enable_fp_fusion=True)
