// lora_linear's three loops for bf16 on AMX tiles, products and sums in fp32. lora_linear.cpp says what each computes
// and runs them on threads.
#pragma once
#include "amx.h"

#if defined(__AMX_BF16__)
namespace slao::SLAO_ISA {
namespace {

struct Tiles {
  static constexpr int64_t kRows = 64, kRowStep = 16, kColumnStep = 64, kMaxRank = 64;
  static constexpr int64_t kWork = 800000;
  static constexpr int64_t kTile = 512;  // elements of a tile

  static int64_t rank_tiles(int64_t r) { return (r + 15) / 16; }
  static int64_t steps(int64_t k) { return (k + 31) / 32; }
  static int64_t pitch(int64_t r) { return 16 * rank_tiles(r); }
  // A rank of at most 16 takes tiles of half the depth.
  static int64_t depth(int64_t r) { return r > 16 ? 32 : 16; }
  static int64_t t_pitch(int64_t r) { return depth(r) * steps(r); }
  static void finish() { tile_release(); }

  // --- packing --------------------------------------------------------------------
  static int64_t size(Role role, const Matrix& m) {
    if (role == Role::expand) return round_up(m.cols, 32) * t_pitch(m.rows);
    return steps(m.rows) * rank_tiles(m.cols) * kTile;
  }
  static void pack(Role role, const Matrix& m, int64_t piece, bf16* to) {
    __m512i v[16];
    if (role == Role::expand) {  // Q: per 16 columns, its steps
      const int64_t deep = depth(m.rows), inner = steps(m.rows);
      for (int64_t j = piece * kPiece / 16; j < min(round_up(m.cols, 32), (piece + 1) * kPiece) / 16; ++j)
        for (int64_t s = 0; s < inner; ++s) {
          pairs_of(m, s * 32, j * 16, v);
          for (int p = 0; p < deep / 2; ++p) storeu(to + (j * inner + s) * deep * 16 + p * 32, v[p]);
        }
      return;
    }
    const int64_t tiles = rank_tiles(m.cols);  // P and T: per step, its ranks
    for (int64_t s = piece * kPiece / 32; s < min(steps(m.rows), (piece + 1) * kPiece / 32); ++s)
      for (int64_t j = 0; j < tiles; ++j) {
        pairs_of(m, s * 32, j * 16, v);
        if (role == Role::outer) transpose16(v);  // into A's order: a row is a rank
        for (int p = 0; p < 16; ++p) storeu(to + (s * tiles + j) * kTile + p * 32, v[p]);
      }
  }

  // --- sums (rows, pitch) = x P ------------------------------------------------------------------------------------
  template <int MI, int RT>
  static void shrink_tiles(const bf16* x, int64_t ldx, int rows, int64_t k, const bf16* packed, float* sums) {
    each<MI * RT>([](auto c) { tile_zero<c>(); });
    auto step = [&](const bf16* from, int64_t ld, const bf16* p) {
      if constexpr (RT == 1) tile_load<6>(p, 64);
      each<MI>([&](auto i) {
        tile_load<4 + i % 2>(from + i * 16 * ld, ld * 2);
        each<RT>([&](auto j) {
          if constexpr (RT > 1) tile_load<6 + j % 2>(p + j * kTile, 64);
          tile_multiply_add<i * RT + j, 4 + i % 2, RT == 1 ? 6 : 6 + j % 2>();
        });
      });
    };
    int64_t s = 0;
    for (; s < k / 32; ++s) step(x + s * 32, ldx, packed + s * RT * kTile);
    if (k % 32) {
      alignas(64) bf16 edge[MI * 16 * 32];
      for (int i = 0; i < (MI - 1) * 16 + rows; ++i)
        storeu(edge + i * 32, _mm512_maskz_loadu_epi16(first(k % 32), x + i * ldx + s * 32));
      step(edge, 32, packed + s * RT * kTile);
    }
    each<MI>([&](auto i) {
      each<RT>([&](auto j) { tile_store<i * RT + j>(sums + i * 16 * RT * 16 + j * 16, RT * 64); });
    });
  }

  static void shrink(const Matrix& x, int64_t row, int64_t rows, const bf16* packed, int64_t r, float* sums) {
    with_constant(rank_tiles(r), [&](auto tiles) {
      constexpr int RT = decltype(tiles)::value, MI = RT == 1 ? 4 : RT == 2 ? 2 : 1;
      const bf16* from = (const bf16*)x.data + row * x.row_stride;
      int64_t i = 0;
      if (rows >= 16) tile_configure(16, 32);
      for (; i + 16 * MI <= rows; i += 16 * MI)
        shrink_tiles<MI, RT>(from + i * x.row_stride, x.row_stride, 16, x.cols, packed, sums + i * RT * 16);
      if constexpr (MI > 1)
        for (; i + 16 <= rows; i += 16)
          shrink_tiles<1, RT>(from + i * x.row_stride, x.row_stride, 16, x.cols, packed, sums + i * RT * 16);
      if (i == rows) return;
      tile_configure(int(rows - i), 32);
      shrink_tiles<1, RT>(from + i * x.row_stride, x.row_stride, int(rows - i), x.cols, packed, sums + i * RT * 16);
    });
  }

