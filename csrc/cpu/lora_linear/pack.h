// Small matrices in and out of the order in which lora_linear's loops read and leave them.
#pragma once
#include <type_traits>

#include "../arena.h"
#include "../simd.h"

namespace slao::SLAO_ISA {
namespace {

// What a small matrix is to a loop: P, Q or T.
enum class Role { shrink, expand, outer };

// Two bf16 values as one 32-bit word: what both instructions multiply at a time.
inline uint32_t word(const void* p) {
  uint32_t w;
  std::memcpy(&w, p, sizeof w);
  return w;
}
inline uint32_t pair_of(bf16 low, bf16 high) { return low.bits | uint32_t(high.bits) << 16; }

// 16 values, rounded. As the products themselves, this takes denormals for zero.
inline void put16(bf16* to, vf value) { storeu(to, (__m256i)_mm512_cvtneps_pbh((__m512)value)); }

// A copy of m (bf16 or fp32) as bf16, its long dimension contiguous.
inline Matrix dense(const Matrix& m, bf16* to) {
  const bool flip = m.row_stride < m.col_stride;
  const Matrix from = flip ? Matrix{m.data, m.cols, m.rows, m.col_stride, m.row_stride, m.dtype} : m;
  for (int64_t i = 0; i < from.rows; ++i) {
    bf16* out = to + i * from.cols;
    int64_t j = 0;
    if (m.dtype == Dtype::bf16) {
      const bf16* row = (const bf16*)from.data + i * from.row_stride;
      for (; j < from.cols; ++j) out[j] = row[j * from.col_stride];
      continue;
    }
    const float* row = (const float*)from.data + i * from.row_stride;
    if (from.col_stride == 1)
      for (; j + kFloats <= from.cols; j += kFloats) put16(out + j, load(row + j));
    for (; j < from.cols; ++j) out[j] = to_bf16(row[j * from.col_stride]);
  }
  return flip ? Matrix{(char*)to, m.rows, m.cols, 1, from.cols, Dtype::bf16}
              : Matrix{(char*)to, m.rows, m.cols, from.cols, 1, Dtype::bf16};
}

// d[j, i] = scale sums[i, j - begin]
template <typename D>
void store_columns(const float* sums, int64_t lds, float scale, const Matrix& d, int64_t begin, int64_t end) {
  D* to = (D*)d.data;
  if (d.row_stride != 1) {
    for (int64_t j = begin; j < end; ++j)
      for (int64_t i = 0; i < d.cols; ++i) put(to + j * d.row_stride + i * d.col_stride, scale * sums[i * lds + j - begin]);
    return;
  }
  for (int64_t i = 0; i < d.cols; ++i) {
    const float* from = sums + i * lds - begin;
    D* line = to + i * d.col_stride;
    int64_t j = begin;
    for (; j + kFloats <= end; j += kFloats) store(line + j, splat(scale) * load(from + j));
    for (; j < end; ++j) put(line + j, scale * from[j]);
  }
}
inline void store_outer(const float* sums, int64_t lds, float scale, const Matrix& d, int64_t begin, int64_t end) {
  if (d.dtype == Dtype::f32)
    store_columns<float>(sums, lds, scale, d, begin, end);
  else
    store_columns<bf16>(sums, lds, scale, d, begin, end);
}

}  // namespace
}  // namespace slao::SLAO_ISA
