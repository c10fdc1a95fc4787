// AMX for lora_linear: tiles of 16 rows x 64 bytes, and matrices in the order that tiles want.
//
// TDPBF16PS adds to a tile C (16 x 16 fp32) the product of A (16 rows of 32 bf16) and B (16 pairs of rows, each pair's
// two values side by side, x 16). Like VDPBF16PS it takes denormals for zero. Tiles 0 to 3 are C, 4 and 5 A, 6 and 7 B.
#pragma once
#if defined(__AMX_BF16__)
#include <utility>

#include "pack.h"

namespace slao::SLAO_ISA {
namespace {

#if defined(SLAO_TILES_ON_CPU)  // the tests': where no processor has tiles
#include SLAO_TILES_ON_CPU
#else
// Memory is named as clobbered: what was written just before has to be there when a tile is loaded.
template <int T> inline void tile_zero() { asm volatile("tilezero %%tmm%c0" ::"i"(T)); }
template <int T> inline void tile_load(const void* p, int64_t stride) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(p), "r"(stride), "i"(T) : "memory");
}
template <int T> inline void tile_store(void* p, int64_t stride) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(p), "r"(stride), "i"(T) : "memory");
}
template <int C, int A, int B> inline void tile_multiply_add() {
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(C), "i"(A), "i"(B));
}

// C and A have `rows` rows, A and B are `depth` (16 or 32) deep. Clears all tiles.
inline void tile_configure(int rows, int depth) {
  struct alignas(64) {
    uint8_t palette = 1, start = 0, reserved[14] = {};
    uint16_t bytes[16] = {};
    uint8_t rows[16] = {};
  } config;
  for (int t = 0; t < 8; ++t) {
    config.bytes[t] = uint16_t(t == 4 || t == 5 ? 2 * depth : 64);
    config.rows[t] = uint8_t(t < 6 ? rows : depth / 2);
  }
  asm volatile("ldtilecfg %0" ::"m"(config));
}
inline void tile_release() { asm volatile("tilerelease"); }
#endif

// f(0), f(1), ... f(N - 1) with constants.
template <typename F, int... i> inline void each_of(F&& f, std::integer_sequence<int, i...>) {
  (f(std::integral_constant<int, i>{}), ...);
}
template <int N, typename F> inline void each(F&& f) { each_of(f, std::make_integer_sequence<int, N>{}); }

// --- pieces of matrices as bf16 ------------------------------------------------------------------------------------

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

}  // namespace
}  // namespace slao::SLAO_ISA
#endif
