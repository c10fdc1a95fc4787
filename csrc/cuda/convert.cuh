// The four storage dtypes in and out of registers: one element, or four neighbours in one or two memory transactions.
#pragma once
#include "../tensor_table.h"
#include "launch.h"

namespace slao::cuda {

struct bf16 { uint16_t bits; };
struct f16 { uint16_t bits; };

#ifdef __CUDACC__
__device__ inline float to_float(bf16 x) { return __uint_as_float(uint32_t(x.bits) << 16); }
__device__ inline float to_float(f16 x) {
  float y;
  asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x.bits));
  return y;
}
__device__ inline bf16 to_bf16(float x) {
  bf16 y;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(y.bits) : "f"(x));
  return y;
}
__device__ inline f16 to_f16(float x) {
  f16 y;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y.bits) : "f"(x));
  return y;
}
// Towards zero, the last bit set when that was inexact: rounding the result again equals rounding once.
__device__ inline float to_odd_float(double x) {
  const float y = __double2float_rz(x);
  return double(y) == x || y != y ? y : __uint_as_float(__float_as_uint(y) | 1u);
}
__device__ inline float float_of(uint32_t bits) { return __uint_as_float(bits); }
__device__ inline double double_of(uint64_t bits) { return __longlong_as_double(static_cast<long long>(bits)); }
#else  // the tests' emulator borrows the CPU kernels' conversions
inline float to_float(bf16 x) { return base::to_float(base::bf16{x.bits}); }
inline float to_float(f16 x) { return base::to_float(base::f16{x.bits}); }
inline bf16 to_bf16(float x) { return {base::to_bf16(x).bits}; }
inline f16 to_f16(float x) { return {base::to_f16(x).bits}; }
inline float to_odd_float(double x) { return base::to_odd_float(x); }
inline float float_of(uint32_t bits) { return reinterpret<float>(bits); }
inline double double_of(uint64_t bits) { return reinterpret<double>(bits); }
#endif

template <typename C> __device__ inline C widen(double x) { return C(x); }
template <typename C> __device__ inline C widen(float x) { return C(x); }
template <typename C> __device__ inline C widen(bf16 x) { return C(to_float(x)); }
template <typename C> __device__ inline C widen(f16 x) { return C(to_float(x)); }

__device__ inline float before_rounding(float x) { return x; }
__device__ inline float before_rounding(double x) { return to_odd_float(x); }
template <typename C> __device__ inline void narrow(C x, double& out) { out = x; }
template <typename C> __device__ inline void narrow(C x, float& out) { out = float(x); }
template <typename C> __device__ inline void narrow(C x, bf16& out) { out = to_bf16(before_rounding(x)); }
template <typename C> __device__ inline void narrow(C x, f16& out) { out = to_f16(before_rounding(x)); }

// A matrix as kernels get it.
struct View {
  char* data;
  int64_t row_stride, col_stride;  // in elements
  int32_t rows, cols;
  int8_t dtype;  // of Dtype
  int8_t quads;  // four neighbours of a row, from a column that is a multiple of 4, may be loaded as vectors
};

inline View view(const Matrix& m) {
  if (m.rows > INT32_MAX || m.cols > INT32_MAX) throw std::invalid_argument("a side of 2^31 elements or more");
  const int64_t quad = 4 * element_size(m.dtype), alignment = quad < 16 ? quad : 16;
  const bool quads = m.col_stride == 1 && (m.row_stride % 4 == 0 || m.rows == 1) &&
                     reinterpret_cast<uintptr_t>(m.data) % alignment == 0;
  return {m.data, m.row_stride, m.col_stride, int32_t(m.rows), int32_t(m.cols), int8_t(m.dtype), int8_t(quads)};
}

__device__ inline int element_bytes(int8_t dtype) { return dtype == 0 ? 8 : dtype == 1 ? 4 : 2; }

// f(T{}) with the C++ type of a dtype code.
template <typename F> __device__ inline auto with_type(int8_t dtype, const F& f) {
  switch (dtype) {
    case 0: return f(double{});
    case 1: return f(float{});
    case 2: return f(bf16{});
    default: return f(f16{});
  }
}

template <typename C> __device__ inline C load_element(const char* data, int64_t at, int8_t dtype) {
  data = in_global(data);
  return with_type(dtype, [&](auto t) { return widen<C>(reinterpret_cast<const decltype(t)*>(data)[at]); });
}

template <typename C> __device__ inline void store_element(char* data, int64_t at, int8_t dtype, C x) {
  data = in_global(data);
  with_type(dtype, [&](auto t) { narrow(x, reinterpret_cast<decltype(t)*>(data)[at]); });
}

template <typename C> __device__ inline C load_element(const View& m, int row, int col) {
  return load_element<C>(m.data, row * m.row_stride + col * m.col_stride, m.dtype);
}
template <typename C> __device__ inline void store_element(const View& m, int row, int col, C x) {
  store_element(m.data, row * m.row_stride + col * m.col_stride, m.dtype, x);
}

// Four elements of a row, still in their storage format: a load that nothing waits for yet. Only a Quad of 8 words
// holds fp64.
template <int kWords> struct Quad { uint32_t words[kWords]; };
template <typename C> constexpr int kQuadWords = sizeof(C) == 8 ? 8 : 4;

