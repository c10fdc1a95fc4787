"""Which tile a Triton kernel takes for a shape: a JSON file per device name, and a default for all others.

A file is configs/<device name, lower case, _ for everything odd>.json: {"about": ..., "tiles": [...], "gemm": [...]},
either list or both; gemm.py says what is in the second. A tile is {"kernel", "bits" of the tensors' dtype, "r" (largest
rank that it serves), "m" and "k" (the shape it was chosen at), "block_m", "block_k", "block_r", "warps", "stages"}, and
"aligned": false where it is for tensors whose rows do not all start at multiples of 16 elements. Among the tiles with
the smallest sufficient `r`, the one nearest in (m, k) is taken. A device's table is asked first and need not be
complete. Nothing here raises for a device that is unknown or a file that cannot be read; `bench/tune_lora_gemm.py`
writes one.
"""

from __future__ import annotations

import json
import math
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path
from typing import Any, TypeVar

import torch

FOLDER = Path(__file__).with_name("configs")
_LISTS = {"tiles", "gemm"}
Row = TypeVar("Row")


def check_positive(*values: object) -> None:
    """ValueError unless all are positive integers."""
    if not all(type(value) is int and value > 0 for value in values):
        raise ValueError(f"{values} should be positive integers")


def check_blocks(*blocks: int, warps: int) -> None:
    """ValueError unless these are sizes that Triton takes: blocks of 16, 32, 64, ..., and 1, 2, 4, ... warps."""
    check_positive(*blocks, warps)
    if min(blocks) < 16 or any(size & (size - 1) for size in (*blocks, warps)):
        raise ValueError(f"blocks {blocks} should be powers of two from 16 up, warps {warps} a power of two")


@dataclass(frozen=True)
class Tile:
    """One row of a table."""

    kernel: str
    bits: int
    r: int
    block_m: int
    block_k: int
    block_r: int
    warps: int
    stages: int
    m: int = 4096
    k: int = 4096
    aligned: bool = True

    def __post_init__(self) -> None:
        check_positive(self.r, self.m, self.k, self.stages)
        check_blocks(self.block_m, self.block_k, self.block_r, warps=self.warps)

    def distance(self, m: int, k: int) -> float:
        """Of a shape from the one that the tile was chosen at, in factors of two."""
        return abs(math.log2(max(m, 1) / self.m)) + abs(math.log2(max(k, 1) / self.k))


def path_of(device: str) -> Path:
    """Where the tables of a device name are, if there are any."""
    return FOLDER / (re.sub(r"[^a-z0-9]+", "_", device.lower()).strip("_") + ".json")


@cache
def rows(device: str, name: str, read: Callable[..., Row]) -> tuple[Row, ...]:
    """The list `name` in the device's file, `read` from the names in each row; none where there is no such list, and a
    warning where it cannot be read."""
    path = path_of(device)
    if not path.is_file():
        return ()
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        absent = name not in content and not _LISTS.isdisjoint(content)
        return () if absent else tuple(read(**row) for row in content[name])
    except (OSError, ValueError, KeyError, TypeError) as error:
        warnings.warn(f"{path.name} has no table of {name} that can be read ({error}); it is left out", stacklevel=2)
        return ()


def table(device: str) -> tuple[Tile, ...]:
    """The tiles written for a device name; none where there is no table, or none that can be read."""
    return rows(device, "tiles", Tile)


@lru_cache(maxsize=1024)  # a new m with every batch
def find(
    kernel: str, dtype: torch.dtype, m: int, k: int, r: int, aligned: bool = True, device: str = "default"
) -> Tile | None:
    """The tile for m rows of k elements at rank r; None where no table has one for that rank, dtype and alignment."""
    wanted = (kernel, dtype.itemsize * 8, aligned)
    for rows in (table(device), table("default")):
        fitting = [tile for tile in rows if (tile.kernel, tile.bits, tile.aligned) == wanted and tile.r >= r]
        if fitting:
            rank = min(tile.r for tile in fitting)
            return min((tile for tile in fitting if tile.r == rank), key=lambda tile: tile.distance(m, k))
    return None


forced: dict[str, Any] = {}


@contextmanager
def force(kernel: str, tile: Any) -> Iterator[None]:
    """Within the block the kernel takes the tile for every shape that it can compute, whatever a table says.

    For tests and the tuner. It holds for the whole process: backward passes run on threads of their own.
    """
    before = dict(forced)
    forced[kernel] = tile
    try:
        yield
    finally:
        forced.clear()
        forced.update(before)


@cache
def device_of(index: int | None) -> tuple[str, int]:
    """(name, number of multiprocessors) of a CUDA or ROCm device; index None: the interpreter's."""
    if index is None:
        return "interpreter", 4
    properties = torch.cuda.get_device_properties(index)
    return properties.name, properties.multi_processor_count


def split(size: int, block: int, programs: int, processors: int) -> tuple[int, int]:
    """(parts, elements a part) of a sum over `size` that `programs` programs would otherwise do alone.

    Two programs a multiprocessor hide each other's waits; a part of fewer than four blocks costs more in its
    workspace than it brings. The parts follow from shape and device alone, so sums are repeatable.
    """
    blocks = -(-size // block)
    parts = max(1, min(2 * processors // max(programs, 1), blocks // 4))
    per_part = -(-blocks // parts) * block
    return -(-size // per_part), per_part
