// Matrices whose rows are nearly dependent: Gram-Schmidt, each row twice, by one CTA. Slow, rare, and safe for any
// finite input. A row without a direction of its own is replaced by a unit vector.
#pragma once
#include "factor.cuh"

namespace slao::cuda {

// As in ops/orthogonal_init/reference.py: what is left of a row after projection, below one rounding error of the row.
__device__ inline double no_direction(int8_t dtype) { return dtype == 0 ? 0x1p-50 : 0x1p-23; }

SLAO_BOTH int64_t complete_shared_bytes(int r) { return (2 * int64_t(r) + kThreads) * 8; }

struct Rows {
  View X;
  double *sums, *total, *slots;  // shared memory: r, r, kThreads

  __device__ double squared_length(int row) const {
    double squared = 0;
    for (int c = threadIdx.x; c < X.cols; c += kThreads) {
      const double x = load_element<double>(X, row, c);
      squared += x * x;
    }
    return block_sum(squared, slots);
  }

  __device__ double largest(int row) const {
    double most = 0;
    for (int c = threadIdx.x; c < X.cols; c += kThreads) most = fmax(most, fabs(load_element<double>(X, row, c)));
    return block_reduce(most, slots, [](double a, double b) { return fmax(a, b); });
  }

  template <typename F> __device__ void map(int row, const F& f) const {
    for (int c = threadIdx.x; c < X.cols; c += kThreads)
      store_element(X, row, c, f(load_element<double>(X, row, c), c));
    __syncthreads();
  }

  // Row i without its part along the rows before it; that part's coordinates are added to `total`.
  __device__ void project(int i) const {
    __syncthreads();
    for (int k = threadIdx.x / 32; k < i; k += kWarps) {
      double sum = 0;
      for (int c = threadIdx.x % 32; c < X.cols; c += 32)
        sum += load_element<double>(X, k, c) * load_element<double>(X, i, c);
      sum = warp_sum(sum);
      if (threadIdx.x % 32 == 0) {
        sums[k] = sum;
        total[k] += sum;
      }
    }
    __syncthreads();
    map(i, [&](double x, int c) {
      for (int k = 0; k < i; ++k) x -= sums[k] * load_element<double>(X, k, c);
      return x;
    });
  }

  // The column in which the rows before i have the least weight, the first of equals.
  __device__ int lightest(int i) const {
    double least = INFINITY;
    int column = X.cols;
    for (int c = threadIdx.x; c < X.cols; c += kThreads) {
      double weight = 0;
      for (int k = 0; k < i; ++k) {
        const double x = load_element<double>(X, k, c);
        weight += x * x;
      }
      if (weight < least) least = weight, column = c;
    }
    const auto smaller = [](double a, double b) { return fmin(a, b); };
    const bool mine = block_reduce(least, slots, smaller) == least;
    return int(block_reduce(mine ? column : X.cols, slots, smaller));
  }
};

// X's rows become orthonormal; R goes to `triangle` if that has memory. True when a row had to be replaced.
__device__ inline bool complete(const View& X, const View& triangle) {
  double* shared = reinterpret_cast<double*>(dynamic_shared());
  const int r = X.rows;
  const Rows rows{X, shared, shared + r, shared + 2 * r};
  bool deficient = false;
  for (int i = 0; i < r; ++i) {
    for (int k = threadIdx.x; k < r; k += kThreads) rows.total[k] = 0;
    // Near 1 neither squares nor what is left of the row leave the range of the numbers.
    const double largest = rows.largest(i);
    const int exponent = largest > 0 ? ilogb(largest) : 0;
    rows.map(i, [&](double x, int) { return scalbn(x, -exponent); });
    const double length = sqrt(rows.squared_length(i));
    rows.project(i);
    rows.project(i);
    double left = sqrt(rows.squared_length(i));
    const bool replaced = !(left > no_direction(X.dtype) * length);
    if (triangle.data)
      for (int k = threadIdx.x; k < r; k += kThreads)
        store_element(triangle, k, i,
                      k < i ? scalbn(rows.total[k], exponent) : k == i && !replaced ? scalbn(left, exponent) : 0.0);
    if (replaced) {
      deficient = true;
      const int column = rows.lightest(i);
      rows.map(i, [&](double, int c) { return c == column ? 1.0 : 0.0; });
      rows.project(i);
      rows.project(i);
      left = sqrt(rows.squared_length(i));
    }
    rows.map(i, [&](double x, int) { return x / left; });
  }
  return deficient;
}

}  // namespace slao::cuda
