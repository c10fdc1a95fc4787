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
