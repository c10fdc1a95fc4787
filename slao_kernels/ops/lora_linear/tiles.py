"""Which tile a Triton kernel takes for a shape: a JSON table per device name, and a default for all others.

A table is configs/<device name, lower case, _ for everything odd>.json: {"about": ..., "tiles": [...]}, a tile being
{"kernel", "bits" of the tensors' dtype, "r" (largest rank that it serves), "m" and "k" (the shape it was chosen at),
"block_m", "block_k", "block_r", "warps", "stages"}, and "aligned": false where it is for tensors whose rows do not all
start at multiples of 16 elements. Among the tiles with the smallest sufficient `r`, the one nearest in (m, k) is
taken. A device's table is asked first and need not be complete; nothing here raises for an unknown device.
"""

from __future__ import annotations

import json
import math
import re
import warnings
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch

FOLDER = Path(__file__).with_name("configs")


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

    def distance(self, m: int, k: int) -> float:
        """Of a shape from the one that the tile was chosen at, in factors of two."""
        return abs(math.log2(max(m, 1) / self.m)) + abs(math.log2(max(k, 1) / self.k))


@cache
def table(device: str) -> tuple[Tile, ...]:
    """The tiles written for a device name; none where there is no table, or none that can be read."""
    path = FOLDER / (re.sub(r"[^a-z0-9]+", "_", device.lower()).strip("_") + ".json")
    if not path.is_file():
        return ()
    try:
        return tuple(Tile(**row) for row in json.loads(path.read_text(encoding="utf-8"))["tiles"])
    except (ValueError, KeyError, TypeError) as error:
        warnings.warn(f"{path.name} is no table of tiles ({error}); the default ones are used", stacklevel=2)
        return ()


@cache
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
