"""lora_linear on a GPU by Triton: from the products down to the launches. The base GEMM stays torch's.

A forward pass of one layer is two launches (shrink, and torch's GEMMs for expand and base), a backward pass three
(grad_t: g and dB in one pass over dy; outer: dA; torch's for dx); sums over several programs take one more, `gather`.

Dropout on x is drawn inside the products and drawn again in backward: neither a mask nor a masked copy of x exists.
Element (m, k) of x, seen as (M, K), is kept where its 16 bits of Philox4x32-10 are below `keep_below`: key = seed,
counter = (k // 8, m, 0, 0), word (k % 8) // 2 of the four, low half first. What is kept is scaled by
65536 / keep_below, so that the mean is exact; the probability is thus a multiple of 2^-16. Half words, because the
generator's integer work would otherwise be about as long as reading x (an estimate from instruction counts).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import gemm, tiles
from . import triton_kernels as kernels
from .precise import outer_split, shrink_split, splits
from .products import TorchProducts
from .triton_kernels import COMPUTE, gather, launch, parts_of

MAX_RANK = 256
# Bytes of the one-pass dB's parts, ceil(M / 128) N r of fp32, beyond which dy is read twice instead: beside an lm_head
# they would be half a gigabyte. A block of Llama-3.2-1B needs 34 MB at 8,192 tokens and r = 16.
_MAX_PARTS = 64 << 20


def keep_below(p: float) -> int:
    """Half words below this are kept: (1 - p) in units of 2^-16, at least 1."""
    return max(1, round((1.0 - p) * 65536))


class TritonProducts(TorchProducts):
    """With a seed, `shrink` and `grad_A` see dropout(x, p), and `grad_source` masks what they masked."""

    def __init__(self, drawn: Tensor | None = None, p: float = 0.0) -> None:
        by_torch = drawn is not None and drawn.dtype is torch.bool
        super().__init__(drawn if by_torch else None, p)
        self.seed = None if by_torch else drawn
        self.keep_below = 65536 if self.seed is None else keep_below(p)
        self.kept = 65536 / self.keep_below  # what is kept is scaled by

    def shrink(self, x: Tensor, A: Tensor) -> Tensor:
        if self.seed is None and not _serves(x, A.shape[0]):
            return super().shrink(x, A)
        return _shrink(x, A, self.kept, seed=self.seed, below=self.keep_below)

    # Of `linear_` the rank's part, one product of inner size r that writes all of y, is the GEMM library's: at the
    # copy's speed there.
    def linear_(
        self, y: Tensor, x: Tensor, W: Tensor, t: Tensor, B: Tensor, scaling: float, bias: Tensor | None
    ) -> None:
        if not gemm.gemm_(y, x, W.t(), t, B.t(), scaling, bias):
            super().linear_(y, x, W, t, B, scaling, bias)

    def grad_t(
        self, dy: Tensor, t: Tensor, B: Tensor, scaling: float, need_g: bool, need_dB: bool
    ) -> tuple[Tensor | None, Tensor | None]:
        if not _serves(dy, B.shape[1]):
            return super().grad_t(dy, t, B, scaling, need_g, need_dB)
        if need_g and need_dB and (both := _grad_t_in_one_pass(dy, t, B, scaling)) is not None:
            return both
        # B.t() is small, and read by every program.
        g = _shrink(dy, B.t().contiguous(), scaling) if need_g else None
        return g, _outer(t, dy, scaling, transposed=True).t() if need_dB else None

    def grad_A(self, g: Tensor, x: Tensor) -> Tensor:
        if self.seed is None and not _serves(x, g.shape[1]):
            return super().grad_A(g, x)
        return _outer(g, x, self.kept, seed=self.seed, below=self.keep_below)

    def grad_source(self, g: Tensor, A: Tensor) -> Tensor:
        if self.seed is None:
            return super().grad_source(g, A)
        return _expand_dropped(g, A, self.kept, self.seed, self.keep_below)

    def grad_x(self, dy: Tensor, W: Tensor, g: Tensor, A: Tensor) -> Tensor:
        if self.seed is self.mask is None:  # else the rank's term alone is masked; in the one kernel it is not alone
            dx = g.new_empty((g.shape[0], A.shape[1]))
            if gemm.gemm_(dx, dy, W, g, A, 1.0, None):
                return dx
            del dx  # torch makes its own: not two of x's size at once
        return super().grad_x(dy, W, g, A)

    # fp32 adapters on a 16-bit base; no dropout of our own there (`Call.draws` in autograd.py).
    def shrink_wide(self, x: Tensor, A: Tensor, scaling: float) -> Tensor:
        if not splits(x, A):
            return super().shrink_wide(x, A, scaling)
        return shrink_split(x, A, lambda x, P: _shrink(x, P.t(), dtype=torch.float32)).mul_(scaling)

    def outer_wide(self, t: Tensor, x: Tensor, scaling: float) -> Tensor:
        if not splits(x, t):
            return super().outer_wide(t, x, scaling)
        return outer_split(t, x, lambda g, x: _outer(g.t(), x, dtype=torch.float32)).mul_(scaling)


_UNDROPPED = TritonProducts()


def products(drawn: Tensor | None = None, p: float = 0.0) -> TritonProducts:
    """The backend "triton"; drawn: torch's mask, or the seed from which the kernels draw."""
    return _UNDROPPED if drawn is None else TritonProducts(drawn, p)


def _serves(x: Tensor, r: int) -> bool:
    return x.dtype in COMPUTE and 0 < r <= MAX_RANK and x.numel() > 0


def _tile(name: str, x: Tensor, r: int) -> tuple[tiles.Tile | None, int]:
    """(the tile for the large matrix x, the device's number of multiprocessors)"""
    device, processors = tiles.device_of(x.device.index if x.is_cuda else None)
    return tiles.forced.get(name) or tiles.find(name, x.dtype, *x.shape, r, _aligned(name, x, r), device), processors


