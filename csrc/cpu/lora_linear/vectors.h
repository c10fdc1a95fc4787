// lora_linear's three loops on vector registers, two products at a time through VDPBF16PS. lora_linear.cpp says what
// each computes and runs them on threads.
#pragma once
#include "pack.h"

namespace slao::SLAO_ISA {
namespace {

// Steps that are added one after another before their sum joins the total: what keeps long fp32 sums accurate.
constexpr int64_t kSums = 64;

struct Vectors {
  static constexpr int64_t kDepth = 2;  // products of a step
  static constexpr int64_t kRows = 48;  // a multiple of every number of rows that is multiplied in registers
  static constexpr int64_t kRowStep = 12;
  static constexpr int64_t kMaxRank = 4 * kFloats;
  static constexpr int64_t kColumnStep = 16;
  static constexpr int64_t kWork = 30000 * kFloats * kDepth;

  static vf multiply_add(vf sum, uint32_t x, vf packed) {
    return (vf)_mm512_dpbf16_ps((__m512)sum, (__m512bh)_mm512_set1_epi32(int(x)), (__m512bh)packed);
  }

  // --- packing: steps of the inner dimension, the outer one padded to whole vectors -----------------------------------
  // Of Q in blocks of kColumns, one after the other: rows of a power of two would all fall on the same lines of the cache.
  static constexpr int64_t kColumns = 4 * kFloats;

  static int64_t pitch(int64_t r) { return round_up(r, kFloats); }
  static int64_t steps(int64_t k) { return (k + kDepth - 1) / kDepth; }
  static int64_t size(Role role, const Matrix& m) {
    return steps(m.rows) * round_up(m.cols, role == Role::expand ? kColumns : kFloats) * kDepth;
  }
  static void pack(Role role, const Matrix& m, int64_t piece, bf16* to) {
    const bool blocks = role == Role::expand;
    const int64_t inner = steps(m.rows), width = blocks ? kColumns : pitch(m.cols), begin = piece * kPiece;
    const int64_t first_step = blocks ? 0 : begin / kDepth, first_column = blocks ? begin : 0;
    const int64_t last_step = blocks ? inner : min(inner, (begin + kPiece) / kDepth);
    const int64_t last_column = blocks ? min(m.cols, begin + kPiece) : m.cols;
    __m512i v[16];
    for (int64_t s = first_step; s < last_step; s += 16)
      for (int64_t j = first_column; j < last_column; j += kFloats) {
        pairs_of(m, s * kDepth, j, v);
        bf16* at = to + ((j / width * inner + s) * width + j % width) * kDepth;
        for (int p = 0; p < min<int64_t>(16, last_step - s); ++p) storeu(at + p * width * kDepth, v[p]);
      }
  }
  static void finish() {}

  // --- sums (rows, pitch) = x P ------------------------------------------------------------------------------------
  template <int MI, int RV>
  static void shrink_tile(const bf16* x, int64_t ldx, int64_t k, const bf16* packed, float* sums) {
    const int64_t whole = k / kDepth;
    // A pointer to every fourth row, which the compiler must not take apart: with one for each of twelve it runs out
    // of registers.
    const bf16* row[(MI + 3) / 4];
#pragma GCC unroll 4
    for (int i = 0; i < (MI + 3) / 4; ++i) {
      row[i] = x + i * 4 * ldx;
      asm("" : "+r"(row[i]));
    }
    vf total[MI][RV] = {};
    for (int64_t block = 0; block < whole; block += kSums) {
      vf acc[MI][RV] = {};
      const int64_t end = min(block + kSums, whole);
      for (int64_t s = block; s < end; ++s) {
        vf p[RV];
#pragma GCC unroll 8
        for (int j = 0; j < RV; ++j) p[j] = loadu<vf>(packed + (s * RV + j) * kFloats * kDepth);
#pragma GCC unroll 16
        for (int i = 0; i < MI; ++i) {
          const uint32_t w = loadu<uint32_t>(row[i / 4] + i % 4 * ldx);
#pragma GCC unroll 8
          for (int j = 0; j < RV; ++j) acc[i][j] = multiply_add(acc[i][j], w, p[j]);
        }
#pragma GCC unroll 4
        for (int i = 0; i < (MI + 3) / 4; ++i) row[i] += kDepth;
      }
#pragma GCC unroll 16
      for (int i = 0; i < MI; ++i)
#pragma GCC unroll 8
        for (int j = 0; j < RV; ++j) total[i][j] += acc[i][j];
    }
    if (k % kDepth)  // the last of an odd number has no partner
      for (int i = 0; i < MI; ++i)
        for (int j = 0; j < RV; ++j)
          total[i][j] =
              multiply_add(total[i][j], x[i * ldx + k - 1].bits, loadu<vf>(packed + (whole * RV + j) * kFloats * kDepth));
    for (int i = 0; i < MI; ++i)
      for (int j = 0; j < RV; ++j) storeu(sums + (i * RV + j) * kFloats, total[i][j]);
  }

