// Vectors of one machine register, and the four storage dtypes in and out of them.
//
// Included by kernels that are compiled once per instruction set (see isa.h): SLAO_ISA names the namespace, the
// compiler's flags set the width. GCC's and Clang's vector extensions do the arithmetic, so one source serves x86-64
// and aarch64; only 16-bit floats need words of their own.
#pragma once
#include <cstdint>
#include <cstring>

#if defined(__AVX512F__) || defined(__AVX2__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#include "../tensor_table.h"

namespace slao::SLAO_ISA {

#if defined(__AVX512F__)
constexpr int kBytes = 64;
#elif defined(__AVX2__)
constexpr int kBytes = 32;
#else
constexpr int kBytes = 16;
#endif

constexpr int kFloats = kBytes / 4;
constexpr int kDoubles = kBytes / 8;

typedef float vf __attribute__((vector_size(kBytes)));
typedef double vd __attribute__((vector_size(kBytes)));
typedef uint32_t vu __attribute__((vector_size(kBytes)));
typedef uint16_t vh __attribute__((vector_size(kBytes / 2)));      // kFloats 16-bit words
typedef float vf_half __attribute__((vector_size(kBytes / 2)));    // kDoubles floats

struct bf16 { uint16_t bits; };
struct f16 { uint16_t bits; };

template <typename V> inline V loadu(const void* p) {
  V v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
template <typename V> inline void storeu(void* p, V v) { std::memcpy(p, &v, sizeof v); }

inline vf splat(float x) { return x - vf{}; }
inline vd splat(double x) { return x - vd{}; }

// --- one element -----------------------------------------------------------------------------------------------

inline float to_float(bf16 h) {
  const uint32_t bits = uint32_t(h.bits) << 16;
  return loadu<float>(&bits);
}

inline bf16 to_bf16(float x) {  // round to nearest, ties to even; NaN stays NaN
  const uint32_t bits = loadu<uint32_t>(&x);
  if (x != x) return {uint16_t((bits >> 16) | 0x40)};
  return {uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16)};
}

inline float to_float(f16 h) {
  const uint32_t sign = uint32_t(h.bits & 0x8000) << 16, rest = h.bits & 0x7fff;
  uint32_t bits = (rest << 13) + (112u << 23);  // normal: rebias the exponent
  if (rest >= 0x7c00) bits = 0x7f800000 | ((rest & 0x3ff) << 13);  // infinity, NaN
  if (rest < 0x400) {  // denormal: exact
    const float small = float(rest) * 0x1p-24f;
    bits = loadu<uint32_t>(&small);
  }
  bits |= sign;
  return loadu<float>(&bits);
}

inline f16 to_f16(float x) {
  const uint32_t bits = loadu<uint32_t>(&x), rest = bits & 0x7fffffff;
  const uint16_t sign = uint16_t((bits >> 16) & 0x8000);
  if (rest > 0x7f800000) return {uint16_t(sign | 0x7e00 | ((rest >> 13) & 0x3ff))};
  if (rest >= 0x477ff000) return {uint16_t(sign | 0x7c00)};  // 65520 and up round to infinity
  if (rest < 0x38800000) {  // below 2^-14: the addition rounds to a multiple of 2^-24, ties to even
    const float shifted = loadu<float>(&rest) + 0.5f;
    return {uint16_t(sign | (loadu<uint32_t>(&shifted) - 0x3f000000))};
  }
  return {uint16_t(sign | ((rest - (112u << 23) + 0xfff + ((rest >> 13) & 1)) >> 13))};
}

// A double that goes to 16 bits is rounded to odd on the way through float (towards zero, the last bit set when that is
// inexact), so that the two roundings equal one.
inline float to_odd_float(double x) {
  const float nearest = float(x);
  if (double(nearest) == x || x != x) return nearest;
  uint32_t bits = loadu<uint32_t>(&nearest);
  if (__builtin_fabs(double(nearest)) > __builtin_fabs(x)) --bits;
  bits |= 1;
  return loadu<float>(&bits);
}
inline float to_odd_float(float x) { return x; }

// The narrowest type to compute in that holds every value.
inline double widen(double x) { return x; }
inline float widen(float x) { return x; }
inline float widen(bf16 x) { return to_float(x); }
inline float widen(f16 x) { return to_float(x); }

// x: float or double, rounded once.
template <typename T> inline void put(double* p, T x) { *p = x; }
template <typename T> inline void put(float* p, T x) { *p = float(x); }
template <typename T> inline void put(bf16* p, T x) { *p = to_bf16(to_odd_float(x)); }
template <typename T> inline void put(f16* p, T x) { *p = to_f16(to_odd_float(x)); }

// --- one register of floats ------------------------------------------------------------------------------------

inline vf load(const float* p) { return loadu<vf>(p); }

inline vf load(const bf16* p) {
  vu wide = __builtin_convertvector(loadu<vh>(p), vu) << 16;
  return (vf)wide;
}

inline vf load(const f16* p) {
#if defined(__AVX512F__)
  return (vf)_mm512_cvtph_ps(loadu<__m256i>(p));
#elif defined(__AVX2__)
  return (vf)_mm256_cvtph_ps(loadu<__m128i>(p));
#elif defined(__aarch64__)
  return (vf)vcvt_f32_f16(loadu<float16x4_t>(p));
#else
  vf v;
  for (int i = 0; i < kFloats; ++i) v[i] = to_float(p[i]);
  return v;
#endif
}

inline vf load(const double* p) {
  float lanes[kFloats];
  for (int i = 0; i < kFloats; ++i) lanes[i] = float(p[i]);
  return loadu<vf>(lanes);
}

inline void store(float* p, vf v) { storeu(p, v); }
inline void store(double* p, vd v) { storeu(p, v); }

// The upper half of each lane is the bf16 nearest to v (ties to even, NaN stays NaN); the lower half is anything.
inline vu round_bf16(vf v) {
  const vu bits = (vu)v;
  const vu rounded = bits + 0x7fff + ((bits >> 16) & 1);
  return v == v ? rounded : bits | 0x400000;
}

inline void store(bf16* p, vf v) { storeu(p, __builtin_convertvector(round_bf16(v) >> 16, vh)); }

// 2 kFloats of them, the even ones and the odd ones: for elementwise work, that saves moving halves across lanes.
inline void load_pairs(const bf16* p, vf& even, vf& odd) {
  const vu words = loadu<vu>(p);
  even = (vf)(words << 16);
  odd = (vf)(words & 0xffff0000u);
}
inline void store_pairs(bf16* p, vf even, vf odd) {
  storeu(p, (round_bf16(even) >> 16) | (round_bf16(odd) & 0xffff0000u));
}

inline void store(f16* p, vf v) {
#if defined(__AVX512F__)
  storeu(p, _mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#elif defined(__AVX2__)
  storeu(p, _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#elif defined(__aarch64__)
  storeu(p, vcvt_f16_f32((float32x4_t)v));  // to nearest, as the control register stands at the start
#else
  for (int i = 0; i < kFloats; ++i) p[i] = to_f16(v[i]);
#endif
}

// kDoubles floats, widened.
inline vd load_wide(const float* p) { return __builtin_convertvector(loadu<vf_half>(p), vd); }
inline vd load_wide(const double* p) { return loadu<vd>(p); }
inline void store(double* p, vf v) {
  float lanes[kFloats];
  storeu(lanes, v);
  storeu(p, load_wide(lanes));
  storeu(p + kDoubles, load_wide(lanes + kDoubles));
}

template <typename V, typename D> inline V load_as(const D* p) {
  if constexpr (sizeof(V{}[0]) == 8)
    return load_wide(p);
  else
    return load(p);
}

// In double and in a fixed order: pairs, pairs of pairs.
inline double sum(vd v) {
  double lanes[kDoubles];
  storeu(lanes, v);
  for (int width = kDoubles / 2; width; width /= 2)
    for (int i = 0; i < width; ++i) lanes[i] += lanes[i + width];
  return lanes[0];
}
inline double sum(vf v) {
  double lanes[kFloats];
  store(lanes, v);
  return sum(loadu<vd>(lanes) + loadu<vd>(lanes + kDoubles));
}

// Calls f(T{}) with the C++ type of a dtype code.
template <typename F> inline void with_type(Dtype dtype, F&& f) {
  switch (dtype) {
    case Dtype::f64: return f(double{});
    case Dtype::f32: return f(float{});
    case Dtype::bf16: return f(bf16{});
    case Dtype::f16: return f(f16{});
  }
}

}  // namespace slao::SLAO_ISA
