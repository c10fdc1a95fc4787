// lora_linear's rank-r products, for layers so small that a call of a GEMM library costs more than the arithmetic.
//
// Three loops, each parallel without partial sums, so that the answer does not depend on the threads:
//   shrink  T (M, R) = s X P      rows of X; P (K, R) packed with a row's R values side by side
//   expand  Y (M, N) = s T Q + b  rows of Y; Q (R, N) packed
//   outer   D (N, R) = s Xᵀ T     columns of X
// X and Y are fp32 or bf16 with unit column stride. bf16 goes two at a time through VDPBF16PS (namespace avx512bf16
// only): products and sums in fp32 either way.
#include <algorithm>
#include <type_traits>

#include "isa.h"
#include "rows.h"

namespace slao::SLAO_ISA {
namespace {

// Rows are multiplied in registers: kMax vectors of R, as many rows as leave some registers free.
constexpr int kMax = 4;
constexpr int rows_at_once(int vectors) { return (kBytes == 64 ? 20 : 10) / vectors > 8 ? 8 : (kBytes == 64 ? 20 : 10) / vectors; }

// Products that are added one after another before their sum joins the total: what keeps long fp32 sums accurate.
constexpr int64_t kSums = 64;

// A step of k: one fp32 value, or two bf16 ones as one 32-bit word.
template <typename T> struct Step;
template <> struct Step<float> {
  static constexpr int64_t depth = 1;
  using Word = float;
  static vf multiply_add(vf sum, Word x, vf packed) { return sum + splat(x) * packed; }
  static void put(float* to, vf value) { storeu(to, value); }
};
#if defined(__AVX512BF16__)
template <> struct Step<bf16> {
  static constexpr int64_t depth = 2;
  using Word = uint32_t;
  static vf multiply_add(vf sum, Word x, vf packed) {
    return (vf)_mm512_dpbf16_ps((__m512)sum, (__m512bh)_mm512_set1_epi32(int(x)), (__m512bh)packed);
  }
  // As VDPBF16PS itself, this takes denormals for zero.
  static void put(bf16* to, vf value) { storeu(to, (__m256i)_mm512_cvtneps_pbh((__m512)value)); }
};
#endif

template <typename Word> Word word(const void* p) {
  Word w;
  std::memcpy(&w, p, sizeof w);
  return w;
}

int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

template <typename T> T cast(float x) {
  if constexpr (std::is_same<T, float>::value)
    return x;
  else
    return to_bf16(x);
}

// m (k, n) -> steps of k, each `pitch` words of n, padded with zeros. Returns where they are: m itself if it is so laid
// out already.
template <typename T> const T* pack(const Matrix& m, int64_t pitch, Scratch<T>& to) {
  constexpr int64_t depth = Step<T>::depth;
  using Word = typename Step<T>::Word;
  const T* from = (const T*)m.data;
  if (depth == 1 && m.col_stride == 1 && m.row_stride == pitch && m.cols == pitch) return from;
  const int64_t steps = round_up(m.rows, depth) / depth;
  if (int64_t(to.size()) < steps * pitch * depth) to.resize(steps * pitch * depth);
  Word* words = (Word*)to.data();
  if (m.row_stride == 1 && m.rows % depth == 0) {  // k runs along memory: words change places, in blocks of lines
    for (int64_t k = 0; k < steps; k += 16)
      for (int64_t j = 0; j < pitch; ++j)
        for (int64_t a = k; a < std::min(k + 16, steps); ++a)
          words[a * pitch + j] = j < m.cols ? word<Word>(from + j * m.col_stride + a * depth) : Word(0);
    return to.data();
  }
  for (int64_t k = 0; k < steps; ++k) {
    Word* line = words + k * pitch;
    const T* first = from + k * depth * m.row_stride;
    if constexpr (depth == 1) {
      for (int64_t j = 0; j < m.cols; ++j) line[j] = first[j * m.col_stride];
    } else {
      const bool two = k * depth + 1 < m.rows;
      const T* second = two ? first + m.row_stride : first;
      const uint32_t mask = two ? 0xffffu : 0u;
      for (int64_t j = 0; j < m.cols; ++j)
        line[j] = first[j * m.col_stride].bits | (second[j * m.col_stride].bits & mask) << 16;
    }
    for (int64_t j = m.cols; j < pitch; ++j) line[j] = Word(0);
  }
  return to.data();
}

// --- T = s X P -----------------------------------------------------------------------------------------------------

template <int MI, int RV, typename T>
void shrink_tile(const T* x, int64_t ldx, int64_t steps, const T* packed, float scale, int64_t r, T* t, int64_t ldt) {
  using S = Step<T>;
  using Word = typename S::Word;
  vf total[MI][RV] = {};
  for (int64_t block = 0; block < steps; block += kSums) {
    vf sums[MI][RV] = {};
    for (int64_t k = block; k < std::min(block + kSums, steps); ++k) {
      vf p[RV];
#pragma GCC unroll 8
      for (int j = 0; j < RV; ++j) p[j] = loadu<vf>(packed + (k * RV + j) * kFloats * S::depth);
#pragma GCC unroll 8
      for (int i = 0; i < MI; ++i) {
        const Word w = word<Word>(x + i * ldx + k * S::depth);
#pragma GCC unroll 8
        for (int j = 0; j < RV; ++j) sums[i][j] = S::multiply_add(sums[i][j], w, p[j]);
      }
    }
#pragma GCC unroll 8
    for (int i = 0; i < MI; ++i)
#pragma GCC unroll 8
      for (int j = 0; j < RV; ++j) total[i][j] += sums[i][j];
  }
  for (int i = 0; i < MI; ++i) {
    float row[RV * kFloats];
    for (int j = 0; j < RV; ++j) storeu(row + j * kFloats, splat(scale) * total[i][j]);
    for (int64_t j = 0; j < r; ++j) t[i * ldt + j] = cast<T>(row[j]);
  }
}

template <int RV, typename T>
void shrink(const Matrix& x, const T* packed, float scale, const Matrix& t, int64_t begin, int64_t end) {
  constexpr int MI = rows_at_once(RV);
  const int64_t steps = x.cols / Step<T>::depth;
  const T* from = (const T*)x.data;
  T* to = (T*)t.data;
  int64_t i = begin;
  for (; i + MI <= end; i += MI)
    shrink_tile<MI, RV>(from + i * x.row_stride, x.row_stride, steps, packed, scale, t.cols, to + i * t.row_stride, t.row_stride);
  for (; i < end; ++i)
    shrink_tile<1, RV>(from + i * x.row_stride, x.row_stride, steps, packed, scale, t.cols, to + i * t.row_stride, t.row_stride);
}

// --- Y = s T Q + b -------------------------------------------------------------------------------------------------

// t: MI rows of `steps` words each. Columns [0, NV vectors) of y from `packed` and bias.
template <int MI, int NV, typename T>
void expand_tile(const T* t, int64_t steps, const T* packed, int64_t pitch, float scale, const T* bias, T* y, int64_t ldy) {
  using S = Step<T>;
  using Word = typename S::Word;
  vf sums[MI][NV] = {};
  for (int64_t k = 0; k < steps; ++k) {
    vf q[NV];
#pragma GCC unroll 8
    for (int j = 0; j < NV; ++j) q[j] = loadu<vf>(packed + (k * pitch + j * kFloats) * S::depth);
#pragma GCC unroll 8
    for (int i = 0; i < MI; ++i) {
      const Word w = word<Word>(t + (i * steps + k) * S::depth);
#pragma GCC unroll 8
      for (int j = 0; j < NV; ++j) sums[i][j] = S::multiply_add(sums[i][j], w, q[j]);
    }
  }
#pragma GCC unroll 8
  for (int j = 0; j < NV; ++j) {
    const vf shift = bias ? load(bias + j * kFloats) : vf{};
#pragma GCC unroll 8
    for (int i = 0; i < MI; ++i) Step<T>::put(y + i * ldy + j * kFloats, shift + splat(scale) * sums[i][j]);
  }
}

template <int MI, typename T>
void expand_rows(const T* t, int64_t steps, const T* packed, int64_t pitch, float scale, const T* bias, T* y, int64_t ldy, int64_t cols) {
  constexpr int NV = kBytes == 64 ? 4 : 2;
  constexpr int64_t depth = Step<T>::depth;
  int64_t j = 0;
  for (; j + NV * kFloats <= cols; j += NV * kFloats)
    expand_tile<MI, NV>(t, steps, packed + j * depth, pitch, scale, bias ? bias + j : nullptr, y + j, ldy);
  for (; j + kFloats <= cols; j += kFloats)
    expand_tile<MI, 1>(t, steps, packed + j * depth, pitch, scale, bias ? bias + j : nullptr, y + j, ldy);
  if (j == cols) return;
  T edge[MI * kFloats], tail[kFloats] = {};  // the last columns, fewer than a vector
  if (bias) std::copy(bias + j, bias + cols, tail);
  expand_tile<MI, 1>(t, steps, packed + j * depth, pitch, scale, bias ? tail : nullptr, edge, kFloats);
  for (int i = 0; i < MI; ++i) std::copy(edge + i * kFloats, edge + i * kFloats + (cols - j), y + i * ldy + j);
}

template <typename T>
void expand(const Matrix& t, const T* packed, int64_t pitch, float scale, const T* bias, const Matrix& y, int64_t begin, int64_t end) {
  constexpr int MI = kBytes == 64 ? 4 : 3;
  constexpr int64_t depth = Step<T>::depth;
  const int64_t steps = (t.cols + depth - 1) / depth;
  T rows[MI * kMax * 16 * 2] = {};  // t's rows without gaps, padded to whole steps
  for (int64_t i = begin; i < end;) {
    const int64_t count = std::min<int64_t>(MI, end - i);
    for (int64_t a = 0; a < count; ++a)
      for (int64_t k = 0; k < t.cols; ++k) rows[a * steps * depth + k] = ((const T*)t.data)[(i + a) * t.row_stride + k];
    T* to = (T*)y.data + i * y.row_stride;
    if (count == MI)
      expand_rows<MI>(rows, steps, packed, pitch, scale, bias, to, y.row_stride, y.cols);
    else
      for (int64_t a = 0; a < count; ++a)
        expand_rows<1>(rows + a * steps * depth, steps, packed, pitch, scale, bias, to + a * y.row_stride, y.row_stride, y.cols);
    i += count;
  }
}

// --- D = s Xᵀ T ----------------------------------------------------------------------------------------------------

constexpr int64_t kBlock = 32;    // rows of X whose words are used before the sums go back to memory
constexpr int64_t kStrip = 256;   // columns of X that a thread takes at a time: their sums stay in the L1 cache

// x: words of `count` columns of each step, `ldx` words apart; packed: T's steps; sums (columns, RV vectors).
template <int NI, int RV, typename T>
void outer_tile(const typename Step<T>::Word* x, int64_t ldx, int64_t steps, const T* packed, vf* sums) {
  using S = Step<T>;
  vf acc[NI][RV] = {};
  for (int64_t m = 0; m < steps; ++m) {
    vf p[RV];
#pragma GCC unroll 8
    for (int j = 0; j < RV; ++j) p[j] = loadu<vf>(packed + (m * RV + j) * kFloats * S::depth);
#pragma GCC unroll 16
    for (int i = 0; i < NI; ++i)
#pragma GCC unroll 8
      for (int j = 0; j < RV; ++j) acc[i][j] = S::multiply_add(acc[i][j], x[m * ldx + i], p[j]);
  }
#pragma GCC unroll 16
  for (int i = 0; i < NI; ++i)
#pragma GCC unroll 8
    for (int j = 0; j < RV; ++j) sums[i * RV + j] += acc[i][j];
}

// Rows [row, row + count) of X, columns [begin, end), as words: fp32 where it lies; bf16 pairs of rows, interleaved.
template <typename T> struct Words;
template <> struct Words<float> {
  int64_t ld;
  const float* operator()(const Matrix& x, int64_t row, int64_t, int64_t begin, int64_t) {
    ld = x.row_stride;
    return (const float*)x.data + row * x.row_stride + begin;
  }
};
#if defined(__AVX512BF16__)
template <> struct Words<bf16> {
  static constexpr int64_t ld = kStrip;
  uint32_t buffer[kBlock / 2 * kStrip];
  const uint32_t* operator()(const Matrix& x, int64_t row, int64_t count, int64_t begin, int64_t end) {
    for (int64_t m = 0; m < count; m += 2) {
      const bf16* first = (const bf16*)x.data + (row + m) * x.row_stride;
      const bf16* second = first + x.row_stride;
      uint32_t* to = buffer + m / 2 * kStrip;
      int64_t j = begin;
      if (m + 1 < count)
        for (; j + kFloats <= end; j += kFloats) {
          const vu low = (vu)_mm512_cvtepu16_epi32(loadu<__m256i>(first + j));
          const vu high = (vu)_mm512_cvtepu16_epi32(loadu<__m256i>(second + j));
          storeu(to + j - begin, low | (high << 16));
        }
      for (; j < end; ++j)
        to[j - begin] = first[j].bits | (m + 1 < count ? uint32_t(second[j].bits) << 16 : 0u);
    }
    return buffer;
  }
};
#endif

template <int RV, typename T>
void outer(const Matrix& x, const T* packed, float scale, const Matrix& d, int64_t begin, int64_t end) {
  constexpr int NI = rows_at_once(RV);
  constexpr int64_t depth = Step<T>::depth;
  vf sums[kStrip * RV] = {};
  Words<T> words;
  for (int64_t row = 0; row < x.rows; row += kBlock) {
    const int64_t count = std::min(kBlock, x.rows - row), steps = (count + depth - 1) / depth;
    const auto* w = words(x, row, count, begin, end);
    const T* p = packed + row / depth * depth * RV * kFloats;
    int64_t j = 0;
    for (; j + NI <= end - begin; j += NI) outer_tile<NI, RV>(w + j, words.ld, steps, p, sums + j * RV);
    for (; j < end - begin; ++j) outer_tile<1, RV>(w + j, words.ld, steps, p, sums + j * RV);
  }
  T* to = (T*)d.data;
  for (int64_t j = begin; j < end; ++j) {
    float row[RV * kFloats];
    for (int v = 0; v < RV; ++v) storeu(row + v * kFloats, splat(scale) * sums[(j - begin) * RV + v]);
    for (int64_t k = 0; k < d.cols; ++k) to[j * d.row_stride + k * d.col_stride] = cast<T>(row[k]);
  }
}

// --- by rank, dtype and threads ----------------------------------------------------------------------------------

template <typename F> void with_vectors(int64_t r, F&& f) {
  switch ((r + kFloats - 1) / kFloats) {
    case 1: return f(std::integral_constant<int, 1>{});
    case 2: return f(std::integral_constant<int, 2>{});
    case 3: return f(std::integral_constant<int, 3>{});
    default: return f(std::integral_constant<int, 4>{});
  }
}

// Threads worth waking for so many vector multiply-adds: about 10 µs of work each.
int enough(int64_t work, int threads) { return int(std::max<int64_t>(1, std::min<int64_t>(threads, work / 30000))); }

template <typename T> Scratch<T>& scratch() {
  static thread_local Scratch<T> buffer;
  return buffer;
}

template <typename T> void run_shrink(const Matrix& x, const Matrix& P, const Matrix& t, float scale, int threads) {
  with_vectors(t.cols, [&](auto vectors) {
    constexpr int RV = decltype(vectors)::value;
    const T* p = pack(P, RV * kFloats, scratch<T>());
    const int team = enough(x.rows * x.cols / Step<T>::depth * RV, threads);
    const int64_t step = round_up((x.rows + team - 1) / team, 8);
#pragma omp parallel for num_threads(team) if (team > 1)
    for (int64_t i = 0; i < x.rows; i += step) shrink<RV>(x, p, scale, t, i, std::min(i + step, x.rows));
  });
}

template <typename T>
void run_expand(const Matrix& t, const Matrix& Q, const Matrix& y, const T* bias, float scale, int threads) {
  const int64_t pitch = round_up(y.cols, kFloats);
  const T* q = pack(Q, pitch, scratch<T>());
  const int team = enough(y.rows * pitch / kFloats * t.cols / Step<T>::depth, threads);
  const int64_t step = round_up((y.rows + team - 1) / team, 4);
#pragma omp parallel for num_threads(team) if (team > 1)
  for (int64_t i = 0; i < y.rows; i += step) expand(t, q, pitch, scale, bias, y, i, std::min(i + step, y.rows));
}

template <typename T> void run_outer(const Matrix& x, const Matrix& t, const Matrix& d, float scale, int threads) {
  with_vectors(t.cols, [&](auto vectors) {
    constexpr int RV = decltype(vectors)::value;
    const T* p = pack(t, RV * kFloats, scratch<T>());
    const int team = enough(x.rows * x.cols / Step<T>::depth * RV, threads);
    const int64_t step = std::min(kStrip, round_up((x.cols + team - 1) / team, 8));
#pragma omp parallel for num_threads(team) if (team > 1) schedule(dynamic, 1)
    for (int64_t j = 0; j < x.cols; j += step) outer<RV>(x, p, scale, d, j, std::min(j + step, x.cols));
  });
}

}  // namespace

bool lora_has(Dtype dtype) {
#if defined(__AVX512BF16__)
  if (dtype == Dtype::bf16) return true;
#endif
  return dtype == Dtype::f32;
}

// One call with the C++ type of the dtype, which is one that lora_has() has.
template <typename F> void with_lora_type(Dtype dtype, F&& f) {
#if defined(__AVX512BF16__)
  if (dtype == Dtype::bf16) return f(bf16{});
#endif
  if (dtype == Dtype::f32) f(float{});
}

void lora_shrink(const Matrix& x, const Matrix& P, const Matrix& t, float scale, int threads) {
  with_lora_type(x.dtype, [&](auto d) { run_shrink<decltype(d)>(x, P, t, scale, threads); });
}

void lora_expand(const Matrix& t, const Matrix& Q, const void* bias, const Matrix& y, float scale, int threads) {
  with_lora_type(y.dtype, [&](auto d) {
    using T = decltype(d);
    run_expand<T>(t, Q, y, (const T*)bias, scale, threads);
  });
}

void lora_outer(const Matrix& x, const Matrix& t, const Matrix& d, float scale, int threads) {
  with_lora_type(x.dtype, [&](auto type) { run_outer<decltype(type)>(x, t, d, scale, threads); });
}

}  // namespace slao::SLAO_ISA
