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
  void gram(const Matrix* matrices, const int64_t* sizes, int64_t count, double* G, int threads);                   \
  void exact_plan(const FoldRecord* records, int64_t count, int64_t& pieces, int64_t& bytes);                       \
  int64_t exact_fold(const FoldRecord* records, int64_t count, char* stream, int64_t* lengths, uint64_t* sums,      \
                     int threads);                                                                                  \
  bool exact_unfold(const FoldRecord* records, int64_t count, const char* stream, const int64_t* lengths,           \
                    int threads);                                                                                   \
  void exact_sums(const FoldRecord* records, int64_t count, uint64_t* sums, int threads);                           \
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

// t = t_scale x P where P has data (else t is there already), y = y_scale t Q + bias (or null) where Q has.
struct LoraRows {
  Matrix x, P, t, Q, y;
  const void* bias;
  float t_scale, y_scale;
};

// d = scale xᵀ t
struct LoraOuter {
  Matrix x, t, d;
  float scale;
};

// g (M, r) = scale dy B, dx (M, K) = g A, dA (K, r) = xᵀ g, dB (N, r) = scale dyᵀ t: each where it has data; dx and dA
// need g.
struct LoraBackward {
  Matrix dy, t, x, A, B, g, dx, dA, dB;
  float scale;
};

// lora_linear's products for one instruction set (lora_linear.cpp says what each is): rank at most kLoraRank; x, dy, y,
// t, g and dx bf16 with unit column stride, the other matrices bf16 or fp32.
struct LoraProducts {
  void (*rows)(const LoraRows& rows, int threads);
  void (*outer)(const LoraOuter& outer, int threads);
  void (*backward)(const LoraBackward& pass, int threads);
};
constexpr int kLoraRank = 64;

namespace avx512bf16 {
extern const LoraProducts lora_products;
}
namespace amx {
extern const LoraProducts lora_products;
}

// In rising order. lora_linear has code for the last two, where the compiler has flags for them; all else of theirs is
// avx512's.
enum class Isa { base, avx2, avx512, avx512bf16, amx };

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

inline Isa best_isa() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq")) {
#if defined(SLAO_HAS_AVX512BF16)
    if (__builtin_cpu_supports("avx512bf16")) {
#if defined(SLAO_HAS_AMX)
      if (tiles_granted()) return Isa::amx;
#endif
      return Isa::avx512bf16;
    }
#endif
    return Isa::avx512;
  }
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c"))
    return Isa::avx2;
#endif
  return Isa::base;
}

// Null where there are none for `isa`.
inline const LoraProducts* lora_products(Isa isa) {
#if defined(SLAO_HAS_AVX512BF16)
  if (isa == Isa::avx512bf16) return &avx512bf16::lora_products;
#endif
#if defined(SLAO_HAS_AMX)
  if (isa == Isa::amx) return &amx::lora_products;
#endif
  (void)isa;
  return nullptr;
}

}  // namespace slao

// Calls `call` in the namespace of `isa`.
#if defined(__x86_64__)
#define SLAO_CALL(isa, call)                                  \
  ((isa) >= ::slao::Isa::avx512 ? ::slao::avx512::call        \
   : (isa) == ::slao::Isa::avx2 ? ::slao::avx2::call          \
                                : ::slao::base::call)
#else
#define SLAO_CALL(isa, call) (::slao::base::call)
#endif
