"""lora_linear with its rank-r products in Triton; the base GEMM stays torch's, but for what gemm.py takes.

Dropout on x is drawn inside the products and drawn again in backward: neither a mask nor a masked copy of x exists.
Element (m, k) of x, seen as (M, K), is kept where its 16 bits of Philox4x32-10 are below `keep_below`: key = seed,
counter = (k // 8, m, 0, 0), word (k % 8) // 2 of the four, low half first. What is kept is scaled by
65536 / keep_below, so that the mean is exact; the probability is thus a multiple of 2^-16. Half words, because the
generator's integer work would otherwise be about as long as reading x (an estimate from instruction counts).
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import device as kernel
from . import eager, gemm, hilo, skinny, tiles, wide
from .launch import COMPUTE, gather, landing, launch, parts_of

_MAX_RANK = 256


def keep_below(p: float) -> int:
    """Half words below this are kept: (1 - p) in units of 2^-16, at least 1."""
    return max(1, round((1.0 - p) * 65536))


def forward(
    x: Tensor,
    x_dropped: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    A: Tensor,
    B: Tensor,
    scaling: float,
    wide: bool = False,
    seed: Tensor | None = None,
    p: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """(y, t) of `slao_kernels::lora_linear`; with a seed, t = dropout(x) Aᵀ."""
    return eager.forward(x, x_dropped, weight, bias, A, B, scaling, wide, TritonProducts(seed, p))


def backward(
    dy: Tensor,
    x: Tensor,
    x_dropped: Tensor | None,
    weight: Tensor,
    t: Tensor,
    A: Tensor,
    B: Tensor,
    scaling: float,
    need_x: bool,
    need_dropped: bool,
    need_A: bool,
    need_B: bool,
    wide: bool = False,
    seed: Tensor | None = None,
    p: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(dx, dx_dropped, dA, dB, g) of `slao_kernels::lora_linear_backward`; with a seed, x is masked as in forward."""
    needs = (need_x, need_dropped, need_A, need_B, wide)
    products = TritonProducts() if seed is None else _DroppedBackward(seed, p)
    return eager.backward(dy, x, x_dropped, weight, t, A, B, scaling, *needs, products=products)


class TritonProducts:
    """The products of skinny.py as Triton kernels; with a seed, `shrink` and `grad_A` see dropout(x, p)."""

    def __init__(self, seed: Tensor | None = None, p: float = 0.0) -> None:
        self.seed = seed
        self.keep_below = 65536 if seed is None else keep_below(p)
        self.scale = 65536 / self.keep_below

    def shrink(self, x: Tensor, A: Tensor) -> Tensor:
        if self.seed is None and not _serves(x, A.shape[0]):
            return skinny.shrink(x, A)
        t = x.new_empty((x.shape[0], A.shape[0]))
        _shrink(x, A, t, self.scale, self.seed, self.keep_below)
        return t

    # One product of inner size r that writes all of y: the GEMM library is at the copy's speed there.
    def expand_(self, y: Tensor, t: Tensor, B: Tensor, scaling: float, bias: Tensor | None = None) -> None:
        skinny.expand_(y, t, B, scaling, bias)

    def gemm_(self, y: Tensor, x: Tensor, W: Tensor, t: Tensor, B: Tensor, scaling: float, bias: Tensor | None) -> bool:
        """y <- x W + scaling t Bᵀ + bias in one kernel, and True, where gemm.py says that this pays."""
        return gemm.gemm_(y, x, W, t, B.t(), scaling, bias)

    def grad_t(self, dy: Tensor, t: Tensor, B: Tensor, scaling: float, g: Tensor | None, dB: Tensor | None) -> None:
        if not _serves(dy, B.shape[1]):
            skinny.grad_t(dy, t, B, scaling, g, dB)
            return
        if g is not None and dB is not None and _grad_t_in_one_pass(dy, t, B, scaling, g, dB):
            return
        if g is not None:
            _shrink(dy, B.t().contiguous(), g, scaling)  # (r, N): small, and read by every program
        if dB is not None:
            _outer(t, dy, dB.t(), scaling)

    def grad_A(self, g: Tensor, x: Tensor, dA: Tensor) -> None:
        if self.seed is None and not _serves(x, g.shape[1]):
            skinny.grad_A(g, x, dA)
        else:
            _outer(g, x, dA, self.scale, self.seed, self.keep_below)

    # fp32 adapters on a 16-bit base; no dropout of our own there (see apply in __init__.py).
    def shrink_wide(self, x: Tensor, A: Tensor, scaling: float) -> Tensor:
        if not wide.splits(x, A):
            return skinny.shrink_wide(x, A, scaling)
        return hilo.shrink(x, A, _fp32_shrink).mul_(scaling)

    def outer_wide(self, t: Tensor, x: Tensor, out: Tensor, scaling: float) -> None:
        if wide.splits(x, t):
            torch.mul(hilo.outer(t, x, _fp32_outer), scaling, out=out)
        else:
            skinny.outer_wide(t, x, out, scaling)

    def add_wide_(self, y: Tensor, t: Tensor, B: Tensor, scaling: float) -> None:
        skinny.add_wide_(y, t, B, scaling)


