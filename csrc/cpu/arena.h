// What every kernel uses instead of the C++ library, in the instruction set's own namespace: memory.h says why.
#pragma once
#include <cstdint>
#include <cstring>

#include "memory.h"

namespace slao::SLAO_ISA {

template <typename T> constexpr T min(T a, T b) { return b < a ? b : a; }
template <typename T> constexpr T max(T a, T b) { return a < b ? b : a; }
constexpr int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

template <typename T> inline void copy(const T* from, int64_t count, T* to) { std::memcpy(to, from, count * sizeof(T)); }
template <typename T> inline void fill(T* to, int64_t count, T value) {
  for (int64_t i = 0; i < count; ++i) to[i] = value;
}

// Takes pieces off a block of memory, each on a cache line's boundary, so that no vector of 64 bytes straddles two
// lines. Without a block it only counts: one function then says both how much a kernel needs and where it lies.
struct Arena {
  char* block = nullptr;
  size_t used = 0;
  template <typename T> T* take(int64_t count) {
    char* at = block ? block + used : nullptr;
    used += round_up(count * sizeof(T), 64);
    return (T*)at;
  }
};

}  // namespace slao::SLAO_ISA
