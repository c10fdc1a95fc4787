"""The Triton kernel of the base GEMM with the rank-r term inside; gemm.py says when it runs, and launches it.

Names and COMPUTE as in device.py. The grid has one program a multiprocessor, each of which walks over tiles of the
output. A tile is one program's alone and its fp32 sum has the order of the loops: bitwise the same from run to run.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _place(tile, tiles_m, tiles_n, GROUP_M: tl.constexpr):
    """(row, column) of a tile: down GROUP_M rows, then the next column, so that tiles in flight share P and Q in L2."""
    first = tile // (GROUP_M * tiles_n) * GROUP_M
    height = tl.minimum(tiles_m - first, GROUP_M)
    within = tile % (GROUP_M * tiles_n)
    return first + within % height, within // height


@triton.jit(do_not_specialize=["M"])
def gemm_kernel(
    P,
    Q,
    T,
    S,
    bias,
    out,
    M,
    N,
    K,
    R,
    stride_p,
    stride_q,
    stride_t,
    stride_s,
    alpha,
    COMPUTE: tl.constexpr,
    TMA: tl.constexpr,
    Q_BY_N: tl.constexpr,
    S_BY_N: tl.constexpr,
    RANK_BY_8: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    GROUP_M: tl.constexpr,
):
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
            d_out.store([first_m, first_n], b_out.to(out.dtype.element_ty))
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
            tl.store(p_out, b_out.to(out.dtype.element_ty), mask=m_m[:, None] & m_n[None, :])
