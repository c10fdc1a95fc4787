"""The Triton kernels of lora_linear's rank-r products, and what every launch of one has to mind; see triton.py.

Names: b_ a block of values, p_ pointers, o_ offsets, m_ masks. M = tokens, K and N = features, R = rank. Every sum is
in fp32 and in an order that depends on shapes alone; what several programs add up goes through a workspace of fp32
parts and `reduce_kernel`, a launch of its own: a flag and a fence would save it, but not safely on every GPU.

COMPUTE is the dtype of the products' operands: the tensors' own, but fp32 where Triton interprets (its bf16 products
are wrong). M changes from batch to batch: specialising on it would only compile again.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import tables
from ..tables_device import rounded

COMPUTE = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
# Elements and parts that a program of the reduction reads at once. Counted, not measured: for 64 parts of 4096 x 16 on
# an H100 that is 256 programs which wait for memory four times each, where 64 programs waited 64 times.
REDUCE_BLOCK, REDUCE_STEP = 256, 16
_VARYING = ["M", "keep_below"]


@triton.jit
def _kept(seed, o_m, first_k, keep_below, BLOCK_K: tl.constexpr):
    """Which elements dropout keeps: (len(o_m), BLOCK_K) of bool. triton.py describes the generator."""
    o_g = first_k // 8 + tl.arange(0, BLOCK_K // 8)
    w0, w1, w2, w3 = tl.philox(seed, o_g[None, :], o_m[:, None], 0, 0)  # (M, K / 8) each
    b_w = tl.interleave(tl.interleave(w0, w2), tl.interleave(w1, w3))  # (M, K / 2)
    bound = keep_below.to(tl.uint32)
    return tl.interleave((b_w & 0xFFFF) < bound, (b_w >> 16) < bound)


@triton.jit(do_not_specialize=_VARYING)
def shrink_kernel(
    x, A, out, seed, M, K, R, stride_xm, stride_xk, stride_ar, stride_ak, k_per_part, alpha, keep_below,
    COMPUTE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """out (parts, M, R) <- alpha x Aᵀ, part i over columns [i, i + 1) k_per_part; x (M, K), A (R, K)."""
    i_m, i_part, i_r = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    first = i_part * k_per_part
    last = tl.minimum(first + k_per_part, K)
    o_m = i_m * BLOCK_M + tl.arange(0, BLOCK_M)
    o_r = i_r * BLOCK_R + tl.arange(0, BLOCK_R)
    o_k = tl.arange(0, BLOCK_K)
    m_m, m_r = o_m < M, o_r < R
    b_seed = tl.load(seed) if seed is not None else 0
    p_x = x + first.to(tl.int64) * stride_xk + (o_m[:, None].to(tl.int64) * stride_xm + o_k[None, :] * stride_xk)
    p_A = A + first.to(tl.int64) * stride_ak + (o_k[:, None] * stride_ak + o_r[None, :].to(tl.int64) * stride_ar)
    b_t = tl.zeros((BLOCK_M, BLOCK_R), dtype=tl.float32)
    for k in range(first, last, BLOCK_K):
        m_k = o_k < K - k
        b_x = tl.load(p_x, mask=m_m[:, None] & m_k[None, :], other=0.0).to(COMPUTE)  # (M, K)
        b_A = tl.load(p_A, mask=m_k[:, None] & m_r[None, :], other=0.0).to(COMPUTE)  # (K, R)
        if seed is not None:
            b_x = tl.where(_kept(b_seed, o_m, k, keep_below, BLOCK_K), b_x, 0.0)
        b_t = tl.dot(b_x, b_A, b_t, input_precision="ieee")
        p_x += BLOCK_K * stride_xk
        p_A += BLOCK_K * stride_ak
    p_t = out + (i_part.to(tl.int64) * M + o_m[:, None]) * R + o_r[None, :]
    tl.store(p_t, rounded(b_t * alpha, out.dtype.element_ty), mask=m_m[:, None] & m_r[None, :])


@triton.jit(do_not_specialize=_VARYING)
def outer_kernel(
    g, x, out, seed, M, K, R, stride_gm, stride_gr, stride_xm, stride_xk, stride_or, stride_ok, m_per_part, alpha,
    keep_below,
    COMPUTE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """out (parts, R, K) <- alpha gᵀ x, part i over rows [i, i + 1) m_per_part; g (M, R), x (M, K)."""
    i_k, i_part, i_r = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    first = i_part * m_per_part
    last = tl.minimum(first + m_per_part, M)
    o_m = tl.arange(0, BLOCK_M)
    o_k = i_k * BLOCK_K + tl.arange(0, BLOCK_K)
    o_r = i_r * BLOCK_R + tl.arange(0, BLOCK_R)
    m_k, m_r = o_k < K, o_r < R
    b_seed = tl.load(seed) if seed is not None else 0
    p_g = g + first.to(tl.int64) * stride_gm + (o_m[None, :] * stride_gm + o_r[:, None].to(tl.int64) * stride_gr)
    p_x = x + first.to(tl.int64) * stride_xm + (o_m[:, None] * stride_xm + o_k[None, :].to(tl.int64) * stride_xk)
    b_out = tl.zeros((BLOCK_R, BLOCK_K), dtype=tl.float32)
    for m in range(first, last, BLOCK_M):
        m_m = o_m < M - m
        b_g = tl.load(p_g, mask=m_r[:, None] & m_m[None, :], other=0.0).to(COMPUTE)  # (R, M)
        b_x = tl.load(p_x, mask=m_m[:, None] & m_k[None, :], other=0.0).to(COMPUTE)  # (M, K)
        if seed is not None:
            b_x = tl.where(_kept(b_seed, m + o_m, i_k * BLOCK_K, keep_below, BLOCK_K), b_x, 0.0)
        b_out = tl.dot(b_g, b_x, b_out, input_precision="ieee")
        p_g += BLOCK_M * stride_gm
        p_x += BLOCK_M * stride_xm
    p_out = out + i_part.to(tl.int64) * R * K + (o_r[:, None] * stride_or + o_k[None, :] * stride_ok)
    tl.store(p_out, rounded(b_out * alpha, out.dtype.element_ty), mask=m_r[:, None] & m_k[None, :])


@triton.jit(do_not_specialize=_VARYING)
def grad_t_kernel(
    dy, t, B, g, dB, M, N, R, stride_ym, stride_yn, stride_tm, stride_tr, stride_bn, stride_br, n_per_part, scaling,
    COMPUTE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """One pass over dy (M, N): g (parts, M, R) <- scaling dy B by columns, dB (blocks, N, R) <- scaling dyᵀ t by rows.

    A program owns BLOCK_M rows and the columns of one part, BLOCK_K at a time. t (M, R), B (N, R), R <= BLOCK_R.
    """
    i_m, i_part = tl.program_id(0), tl.program_id(1)
    first = i_part * n_per_part
    last = tl.minimum(first + n_per_part, N)
    o_m = i_m * BLOCK_M + tl.arange(0, BLOCK_M)
    o_n = tl.arange(0, BLOCK_K)
    o_r = tl.arange(0, BLOCK_R)
    m_m, m_r = o_m < M, o_r < R
    m_t = m_m[:, None] & m_r[None, :]
    p_t = t + o_m[:, None].to(tl.int64) * stride_tm + o_r[None, :] * stride_tr
    b_t = tl.load(p_t, mask=m_t, other=0.0).to(COMPUTE)  # (M, R)
    p_dy = dy + first.to(tl.int64) * stride_yn + (o_m[:, None].to(tl.int64) * stride_ym + o_n[None, :] * stride_yn)
    p_B = B + first.to(tl.int64) * stride_bn + (o_n[:, None] * stride_bn + o_r[None, :] * stride_br)
    p_dB = dB + (i_m.to(tl.int64) * N + first + o_n[:, None]) * R + o_r[None, :]
    b_g = tl.zeros((BLOCK_M, BLOCK_R), dtype=tl.float32)
    for n in range(first, last, BLOCK_K):
        m_n = o_n < N - n
        m_B = m_n[:, None] & m_r[None, :]
        b_dy = tl.load(p_dy, mask=m_m[:, None] & m_n[None, :], other=0.0).to(COMPUTE)  # (M, N)
        b_B = tl.load(p_B, mask=m_B, other=0.0).to(COMPUTE)  # (N, R)
        b_g = tl.dot(b_dy, b_B, b_g, input_precision="ieee")
        b_dB = tl.dot(tl.trans(b_dy), b_t, input_precision="ieee")  # (N, R)
        tl.store(p_dB, rounded(b_dB * scaling, dB.dtype.element_ty), mask=m_B)
        p_dy += BLOCK_K * stride_yn
        p_B += BLOCK_K * stride_bn
        p_dB += BLOCK_K * R
    p_g = g + (i_part.to(tl.int64) * M + o_m[:, None]) * R + o_r[None, :]
    tl.store(p_g, rounded(b_g * scaling, g.dtype.element_ty), mask=m_t)


@triton.jit(do_not_specialize=_VARYING)
def expand_dropped_kernel(
    g, A, out, seed, M, K, R, stride_gm, stride_gr, stride_ar, stride_ak, stride_om, alpha, keep_below,
    COMPUTE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """out (M, K) <- alpha g A where dropout kept x, 0 elsewhere; g (M, R), A (R, K), out's rows dense."""
    i_m, i_k = tl.program_id(0), tl.program_id(1)
    o_m = i_m * BLOCK_M + tl.arange(0, BLOCK_M)
    o_k = i_k * BLOCK_K + tl.arange(0, BLOCK_K)
    o_r = tl.arange(0, BLOCK_R)
    m_m, m_k = o_m < M, o_k < K
    p_g = g + (o_m[:, None].to(tl.int64) * stride_gm + o_r[None, :] * stride_gr)
    p_A = A + (o_r[:, None] * stride_ar + o_k[None, :].to(tl.int64) * stride_ak)
    b_out = tl.zeros((BLOCK_M, BLOCK_K), dtype=tl.float32)
    for r in range(0, R, BLOCK_R):
        m_r = o_r < R - r
        b_g = tl.load(p_g, mask=m_m[:, None] & m_r[None, :], other=0.0).to(COMPUTE)  # (M, R)
        b_A = tl.load(p_A, mask=m_r[:, None] & m_k[None, :], other=0.0).to(COMPUTE)  # (R, K)
        b_out = tl.dot(b_g, b_A, b_out, input_precision="ieee")
        p_g += BLOCK_R * stride_gr
        p_A += BLOCK_R * stride_ar
    b_out = tl.where(_kept(tl.load(seed), o_m, i_k * BLOCK_K, keep_below, BLOCK_K), b_out * alpha, 0.0)
    p_out = out + o_m[:, None].to(tl.int64) * stride_om + o_k[None, :]
    tl.store(p_out, rounded(b_out, out.dtype.element_ty), mask=m_m[:, None] & m_k[None, :])