template <typename T, int kCount> struct alignas(sizeof(T) * kCount) Pack { T x[kCount]; };

template <int kCount> __device__ inline void load_words(const char* from, uint32_t* words) {
  const auto pack = *reinterpret_cast<const Pack<uint32_t, kCount>*>(from);
#pragma unroll
  for (int i = 0; i < kCount; ++i) words[i] = pack.x[i];
}

// As vectors. kShort: elements of 16 bits; else `size` bytes each.
template <bool kShort, int kWords> __device__ inline void load_quad(const char* from, int size, Quad<kWords>& q) {
  load_words<kShort ? 2 : 4>(from, q.words);
  if constexpr (!kShort && kWords == 8)  // of fp32, the same 16 bytes once more
    load_words<4>(from + (size == 8 ? 16 : 0), q.words + 4);
}

// Elements [col, col + 4) of a row; zeros outside of the matrix.
template <int kWords> __device__ inline Quad<kWords> fetch(const View& m, int row, int col) {
  Quad<kWords> q{};
  if (row >= m.rows || col >= m.cols) return q;
  const int size = element_bytes(m.dtype);
  const char* from = in_global(m.data) + (row * m.row_stride + col * m.col_stride) * size;
  if (m.quads && col + 4 <= m.cols) {
    if (size == 2)
      load_quad<true>(from, size, q);
    else
      load_quad<false>(from, size, q);
    return q;
  }
#pragma unroll
  for (int e = 0; e < 4; ++e) {
    if (col + e >= m.cols) break;
    const char* at = from + e * m.col_stride * size;
    if (size == 2)
      q.words[e / 2] |= uint32_t(*reinterpret_cast<const uint16_t*>(at)) << (e % 2 * 16);
    else if (size == 4)
      q.words[e] = *reinterpret_cast<const uint32_t*>(at);
    else if constexpr (kWords == 8)
      load_words<2>(at, q.words + 2 * e);
  }
  return q;
}

// Several quads at once; where(i, row, col) says which is the i-th and whether it is wanted at all (else zeros).
// inside: all that are wanted lie in the matrix, and m.quads holds. Then there is no branch between the loads, so that
// they are in flight together.
template <int kWords, int kCount, typename Where>
__device__ inline void fetch_all(const View& m, bool inside, Quad<kWords> (&quads)[kCount], const Where& where) {
  const int size = element_bytes(m.dtype);
  const char* data = in_global(m.data);
  const auto each = [&](const auto& load) {
    int row = 0, col = 0;
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      quads[i] = {};
      if (where(i, row, col)) load(quads[i], row, col);
    }
  };
  if (!inside)
    each([&](auto& q, int row, int col) { q = fetch<kWords>(m, row, col); });
  else if (size == 2)
    each([&](auto& q, int row, int col) { load_quad<true>(data + (row * m.row_stride + col) * 2, size, q); });
  else
    each([&](auto& q, int row, int col) { load_quad<false>(data + (row * m.row_stride + col) * size, size, q); });
}

template <typename C, int kWords>
__device__ inline void widen(const Quad<kWords>& q, int8_t dtype, C (&x)[4]) {
  if (dtype == 1) {
#pragma unroll
    for (int e = 0; e < 4; ++e) x[e] = C(float_of(q.words[e]));
  } else if (dtype == 0) {
    if constexpr (kWords == 8) {
#pragma unroll
      for (int e = 0; e < 4; ++e) x[e] = C(double_of(uint64_t(q.words[2 * e]) | uint64_t(q.words[2 * e + 1]) << 32));
    }
  } else {
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const uint16_t half = uint16_t(q.words[e / 2] >> (e % 2 * 16));
      x[e] = dtype == 2 ? widen<C>(bf16{half}) : widen<C>(f16{half});
    }
  }
}

template <typename T, typename C> __device__ inline void store_pack(char* to, const C (&x)[4]) {
  if constexpr (sizeof(T) == 8) {  // 16 bytes are the widest store
    Pack<T, 2> low, high;
    narrow(x[0], low.x[0]), narrow(x[1], low.x[1]), narrow(x[2], high.x[0]), narrow(x[3], high.x[1]);
    reinterpret_cast<Pack<T, 2>*>(to)[0] = low;
    reinterpret_cast<Pack<T, 2>*>(to)[1] = high;
  } else {
    Pack<T, 4> pack;
#pragma unroll
    for (int e = 0; e < 4; ++e) narrow(x[e], pack.x[e]);
    *reinterpret_cast<Pack<T, 4>*>(to) = pack;
  }
}

// What lies outside of the matrix is dropped.
template <typename C> __device__ inline void store_quad(const View& m, int row, int col, const C (&x)[4]) {
  if (row >= m.rows || col >= m.cols) return;
  const int64_t at = row * m.row_stride + col * m.col_stride;
  if (m.quads && col + 4 <= m.cols) {
    char* to = in_global(m.data) + at * element_bytes(m.dtype);
    return with_type(m.dtype, [&](auto t) { store_pack<decltype(t)>(to, x); });
  }
#pragma unroll
  for (int e = 0; e < 4; ++e)
    if (col + e < m.cols) store_element(m.data, at + e * m.col_stride, m.dtype, x[e]);
}

}  // namespace slao::cuda