class _DroppedBackward(TritonProducts):
    """In backward `expand_` makes dx's part g A, and what dropout left out of x has none."""

    def expand_(self, y: Tensor, t: Tensor, B: Tensor, scaling: float, bias: Tensor | None = None) -> None:
        assert bias is None
        assert self.seed is not None
        _expand_dropped(t, B.t(), y, scaling * self.scale, self.seed, self.keep_below)

    def gemm_(self, *_: object) -> bool:
        """Never: the rank's term alone is masked, and in the one kernel it is not alone."""
        return False


_plain = TritonProducts()
shrink, expand_, gemm_, grad_t, grad_A = _plain.shrink, _plain.expand_, _plain.gemm_, _plain.grad_t, _plain.grad_A
shrink_wide, outer_wide, add_wide_ = _plain.shrink_wide, _plain.outer_wide, _plain.add_wide_


def _serves(x: Tensor, r: int) -> bool:
    return x.dtype in COMPUTE and 0 < r <= _MAX_RANK and x.numel() > 0


def _tile(name: str, x: Tensor, r: int) -> tuple[tiles.Tile | None, int]:
    """(the tile for the large matrix x, the device's number of multiprocessors)"""
    device, processors = tiles.device_of(x.device.index if x.is_cuda else None)
    return tiles.forced.get(name) or tiles.find(name, x.dtype, *x.shape, r, _aligned(name, x, r), device), processors


def _aligned(name: str, x: Tensor, r: int) -> bool:
    """Whether a tile's rows can be loaded 16 bytes at a time. Where not, each element has an address of its own in
    registers, which large tiles then spill; of a rank that is no multiple of 16, only those of grad_t."""
    dense = x.stride(1) == 1 and x.shape[1] % 16 == 0 and x.stride(0) % 16 == 0 and x.data_ptr() % 16 == 0
    return dense and (name != "grad_t" or r <= 16 or r % 16 == 0)


