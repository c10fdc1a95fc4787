// One CTA's piece of G = X Xᵀ: fp64 tensor cores, straight from global memory to registers.
#pragma once
#include "plan.h"

namespace slao::cuda {

// A warp's sums over its share of the columns [begin, begin + kChunk): rows of block I against rows of block J, blocks
// of 8 kBlocks rows. A lane holds four neighbours of row lane / 4 of every 8; the four products that they enter take
// the columns in another order than memory's, which a sum over columns does not mind.
template <int kBlocks, bool kDiagonal, int kWords>
__device__ inline void gram_warp(const View& X, int I, int J, int begin, double (&sums)[kBlocks][kBlocks][2]) {
  constexpr int kAhead = kBlocks == 4 ? 1 : kWords == 8 ? 2 : 4;  // steps whose loads are in flight together
  constexpr int kStep = 16 * kWarps, kSide = 8 * kBlocks;
  const int warp = threadIdx.x / 32, row = threadIdx.x % 32 / 4, quad = threadIdx.x % 4, rows = X.rows;
  for (int at = 0; at < kChunk; at += kStep * kAhead) {
    Quad<kWords> x[kAhead * kBlocks], y[kAhead * kBlocks];
    const bool inside = X.quads && begin + at + kStep * kAhead <= X.cols;
    const auto of_block = [&](int block) {
      return [=](int i, int& where_row, int& where_col) {
        where_row = block * kSide + i % kBlocks * 8 + row;
        where_col = begin + at + i / kBlocks * kStep + warp * 16 + quad * 4;
        return where_row < rows;
      };
    };
    fetch_all(X, inside, x, of_block(I));
    if (!kDiagonal) fetch_all(X, inside, y, of_block(J));
#pragma unroll
    for (int s = 0; s < kAhead; ++s) {
      if (begin + at + s * kStep + warp * 16 >= X.cols) break;  // the same for the whole warp
      double left[kBlocks][4], right[kBlocks][4];
#pragma unroll
      for (int b = 0; b < kBlocks; ++b) {
        widen(x[s * kBlocks + b], X.dtype, left[b]);
        if (!kDiagonal) widen(y[s * kBlocks + b], X.dtype, right[b]);
      }
      __syncwarp();  // loads at the matrix's edge part the lanes; the tensor cores need them together
#pragma unroll
      for (int e = 0; e < 4; ++e)
#pragma unroll
        for (int a = 0; a < kBlocks; ++a)
#pragma unroll
          for (int b = 0; b < (kDiagonal ? a + 1 : kBlocks); ++b)
            mma_f64(sums[a][b], left[a][e], kDiagonal ? left[b][e] : right[b][e]);
    }
  }
}

// The CTA's sums, warp after warp in the same order in every run, into shared memory: (8 kBlocks)².
template <int kBlocks, bool kDiagonal, int kWords>
__device__ inline void gram_piece(const View& X, int I, int J, int begin, double* piece) {
  constexpr int kSide = 8 * kBlocks;
  double sums[kBlocks][kBlocks][2] = {};
  gram_warp<kBlocks, kDiagonal, kWords>(X, I, J, begin, sums);
  const int warp = threadIdx.x / 32, row = threadIdx.x % 32 / 4, col = threadIdx.x % 4 * 2;
  for (int turn = 0; turn < kWarps; ++turn) {
    if (warp == turn) {
#pragma unroll
      for (int a = 0; a < kBlocks; ++a)
#pragma unroll
        for (int b = 0; b < kBlocks; ++b)
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            double& to = piece[(a * 8 + row) * kSide + b * 8 + col + e];
            to = turn ? to + sums[a][b][e] : sums[a][b][e];
          }
    }
    __syncthreads();
  }
}

template <int kBlocks, int kWords>
__device__ inline void gram_piece(const View& X, int I, int J, int begin, double* piece) {
  if (kBlocks == 2 || I == J)
    gram_piece<kBlocks, true, kWords>(X, I, J, begin, piece);
  else
    gram_piece<kBlocks, false, kWords>(X, I, J, begin, piece);
}

// The sum of the chunks' pieces, in order, into the lower triangle of F.
__device__ inline void sum_pieces(const double* pieces, int r, int chunks, double* F) {
  const int side = gram_side(r), count = gram_pieces(r), size = side * side;
  for (int at = threadIdx.x; at < r * r; at += kThreads) {
    const int i = at / r, j = at % r, I = i / side, J = j / side;
    if (j > i) continue;
    const double* from = pieces + int64_t(I * (I + 1) / 2 + J) * size + (i % side) * side + j % side;
    double sum = 0;
    for (int chunk = 0; chunk < chunks; ++chunk) sum += from[int64_t(chunk) * count * size];
    F[at_L(r, i, j)] = sum;
  }
}

}  // namespace slao::cuda
