// Numbers of one storage type as those of another; pieces of a matrix's rows in and out of contiguous scratch.
#pragma once
#include <type_traits>

#include "simd.h"

namespace slao::SLAO_ISA {

template <typename T> struct Lanes;
template <> struct Lanes<float> {
  using V = vf;
  static constexpr int n = kFloats;
};
template <> struct Lanes<double> {
  using V = vd;
  static constexpr int n = kDoubles;
};

// Each rounded once; between equal types every bit stays.
template <typename D, typename S>
void convert(const S* from, int64_t from_stride, D* to, int64_t to_stride, int64_t count) {
  const bool dense = from_stride == 1 && to_stride == 1;
  int64_t j = 0;
  if constexpr (std::is_same<D, S>::value) {
    if (dense) return void(std::memmove(to, from, count * sizeof(D)));
    for (; j < count; ++j) to[j * to_stride] = from[j * from_stride];
  } else if constexpr (!std::is_same<S, double>::value) {
    for (; dense && j + kFloats <= count; j += kFloats) store(to + j, load(from + j));
  }
  for (; j < count; ++j) put(to + j * to_stride, widen(from[j * from_stride]));
}

// to[0:count] = m[row, begin:begin+count], as the type that is computed in (float or double)
template <typename T> void load_span(const Matrix& m, int64_t row, int64_t begin, int64_t count, T* to) {
  const int64_t at = row * m.row_stride + begin * m.col_stride;
  with_type(m.dtype, [&](auto d) { convert((const decltype(d)*)m.data + at, m.col_stride, to, 1, count); });
}

// m[row, begin:begin+count] = from[0:count]
template <typename T> void store_span(const Matrix& m, int64_t row, int64_t begin, int64_t count, const T* from) {
  const int64_t at = row * m.row_stride + begin * m.col_stride;
  with_type(m.dtype, [&](auto d) { convert(from, 1, (decltype(d)*)m.data + at, m.col_stride, count); });
}

// to <- from, bit for bit: two matrices of one shape and dtype.
inline void copy_matrix(const Matrix& to, const Matrix& from) {
  with_type(from.dtype, [&](auto d) {
    auto *out = (decltype(d)*)to.data, *in = (decltype(d)*)from.data;
    for (int64_t i = 0; i < from.rows; ++i)
      convert(in + i * from.row_stride, from.col_stride, out + i * to.row_stride, to.col_stride, from.cols);
  });
}

}  // namespace slao::SLAO_ISA