@triton.jit(do_not_specialize=["parts"])
def reduce_kernel(workspace, out, size, parts, BLOCK: tl.constexpr, STEP: tl.constexpr):
    """out (size) <- the sum of workspace (parts, size).

    A program sums BLOCK elements, STEP parts at a time: their loads are on the way together, where one part after the
    other would wait for memory as often as there are parts.
    """
    o = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    m = o < size
    b_sums = tl.zeros((STEP, BLOCK), dtype=tl.float32)
    for first in range(0, parts, STEP):
        o_p = first + tl.arange(0, STEP)
        p_w = workspace + (o_p[:, None].to(tl.int64) * size + o[None, :])
        b_sums += tl.load(p_w, mask=(o_p < parts)[:, None] & m[None, :], other=0.0)
    tl.store(out + o, rounded(tl.sum(b_sums, axis=0), out.dtype.element_ty), mask=m)


last: Any = None  # the compiled kernel that was launched last, for the tuner: it tells its name and its spills


def launch(
    kernel: Any, grid: tuple[int, ...], x: Tensor, warps: int, stages: int, *arguments: Any, **constants: Any
) -> None:
    """Run `kernel` on x's device; its products' operands have x's dtype."""
    global last
    stages = min(stages, 2) if torch.version.hip else stages  # a third does not fit in 64 KB there
    constants["COMPUTE"] = tl.float32 if tables.INTERPRETED else COMPUTE[x.dtype]
    last = tables.launch(kernel, grid, x.device, *arguments, **constants, num_warps=warps, num_stages=stages)


def parts_of(out: Tensor, parts: int) -> Tensor:
    """A workspace for the parts of the contiguous `out`; `out` itself where there is but one."""
    return out if parts == 1 else torch.empty((parts, *out.shape), dtype=torch.float32, device=out.device)


def gather(workspace: Tensor, out: Tensor) -> None:
    """out <- the sum of its parts."""
    if workspace is not out:
        size, parts = out.numel(), len(workspace)
        step = min(REDUCE_STEP, triton.next_power_of_2(parts))
        grid = (-(-size // REDUCE_BLOCK),)
        tables.launch(reduce_kernel, grid, out.device, workspace, out, size, parts, BLOCK=REDUCE_BLOCK, STEP=step)
