"""The base GEMM with the rank-r term inside (gemm_device.py), where a stored measurement says that it pays.

torch's way to out = P Q + alpha T S + bias is two products (skinny.linear_), so out is written twice and read once;
the one kernel writes it once, but has to come close to the vendor's GEMM, and how close it comes differs from shape to
shape and from card to card. So the choice is never a rule: `chosen` answers from the device's table alone. No table is
shipped, since nothing has been measured on a GPU yet: the kernel is off on every device until
`bench/tune_lora_gemm.py` has written one.

A table is the list "gemm" in the device's file (tiles.py says which), a row for every product that was measured, the
lost ones too: {"layout", "dtype", "m", "n", "k", "r", "ours_us", "torch_us", "noise_us", "tile": {...}}. m, n, k and r
are this product's sizes; layout is how Q lies in memory: "nk" (forward of nn.Linear, backward of Conv1D) or "kn" (the
other two). A row is near where layout, dtype, n and k are the same and m and r each within a factor of √2, with r a
multiple of 8 in both or in neither (those are loaded differently). The nearest row decides; it is a win where
ours_us + noise_us < torch_us. All else is torch's, as for a device that has no table.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import copy_context
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import triton
from torch import Tensor
from triton.runtime.errors import OutOfResources

from . import tiles
from .gemm_device import gemm_kernel
from .launch import landing, launch

# fp32 is torch's: at its default precision its products are none of the tensor cores', so there is no room between a
# GEMM and its memory traffic in which the rank's term could hide, and a Triton kernel has nothing to gain.
_DTYPES = {torch.bfloat16: "bfloat16", torch.float16: "float16"}
_MAX_RANK = 256
_NEAR = 0.5  # a factor of √2, in factors of two


@dataclass(frozen=True)
class Tile:
    """How a program works: its block of the output and of the sum, and whether it loads by descriptors (TMA)."""

    block_m: int
    block_n: int
    block_k: int
    warps: int
    stages: int
    tma: bool
    group_m: int = 8

    def __post_init__(self) -> None:
        tiles.check_blocks(self.block_m, self.block_n, self.block_k, warps=self.warps)
        tiles.check_positive(self.stages, self.group_m)
        if max(self.block_m, self.block_n, self.block_k) > 256:
            raise ValueError("a block has more than 256 rows or columns, which no descriptor describes")


# What the tuner tries. Chosen by compiling, not by running: for every rank and layout these need no more than 255
# registers and 208 KB and spill nothing, with descriptors on sm_90 and without on sm_80 and gfx942
# (tests/slao_kernels/test_offline_compile.py).
CANDIDATES = (
    Tile(128, 256, 64, warps=8, stages=3, tma=True),
    Tile(256, 128, 64, warps=8, stages=3, tma=True),
    Tile(128, 128, 64, warps=8, stages=4, tma=True),
    Tile(128, 128, 128, warps=8, stages=2, tma=True),
    Tile(64, 256, 64, warps=8, stages=4, tma=True),
    Tile(64, 128, 64, warps=4, stages=5, tma=True),
    Tile(128, 128, 32, warps=8, stages=4, tma=False),
    Tile(64, 256, 32, warps=8, stages=4, tma=False),
)


@dataclass(frozen=True)
class Measurement:
    """One row of a table: the best tile for a product, and medians in µs with the noise of their difference."""

    layout: str
    dtype: str
    m: int
    n: int
    k: int
    r: int
    ours_us: float
    torch_us: float
    noise_us: float
    tile: Tile

    def __post_init__(self) -> None:
        tiles.check_positive(self.m, self.n, self.k, self.r)
        if self.layout not in ("nk", "kn") or self.dtype not in _DTYPES.values():
            raise ValueError(f"layout {self.layout!r} or dtype {self.dtype!r} is unknown")
        if not all(math.isfinite(value) and value >= 0 for value in (self.ours_us, self.torch_us, self.noise_us)):
            raise ValueError("a time is negative or not a number")

    @property
    def wins(self) -> bool:
        return self.ours_us + self.noise_us < self.torch_us


def _read(row: dict[str, Any]) -> Measurement:
    return Measurement(**{**row, "tile": Tile(**row["tile"])})


def measurements(device: str) -> tuple[Measurement, ...]:
    """The rows written for a device name; none where there is no table, or none that can be read."""
    return tiles.rows(device, "gemm", _read)


@cache
def chosen(layout: str, dtype: torch.dtype, m: int, n: int, k: int, r: int, device: str) -> Tile | None:
    """The tile with which the kernel beats torch at this product on that device; None where no near row says so."""

    def distance(row: Measurement) -> float:
        off = abs(math.log2(m / row.m)), abs(math.log2(r / row.r))
        return sum(off) if max(off) <= _NEAR else math.inf

    exact = (layout, _DTYPES.get(dtype), n, k, r % 8 == 0)
    rows = [row for row in measurements(device) if (row.layout, row.dtype, row.n, row.k, row.r % 8 == 0) == exact]
    nearest = min(rows, key=distance, default=None)
    return nearest.tile if nearest is not None and distance(nearest) < math.inf and nearest.wins else None


_forced: Tile | None = None
_unfit: set[Tile] = set()


@contextmanager
def force(tile: Tile) -> Iterator[None]:
    """Within the block every product that the kernel can compute runs in it, with this tile, whatever a table says.

    For tests and the tuner. It holds for the whole process: backward passes run on threads of their own.
    """
    global _forced
    before, _forced = _forced, tile
    try:
        yield
    finally:
        _forced = before


def gemm_(out: Tensor, P: Tensor, Q: Tensor, T: Tensor, S: Tensor, alpha: float, bias: Tensor | None = None) -> bool:
    """out <- P Q + alpha T S + bias in the one kernel, and True; False, and nothing done, where torch's way is taken.

    P (M, K), Q (K, N), T (M, R), S (R, N), bias (N); out (M, N) is contiguous.
    """
    device, _ = tiles.device_of(P.device.index if P.is_cuda else None)
    if _forced is None and not measurements(device):
        return False
    layout = layout_of(out, P, Q, T, S, bias)
    if layout is None:
        return False
    (m, k), n, r = P.shape, Q.shape[1], T.shape[1]
    tile = chosen(layout, P.dtype, m, n, k, r, device) if _forced is None else _forced
    if tile is None or tile in _unfit:
        return False
    try:
        run(tile, out, P, Q, T, S, alpha, bias)
    except OutOfResources as error:  # raised before anything is launched
        if _forced is not None:
            raise
        _unfit.add(tile)
        warnings.warn(
            f"{tile} does not fit on {device} with this Triton, torch's products serve: {error}", stacklevel=2
        )
        return False
    return True


def layout_of(out: Tensor, P: Tensor, Q: Tensor, T: Tensor, S: Tensor, bias: Tensor | None) -> str | None:
    """How Q lies in memory, "nk" or "kn"; None where the kernel cannot take these tensors."""
    if P.dtype not in _DTYPES or not 0 < T.shape[1] <= _MAX_RANK or 0 in (*P.shape, Q.shape[1]):
        return None
    if not all(one is None or one.dtype == P.dtype for one in (out, Q, T, S, bias)):
        return None
    if not (_rows_by_16_bytes(P) and _rows_by_16_bytes(out) and out.is_contiguous()):
        return None
    if T.stride(1) != 1 or 1 not in S.stride() or (bias is not None and bias.stride(0) != 1):
        return None
    return "kn" if _rows_by_16_bytes(Q) else "nk" if _rows_by_16_bytes(Q.t()) else None


def _rows_by_16_bytes(matrix: Tensor) -> bool:
    """Whether rows are dense and start at multiples of 16 bytes, which a descriptor asks for."""
    step = matrix.stride(0) * matrix.itemsize
    dense = matrix.stride(1) == 1 and matrix.stride(0) >= matrix.shape[1]
    return dense and step % 16 == 0 and matrix.data_ptr() % 16 == 0


def rank_block(r: int, by_8: bool) -> int:
    """Ranks a step: all where they are few. Each rank has an address of its own in registers where rows do not start
    at multiples of 8 elements; more than 16 at once would then spill."""
    return min(64, max(16, triton.next_power_of_2(r))) if by_8 else 16


def run(
    tile: Tile, out: Tensor, P: Tensor, Q: Tensor, T: Tensor, S: Tensor, alpha: float, bias: Tensor | None = None
) -> None:
    """out <- P Q + alpha T S + bias with `tile`, for tensors that have a `layout_of`."""
    (m, k), n, r = P.shape, Q.shape[1], T.shape[1]
    q_by_n, s_by_n = not _rows_by_16_bytes(Q), S.stride(1) != 1
    stride_s = S.stride(1) if s_by_n else S.stride(0)
    by_8 = all(size % 8 == 0 for size in (r, T.stride(0), stride_s)) and (T.data_ptr() | S.data_ptr()) % 16 == 0
    _, processors = tiles.device_of(P.device.index if P.is_cuda else None)
    landed = landing(out)

    def go() -> None:
        if tile.tma:
            triton.set_allocator(lambda size, align, stream: torch.empty(size, dtype=torch.int8, device=P.device))
        launch(
            gemm_kernel,
            (min(processors, triton.cdiv(m, tile.block_m) * triton.cdiv(n, tile.block_n)),),
            P,
            tile.warps,
            tile.stages,
            P,
            Q,
            T,
            S,
            bias,
            landed,
            m,
            n,
            k,
            r,
            P.stride(0),
            Q.stride(1) if q_by_n else Q.stride(0),
            T.stride(0),
            stride_s,
            alpha,
            TMA=tile.tma,
            Q_BY_N=q_by_n,
            S_BY_N=s_by_n,
            RANK_BY_8=by_8,
            BLOCK_M=tile.block_m,
            BLOCK_N=tile.block_n,
            BLOCK_K=tile.block_k,
            BLOCK_R=rank_block(r, by_8),
            GROUP_M=tile.group_m,
        )

    # The descriptors lie in memory that Triton asks an allocator for, a context variable. In a copy of the context it
    # is set whatever thread this is, and the caller's own stays as it was.
    copy_context().run(go)
    if landed is not out:
        out.copy_(landed)