def _aligned(name: str, x: Tensor, r: int) -> bool:
    """Whether a tile's rows can be loaded 16 bytes at a time. Where not, each element has an address of its own in
    registers, which large tiles then spill; of a rank that is no multiple of 16, only those of grad_t."""
    dense = x.stride(1) == 1 and x.shape[1] % 16 == 0 and x.stride(0) % 16 == 0 and x.data_ptr() % 16 == 0
    return dense and (name != "grad_t" or r <= 16 or r % 16 == 0)


def _launch(kernel: Any, grid: tuple[int, ...], tile: tiles.Tile, x: Tensor, *arguments: Any) -> None:
    blocks = {"BLOCK_M": tile.block_m, "BLOCK_K": tile.block_k, "BLOCK_R": tile.block_r}
    launch(kernel, grid, x, tile.warps, tile.stages, *arguments, **blocks)


def _shrink(
    x: Tensor,
    A: Tensor,
    alpha: float = 1.0,
    dtype: torch.dtype | None = None,
    seed: Tensor | None = None,
    below: int = 0,
) -> Tensor:
    """alpha x Aᵀ (M, R) in x's dtype, or another; x (M, K) and A (R, K) with any strides."""
    (m, k), r = x.shape, A.shape[0]
    out = x.new_empty((m, r), dtype=dtype)
    if m * k * r == 0:
        return out.zero_()
    tile, processors = _tile("shrink", x, min(r, MAX_RANK))  # more ranks are more programs
    assert tile is not None
    blocks, rank_blocks = -(-m // tile.block_m), -(-r // tile.block_r)
    parts, per_part = tiles.split(k, tile.block_k, blocks * rank_blocks, processors)
    workspace = parts_of(out, parts)
    sizes = m, k, r, *x.stride(), *A.stride(), per_part
    grid = blocks, parts, rank_blocks
    _launch(kernels.shrink_kernel, grid, tile, x, x, A, workspace, seed, *sizes, alpha, below)
    gather(workspace, out)
    return out


def _outer(
    g: Tensor,
    x: Tensor,
    alpha: float = 1.0,
    dtype: torch.dtype | None = None,
    seed: Tensor | None = None,
    below: int = 0,
    transposed: bool = False,
) -> Tensor:
    """alpha gᵀ x (R, K) in x's dtype, or another; g (M, R), x (M, K) with any strides. transposed: in memory (K, R)."""
    (m, k), r = x.shape, g.shape[1]
    memory = x.new_empty((k, r) if transposed else (r, k), dtype=dtype)
    out = memory.t() if transposed else memory
    if m * k * r == 0:
        return out.zero_()
    tile, processors = _tile("outer", x, min(r, MAX_RANK))
    assert tile is not None
    columns, rank_blocks = -(-k // tile.block_k), -(-r // tile.block_r)
    parts, per_part = tiles.split(m, tile.block_m, columns * rank_blocks, processors)
    workspace = parts_of(memory, parts)
    sizes = m, k, r, *g.stride(), *x.stride(), *out.stride(), per_part
    grid = columns, parts, rank_blocks
    _launch(kernels.outer_kernel, grid, tile, x, g, x, workspace, seed, *sizes, alpha, below)
    gather(workspace, memory)
    return out


def one_pass_pays(dy: Tensor, r: int, row_blocks: int, parts: int) -> bool:
    """Whether one pass over dy with partial results moves fewer bytes than two passes without.

    Not measured: a count of bytes (each fp32 part written and read once), in which r = 16 gains and r >= 64 loses.
    """
    m, n = dy.shape
    partial = n * (row_blocks if row_blocks > 1 else 0) + m * (parts if parts > 1 else 0)
    return 8 * r * partial <= m * n * dy.itemsize


def _grad_t_in_one_pass(dy: Tensor, t: Tensor, B: Tensor, scaling: float) -> tuple[Tensor, Tensor] | None:
    """(g = scaling dy B (M, R), dB = scaling dyᵀ t (N, R)); None where two passes are better."""
    (m, n), r = dy.shape, B.shape[1]
    tile, processors = _tile("grad_t", dy, r)
    if tile is None:
        return None
    row_blocks = -(-m // tile.block_m)
    parts, per_part = tiles.split(n, tile.block_k, row_blocks, processors)
    if 4 * r * n * row_blocks > _MAX_PARTS or not one_pass_pays(dy, r, row_blocks, parts):
        return None
    g, dB = dy.new_empty((m, r)), dy.new_empty((n, r))
    part_g, part_dB = parts_of(g, parts), parts_of(dB, row_blocks)
    sizes = m, n, r, *dy.stride(), *t.stride(), *B.stride(), per_part
    _launch(kernels.grad_t_kernel, (row_blocks, parts), tile, dy, dy, t, B, part_g, part_dB, *sizes, scaling)
    gather(part_g, g)
    gather(part_dB, dB)
    return g, dB


def _expand_dropped(g: Tensor, A: Tensor, alpha: float, seed: Tensor, below: int) -> Tensor:
    """alpha g A (M, K) where dropout kept x, 0 elsewhere; g (M, R), A (R, K)."""
    (m, r), k = g.shape, A.shape[1]
    out = g.new_empty((m, k))
    if out.numel() > 0:
        tile, _ = _tile("expand_dropped", out, max(r, 1))
        assert tile is not None
        sizes = m, k, r, *g.stride(), *A.stride(), out.stride(0)
        grid = -(-m // tile.block_m), -(-k // tile.block_k)
        _launch(kernels.expand_dropped_kernel, grid, tile, out, g, A, out, seed, *sizes, alpha, below)
    return out
