// lora_linear's three loops on vector registers, fp32 or bf16 (two at a time through VDPBF16PS). lora_linear.cpp says
// what each computes and runs them on threads.
#pragma once
#include "pack.h"

namespace slao::SLAO_ISA {
namespace {

template <typename F> inline void with_vectors(int64_t r, F&& f) {
  switch ((r + kFloats - 1) / kFloats) {
    case 1: return f(std::integral_constant<int, 1>{});
    case 2: return f(std::integral_constant<int, 2>{});
    case 3: return f(std::integral_constant<int, 3>{});
    default: return f(std::integral_constant<int, 4>{});
  }
}

constexpr bool kWide = kBytes == 64;  // 32 vector registers, else 16

template <typename T> struct Vectors {
  using Element = T;
  using S = Step<T>;
  using Word = typename S::Word;
  static constexpr int64_t depth = S::depth;
  static constexpr int64_t kRows = 48;  // a multiple of every number of rows that is multiplied in registers
  static constexpr int64_t kRowStep = 12;
  static constexpr int64_t kMaxRank = 4 * kFloats;
  static constexpr int64_t kColumnStep = 16;
  static constexpr int64_t kWork = 30000 * kFloats * depth;

  // --- packing: steps of the inner dimension, the outer one padded to whole vectors -----------------------------------
  // Of Q in blocks of kColumns, one after the other: rows of a power of two would all fall on the same lines of the cache.
  static constexpr int64_t kColumns = (kWide ? 4 : 2) * kFloats;

  static int64_t pitch(int64_t r) { return round_up(r, kFloats); }
  static int64_t steps(int64_t k) { return (k + depth - 1) / depth; }
  static int64_t size(Role role, int64_t k, int64_t n) {
    return steps(k) * round_up(n, role == Role::expand ? kColumns : kFloats) * depth;
  }
  static int64_t pieces(Role role, int64_t k, int64_t n) {
    return role == Role::expand ? (n + 4 * kColumns - 1) / (4 * kColumns) : (steps(k) + 63) / 64;
  }
  static const T* as_is(Role role, const Matrix& m) {
    const bool whole = m.col_stride == 1 && m.row_stride == m.cols && m.cols % kFloats == 0;
    return depth == 1 && role != Role::expand && whole ? (const T*)m.data : nullptr;
  }
  static void pack(Role role, const Matrix& m, int64_t piece, T* to) {
    const int64_t inner = steps(m.rows);
    if (role != Role::expand) return pack_steps(m, pitch(m.cols), piece * 64, std::min(inner, piece * 64 + 64), to);
    for (int64_t j = piece * 4 * kColumns; j < std::min(m.cols, (piece + 1) * 4 * kColumns); j += kColumns) {
      Matrix block = m;
      block.data += j * m.col_stride * int64_t(sizeof(T));
      block.cols = std::min(kColumns, m.cols - j);
      pack_steps(block, kColumns, 0, inner, to + j * inner * depth);
    }
  }
  static Matrix source(const Matrix& m, Scratch<T>& narrow) { return converted<T>(m, narrow); }
  static void finish() {}

  // --- sums (rows, pitch) = x P ------------------------------------------------------------------------------------
  template <int MI, int RV> static void shrink_tile(const T* x, int64_t ldx, int64_t k, const T* packed, float* sums) {
    const int64_t whole = k / depth;
    // A pointer to every fourth row, which the compiler must not take apart: with one for each of twelve it runs out
    // of registers.
    const T* row[(MI + 3) / 4];
#pragma GCC unroll 4
    for (int i = 0; i < (MI + 3) / 4; ++i) {
      row[i] = x + i * 4 * ldx;
      asm("" : "+r"(row[i]));
    }
    vf total[MI][RV] = {};
    for (int64_t block = 0; block < whole; block += kSums) {
      vf acc[MI][RV] = {};
      const int64_t end = std::min(block + kSums, whole);
      for (int64_t s = block; s < end; ++s) {
        vf p[RV];
#pragma GCC unroll 8
        for (int j = 0; j < RV; ++j) p[j] = loadu<vf>(packed + (s * RV + j) * kFloats * depth);
#pragma GCC unroll 16
        for (int i = 0; i < MI; ++i) {
          const Word w = word<Word>(row[i / 4] + i % 4 * ldx);
#pragma GCC unroll 8
          for (int j = 0; j < RV; ++j) acc[i][j] = S::multiply_add(acc[i][j], w, p[j]);
        }
#pragma GCC unroll 4
        for (int i = 0; i < (MI + 3) / 4; ++i) row[i] += depth;
      }
#pragma GCC unroll 16
      for (int i = 0; i < MI; ++i)
#pragma GCC unroll 8
        for (int j = 0; j < RV; ++j) total[i][j] += acc[i][j];
    }
    if constexpr (depth == 2)
      if (k % 2)  // the last of an odd number has no partner
        for (int i = 0; i < MI; ++i)
          for (int j = 0; j < RV; ++j)
            total[i][j] = S::multiply_add(total[i][j], x[i * ldx + k - 1].bits,
                                          loadu<vf>(packed + (whole * RV + j) * kFloats * depth));
    for (int i = 0; i < MI; ++i)
      for (int j = 0; j < RV; ++j) storeu(sums + (i * RV + j) * kFloats, total[i][j]);
  }

  static void shrink(const Matrix& x, int64_t row, int64_t rows, const T* packed, int64_t r, float* sums) {
    with_vectors(r, [&](auto vectors) {
      constexpr int RV = decltype(vectors)::value;
      constexpr int MI = std::min(kWide ? 24 / RV : 12 / RV, 12);
      const T* from = (const T*)x.data + row * x.row_stride;
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
  static void expand_tile(const T* t, int64_t ldt, int64_t inner, const T* packed, float scale, const T* bias, T* y,
                          int64_t ldy) {
    vf acc[MI][NV] = {};
    for (int64_t s = 0; s < inner; ++s) {
      vf q[NV];
#pragma GCC unroll 8
      for (int j = 0; j < NV; ++j) q[j] = loadu<vf>(packed + (s * kColumns + j * kFloats) * depth);
#pragma GCC unroll 8
      for (int i = 0; i < MI; ++i) {
        const Word w = word<Word>(t + i * ldt + s * depth);
#pragma GCC unroll 8
        for (int j = 0; j < NV; ++j) acc[i][j] = S::multiply_add(acc[i][j], w, q[j]);
      }
    }
#pragma GCC unroll 8
    for (int j = 0; j < NV; ++j) {
      const vf shift = bias ? load(bias + j * kFloats) : vf{};
#pragma GCC unroll 8
      for (int i = 0; i < MI; ++i) S::put(y + i * ldy + j * kFloats, shift + splat(scale) * acc[i][j]);
    }
  }

  template <int MI>
  static void expand_rows(const T* t, int64_t ldt, int64_t r, const T* packed, float scale, const T* bias, T* y,
                          int64_t ldy, int64_t cols) {
    const int64_t inner = steps(r);
    int64_t j = 0;
    for (; j + kColumns <= cols; j += kColumns)
      expand_tile<MI, kColumns / kFloats>(t, ldt, inner, packed + j * inner * depth, scale, bias ? bias + j : nullptr,
                                          y + j, ldy);
    const T* last = packed + j * inner * depth;
    for (; j + kFloats <= cols; j += kFloats, last += kFloats * depth)
      expand_tile<MI, 1>(t, ldt, inner, last, scale, bias ? bias + j : nullptr, y + j, ldy);
    if (j == cols) return;
    T edge[MI * kFloats], tail[kFloats] = {};  // the last columns, fewer than a vector
    if (bias) std::copy(bias + j, bias + cols, tail);
    expand_tile<MI, 1>(t, ldt, inner, last, scale, bias ? tail : nullptr, edge, kFloats);
    for (int i = 0; i < MI; ++i) std::copy(edge + i * kFloats, edge + i * kFloats + (cols - j), y + i * ldy + j);
  }

  static void expand(const T* t, int64_t rows, const T* packed, int64_t r, float scale, const T* bias, const Matrix& y,
                     int64_t row) {
    constexpr int MI = kWide ? 6 : 4;
    const int64_t ldt = t_pitch(r);
    T* to = (T*)y.data + row * y.row_stride;
    int64_t i = 0;
    for (; i + MI <= rows; i += MI)
      expand_rows<MI>(t + i * ldt, ldt, r, packed, scale, bias, to + i * y.row_stride, y.row_stride, y.cols);
    for (; i < rows; ++i)
      expand_rows<1>(t + i * ldt, ldt, r, packed, scale, bias, to + i * y.row_stride, y.row_stride, y.cols);
  }

  // --- d (columns, r) = scale xᵀ t, columns [begin, end) of x ---------------------------------------------------------
  static constexpr int64_t kStrip = 256;  // columns of x that a thread takes at a time: their sums stay in the L1 cache
  static constexpr int64_t kBlock = 64;   // rows of x whose words are used before the sums go back to memory

  // x: words of NV vectors of columns, ldx words apart; t: words of RB ranks, ldt apart; sums: RB lines of kStrip.
  // ahead: x's rows that come next, or null: their lines lie far apart, which no prefetcher of a processor follows.
  template <int RB, int NV>
  static void outer_tile(const Word* x, int64_t ldx, int64_t count, const Word* t, int64_t ldt, float* sums,
                         const Word* ahead) {
    vf acc[RB][NV] = {};
    for (int64_t s = 0; s < count; ++s) {
      if (ahead)
#pragma GCC unroll 8
        for (int j = 0; j < NV; ++j) __builtin_prefetch(ahead + s * ldx + j * kFloats, 0, 2);
      vf v[NV];
#pragma GCC unroll 8
      for (int j = 0; j < NV; ++j) v[j] = loadu<vf>(x + s * ldx + j * kFloats);
#pragma GCC unroll 8
      for (int i = 0; i < RB; ++i)
#pragma GCC unroll 8
        for (int j = 0; j < NV; ++j) acc[i][j] = S::multiply_add(acc[i][j], t[s * ldt + i], v[j]);
    }
#pragma GCC unroll 8
    for (int i = 0; i < RB; ++i)
#pragma GCC unroll 8
      for (int j = 0; j < NV; ++j) {
        float* to = sums + i * kStrip + j * kFloats;
        storeu(to, load(to) + acc[i][j]);
      }
  }

  // Rows [row, row + count) and columns [begin, end) of x as words where they lie, or interleaved in `buffer`; the last
  // columns, fewer than a vector, always there and padded with zeros.
  struct Words {
    const Word *body, *tail;
    int64_t ld;
    alignas(64) Word buffer[depth == 1 ? 1 : kBlock / 2 * kStrip], edge[kBlock / depth * kFloats];

    void take(const Matrix& x, int64_t row, int64_t count, int64_t begin, int64_t end) {
      const int64_t whole = (end - begin) / kFloats * kFloats;
      const T* from = (const T*)x.data + row * x.row_stride + begin;
      tail = edge;
      if constexpr (depth == 1) {
        body = from, ld = x.row_stride;
        for (int64_t m = 0; m < count && begin + whole < end; ++m)
          for (int64_t j = 0; j < kFloats; ++j)
            edge[m * kFloats + j] = begin + whole + j < end ? from[m * x.row_stride + whole + j] : 0.0f;
      } else {
#if defined(__AVX512BF16__)
        body = buffer, ld = kStrip;
        for (int64_t m = 0; m < count; m += 2) {
          const bool two = m + 1 < count;
          const T *first = from + m * x.row_stride, *second = two ? first + x.row_stride : first;
          for (int64_t j = 0; j < whole; j += kFloats) {
            const vu low = (vu)_mm512_cvtepu16_epi32(loadu<__m256i>(first + j));
            const vu high = (vu)_mm512_cvtepu16_epi32(loadu<__m256i>(second + j));
            storeu(buffer + m / 2 * kStrip + j, two ? low | (high << 16) : low);
          }
          for (int64_t j = 0; j < kFloats && begin + whole < end; ++j) {
            const bool here = begin + whole + j < end;
            edge[m / 2 * kFloats + j] = here ? pair_of(first[whole + j], two ? second[whole + j] : T{}) : 0u;
          }
        }
#endif
      }
    }
  };

  static void outer(const Matrix& x, const T* packed, int64_t r, float scale, const Matrix* d, int parts, int64_t begin,
                    int64_t end) {
    constexpr int RB = kWide ? 8 : 4, NV = 3;
    const int64_t ldt = pitch(r), width = end - begin, whole = width / kFloats * kFloats;
    const int64_t ranks = round_up(r, RB);  // t is padded with zeros
    float sums[kMaxRank * kStrip];
    std::fill(sums, sums + ranks * kStrip, 0.0f);
    Words words;
    for (int64_t row = 0; row < x.rows; row += kBlock) {
      const int64_t count = std::min(kBlock, x.rows - row), inner = steps(count);
      words.take(x, row, count, begin, end);
      const Word* t = (const Word*)packed + row / depth * ldt;
      auto columns = [&](int64_t i) {
        const Word* ahead = depth == 1 && i == 0 ? words.body + NV * kFloats : nullptr;
        int64_t j = 0;
        for (; j + NV * kFloats <= whole; j += NV * kFloats)
          outer_tile<RB, NV>(words.body + j, words.ld, inner, t + i, ldt, sums + i * kStrip + j, ahead ? ahead + j : nullptr);
        for (; j < whole; j += kFloats)
          outer_tile<RB, 1>(words.body + j, words.ld, inner, t + i, ldt, sums + i * kStrip + j, ahead ? ahead + j : nullptr);
        if (j < width) outer_tile<RB, 1>(words.tail, kFloats, inner, t + i, ldt, sums + i * kStrip + j, nullptr);
      };
      for (int64_t i = 0; i < ranks; i += RB) columns(i);
    }
    store_outer(sums, kStrip, scale, d, parts, begin, end);
  }
};

}  // namespace
}  // namespace slao::SLAO_ISA
