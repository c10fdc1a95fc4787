// A stream of fields of 0 to 64 bits, and the numbers that go into it.
#pragma once
#include "../arena.h"
#include "../rows.h"

namespace slao::SLAO_ISA {

template <typename D> struct Word;  // an unsigned integer that holds D's bits, and how many of them are D's fraction
template <> struct Word<bf16> { using U = uint16_t; static constexpr int fraction = 7; };
template <> struct Word<f16> { using U = uint16_t; static constexpr int fraction = 10; };
template <> struct Word<float> { using U = uint32_t; static constexpr int fraction = 23; };
template <> struct Word<double> { using U = uint64_t; static constexpr int fraction = 52; };

template <typename U> constexpr int kBits = 8 * sizeof(U);

// The bits of a float as an integer that grows with it: neighbours are one apart, -0 is one below +0. Its own inverse.
template <typename U> inline U ordered(U bits) {
  return U(bits ^ (U(U(0) - U(bits >> (kBits<U> - 1))) & U(U(~U(0)) >> 1)));
}

class BitWriter {
 public:
  explicit BitWriter(char* to) : begin(to), at(to) {}
  // The lowest `width` bits of value.
  void put(uint64_t value, int width) {
    if (width > 32) short_put(value, 32), value >>= 32, width -= 32;
    short_put(value, width);
  }
  // Ends the stream on a whole word; its bytes.
  int64_t finish() {
    if (used) std::memcpy(at, &word, 4), at += 4;
    return at - begin;
  }

 private:
  char *begin, *at;
  uint64_t word = 0;
  int used = 0;  // < 32 between calls
  void short_put(uint64_t value, int width) {
    word |= (value & ((uint64_t(1) << width) - 1)) << used;
    used += width;
    if (used < 32) return;
    std::memcpy(at, &word, 4);
    at += 4, word >>= 32, used -= 32;
  }
};

// Reads at most `bytes`; beyond them are zeros, and `read` says that more was asked for.
class BitReader {
 public:
  BitReader(const char* from, int64_t bytes) : at(from), end(from + bytes), begin(from) {}
  uint64_t get(int width) {
    if (width <= 32) return short_get(width);
    const uint64_t low = short_get(32);
    return low | short_get(width - 32) << 32;
  }
  int64_t read() const { return at - begin; }  // whole words

 private:
  const char *at, *const end, *const begin;
  uint64_t word = 0;
  int left = 0;
  uint64_t short_get(int width) {
    if (left < width) {
      uint32_t next = 0;
      if (at < end) std::memcpy(&next, at, 4);
      at += 4;
      word |= uint64_t(next) << left, left += 32;
    }
    const uint64_t value = word & ((uint64_t(1) << width) - 1);
    word >>= width, left -= width;
    return value;
  }
};

// --- a checksum that knows places: any one changed element changes it, and so do two that change places but for chance
// (slao_kernels/ops/exact_fold/kept.py has the formula)

inline uint64_t mixed(uint64_t i) {
  i = (i + 1) * 0x9e3779b97f4a7c15u;
  i = (i ^ (i >> 30)) * 0xbf58476d1ce4e5b9u;
  i = (i ^ (i >> 27)) * 0x94d049bb133111ebu;
  return i ^ (i >> 31);
}

template <typename D> uint64_t row_sum(const D* row, int64_t count, const uint64_t* keys, int64_t index) {
  uint64_t sum = 0;
  for (int64_t j = 0; j < count; ++j) {
    const uint64_t x = (loadu<typename Word<D>::U>(row + j) ^ keys[j]) * 0xd1342543de82ef95u;
    sum += x ^ (x >> 32);
  }
  return sum * (mixed(uint64_t(index) + (uint64_t(1) << 32)) | 1);
}

}  // namespace slao::SLAO_ISA