  static void shrink(const Matrix& x, int64_t row, int64_t rows, const bf16* packed, int64_t r, float* sums) {
    with_constant(pitch(r) / kFloats, [&](auto vectors) {
      constexpr int RV = decltype(vectors)::value, MI = min(24 / RV, 12);
      const bf16* from = (const bf16*)x.data + row * x.row_stride;
      int64_t i = 0;
      for (; i + MI <= rows; i += MI)
        shrink_tile<MI, RV>(from + i * x.row_stride, x.row_stride, x.cols, packed, sums + i * RV * kFloats);
      for (; i < rows; ++i)
        shrink_tile<1, RV>(from + i * x.row_stride, x.row_stride, x.cols, packed, sums + i * RV * kFloats);
    });
  }

  // --- y (rows) = scale t Q + bias, t (rows, pitch(r)) without gaps ---------------------------------------------------
  static int64_t t_pitch(int64_t r) { return pitch(r); }

  // A block of Q's columns, of which NV vectors are used.
  template <int MI, int NV>
  static void expand_tile(const bf16* t, int64_t ldt, int64_t inner, const bf16* packed, float scale, const bf16* bias,
                          bf16* y, int64_t ldy) {
    vf acc[MI][NV] = {};
    for (int64_t s = 0; s < inner; ++s) {
      vf q[NV];
#pragma GCC unroll 8
      for (int j = 0; j < NV; ++j) q[j] = loadu<vf>(packed + (s * kColumns + j * kFloats) * kDepth);
#pragma GCC unroll 8
      for (int i = 0; i < MI; ++i) {
        const uint32_t w = loadu<uint32_t>(t + i * ldt + s * kDepth);
#pragma GCC unroll 8
        for (int j = 0; j < NV; ++j) acc[i][j] = multiply_add(acc[i][j], w, q[j]);
      }
    }
#pragma GCC unroll 8
    for (int j = 0; j < NV; ++j) {
      const vf shift = bias ? load(bias + j * kFloats) : vf{};
#pragma GCC unroll 8
      for (int i = 0; i < MI; ++i) put16(y + i * ldy + j * kFloats, shift + splat(scale) * acc[i][j]);
    }
  }

  template <int MI>
  static void expand_rows(const bf16* t, int64_t r, const bf16* packed, float scale, const bf16* bias, bf16* y,
                          int64_t ldy, int64_t cols) {
    const int64_t ldt = t_pitch(r), inner = steps(r);
    int64_t j = 0;
    for (; j + kColumns <= cols; j += kColumns)
      expand_tile<MI, kColumns / kFloats>(t, ldt, inner, packed + j * inner * kDepth, scale, bias ? bias + j : nullptr,
                                          y + j, ldy);
    const bf16* last = packed + j * inner * kDepth;
    for (; j + kFloats <= cols; j += kFloats, last += kFloats * kDepth)
      expand_tile<MI, 1>(t, ldt, inner, last, scale, bias ? bias + j : nullptr, y + j, ldy);
    if (j == cols) return;
    bf16 edge[MI * kFloats], tail[kFloats] = {};  // the last columns, fewer than a vector
    if (bias) copy(bias + j, cols - j, tail);
    expand_tile<MI, 1>(t, ldt, inner, last, scale, bias ? tail : nullptr, edge, kFloats);
    for (int i = 0; i < MI; ++i) copy(edge + i * kFloats, cols - j, y + i * ldy + j);
  }

