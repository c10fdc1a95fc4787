"""The base GEMM with the rank-r term inside, in Triton, where a stored measurement says that it pays.

torch's way to out = P Q + alpha T S + bias is two products (products.py), so out is written twice and read once; the
one kernel writes it once, but has to come close to the vendor's GEMM, and how close it comes differs from shape to
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
from contextvars import copy_context
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime.errors import OutOfResources

from ..tables_device import rounded
from . import tiles
from .triton_kernels import launch

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


def _read(tile: dict[str, Any], **row: Any) -> Measurement:
    return Measurement(**row, tile=Tile(**tile))


def measurements(device: str) -> tuple[Measurement, ...]:
    """The rows written for a device name; none where there is no table, or none that can be read."""
    return tiles.rows(device, "gemm", _read)


@lru_cache(maxsize=1024)  # a new m with every batch
def chosen(layout: str, dtype: torch.dtype, m: int, n: int, k: int, r: int, device: str) -> Tile | None:
    """The tile with which the kernel beats torch at this product on that device; None where no near row says so."""

    def distance(row: Measurement) -> float:
        off = abs(math.log2(m / row.m)), abs(math.log2(r / row.r))
        return sum(off) if max(off) <= _NEAR else math.inf

    exact = (layout, _DTYPES.get(dtype), n, k, r % 8 == 0)
    rows = [row for row in measurements(device) if (row.layout, row.dtype, row.n, row.k, row.r % 8 == 0) == exact]
    nearest = min(rows, key=distance, default=None)
    return nearest.tile if nearest is not None and distance(nearest) < math.inf and nearest.wins else None


_unfit: set[Tile] = set()


def gemm_(out: Tensor, P: Tensor, Q: Tensor, T: Tensor, S: Tensor, alpha: float, bias: Tensor | None = None) -> bool:
    """out <- P Q + alpha T S + bias in the one kernel, and True; False, and nothing done, where torch's way is taken.

    P (M, K), Q (K, N), T (M, R), S (R, N), bias (N); out (M, N) is contiguous.
    """
    device, _ = tiles.device_of(P.device.index if P.is_cuda else None)
    forced = tiles.forced.get("gemm")
    if forced is None and not measurements(device):
        return False
    layout = layout_of(out, P, Q, T, S, bias)
    if layout is None:
        return False
    (m, k), n, r = P.shape, Q.shape[1], T.shape[1]
    tile = chosen(layout, P.dtype, m, n, k, r, device) if forced is None else forced
    if tile is None or tile in _unfit:
        return False
    try:
        run(tile, out, P, Q, T, S, alpha, bias)
    except OutOfResources as error:  # raised before anything is launched
        if forced is not None:
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
    strides = P.stride(0), Q.stride(1) if q_by_n else Q.stride(0), T.stride(0), stride_s
    blocks = {"BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n, "BLOCK_K": tile.block_k, "BLOCK_R": rank_block(r, by_8)}
    layout = {"TMA": tile.tma, "Q_BY_N": q_by_n, "S_BY_N": s_by_n, "RANK_BY_8": by_8, "GROUP_M": tile.group_m}
    programs = min(processors, triton.cdiv(m, tile.block_m) * triton.cdiv(n, tile.block_n))

    def go() -> None:
        if tile.tma:
            triton.set_allocator(lambda size, align, stream: torch.empty(size, dtype=torch.int8, device=P.device))
        arguments = P, Q, T, S, bias, out, m, n, k, r, *strides, alpha
        launch(gemm_kernel, (programs,), P, tile.warps, tile.stages, *arguments, **layout, **blocks)

    # The descriptors lie in memory that Triton asks an allocator for, a context variable. In a copy of the context it
    # is set whatever thread this is, and the caller's own stays as it was.
    copy_context().run(go)


# The kernel. Names and COMPUTE as in triton_kernels.py. The grid has one program a multiprocessor, each of which walks
# over tiles of the output. A tile is one program's alone and its fp32 sum has the order of the loops: bitwise the same
# from run to run.


@triton.jit
def _place(tile, tiles_m, tiles_n, GROUP_M: tl.constexpr):
    """(row, column) of a tile: down GROUP_M rows, then the next column, so that tiles in flight share P and Q in L2."""
    first = tile // (GROUP_M * tiles_n) * GROUP_M
    height = tl.minimum(tiles_m - first, GROUP_M)
    within = tile % (GROUP_M * tiles_n)
    return first + within % height, within // height


@triton.jit(do_not_specialize=["M"])
def gemm_kernel(
    P, Q, T, S, bias, out, M, N, K, R, stride_p, stride_q, stride_t, stride_s, alpha,
    COMPUTE: tl.constexpr, TMA: tl.constexpr, Q_BY_N: tl.constexpr, S_BY_N: tl.constexpr, RANK_BY_8: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    """out (M, N) <- P Q + alpha T S + bias: P (M, K), Q (K, N), T (M, R), S (R, N), bias (N) or None; rounded once.

    Rows are dense in memory and stride_* elements apart. Q's memory is (K, N), or (N, K) where Q_BY_N; S's alike.
    """
    if RANK_BY_8:  # for the compiler, which by itself sees multiples of 16 only: r = 8 too is read 16 bytes at a time
        R, stride_t = R // 8 * 8, stride_t // 8 * 8
        if S_BY_N:
            stride_s = stride_s // 8 * 8
    tiles_m, tiles_n = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    if TMA:
        d_P = tl.make_tensor_descriptor(P, [M, K], [stride_p, 1], [BLOCK_M, BLOCK_K])
        if Q_BY_N:
            d_Q = tl.make_tensor_descriptor(Q, [N, K], [stride_q, 1], [BLOCK_N, BLOCK_K])
        else:
            d_Q = tl.make_tensor_descriptor(Q, [K, N], [stride_q, 1], [BLOCK_K, BLOCK_N])
        d_out = tl.make_tensor_descriptor(out, [M, N], [N, 1], [BLOCK_M, BLOCK_N])
    for tile in range(tl.program_id(0), tiles_m * tiles_n, tl.num_programs(0)):
        i_m, i_n = _place(tile, tiles_m, tiles_n, GROUP_M)
        first_m, first_n = i_m * BLOCK_M, i_n * BLOCK_N
        # Offsets within the whole matrices, not within the tile: those would be the same for every tile, the compiler
        # would keep them in registers over the main loop, and spill (seen in its output for sm_80 and sm_90).
        o_m, o_n = first_m + tl.arange(0, BLOCK_M), first_n + tl.arange(0, BLOCK_N)
        o_m64, o_n64 = o_m.to(tl.int64), o_n.to(tl.int64)
        o_r, o_k = tl.arange(0, BLOCK_R), tl.arange(0, BLOCK_K)
        m_m, m_n = o_m < M, o_n < N

        # The rank's term first: alpha then scales the accumulator, in fp32, and no second one is needed.
        p_T = T + (o_m64[:, None] * stride_t + o_r[None, :])
        if S_BY_N:
            p_S, step_s = S + (o_r[:, None] + o_n64[None, :] * stride_s), BLOCK_R
        else:
            p_S, step_s = S + (o_r[:, None] * stride_s + o_n64[None, :]), BLOCK_R * stride_s
        b_out = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        for r in range(0, R, BLOCK_R):
            m_r = o_r < R - r
            b_T = tl.load(p_T, mask=m_m[:, None] & m_r[None, :], other=0.0).to(COMPUTE)  # (M, R)
            b_S = tl.load(p_S, mask=m_r[:, None] & m_n[None, :], other=0.0).to(COMPUTE)  # (R, N)
            b_out = tl.dot(b_T, b_S, b_out, input_precision="ieee")
            p_T += BLOCK_R
            p_S += step_s
        b_out = b_out * alpha
        if bias is not None:
            b_out += tl.load(bias + o_n, mask=m_n, other=0.0).to(tl.float32)[None, :]

        if TMA:  # what lies outside the matrices is read as 0 and not written
            for k in range(0, K, BLOCK_K):
                b_P = d_P.load([first_m, k]).to(COMPUTE)  # (M, K)
                b_Q = (d_Q.load([first_n, k]).T if Q_BY_N else d_Q.load([k, first_n])).to(COMPUTE)  # (K, N)
                b_out = tl.dot(b_P, b_Q, b_out, input_precision="ieee")
            d_out.store([first_m, first_n], rounded(b_out, out.dtype.element_ty))
        else:
            p_P = P + (o_m64[:, None] * stride_p + o_k[None, :])
            if Q_BY_N:
                p_Q, step_q = Q + (o_k[:, None] + o_n64[None, :] * stride_q), BLOCK_K
            else:
                p_Q, step_q = Q + (o_k[:, None].to(tl.int64) * stride_q + o_n[None, :]), BLOCK_K * stride_q
            for k in range(0, K, BLOCK_K):
                m_k = o_k < K - k
                b_P = tl.load(p_P, mask=m_m[:, None] & m_k[None, :], other=0.0).to(COMPUTE)
                b_Q = tl.load(p_Q, mask=m_k[:, None] & m_n[None, :], other=0.0).to(COMPUTE)
                b_out = tl.dot(b_P, b_Q, b_out, input_precision="ieee")
                p_P += BLOCK_K
                p_Q += step_q
            p_out = out + (o_m64[:, None] * N + o_n[None, :])
            tl.store(p_out, rounded(b_out, out.dtype.element_ty), mask=m_m[:, None] & m_n[None, :])
