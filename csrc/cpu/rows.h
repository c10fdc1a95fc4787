// Pieces of a matrix's rows in and out of contiguous scratch of the type that is computed in (float or double).
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

// to[0:count] = m[row, begin:begin+count]
template <typename T> void load_span(const Matrix& m, int64_t row, int64_t begin, int64_t count, T* to) {
  with_type(m.dtype, [&](auto d) {
    using D = decltype(d);
    const D* from = (const D*)m.data + row * m.row_stride + begin * m.col_stride;
    int64_t j = 0;
    if (m.col_stride == 1) {
      if constexpr (std::is_same<D, T>::value) {
        std::memcpy(to, from, count * sizeof(T));
        return;
      } else if constexpr (std::is_same<T, float>::value && !std::is_same<D, double>::value) {
        for (; j + kFloats <= count; j += kFloats) store(to + j, load(from + j));
      } else if constexpr (std::is_same<D, float>::value) {
        for (; j + kDoubles <= count; j += kDoubles) storeu(to + j, load_wide(from + j));
      } else if constexpr (std::is_same<T, double>::value) {
        for (; j + kFloats <= count; j += kFloats) {
          float narrow[kFloats];
          store(narrow, load(from + j));
          storeu(to + j, load_wide(narrow));
          storeu(to + j + kDoubles, load_wide(narrow + kDoubles));
        }
      }
    }
    for (; j < count; ++j) to[j] = T(to_double(from[j * m.col_stride]));
  });
}

// m[row, begin:begin+count] = from[0:count], rounded once to the matrix's dtype
template <typename T> void store_span(const Matrix& m, int64_t row, int64_t begin, int64_t count, const T* from) {
  with_type(m.dtype, [&](auto d) {
    using D = decltype(d);
    D* to = (D*)m.data + row * m.row_stride + begin * m.col_stride;
    int64_t j = 0;
    if (m.col_stride == 1) {
      if constexpr (std::is_same<D, T>::value) {
        std::memcpy(to, from, count * sizeof(T));
        return;
      } else if constexpr (std::is_same<T, float>::value && !std::is_same<D, double>::value) {
        for (; j + kFloats <= count; j += kFloats) store(to + j, load(from + j));
      }
    }
    for (; j < count; ++j) put(to + j * m.col_stride, from[j]);
  });
}

// to <- from, bit for bit: two matrices of one shape and dtype.
inline void copy_matrix(const Matrix& to, const Matrix& from) {
  const int64_t size = element_size(from.dtype);
  for (int64_t i = 0; i < from.rows; ++i) {
    char* out = to.data + i * to.row_stride * size;
    const char* in = from.data + i * from.row_stride * size;
    if (to.col_stride == 1 && from.col_stride == 1)
      std::memcpy(out, in, from.cols * size);
    else
      for (int64_t j = 0; j < from.cols; ++j) std::memcpy(out + j * to.col_stride * size, in + j * from.col_stride * size, size);
  }
}

}  // namespace slao::SLAO_ISA
