// Small matrices in and out of the order in which lora_linear's loops read and leave them.
#pragma once
#include "../arena.h"
#include "../rows.h"

namespace slao::SLAO_ISA {
namespace {

// What a small matrix is to a loop: P, Q or T.
enum class Role { shrink, expand, outer };

// They are packed in pieces of 256 rows (of Q: columns).
constexpr int64_t kPiece = 256;
inline int64_t pieces(Role role, const Matrix& m) {
  return ((role == Role::expand ? m.cols : m.rows) + kPiece - 1) / kPiece;
}

// f(n), n from 1 to 4, with a constant.
template <typename F> inline void with_constant(int64_t n, F&& f) {
  switch (n) {
    case 1: return f(std::integral_constant<int, 1>{});
    case 2: return f(std::integral_constant<int, 2>{});
    case 3: return f(std::integral_constant<int, 3>{});
    default: return f(std::integral_constant<int, 4>{});
  }
}

// 16 values, rounded. As the products themselves, this takes denormals for zero.
inline void put16(bf16* to, vf value) { storeu(to, (__m256i)_mm512_cvtneps_pbh((__m512)value)); }

// m itself where its rows or columns are contiguous, else a copy as bf16, its long dimension contiguous.
inline Matrix dense(const Matrix& m, bf16* to) {
  if (m.row_stride == 1 || m.col_stride == 1) return m;
  const bool flip = m.row_stride < m.col_stride;
  const Matrix from = flip ? transposed(m) : m;
  for (int64_t i = 0; i < from.rows; ++i) load_span(from, i, 0, from.cols, to + i * from.cols);
  const Matrix copied{(char*)to, from.rows, from.cols, from.cols, 1, Dtype::bf16};
  return flip ? transposed(copied) : copied;
}

inline uint32_t first(int64_t count) { return count >= 32 ? ~0u : count <= 0 ? 0u : (1u << count) - 1; }

// Up to 32 neighbours from element `at`, then zeros; of bf16, or fp32 rounded.
inline __m512i line32(const Matrix& m, int64_t at, int64_t count) {
  const uint32_t mask = first(count);
  if (m.dtype == Dtype::bf16) return _mm512_maskz_loadu_epi16(mask, (const bf16*)m.data + at);
  const float* from = (const float*)m.data + at;
  const __m512 low = _mm512_maskz_loadu_ps(__mmask16(mask), from);
  const __m512 high = mask >> 16 ? _mm512_maskz_loadu_ps(__mmask16(mask >> 16), from + 16) : _mm512_setzero_ps();
  return (__m512i)_mm512_cvtne2ps_pbh(high, low);
}
inline __m512i line16(const Matrix& m, int64_t at, int64_t count) {  // 16 of them, each in the low half of a word
  const __mmask16 mask = __mmask16(first(min<int64_t>(count, 16)));
  if (m.dtype == Dtype::bf16)
    return _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, (const bf16*)m.data + at));
  return _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(_mm512_maskz_loadu_ps(mask, (const float*)m.data + at)));
}

// 16 x 16 words change rows and columns.
inline void transpose16(__m512i (&v)[16]) {
  __m512i w[16];
  for (int i = 0; i < 16; i += 2) {
    w[i] = _mm512_unpacklo_epi32(v[i], v[i + 1]);
    w[i + 1] = _mm512_unpackhi_epi32(v[i], v[i + 1]);
  }
  for (int i = 0; i < 16; i += 4)
    for (int j = 0; j < 2; ++j) {
      v[i + 2 * j] = _mm512_unpacklo_epi64(w[i + j], w[i + j + 2]);
      v[i + 2 * j + 1] = _mm512_unpackhi_epi64(w[i + j], w[i + j + 2]);
    }
  for (int i = 0; i < 16; i += 8)
    for (int j = 0; j < 4; ++j) {
      w[i + j] = _mm512_shuffle_i32x4(v[i + j], v[i + j + 4], 0x88);
      w[i + j + 4] = _mm512_shuffle_i32x4(v[i + j], v[i + j + 4], 0xdd);
    }
  for (int j = 0; j < 8; ++j) {
    v[j] = _mm512_shuffle_i32x4(w[j], w[j + 8], 0x88);
    v[j + 8] = _mm512_shuffle_i32x4(w[j], w[j + 8], 0xdd);
  }
}

// Rows [k, k + 32) and columns [n, n + 16) of m as 16 pairs of rows, zeros beyond m: B's order.
inline void pairs_of(const Matrix& m, int64_t k, int64_t n, __m512i (&v)[16]) {
  const int64_t rows = m.rows - k, cols = m.cols - n;
  if (m.row_stride == 1) {
    for (int64_t j = 0; j < 16; ++j) v[j] = j < cols ? line32(m, (n + j) * m.col_stride + k, rows) : __m512i{};
    return transpose16(v);
  }
  for (int64_t p = 0; p < 16; ++p) {
    const int64_t at = (k + 2 * p) * m.row_stride + n;
    v[p] = 2 * p < rows ? line16(m, at, cols) : __m512i{};
    if (2 * p + 1 < rows) v[p] = _mm512_or_si512(v[p], _mm512_slli_epi32(line16(m, at + m.row_stride, cols), 16));
  }
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