def _shrink(x: Tensor, A: Tensor, out: Tensor, alpha: float, seed: Tensor | None = None, below: int = 0) -> None:
    """out (M, R) <- alpha x Aᵀ; x (M, K) and A (R, K) with any strides."""
    (m, k), r = x.shape, A.shape[0]
    if m * k * r == 0:
        out.zero_()
        return
    tile, processors = _tile("shrink", x, min(r, _MAX_RANK))  # more ranks are more programs
    assert tile is not None
    blocks, rank_blocks = -(-m // tile.block_m), -(-r // tile.block_r)
    parts, per_part = tiles.split(k, tile.block_k, blocks * rank_blocks, processors)
    landed = landing(out)
    workspace = parts_of(landed, parts)
    launch(
        kernel.shrink_kernel,
        (blocks, parts, rank_blocks),
        x,
        tile.warps,
        tile.stages,
        x,
        A,
        workspace,
        seed,
        m,
        k,
        r,
        *x.stride(),
        *A.stride(),
        per_part,
        alpha,
        below,
        BLOCK_M=tile.block_m,
        BLOCK_K=tile.block_k,
        BLOCK_R=tile.block_r,
    )
    gather(workspace, landed, out)


def _fp32_shrink(x: Tensor, P: Tensor) -> Tensor:
    """x P in fp32: x (M, K), P (K, R)."""
    out = torch.empty((x.shape[0], P.shape[1]), dtype=torch.float32, device=x.device)
    _shrink(x, P.t(), out, 1.0)
    return out


def _fp32_outer(g: Tensor, x: Tensor) -> Tensor:
    """g x in fp32: g (R, M), x (M, K)."""
    out = torch.empty((g.shape[0], x.shape[1]), dtype=torch.float32, device=x.device)
    _outer(g.t(), x, out, 1.0)
    return out


def _outer(g: Tensor, x: Tensor, out: Tensor, alpha: float, seed: Tensor | None = None, below: int = 0) -> None:
    """out (R, K) <- alpha gᵀ x; g (M, R), x (M, K) with any strides. A transposed `out` is written as such."""
    (m, k), r = x.shape, g.shape[1]
    if m * k * r == 0:
        out.zero_()
        return
    tile, processors = _tile("outer", x, min(r, _MAX_RANK))
    assert tile is not None
    columns, rank_blocks = -(-k // tile.block_k), -(-r // tile.block_r)
    parts, per_part = tiles.split(m, tile.block_m, columns * rank_blocks, processors)
    transposed = not out.is_contiguous() and out.t().is_contiguous()
    out = out.t() if transposed else out
    landed = landing(out)
    workspace = parts_of(landed, parts)
    strides = (1, landed.stride(0)) if transposed else (landed.stride(0), 1)
    launch(
        kernel.outer_kernel,
        (columns, parts, rank_blocks),
        x,
        tile.warps,
        tile.stages,
        g,
        x,
        workspace,
        seed,
        m,
        k,
        r,
        *g.stride(),
        *x.stride(),
        *strides,
        per_part,
        alpha,
        below,
        BLOCK_M=tile.block_m,
        BLOCK_K=tile.block_k,
        BLOCK_R=tile.block_r,
    )
    gather(workspace, landed, out)


def one_pass_pays(dy: Tensor, r: int, row_blocks: int, parts: int) -> bool:
    """Whether one pass over dy with partial results moves fewer bytes than two passes without.

    Not measured: a count of bytes (each fp32 part written and read once), in which r = 16 gains and r >= 64 loses.
    """
    m, n = dy.shape
    partial = n * (row_blocks if row_blocks > 1 else 0) + m * (parts if parts > 1 else 0)
    return 8 * r * partial <= m * n * dy.itemsize


def _grad_t_in_one_pass(dy: Tensor, t: Tensor, B: Tensor, scaling: float, g: Tensor, dB: Tensor) -> bool:
    """g (M, R) <- scaling dy B and dB (N, R) <- scaling dyᵀ t, or False and nothing where two passes are better."""
    (m, n), r = dy.shape, B.shape[1]
    tile, processors = _tile("grad_t", dy, r)
    if tile is None:
        return False
    row_blocks = -(-m // tile.block_m)
    parts, per_part = tiles.split(n, tile.block_k, row_blocks, processors)
    if not one_pass_pays(dy, r, row_blocks, parts):
        return False
    landed_g, landed_dB = landing(g), landing(dB)
    part_g, part_dB = parts_of(landed_g, parts), parts_of(landed_dB, row_blocks)
    launch(
        kernel.grad_t_kernel,
        (row_blocks, parts),
        dy,
        tile.warps,
        tile.stages,
        dy,
        t,
        B,
        part_g,
        part_dB,
        m,
        n,
        r,
        *dy.stride(),
        *t.stride(),
        *B.stride(),
        per_part,
        scaling,
        BLOCK_M=tile.block_m,
        BLOCK_N=tile.block_k,
        BLOCK_R=tile.block_r,
    )
    gather(part_g, landed_g, g)
    gather(part_dB, landed_dB, dB)
    return True


def _expand_dropped(g: Tensor, A: Tensor, out: Tensor, alpha: float, seed: Tensor, below: int) -> None:
    """out (M, K) <- alpha g A where dropout kept x, 0 elsewhere; g (M, R), A (R, K)."""
    (m, k), r = out.shape, g.shape[1]
    if out.numel() == 0:
        return
    tile, _ = _tile("expand_dropped", out, max(r, 1))
    assert tile is not None
    landed = landing(out)
    launch(
        kernel.expand_dropped_kernel,
        (-(-m // tile.block_m), -(-k // tile.block_k)),
        out,
        tile.warps,
        tile.stages,
        g,
        A,
        landed,
        seed,
        m,
        k,
        r,
        *g.stride(),
        *A.stride(),
        landed.stride(0),
        alpha,
        below,
        BLOCK_M=tile.block_m,
        BLOCK_K=tile.block_k,
        BLOCK_R=tile.block_r,
    )
    if landed is not out:
        out.copy_(landed)
