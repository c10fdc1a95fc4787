// AMX for lora_linear: tiles of 16 rows x 64 bytes.
//
// TDPBF16PS adds to a tile C (16 x 16 fp32) the product of A (16 rows of 32 bf16) and B (16 pairs of rows, each pair's
// two values side by side, x 16). Like VDPBF16PS it takes denormals for zero. Tiles 0 to 3 are C, 4 and 5 A, 6 and 7 B.
#pragma once
#if defined(__AMX_BF16__)
#include <utility>

#include "pack.h"

namespace slao::SLAO_ISA {
namespace {

#if defined(SLAO_TILES_ON_CPU)  // the tests': where no processor has tiles
#include SLAO_TILES_ON_CPU
#else
// Memory is named as clobbered: what was written just before has to be there when a tile is loaded.
template <int T> inline void tile_zero() { asm volatile("tilezero %%tmm%c0" ::"i"(T)); }
template <int T> inline void tile_load(const void* p, int64_t stride) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(p), "r"(stride), "i"(T) : "memory");
}
template <int T> inline void tile_store(void* p, int64_t stride) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(p), "r"(stride), "i"(T) : "memory");
}
template <int C, int A, int B> inline void tile_multiply_add() {
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(C), "i"(A), "i"(B));
}

// C and A have `rows` rows, A and B are `depth` (16 or 32) deep. Clears all tiles.
inline void tile_configure(int rows, int depth) {
  struct alignas(64) {
    uint8_t palette = 1, start = 0, reserved[14] = {};
    uint16_t bytes[16] = {};
    uint8_t rows[16] = {};
  } config;
  for (int t = 0; t < 8; ++t) {
    config.bytes[t] = uint16_t(t == 4 || t == 5 ? 2 * depth : 64);
    config.rows[t] = uint8_t(t < 6 ? rows : depth / 2);
  }
  asm volatile("ldtilecfg %0" ::"m"(config));
}
inline void tile_release() { asm volatile("tilerelease"); }
#endif

// f(0), f(1), ... f(N - 1) with constants.
template <typename F, int... i> inline void each_of(F&& f, std::integer_sequence<int, i...>) {
  (f(std::integral_constant<int, i>{}), ...);
}
template <int N, typename F> inline void each(F&& f) { each_of(f, std::make_integer_sequence<int, N>{}); }

}  // namespace
}  // namespace slao::SLAO_ISA
#endif
