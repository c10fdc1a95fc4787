// G = A Aᵀ: products in T (float or double), sums over more than kRun columns in double.
#pragma once
#include <algorithm>
#include <cmath>
#include <vector>

#include "rows.h"

namespace slao::SLAO_ISA {

// 16 accumulators fill AVX-512's 32 registers well; the narrower sets have 16 registers.
constexpr int kTile = kBytes == 64 ? 4 : 2;
// Columns of all rows that are multiplied while they are in the cache: 16 KiB of fp32 at r = 16.
constexpr int64_t kChunk = 1024;
// Columns that a lane of T adds up before its sum goes to double: at most 128 products (AVX-512), so that fp32 keeps 1e-8.
constexpr int64_t kRun = 2048;

// kTile × kTile dot products of `count` columns, added to the vectors in `acc`; kDiagonal: the lower triangle of x xᵀ.
// `ahead`: two rows of the next columns, asked for on the way: 16 rows are more streams than a processor follows by
// itself, and a burst of requests would hold up the multiplications.
template <bool kDiagonal, typename T>
void gram_tile(const T* const* x, const T* const* y, int64_t count, typename Lanes<T>::V* acc, const T* const* ahead) {
  using V = typename Lanes<T>::V;
  V sums[kTile][kTile];
  for (int i = 0; i < kTile; ++i)
    for (int j = 0; j < kTile; ++j) sums[i][j] = acc[i * kTile + j];
  for (int64_t k = 0; k < count; k += Lanes<T>::n) {
    V right[kTile];
    for (int j = 0; j < kTile; ++j) right[j] = loadu<V>(y[j] + k);
    __builtin_prefetch(ahead[0] + k, 0, 2);
    for (int i = 0; i < kTile; ++i) {
      const V left = kDiagonal ? right[i] : loadu<V>(x[i] + k);
      for (int j = 0; j <= (kDiagonal ? i : kTile - 1); ++j) sums[i][j] += left * right[j];
    }
    __builtin_prefetch(ahead[1] + k, 0, 2);
  }
  for (int i = 0; i < kTile; ++i)
    for (int j = 0; j < kTile; ++j) acc[i * kTile + j] = sums[i][j];
}

template <typename T> class Gram {
  using V = typename Lanes<T>::V;
  static constexpr int64_t n = Lanes<T>::n;

 public:
  // G (r, r), row-major: the lower triangle is written.
  void operator()(const Matrix& m, double* G) {
    r_ = m.rows, tiles_ = (r_ + kTile - 1) / kTile;
    acc_.assign(tiles_ * (tiles_ + 1) / 2 * kTile * kTile, V{});
    std::fill(G, G + r_ * r_, 0.0);
    // Rows are padded to whole tiles with zeros, and the last columns to a whole vector: no remainders below.
    zeros_.resize(kChunk, T(0));
    next_.assign(tiles_ * kTile + 2, zeros_.data());
    rows_.assign(tiles_ * kTile, zeros_.data());
    const bool direct = m.col_stride == 1 && m.dtype == (sizeof(T) == 8 ? Dtype::f64 : Dtype::f32);
    int64_t in_run = 0;
    for (int64_t begin = 0; begin < m.cols;) {
      int64_t count = std::min(kChunk, m.cols - begin);
      if (direct && count >= n) {
        count = count / n * n;
        const T* data = (const T*)m.data + begin;
        for (int64_t i = 0; i < r_; ++i) rows_[i] = data + i * m.row_stride;
        for (int64_t i = 0; i < r_; ++i) next_[i] = rows_[i] + (begin + count < m.cols ? count : 0);
      } else {
        scratch_.resize(r_ * kChunk);
        for (int64_t i = 0; i < r_; ++i) {
          T* row = scratch_.data() + i * kChunk;
          load_span(m, i, begin, count, row);
          std::fill(row + count, row + (count + n - 1) / n * n, T(0));
          rows_[i] = row;
        }
      }
      multiply((count + n - 1) / n * n);
      begin += count;
      if ((in_run += count) >= kRun || begin == m.cols) flush(G), in_run = 0;
    }
  }

 private:
  void multiply(int64_t count) {
    V* acc = acc_.data();
    const T *const *rows = rows_.data(), *const *ahead = next_.data();
    const T* const* const last = ahead + next_.size() - 2;
    for (int64_t I = 0; I < tiles_; ++I) {
      for (int64_t J = 0; J < I; ++J, acc += kTile * kTile) {
        gram_tile<false>(rows + I * kTile, rows + J * kTile, count, acc, ahead);
        ahead = std::min(ahead + 2, last);
      }
      gram_tile<true>(rows + I * kTile, rows + I * kTile, count, acc, ahead);
      ahead = std::min(ahead + 2, last);
      acc += kTile * kTile;
    }
  }

  void flush(double* G) {
    V* acc = acc_.data();
    for (int64_t I = 0; I < tiles_; ++I)
      for (int64_t J = 0; J <= I; ++J, acc += kTile * kTile)
        for (int64_t i = I * kTile; i < std::min(r_, (I + 1) * kTile); ++i)
          for (int64_t j = J * kTile; j < std::min(i + 1, (J + 1) * kTile); ++j)
            G[i * r_ + j] += sum(acc[(i - I * kTile) * kTile + (j - J * kTile)]);
    std::fill(acc_.begin(), acc_.end(), V{});
  }

  int64_t r_, tiles_;
  Scratch<V> acc_;
  Scratch<T> scratch_, zeros_;
  std::vector<const T*> rows_, next_;
};

}  // namespace slao::SLAO_ISA
