// The kernels' entry points, once per instruction set, and the choice between them at run time.
#pragma once
#include <cstdint>

#if defined(__x86_64__)
#include <cpuid.h>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#endif

#include "../tensor_table.h"

#define SLAO_DECLARE(isa)                                                                                           \
  namespace slao::isa {                                                                                             \
  void scaled_merge(const MergeRecord* records, int64_t count, int threads);                                        \
  void fold(const FoldRecord* records, int64_t count, int threads);                                                 \
  bool orthogonal_init(const Matrix* matrices, const Matrix* triangles, const Matrix* kept, Status* status,          \
                       int64_t count, int threads);                                                                 \
  }

SLAO_DECLARE(base)
#if defined(__x86_64__)
SLAO_DECLARE(avx2)
SLAO_DECLARE(avx512)
#endif
#undef SLAO_DECLARE

namespace slao {

// g (M, r) = scale dy B, dB (N, r) = scale dyᵀ t, dA (K, r) = xᵀ g: each where it has data; dA needs g.
struct LoraGrads {
  Matrix dy, t, B, g, dA, dB;
  float scale;
};

}  // namespace slao

// lora_linear's products (lora_linear.cpp says what each is): rank at most four vectors (AMX: 64), unit column stride of
// X, Y and T, which share a dtype that lora_has() has; the other matrices are of that dtype or fp32. lora_forward is a
// shrink with P = Aᵀ and an expand with Q = Bᵀ. lora_backward serves one or more layers of one x: g are their gs side by
// side, A (R, K) their As one below the other, dx = g A; all layers have a dA or none.
#define SLAO_DECLARE(isa)                                                                                            \
  namespace slao::isa {                                                                                              \
  bool lora_has(Dtype dtype);                                                                                        \
  void lora_shrink(const Matrix& x, const Matrix& P, const Matrix& t, float scale, int threads);                     \
  void lora_expand(const Matrix& t, const Matrix& Q, const void* bias, const Matrix& y, float scale, int threads);   \
  void lora_outer(const Matrix& x, const Matrix& t, const Matrix& d, float scale, int threads);                      \
  void lora_forward(const Matrix& x, const Matrix& P, const Matrix& t, const Matrix& Q, const void* bias,            \
                    const Matrix& y, float scale, int threads);                                                      \
  void lora_backward(const LoraGrads* layers, int count, const Matrix& x, const Matrix& g, const Matrix& A,          \
                     const Matrix& dx, int threads);                                                                 \
  }
#if defined(__x86_64__)
SLAO_DECLARE(avx2)
SLAO_DECLARE(avx512)
#if defined(SLAO_HAS_AVX512BF16)  // the compiler has flags for it
SLAO_DECLARE(avx512bf16)
#endif
#if defined(SLAO_HAS_AMX)
SLAO_DECLARE(amx)
#endif
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

// Where lora_linear is concerned: no code for the base sets, more for processors with bf16 dot products or tiles.
enum class LoraIsa { none, avx2, avx512, avx512bf16, amx };

#if defined(SLAO_HAS_AMX)
// Tiles are a large register state: Linux hands it out to a process that asks, where processor and kernel have it.
inline bool tiles_granted() {
#if defined(__linux__)
  unsigned a = 0, b = 0, c = 0, d = 0;
  constexpr unsigned kBf16 = 1u << 22, kTile = 1u << 24;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d & (kBf16 | kTile)) != (kBf16 | kTile)) return false;
  constexpr long kRequest = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return syscall(SYS_arch_prctl, kRequest, kTileData) == 0;
#else
  return false;
#endif
}
#endif

inline LoraIsa best_lora_isa() {
#if defined(__x86_64__)
  const Isa best = best_isa();
#if defined(SLAO_HAS_AVX512BF16)
  if (best == Isa::avx512 && __builtin_cpu_supports("avx512bf16")) {
#if defined(SLAO_HAS_AMX)
    if (tiles_granted()) return LoraIsa::amx;
#endif
    return LoraIsa::avx512bf16;
  }
#endif
  if (best == Isa::avx512) return LoraIsa::avx512;
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
#if defined(SLAO_HAS_AMX)
#define SLAO_AMX_OR(isa, call) (isa) == ::slao::LoraIsa::amx ? ::slao::amx::call:
#else
#define SLAO_AMX_OR(isa, call)
#endif
#if defined(SLAO_HAS_AVX512BF16)
#define SLAO_BF16_OR(isa, call) (isa) == ::slao::LoraIsa::avx512bf16 ? ::slao::avx512bf16::call:
#else
#define SLAO_BF16_OR(isa, call)
#endif
#define SLAO_LORA_CALL(isa, call)                                 \
  (SLAO_AMX_OR(isa, call) SLAO_BF16_OR(isa, call)(isa) == ::slao::LoraIsa::avx512 ? ::slao::avx512::call : ::slao::avx2::call)
#endif
