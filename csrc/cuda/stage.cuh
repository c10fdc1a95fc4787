// Pieces of matrices into shared memory, widened to what is computed in.
#pragma once
#include "convert.cuh"

namespace slao::cuda {

// Rows [row, row + rows) and columns [col, col + cols) of m; the element (i, j) of the piece goes to
// out[i * row_pitch + j * col_pitch] as scale(element, i). cols is a multiple of 4. Zeros outside of m.
// kBatch: loads that a thread has in flight.
template <int kBatch, typename C, typename Scale>
__device__ inline void stage(const View& m, int row, int rows, int col, int cols, C* out, int row_pitch, int col_pitch,
                             const Scale& scale) {
  const int per_row = cols / 4, total = rows * per_row;
  const bool inside = m.quads && row + rows <= m.rows && col + cols <= m.cols;
  for (int first = threadIdx.x; first < total; first += kBatch * kThreads) {
    Quad<kQuadWords<C>> quads[kBatch];
    fetch_all(m, inside, quads, [&](int b, int& i, int& j) {
      const int at = first + b * kThreads;
      i = row + at / per_row, j = col + at % per_row * 4;
      return at < total;
    });
#pragma unroll
    for (int b = 0; b < kBatch; ++b) {
      const int at = first + b * kThreads;
      if (at >= total) continue;
      const int i = at / per_row, j = at % per_row * 4;
      C x[4];
      widen(quads[b], m.dtype, x);
      C* to = out + i * row_pitch + j * col_pitch;
#pragma unroll
      for (int e = 0; e < 4; ++e) to[e * col_pitch] = scale(x[e], i);
    }
  }
}

// Four neighbours in shared memory.
template <typename C> __device__ inline void read4(const C* from, C (&x)[4]) {
  constexpr int kEach = 16 / sizeof(C);
#pragma unroll
  for (int i = 0; i < 4; i += kEach) {
    const auto pack = *reinterpret_cast<const Pack<C, kEach>*>(from + i);
#pragma unroll
    for (int e = 0; e < kEach; ++e) x[i + e] = pack.x[e];
  }
}

}  // namespace slao::cuda
