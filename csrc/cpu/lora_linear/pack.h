// Small matrices in and out of the order in which lora_linear's loops read and leave them.
#pragma once
#include <algorithm>
#include <type_traits>

#include "../rows.h"

namespace slao::SLAO_ISA {
namespace {

inline int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// What a small matrix is to a loop: P, Q or T.
enum class Role { shrink, expand, outer };

// Products that are added one after another before their sum joins the total: what keeps long fp32 sums accurate.
constexpr int64_t kSums = 64;

// A step of the inner dimension: one fp32 value, or two bf16 ones as one 32-bit word.
template <typename T> struct Step;
template <> struct Step<float> {
  static constexpr int64_t depth = 1;
  using Word = float;
  static vf multiply_add(vf sum, Word x, vf packed) { return sum + splat(x) * packed; }
  static void put(float* to, vf value) { storeu(to, value); }
  static float cast(float value) { return value; }
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
  static bf16 cast(float value) { return to_bf16(value); }
};
#endif

template <typename Word> inline Word word(const void* p) {
  Word w;
  std::memcpy(&w, p, sizeof w);
  return w;
}
inline uint32_t pair_of(bf16 low, bf16 high) { return low.bits | uint32_t(high.bits) << 16; }

// A copy of m in T, its long dimension contiguous.
template <typename T> Matrix dense(const Matrix& m, Scratch<T>& to) {
  const bool flip = m.row_stride < m.col_stride;
  const Matrix from = flip ? Matrix{m.data, m.cols, m.rows, m.col_stride, m.row_stride, m.dtype} : m;
  if (int64_t(to.size()) < m.rows * m.cols) to.resize(m.rows * m.cols);
  for (int64_t i = 0; i < from.rows; ++i) {
    T* out = to.data() + i * from.cols;
    int64_t j = 0;
    if (m.dtype != Dtype::f32) {
      const T* row = (const T*)from.data + i * from.row_stride;
      for (; j < from.cols; ++j) out[j] = row[j * from.col_stride];
      continue;
    }
    const float* row = (const float*)from.data + i * from.row_stride;
    if (from.col_stride == 1)
      for (; j + kFloats <= from.cols; j += kFloats) Step<T>::put(out + j, load(row + j));
    for (; j < from.cols; ++j) out[j] = Step<T>::cast(row[j * from.col_stride]);
  }
  const Dtype dtype = sizeof(T) == 4 ? Dtype::f32 : Dtype::bf16;
  return flip ? Matrix{(char*)to.data(), m.rows, m.cols, 1, from.cols, dtype}
              : Matrix{(char*)to.data(), m.rows, m.cols, from.cols, 1, dtype};
}

// m itself if it is of T, else a copy.
template <typename T> Matrix converted(const Matrix& m, Scratch<T>& to) {
  return element_size(m.dtype) == int64_t(sizeof(T)) ? m : dense(m, to);
}

// m (k, n) as steps of k, each `pitch` words of n, padded with zeros: steps [begin, end) of it.
template <typename T> void pack_steps(const Matrix& m, int64_t pitch, int64_t begin, int64_t end, T* to) {
  constexpr int64_t depth = Step<T>::depth;
  using Word = typename Step<T>::Word;
  const T* from = (const T*)m.data;
  Word* words = (Word*)to;
  if (m.row_stride == 1 && (depth == 1 || m.rows % depth == 0)) {  // k runs along memory: words change places
    for (int64_t k = begin; k < end; k += 16)                      // in blocks of cache lines
      for (int64_t j = 0; j < pitch; ++j)
        for (int64_t a = k; a < std::min(k + 16, end); ++a)
          words[a * pitch + j] = j < m.cols ? word<Word>(from + j * m.col_stride + a * depth) : Word(0);
    return;
  }
  for (int64_t k = begin; k < end; ++k) {
    Word* line = words + k * pitch;
    const T* first = from + k * depth * m.row_stride;
    if constexpr (depth == 1) {
      for (int64_t j = 0; j < m.cols; ++j) line[j] = first[j * m.col_stride];
    } else {
      const bool two = k * depth + 1 < m.rows;
      const T* second = two ? first + m.row_stride : first;
      for (int64_t j = 0; j < m.cols; ++j)
        line[j] = pair_of(first[j * m.col_stride], two ? second[j * m.col_stride] : T{});
    }
    for (int64_t j = m.cols; j < pitch; ++j) line[j] = Word(0);
  }
}

// d[j, i] = scale sums[i, j - begin], of type T or fp32.
template <typename D> inline void store_columns(const float* sums, int64_t lds, int64_t r, float scale, const Matrix& d,
                                                int64_t begin, int64_t end) {
  D* to = (D*)d.data;
  if (d.row_stride != 1) {
    for (int64_t j = begin; j < end; ++j)
      for (int64_t i = 0; i < r; ++i) slao::SLAO_ISA::put(to + j * d.row_stride + i * d.col_stride, scale * sums[i * lds + j - begin]);
    return;
  }
  for (int64_t i = 0; i < r; ++i) {
    const float* from = sums + i * lds - begin;
    D* line = to + i * d.col_stride;
    int64_t j = begin;
    for (; j + kFloats <= end; j += kFloats) store(line + j, splat(scale) * load(from + j));
    for (; j < end; ++j) slao::SLAO_ISA::put(line + j, scale * from[j]);
  }
}

// The ranks of `count` matrices in turn.
inline void store_outer(const float* sums, int64_t lds, float scale, const Matrix* d, int count, int64_t begin, int64_t end) {
  for (int i = 0; i < count; sums += d[i++].cols * lds)
    if (d[i].dtype == Dtype::f32)
      store_columns<float>(sums, lds, d[i].cols, scale, d[i], begin, end);
    else
      store_columns<bf16>(sums, lds, d[i].cols, scale, d[i], begin, end);
}

}  // namespace
}  // namespace slao::SLAO_ISA