  static void expand(const bf16* t, int64_t rows, const bf16* packed, int64_t r, float scale, const bf16* bias,
                     const Matrix& y, int64_t row) {
    constexpr int MI = 6;
    bf16* to = (bf16*)y.data + row * y.row_stride;
    int64_t i = 0;
    for (; i + MI <= rows; i += MI)
      expand_rows<MI>(t + i * t_pitch(r), r, packed, scale, bias, to + i * y.row_stride, y.row_stride, y.cols);
    for (; i < rows; ++i)
      expand_rows<1>(t + i * t_pitch(r), r, packed, scale, bias, to + i * y.row_stride, y.row_stride, y.cols);
  }

  // --- d (columns, r) = scale xᵀ t, columns [begin, end) of x ---------------------------------------------------------
  static constexpr int64_t kStrip = 256;  // columns of x that a thread takes at a time: their sums stay in the L1 cache
  static constexpr int64_t kBlock = 64;   // rows of x whose words are used before the sums go back to memory

  // x: words of NV vectors of columns, lines of kStrip; t: words of RB ranks, ldt apart; sums: RB lines of kStrip.
  template <int RB, int NV>
  static void outer_tile(const uint32_t* x, int64_t count, const uint32_t* t, int64_t ldt, float* sums) {
    vf acc[RB][NV] = {};
    for (int64_t s = 0; s < count; ++s) {
      vf v[NV];
#pragma GCC unroll 8
      for (int j = 0; j < NV; ++j) v[j] = loadu<vf>(x + s * kStrip + j * kFloats);
#pragma GCC unroll 8
      for (int i = 0; i < RB; ++i)
#pragma GCC unroll 8
        for (int j = 0; j < NV; ++j) acc[i][j] = multiply_add(acc[i][j], t[s * ldt + i], v[j]);
    }
#pragma GCC unroll 8
    for (int i = 0; i < RB; ++i)
#pragma GCC unroll 8
      for (int j = 0; j < NV; ++j) {
        float* to = sums + i * kStrip + j * kFloats;
        storeu(to, load(to) + acc[i][j]);
      }
  }

  // Rows [row, row + count) and columns [begin, end) of x, two rows to a word; zeros beyond them up to whole vectors.
  static void interleave(const Matrix& x, int64_t row, int64_t count, int64_t begin, int64_t end, uint32_t* words) {
    const bf16* from = (const bf16*)x.data + row * x.row_stride + begin;
    for (int64_t m = 0; m < count; m += 2, words += kStrip) {
      const bf16 *first = from + m * x.row_stride, *second = m + 1 < count ? first + x.row_stride : nullptr;
      for (int64_t j = 0; j < end - begin; j += kFloats) {
        const int64_t here = min<int64_t>(end - begin - j, kFloats);
        const __mmask16 mask = __mmask16((1u << here) - 1);
        const vu low = (vu)_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, first + j));
        const vu high = second ? (vu)_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, second + j)) : vu{};
        storeu(words + j, low | (high << 16));
      }
    }
  }

  static void outer(const Matrix& x, const bf16* packed, int64_t r, float scale, const Matrix& d, int64_t begin,
                    int64_t end) {
    constexpr int RB = 8, NV = 3;
    const int64_t width = round_up(end - begin, kFloats), ranks = round_up(r, RB);  // t is padded with zeros
    alignas(64) uint32_t words[kBlock / kDepth * kStrip];
    float sums[kMaxRank * kStrip];
    fill(sums, ranks * kStrip, 0.0f);
    for (int64_t row = 0; row < x.rows; row += kBlock) {
      const int64_t count = min(kBlock, x.rows - row), inner = steps(count);
      interleave(x, row, count, begin, end, words);
      for (int64_t i = 0; i < ranks; i += RB) {
        const uint32_t* t = (const uint32_t*)packed + row / kDepth * pitch(r) + i;
        int64_t j = 0;
        for (; j + NV * kFloats <= width; j += NV * kFloats)
          outer_tile<RB, NV>(words + j, inner, t, pitch(r), sums + i * kStrip + j);
        for (; j < width; j += kFloats) outer_tile<RB, 1>(words + j, inner, t, pitch(r), sums + i * kStrip + j);
      }
    }
    store_outer(sums, kStrip, scale, d, begin, end);
  }
};

}  // namespace
}  // namespace slao::SLAO_ISA
