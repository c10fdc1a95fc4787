"""The two Triton kernels of the experts' LoRA layer; kernels.py launches them. Names as in lora_linear's.

The rows of the large matrices are sorted by expert: those of expert e end at ends[e]. No row count ever reaches the
host, so a launch over rows has as many programs as there can be tiles, and each finds its own (`_find`).

COMPUTE is the dtype of the products' operands. BY_8: what its docstring lists are multiples of 8, and the compiler is
told so; by itself it sees multiples of 16 only, and would read rank 8 one element at a time.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..tables_device import rounded


@triton.jit
def _find(ends, experts, tile, BLOCK_M: tl.constexpr, BLOCK_E: tl.constexpr):
    """(expert, first row) of a tile, at most BLOCK_M rows of one expert; expert = experts where there are fewer tiles.

    Every program counts all experts' tiles: one wait for memory, and no launch that would count them for all.
    """
    o_e = tl.arange(0, BLOCK_E)
    m_e = o_e < experts
    b_end = tl.load(ends + o_e, mask=m_e, other=0)
    b_start = tl.load(ends + o_e - 1, mask=m_e & (o_e > 0), other=0)
    b_tiles = tl.cumsum(tl.where(m_e, (b_end - b_start + BLOCK_M - 1) // BLOCK_M, 0), axis=0)
    m_before = m_e & (b_tiles <= tile)  # those of which all tiles are before this one, and empty ones
    expert = tl.sum(m_before.to(tl.int32), axis=0)
    start = tl.max(tl.where(m_before, b_end, 0), axis=0)
    return expert, start + (tile - tl.max(tl.where(m_before, b_tiles, 0), axis=0)) * BLOCK_M


@triton.jit
def _add_product(
    b_out, p_left, p_right, m_m, m_n, size, step_left, step_right, COMPUTE: tl.constexpr, BLOCK: tl.constexpr
):
    """b_out + left right, left (M, size) and right (size, N), BLOCK of `size` at a time."""
    o = tl.arange(0, BLOCK)
    for k in range(0, size, BLOCK):
        m_k = o < size - k
        b_left = tl.load(p_left, mask=m_m[:, None] & m_k[None, :], other=0.0).to(COMPUTE)
        b_right = tl.load(p_right, mask=m_k[:, None] & m_n[None, :], other=0.0).to(COMPUTE)
        b_out = tl.dot(b_left, b_right, b_out, input_precision="ieee")
        p_left += step_left
        p_right += step_right
    return b_out


@triton.jit
def rows_kernel(
    T, S, P, Q, out, ends, experts, N, R, K, stride_tm, stride_tr, stride_pm, stride_pk, stride_qe, stride_qk,
    stride_qn, alpha,
    COMPUTE: tl.constexpr, S_BY_N: tl.constexpr, BY_8: tl.constexpr, ADD: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """out (rows, N) <- alpha T S_e + P Q_e for the rows of every expert e, one product alone where the other is None;
    rounded once, and added to what out has where ADD.

    T (rows, R), P (rows, K), Q (experts, K, N); S is dense, (experts, R, N) in memory or (experts, N, R) where S_BY_N;
    out is dense. BY_8: N, R and stride_tm, and T's rows are dense.
    """
    if BY_8:
        N, R, stride_tm = N // 8 * 8, R // 8 * 8, stride_tm // 8 * 8
    # An expert's tiles of columns lie side by side: programs that run together share its W and their rows in L2.
    across = tl.cdiv(N, BLOCK_N)
    expert, first = _find(ends, experts, tl.program_id(0) // across, BLOCK_M, BLOCK_E)
    if expert >= experts:
        return
    o_m = first + tl.arange(0, BLOCK_M)
    o_n = tl.program_id(0) % across * BLOCK_N + tl.arange(0, BLOCK_N)
    o_m64, o_n64, e64 = o_m.to(tl.int64), o_n.to(tl.int64), expert.to(tl.int64)
    m_m, m_n = o_m < tl.load(ends + expert), o_n < N
    p_out = out + (o_m64[:, None] * N + o_n[None, :])
    m_out = m_m[:, None] & m_n[None, :]
    if ADD:  # asked for first: one wait for memory with T and S
        b_before = tl.load(p_out, mask=m_out, other=0.0)
    b_out = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    if T is not None:
        o_r = tl.arange(0, BLOCK_R)
        p_T = T + (o_m64[:, None] * stride_tm + o_r[None, :] * stride_tr)
        if S_BY_N:
            p_S, step_s = S + e64 * N * R + (o_r[:, None] + o_n64[None, :] * R), BLOCK_R
        else:
            p_S, step_s = S + e64 * N * R + (o_r[:, None] * N + o_n64[None, :]), BLOCK_R * N
        b_out = _add_product(b_out, p_T, p_S, m_m, m_n, R, BLOCK_R * stride_tr, step_s, COMPUTE, BLOCK_R) * alpha
    if P is not None:
        o_k = tl.arange(0, BLOCK_K)
        p_P = P + (o_m64[:, None] * stride_pm + o_k[None, :] * stride_pk)
        p_Q = Q + e64 * stride_qe + (o_k[:, None] * stride_qk + o_n64[None, :] * stride_qn)
        b_out = _add_product(b_out, p_P, p_Q, m_m, m_n, K, BLOCK_K * stride_pk, BLOCK_K * stride_qk, COMPUTE, BLOCK_K)
    if ADD:
        b_out += b_before.to(tl.float32)
    tl.store(p_out, rounded(b_out, out.dtype.element_ty), mask=m_out)


@triton.jit
def outer_kernel(
    G, X, out, ends, R, K, stride_xm, stride_xk, alpha,
    COMPUTE: tl.constexpr, BY_K: tl.constexpr, BY_8: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """out_e (R, K) <- alpha G_eᵀ X_e for every expert e, over its rows; zeros where it has none.

    G (rows, R) is dense, X (rows, K); out is dense, (experts, R, K) in memory or (experts, K, R) where BY_K. BY_8: R.
    """
    if BY_8:
        R = R // 8 * 8
    across, ranks = tl.cdiv(K, BLOCK_K), tl.cdiv(R, BLOCK_R)
    i_k, rest = tl.program_id(0) % across, tl.program_id(0) // across
    i_r, expert = rest % ranks, rest // ranks
    start = tl.load(ends + expert - 1, mask=expert > 0, other=0)
    end = tl.load(ends + expert)
    o_m = tl.arange(0, BLOCK_M)
    o_k = i_k * BLOCK_K + tl.arange(0, BLOCK_K)
    o_r = i_r * BLOCK_R + tl.arange(0, BLOCK_R)
    m_k, m_r = o_k < K, o_r < R
    p_G = G + start.to(tl.int64) * R + (o_m[None, :] * R + o_r[:, None])
    p_X = X + start.to(tl.int64) * stride_xm + (o_m[:, None] * stride_xm + o_k[None, :].to(tl.int64) * stride_xk)
    b_out = tl.zeros((BLOCK_R, BLOCK_K), dtype=tl.float32)
    for m in range(start, end, BLOCK_M):
        m_m = o_m < end - m
        b_G = tl.load(p_G, mask=m_r[:, None] & m_m[None, :], other=0.0).to(COMPUTE)  # (R, M)
        b_X = tl.load(p_X, mask=m_m[:, None] & m_k[None, :], other=0.0).to(COMPUTE)  # (M, K)
        b_out = tl.dot(b_G, b_X, b_out, input_precision="ieee")
        p_G += BLOCK_M * R
        p_X += BLOCK_M * stride_xm
    if BY_K:
        o_out = o_r[:, None] + o_k[None, :].to(tl.int64) * R
    else:
        o_out = o_r[:, None].to(tl.int64) * K + o_k[None, :]
    p_out = out + expert.to(tl.int64) * R * K + o_out
    tl.store(p_out, rounded(b_out * alpha, out.dtype.element_ty), mask=m_r[:, None] & m_k[None, :])
