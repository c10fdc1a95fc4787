// G = L Lᵀ and L⁻¹ in fp64 by one CTA, in place in the buffer that plan.h describes.
#pragma once
#include "plan.h"

namespace slao::cuda {

// Every thread gets op over all threads' x, in a fixed order. slots: kThreads doubles of shared memory.
template <typename Op> __device__ inline double block_reduce(double x, double* slots, const Op& op) {
  __syncthreads();
  slots[threadIdx.x] = x;
  for (int half = kThreads / 2; half; half /= 2) {
    __syncthreads();
    if (threadIdx.x < half) slots[threadIdx.x] = op(slots[threadIdx.x], slots[threadIdx.x + half]);
  }
  __syncthreads();
  return slots[0];
}
__device__ inline double block_sum(double x, double* slots) {
  return block_reduce(x, slots, [](double a, double b) { return a + b; });
}

// Row operations that turn G into L, done to the unit matrix too, turn that into L⁻¹: two barriers a column for both.
// lengths: the square roots of G's diagonal. False when a pivot is too small or not a number; all threads agree.
__device__ inline bool factorize(double* F, const double* lengths, int r) {
  for (int at = threadIdx.x; at < r * r; at += kThreads) {
    const int i = at / r, j = at % r;
    if (j <= i) F[at_inverse(r, i, j)] = i == j ? 1.0 : 0.0;
  }
  for (int j = 0; j < r; ++j) {
    __syncthreads();
    const double pivot = F[at_L(r, j, j)], squared = lengths[j] * lengths[j];
    if (!(pivot > kPivot * squared) || squared < kTooSmall) return false;
    const double diagonal = sqrt(pivot), inverse = 1 / diagonal;
    for (int i = j + 1 + threadIdx.x; i < r; i += kThreads) F[at_L(r, i, j)] *= inverse;
    for (int k = threadIdx.x; k <= j; k += kThreads) F[at_inverse(r, j, k)] *= inverse;
    __syncthreads();
    if (threadIdx.x == 0) F[at_L(r, j, j)] = diagonal;  // not before all threads have read the pivot
    for (int at = threadIdx.x; at < (r - 1 - j) * r; at += kThreads) {
      const int i = j + 1 + at / r, k = at % r;
      const double l = F[at_L(r, i, j)];
      if (k <= j)
        F[at_inverse(r, i, k)] -= l * F[at_inverse(r, j, k)];
      else if (k <= i)
        F[at_L(r, i, k)] -= l * F[at_L(r, k, j)];
    }
  }
  __syncthreads();
  return true;
}

// A bound of 1/σ²_min of the matrix with its rows scaled to length 1: their σ² sum to r, so the inverse squares of the
// others sum to r - 2 or more, and all inverse squares are ‖L⁻¹‖²_F.
__device__ inline double condition(const double* F, const double* lengths, int r, double* slots) {
  double squares = 0;
  for (int at = threadIdx.x; at < r * r; at += kThreads) {
    const int i = at / r, j = at % r;
    if (j > i) continue;
    const double m = F[at_inverse(r, i, j)] * lengths[j];
    squares += m * m;
  }
  return block_sum(squares, slots) - r + 2;
}

}  // namespace slao::cuda
