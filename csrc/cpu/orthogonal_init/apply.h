// X <- M X for a lower triangular M, in place.
#pragma once
#include "../gram.h"
#include "../product.h"

namespace slao::SLAO_ISA {
namespace {

// From the last rows up, so that a row is overwritten only when no other needs it any more.
template <int MJ, typename T> void apply_columns(const T* M, int64_t r, T* x, int64_t pitch) {
  int64_t i = r;
  for (; i >= kTile; i -= kTile) {
    const int64_t first = i - kTile;
    product_tile<false, kTile, MJ>(M + first * r, r, i, x, pitch, x + first * pitch, pitch);
  }
  for (; i >= 1; --i) product_tile<false, 1, MJ>(M + (i - 1) * r, r, i, x, pitch, x + (i - 1) * pitch, pitch);
}

// One vector of columns of R rows, all in registers. Rows that lie a multiple of 4 KiB apart, as in a contiguous A of
// 4096 columns, share one set of a small cache: it holds 8 of them and would read every line again and again.
template <int R, typename T> void apply_registers(const T* M, T* x, int64_t pitch, int64_t ahead) {
  using V = typename Lanes<T>::V;
  constexpr int MI = kBytes == 64 ? 8 : 4;  // chains of multiply-adds that hide each other's latency
  V rows[R];
#pragma GCC unroll 16
  for (int k = 0; k < R; ++k) {
    rows[k] = loadu<V>(x + k * pitch);
    __builtin_prefetch(x + k * pitch + ahead, 1, 2);
  }
#pragma GCC unroll 16
  for (int i = R - MI; i >= 0; i -= MI) {
    V sums[MI] = {};
#pragma GCC unroll 16
    for (int k = 0; k < i + MI; ++k)
#pragma GCC unroll 16
      for (int a = 0; a < MI; ++a)
        if (k <= i + a) sums[a] += splat(M[(i + a) * R + k]) * rows[k];
#pragma GCC unroll 16
    for (int a = 0; a < MI; ++a) storeu(x + (i + a) * pitch, sums[a]);
  }
}

// M (r, r) has zeros above its diagonal; x has `cols` columns and rows `pitch` apart.
template <typename T> void apply(const T* M, int64_t r, T* x, int64_t pitch, int64_t cols, T* edge) {
  constexpr int n = Lanes<T>::n;
  int64_t j = 0;
  if (r == 8)
    for (; j + n <= cols; j += n) apply_registers<8>(M, x + j, pitch, 8 * n);
  if (kBytes == 64 && r == 16)
    for (; j + n <= cols; j += n) apply_registers<16>(M, x + j, pitch, 8 * n);
  for (; j + 4 * n <= cols; j += 4 * n) apply_columns<4>(M, r, x + j, pitch);
  for (; j + n <= cols; j += n) apply_columns<1>(M, r, x + j, pitch);
  if (j == cols) return;
  fill(edge, r * n, T(0));  // the last columns, fewer than a vector
  for (int64_t i = 0; i < r; ++i) copy(x + i * pitch + j, cols - j, edge + i * n);
  apply_columns<1>(M, r, edge, n);
  for (int64_t i = 0; i < r; ++i) copy(edge + i * n, cols - j, x + i * pitch + j);
}

}  // namespace
}  // namespace slao::SLAO_ISA
