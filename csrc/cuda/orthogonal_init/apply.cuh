// Q = L⁻¹ X for one CTA's columns, which no other CTA reads or writes: so `to` may be `from`.
#pragma once
#include "../stage.cuh"
#include "plan.h"

namespace slao::cuda {

SLAO_BOTH int64_t apply_shared_bytes(int r, int width, int element) {
  return int64_t(padded(r)) * (width + 2 + (r <= kSharedRank ? r : 0)) * element;
}

// What a CTA needs for any of the ways that apply_kernel may take.
SLAO_BOTH int64_t apply_shared_bytes(int r, bool wide) {
  const int width = apply_width(r, wide);
  const int64_t twice = apply_shared_bytes(r, width / 2, 8), once = apply_shared_bytes(r, width, wide ? 8 : 4);
  return twice > once ? twice : once;
}

// Columns [col, col + width), computed in C.
template <typename C>
__device__ void apply_columns(const View& from, const View& to, const double* F, int col, int width) {
  const int r = from.rows, rows = padded(r);
  C* x = reinterpret_cast<C*>(dynamic_shared());  // (rows, width)
  C* M = x + rows * width;                        // L⁻¹ᵀ: (r, rows), for r <= kSharedRank
  C* halves = M + (r <= kSharedRank ? r * rows : 0);
  const double* lengths = F + int64_t(r) * (r + 1);
  for (int i = threadIdx.x; i < rows; i += kThreads) {
    const int exponent = i < r ? ilogb(lengths[i]) : 0, half = exponent / 2;
    halves[2 * i] = C(ldexp(1.0, -half));
    halves[2 * i + 1] = C(ldexp(1.0, half - exponent));
  }
  const auto inverse = [&](int i, int k) { return i < r && k <= i ? C(F[at_inverse(r, i, k)]) : C(0); };
  if (r <= kSharedRank)
    for (int at = threadIdx.x; at < r * rows; at += kThreads) M[at] = inverse(at % rows, at / rows);
  __syncthreads();
  // Times 2^-exponent of the row's length, in two steps because the power alone may not be representable. The columns
  // of L⁻¹ come with the opposite power (orthogonal_init.cu), which keeps them within fp32 for input of any magnitude.
  stage<4>(from, 0, rows, col, width, x, width, 1,
           [&](C element, int row) { return element * halves[2 * row] * halves[2 * row + 1]; });
  __syncthreads();
  const int across = width / 4, tasks = across * (rows / 4);
  for (int task = threadIdx.x; task < tasks; task += kThreads) {
    const int i = task / across * 4, j = task % across * 4, end = i + 4 < r ? i + 4 : r;
    C sums[4][4] = {};
    for (int k = 0; k < end; ++k) {
      C columns[4], factors[4];
      read4(x + k * width + j, columns);
      if (r <= kSharedRank) {
        read4(M + k * rows + i, factors);
      } else {
#pragma unroll
        for (int e = 0; e < 4; ++e) factors[e] = inverse(i + e, k);
      }
#pragma unroll
      for (int a = 0; a < 4; ++a)
#pragma unroll
        for (int b = 0; b < 4; ++b) sums[a][b] += factors[a] * columns[b];
    }
#pragma unroll
    for (int a = 0; a < 4; ++a) store_quad(to, i + a, col + j, sums[a]);
  }
}

}  // namespace slao::cuda
