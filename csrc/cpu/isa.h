// The kernels' entry points, once per instruction set, and the choice between them at run time.
#pragma once
#include <cstdint>

#include "../tensor_table.h"

#define SLAO_DECLARE(isa)                                                                                           \
  namespace slao::isa {                                                                                             \
  void scaled_merge(const MergeRecord* records, int64_t count, int threads);                                        \
  void fold(const FoldRecord* records, int64_t count, int threads);                                                 \
  bool orthogonal_init(const Matrix* matrices, const Matrix* triangles, Status* status, int64_t count, int threads); \
  }

SLAO_DECLARE(base)
#if defined(__x86_64__)
SLAO_DECLARE(avx2)
SLAO_DECLARE(avx512)
#endif
#undef SLAO_DECLARE

// lora_linear's products (lora_linear.cpp says what each is): rank at most four vectors, unit column stride of x and y,
// one dtype throughout, which lora_has() has; of bf16 x an even number of columns.
#define SLAO_DECLARE(isa)                                                                                            \
  namespace slao::isa {                                                                                              \
  bool lora_has(Dtype dtype);                                                                                        \
  void lora_shrink(const Matrix& x, const Matrix& P, const Matrix& t, float scale, int threads);                     \
  void lora_expand(const Matrix& t, const Matrix& Q, const void* bias, const Matrix& y, float scale, int threads);   \
  void lora_outer(const Matrix& x, const Matrix& t, const Matrix& d, float scale, int threads);                      \
  }
#if defined(__x86_64__)
SLAO_DECLARE(avx2)
SLAO_DECLARE(avx512)
SLAO_DECLARE(avx512bf16)
#endif
#undef SLAO_DECLARE

namespace slao {

enum class Isa { base, avx2, avx512 };

inline Isa best_isa() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq"))
    return Isa::avx512;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c"))
    return Isa::avx2;
#endif
  return Isa::base;
}

// Where lora_linear is concerned: no code for the base sets, one more for processors with bf16 dot products.
enum class LoraIsa { none, avx2, avx512, avx512bf16 };

inline LoraIsa best_lora_isa() {
#if defined(__x86_64__)
  const Isa best = best_isa();
  if (best == Isa::avx512) return __builtin_cpu_supports("avx512bf16") ? LoraIsa::avx512bf16 : LoraIsa::avx512;
  if (best == Isa::avx2) return LoraIsa::avx2;
#endif
  return LoraIsa::none;
}

}  // namespace slao

// Calls `call` in the namespace of `isa`.
#if defined(__x86_64__)
#define SLAO_CALL(isa, call)                                  \
  ((isa) == ::slao::Isa::avx512 ? ::slao::avx512::call        \
   : (isa) == ::slao::Isa::avx2 ? ::slao::avx2::call          \
                                : ::slao::base::call)
#else
#define SLAO_CALL(isa, call) (::slao::base::call)
#endif

#if defined(__x86_64__)
#define SLAO_LORA_CALL(isa, call)                                   \
  ((isa) == ::slao::LoraIsa::avx512bf16 ? ::slao::avx512bf16::call  \
   : (isa) == ::slao::LoraIsa::avx512   ? ::slao::avx512::call      \
                                        : ::slao::avx2::call)
#endif