  // --- y (rows) = scale t Q + bias, t (rows, t_pitch(r)) without gaps ---------------------------------------------------
  // 32 columns: MI tiles of rows times two of columns into sums (16 MI, 32).
  template <int MI>
  static void expand_columns(const bf16* t, int64_t ldt, int64_t deep, int64_t inner, const bf16* q, float* sums) {
    each<MI * 2>([](auto c) { tile_zero<c>(); });
    for (int64_t s = 0; s < inner; ++s) {
      if (inner > 1) each<MI>([&](auto i) { tile_load<4 + i>(t + i * 16 * ldt + s * 32, ldt * 2); });
      tile_load<6>(q + s * deep * 16, 64);
      tile_load<7>(q + (inner + s) * deep * 16, 64);
      each<MI>([&](auto i) {
        tile_multiply_add<i * 2, 4 + i, 6>();
        tile_multiply_add<i * 2 + 1, 4 + i, 7>();
      });
    }
    each<MI>([&](auto i) {
      tile_store<i * 2>(sums + i * 512, 128);
      tile_store<i * 2 + 1>(sums + i * 512 + 16, 128);
    });
  }

  // y (rows, up to 32 columns) = scale sums + bias
  static void put_columns(const float* sums, int rows, float scale, const bf16* bias, bf16* y, int64_t ldy, int64_t cols) {
    const uint32_t mask = first(cols);
    const __m512 factor = _mm512_set1_ps(scale);
    __m512 low = _mm512_setzero_ps(), high = low;
    if (bias) {
      const __m512i b = _mm512_maskz_loadu_epi16(mask, bias);
      low = (__m512)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm512_castsi512_si256(b)), 16);
      high = (__m512)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm512_extracti64x4_epi64(b, 1)), 16);
    }
    for (int i = 0; i < rows; ++i) {
      __builtin_prefetch(y + i * ldy + 32, 1, 3);
      const __m512 even = _mm512_fmadd_ps(_mm512_load_ps(sums + i * 32), factor, low);
      const __m512 odd = _mm512_fmadd_ps(_mm512_load_ps(sums + i * 32 + 16), factor, high);
      const __m512i both = (__m512i)_mm512_cvtne2ps_pbh(odd, even);
      if (mask == ~0u)
        _mm512_storeu_si512(y + i * ldy, both);
      else
        _mm512_mask_storeu_epi16(y + i * ldy, mask, both);
    }
  }

  // All columns of MI tiles of rows, the last with `rows`. The tiles of the next columns are under way while sums are
  // read: a load that follows a tile's store at once waits until that has left the store buffer (35 µs against 24 at
  // 1024 x 384).
  template <int MI>
  static void expand_rows(const bf16* t, int rows, const bf16* packed, int64_t r, float scale, const bf16* bias, bf16* y,
                          int64_t ldy, int64_t cols) {
    const int64_t deep = depth(r), inner = steps(r), ldt = t_pitch(r), size = 2 * inner * deep * 16;
    alignas(64) float sums[2][MI * 16 * 32];
    if (inner == 1) each<MI>([&](auto i) { tile_load<4 + i>(t + i * 16 * ldt, ldt * 2); });
    expand_columns<MI>(t, ldt, deep, inner, packed, sums[0]);
    for (int64_t j = 0; j < cols; j += 32) {
      const int64_t next = j / 32 + 1;
      if (next * 32 < cols) expand_columns<MI>(t, ldt, deep, inner, packed + next * size, sums[next % 2]);
      put_columns(sums[j / 32 % 2], (MI - 1) * 16 + rows, scale, bias ? bias + j : nullptr, y + j, ldy, cols - j);
    }
  }

  static void expand(const bf16* t, int64_t rows, const bf16* packed, int64_t r, float scale, const bf16* bias,
                     const Matrix& y, int64_t row) {
    const int64_t ldt = t_pitch(r), ldy = y.row_stride;
    bf16* to = (bf16*)y.data + row * ldy;
    int64_t i = 0;
    if (rows >= 16) tile_configure(16, int(depth(r)));
    for (; i + 32 <= rows; i += 32) expand_rows<2>(t + i * ldt, 16, packed, r, scale, bias, to + i * ldy, ldy, y.cols);
    for (; i + 16 <= rows; i += 16) expand_rows<1>(t + i * ldt, 16, packed, r, scale, bias, to + i * ldy, ldy, y.cols);
    if (i == rows) return;
    tile_configure(int(rows - i), int(depth(r)));
    expand_rows<1>(t + i * ldt, int(rows - i), packed, r, scale, bias, to + i * ldy, ldy, y.cols);
  }

  // --- d (columns, r) = scale xᵀ t, columns [begin, end) of x ---------------------------------------------------------
  static constexpr int64_t kStrip = 512;  // columns of x that a thread takes at a time
  static constexpr int64_t kBlock = 128;  // rows of x whose products stay in tiles

  // Columns [begin, begin + 16 NJ) of x, whose sums are tiles: NJ of them, the next ranks' kSumTiles further on. Of every
  // 32 columns, 0-3, 8-11, 16-19 and 24-27 lie in one tile, the others in the next.
  static constexpr int64_t kSumTiles = kStrip / 16;

  template <int NJ>
  static void outer_block(const Matrix& x, int64_t row, int64_t count, int64_t begin, int64_t end, const bf16* t,
                          int64_t tiles, bf16* pairs, float* sums) {
    const bf16* from = (const bf16*)x.data + row * x.row_stride + begin;
    const int64_t inner = steps(count);
    for (int64_t m = 0; m < inner * 32; m += 2)
      for (int half = 0; half < NJ / 2; ++half) {
        const bf16* at = from + m * x.row_stride + half * 32;
        const uint32_t mask = first(end - begin - half * 32);
        const __m512i a = m < count ? _mm512_maskz_loadu_epi16(mask, at) : __m512i{};
        const __m512i b = m + 1 < count ? _mm512_maskz_loadu_epi16(mask, at + x.row_stride) : __m512i{};
        // The rows of the next block: their lines lie far apart, which no prefetcher of the processor follows.
        __builtin_prefetch(at + 64, 0, 3);
        __builtin_prefetch(at + x.row_stride + 64, 0, 3);
        bf16* to = pairs + (m / 32 * NJ + half * 2) * kTile + m % 32 * 16;
        storeu(to, _mm512_unpacklo_epi16(a, b));
        storeu(to + kTile, _mm512_unpackhi_epi16(a, b));
      }
    for (int64_t i = 0; i < tiles; ++i) {
      float* to = sums + i * kSumTiles * 256;
      each<NJ>([&](auto j) {
        if (row)
          tile_load<j>(to + j * 256, 64);
        else
          tile_zero<j>();
      });
      for (int64_t s = 0; s < inner; ++s) {
        tile_load<4>(t + (s * tiles + i) * kTile, 64);
        each<NJ>([&](auto j) {
          tile_load<6 + j % 2>(pairs + (s * NJ + j) * kTile, 64);
          tile_multiply_add<j, 4, 6 + j % 2>();
        });
      }
      each<NJ>([&](auto j) { tile_store<j>(to + j * 256, 64); });
    }
  }

  static void outer(const Matrix& x, const bf16* packed, int64_t r, float scale, const Matrix& d, int64_t begin,
                    int64_t end) {
    alignas(64) bf16 pairs[kBlock / 32 * 4 * kTile];
    alignas(64) float sums[kMaxRank * kStrip];
    const int64_t tiles = rank_tiles(r);
    if (x.rows == 0) fill(sums, kMaxRank * kStrip, 0.0f);
    tile_configure(16, 32);
    for (int64_t row = 0; row < x.rows; row += kBlock) {
      const int64_t count = min(kBlock, x.rows - row);
      const bf16* t = packed + row / 32 * tiles * kTile;
      for (int64_t j = begin; j < end; j += 64)
        if (end - j > 32)
          outer_block<4>(x, row, count, j, end, t, tiles, pairs, sums + (j - begin) * 16);
        else
          outer_block<2>(x, row, count, j, end, t, tiles, pairs, sums + (j - begin) * 16);
    }
    const __m512i low = _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
    const __m512i high = _mm512_add_epi32(low, _mm512_set1_epi32(8));
    for (int64_t j = 0; j < end - begin; j += 32) {
      alignas(64) float lines[kMaxRank * 32];
      for (int64_t i = 0; i < r; ++i) {
        const float* at = sums + (i / 16 * kSumTiles + j / 16) * 256 + i % 16 * 16;
        const __m512 a = _mm512_load_ps(at), b = _mm512_load_ps(at + 256);
        _mm512_store_ps(lines + i * 32, _mm512_permutex2var_ps(a, low, b));
        _mm512_store_ps(lines + i * 32 + 16, _mm512_permutex2var_ps(a, high, b));
      }
      store_outer(lines, 32, scale, d, begin + j, min(begin + j + 32, end));
    }
  }
};

}  // namespace
}  // namespace slao::SLAO_ISA
#endif
