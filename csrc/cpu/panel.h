// Products B A for pieces of fold's W: the panel of A that a piece shares, and the loop over it.
#pragma once
#include "arena.h"
#include "product.h"

namespace slao::SLAO_ISA {

constexpr int kRows = kBytes == 64 ? 6 : 2, kVectors = 4;  // accumulators that fit the register file
template <typename T> constexpr int64_t kStep = kVectors * Lanes<T>::n;
constexpr int64_t kUnitRows = 96;                          // rows of W that share one conversion of A's panel
constexpr int64_t kPanelBytes = 128 << 10;                 // of A: half of a small L2

// `rows` <= kRows rows of `count` columns, a multiple of kVectors registers: w becomes b a, or with kAdd w + b a.
template <bool kAdd, typename T, typename D>
void strip(const T* b, int64_t r, const T* a, int64_t pitch, D* w, int64_t ldw, int64_t rows, int64_t count) {
  for (int64_t j = 0; j < count; j += kStep<T>) {
    if (rows == kRows)
      product_tile<kAdd, kRows, kVectors>(b, r, r, a + j, pitch, w + j, ldw);
    else
      for (int64_t i = 0; i < rows; ++i)
        product_tile<kAdd, 1, kVectors>(b + i * r, r, r, a + j, pitch, w + i * ldw + j, ldw);
  }
}

// Where a thread's panel of A (r, pitch), its rows of B (kRows, r) and of W (kRows, padded) lie.
template <typename T> struct Workspace {
  int64_t padded, pitch;
  T *A, *B, *W;
  size_t size;
  Workspace(Arena arena, int64_t r, int64_t width)
      : padded(round_up(width, kStep<T>)),
        // A line more than a power of two, or all rows of the panel would share a few sets of the cache.
        pitch(padded + 64 / int64_t(sizeof(T))),
        A(arena.take<T>(r * pitch)), B(arena.take<T>(kRows * r)), W(arena.take<T>(kRows * padded)), size(arena.used) {}

  void load_panel(const Matrix& from, int64_t col, int64_t count) const {
    fill(A, from.rows * pitch, T(0));
    for (int64_t k = 0; k < from.rows; ++k) load_span(from, k, col, count, A + k * pitch);
  }
  void load_rows(const FoldRecord& record, int64_t row, int64_t rows) const {
    const int64_t r = record.A.rows;
    for (int64_t i = 0; i < rows; ++i) {
      load_span(record.B, row + i, 0, r, B + i * r);
      for (int64_t k = 0; k < r; ++k) B[i * r + k] *= T(record.scaling);
    }
  }
};

// Columns of W that a panel of A covers.
inline int64_t panel_width(const FoldRecord& record) {
  const bool wide = in_double(record);
  const int64_t step = wide ? kStep<double> : kStep<float>;
  return max(step, kPanelBytes / (max<int64_t>(1, record.A.rows) * (wide ? 8 : 4)) / step * step);
}

}  // namespace slao::SLAO_ISA
