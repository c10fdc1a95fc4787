"""Experts' LoRA layers by Triton: no wait for the device, whatever the rows' experts, and no launch per expert.

Forward is two launches (t; base and branch in one pass), backward at most four (g, dx, dA, dB). Where torch's grouped
GEMM serves without a wait it computes the base, and the branch is added to it in place: one launch more each way.
fp64 is torch's, in products.py. Sums are in fp32, in an order that depends on shapes and `ends` alone.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
import triton
from torch import Tensor

from ..lora_linear.gemm import rank_block
from ..lora_linear.triton_kernels import COMPUTE, launch
from . import device, products
from .products import aligned, grouped_serves, multiples


@dataclass(frozen=True)
class Tile:
    """A program's rows and columns of the result, and how much of a sum at a time; of a rank never more than that."""

    m: int
    n: int
    k: int
    warps: int
    stages: int


# (what is computed, bits of the dtype) -> its tile. None has been timed: all compile without spills for sm_80, sm_90,
# sm_100 and gfx942 (tests/slao_kernels/test_offline_compile.py), for which fp32's, whose products are no tensor core's,
# are small. Where rows are tiled, m = 64: of 256 rows an expert half a tile is lost, an eighth; of 128 a quarter.
TILES = {
    # Reads the large matrix once, 128 bytes of a row at a time: a cache line.
    ("shrink", 16): Tile(64, 64, 64, warps=4, stages=3),
    ("shrink", 32): Tile(32, 64, 32, warps=4, stages=3),
    # Reads and writes the result once, and next to nothing else.
    ("expand", 16): Tile(64, 128, 64, warps=8, stages=2),
    ("expand", 32): Tile(32, 64, 16, warps=4, stages=2),
    # A GEMM: wide, since it is not high.
    ("base", 16): Tile(64, 256, 32, warps=8, stages=4),
    ("base", 32): Tile(64, 64, 32, warps=8, stages=3),
    # m rows at a time are the sum, n the large side, k ranks: few, so that there are programs enough.
    ("outer", 16): Tile(64, 128, 64, warps=8, stages=3),
    ("outer", 32): Tile(32, 64, 32, warps=4, stages=3),
}
# Where rows start at no multiple of 16 elements each element has an address of its own in registers.
ODD = Tile(32, 32, 16, warps=4, stages=2)


def forward(
    x: Tensor, weight: Tensor, A: Tensor | None, B: Tensor | None, scaling: float, ends: Tensor
) -> tuple[Tensor, Tensor]:
    """(y (S, N), t = x_e A_eᵀ (S, r)) of the operator `expert_linear`; t is empty without a branch."""
    if x.dtype not in COMPUTE:
        return products.forward(x, weight, A, B, scaling, ends)
    W = weight.transpose(1, 2)
    if A is None or B is None:
        return _whole(x, W, None, None, 1.0, ends), x.new_empty((x.shape[0], 0))
    t = _shrink(x, A.transpose(1, 2), 1.0, ends)
    return _whole(x, W, t, B.transpose(1, 2), scaling, ends), t


def backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    t: Tensor,
    A: Tensor | None,
    B: Tensor | None,
    scaling: float,
    ends: Tensor,
    needs: tuple[bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """(dx, dA, dB), None where not needed; see products.py."""
    if x.dtype not in COMPUTE:
        return products.backward(dy, x, weight, t, A, B, scaling, ends, needs)
    need_x, need_A, need_B = needs
    if A is None or B is None:
        return _whole(dy, weight, None, None, 1.0, ends) if need_x else None, None, None
    g = _shrink(dy, B, scaling, ends) if need_x or need_A else None
    dx = _whole(dy, weight, g, A, 1.0, ends) if need_x else None
    dA = _outer(g, x, 1.0, ends) if g is not None and need_A else None
    return dx, dA, _outer(t, dy, scaling, ends, by_k=True) if need_B else None


def _whole(left: Tensor, right: Tensor, t: Tensor | None, S: Tensor | None, alpha: float, ends: Tensor) -> Tensor:
    """left_e right_e + alpha t_e S_e (S, N): left (S, K), right (E, K, N), t (S, R) and S (E, R, N) or neither."""
    if grouped_serves(left, right):
        out = F.grouped_mm(left, right, offs=ends)
        if t is not None:
            _rows("expand", out, t, S, None, None, alpha, ends)
        return out
    out = left.new_empty((left.shape[0], right.shape[2]))
    _rows("base", out, t, S, left, right, alpha, ends)
    return out


def _shrink(left: Tensor, S: Tensor, alpha: float, ends: Tensor) -> Tensor:
    """alpha left_e S_e (S, R): left (S, K), S (E, K, R)."""
    out = left.new_empty((left.shape[0], S.shape[2]))
    _rows("shrink", out, left, S, None, None, alpha, ends)
    return out


def _rows(
    name: str,
    out: Tensor,
    T: Tensor | None,
    S: Tensor | None,
    P: Tensor | None,
    Q: Tensor | None,
    alpha: float,
    ends: Tensor,
) -> None:
    """`device.rows_kernel` with the tile `name`; S (E, R, N) is dense, or its transposed matrices are."""
    (rows, n), experts = out.shape, len(ends)
    r, k = 0 if T is None else T.shape[1], 0 if P is None else P.shape[1]
    by_n = S is not None and not S.is_contiguous()
    S = S.transpose(1, 2).contiguous() if S is not None and by_n else S
    by_8 = T is not None and T.stride(1) == 1 and multiples(8, n, r, T.stride(0)) and aligned(T, S)
    shrink = name == "shrink"
    large = [matrix for matrix in (T if shrink else None, P, Q) if matrix is not None]
    tile = _tile(name, out, multiples(16, r if shrink else n, k) and all(map(_rows_aligned, large)))
    sides = blocks(name, tile, n if shrink else r, by_8) | {"BLOCK_E": triton.next_power_of_2(max(experts, 1))}
    strides = [
        stride for of, dims in ((T, 2), (P, 2), (Q, 3)) for stride in (of.stride() if of is not None else [0] * dims)
    ]
    grid = (tiles_at_most(rows, experts, tile.m) * -(-n // sides["BLOCK_N"]),)
    arguments = T, S, P, Q, out, ends, experts, n, r, k, *strides, alpha
    flags = {"S_BY_N": by_n, "BY_8": by_8, "ADD": name == "expand"}
    launch(device.rows_kernel, grid, out, tile.warps, tile.stages, *arguments, **flags, **sides)


def blocks(name: str, tile: Tile, r: int, by_8: bool) -> dict[str, int]:
    """The sides of a kernel's blocks: the tile's, but that of the rank r."""
    rank = rank_block(r, by_8)
    if name == "outer":
        return {"BLOCK_M": tile.m, "BLOCK_K": tile.n, "BLOCK_R": min(tile.k, rank)}
    n, summed = (min(tile.n, rank), tile.k) if name == "shrink" else (tile.n, min(tile.k, rank))
    return {"BLOCK_M": tile.m, "BLOCK_N": n, "BLOCK_R": summed, "BLOCK_K": tile.k}


def tiles_at_most(rows: int, experts: int, m: int) -> int:
    """However the rows lie: the last tile of an expert that has any may hold a single one."""
    return (rows + min(experts, rows) * (m - 1)) // m


def _outer(G: Tensor, X: Tensor, alpha: float, ends: Tensor, by_k: bool = False) -> Tensor:
    """alpha G_eᵀ X_e: G (S, R) dense, X (S, K); (E, R, K), or (E, K, R) by_k."""
    r, k, experts = G.shape[1], X.shape[1], len(ends)
    out = X.new_empty((experts, k, r) if by_k else (experts, r, k))
    tile = _tile("outer", X, multiples(16, k) and _rows_aligned(X))
    flags = {"BY_K": by_k, "BY_8": multiples(8, r) and aligned(G)}
    sides = blocks("outer", tile, r, flags["BY_8"])
    grid = (experts * -(-r // sides["BLOCK_R"]) * -(-k // tile.n),)
    arguments = G, X, out, ends, r, k, *X.stride(), alpha
    launch(device.outer_kernel, grid, X, tile.warps, tile.stages, *arguments, **flags, **sides)
    return out


def _tile(name: str, x: Tensor, aligned: bool) -> Tile:
    return TILES[name, x.itemsize * 8] if aligned else ODD


def _rows_aligned(matrix: Tensor) -> bool:
    """Whether what lies side by side can be loaded 16 bytes at a time: one stride is 1, the others multiples of 16."""
    others = [stride for stride in matrix.stride() if stride != 1]
    return len(others) == matrix.dim() - 1 and multiples(16, *others) and aligned(matrix)
