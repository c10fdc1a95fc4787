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

// The lowest `width` bits, 0 to 64.
struct Masks {
  uint64_t of[65] = {};
  constexpr Masks() {
    for (int width = 1; width <= 64; ++width) of[width] = of[width - 1] << 1 | 1;
  }
};
constexpr Masks kMasks;

// The number whose lowest `width` bits these are, in two's complement.
template <typename U> inline U sign_extended(uint64_t bits, int width) {
  const uint64_t mask = kMasks.of[width], top = mask ^ (mask >> 1);
  return U((bits ^ top) - top);
}

// Neither looks at whether a field is empty or a word full: such branches are guessed wrong half of the time. Both touch
// eight bytes beyond what they have written or read.
class BitWriter {
 public:
  explicit BitWriter(char* to) : begin(to), at(to) {}
  template <typename U> void put(uint64_t value, int width) {  // no wider than U
    if constexpr (sizeof(U) > 4)
      if (width > 32) append(value & 0xffffffffu, 32), value >>= 32, width -= 32;
    append(value & kMasks.of[width], width);
  }
  int64_t finish() { return at - begin + (used > 0); }  // the stream's bytes

 private:
  char *begin, *at;
  uint64_t word = 0;
  int used = 0;  // < 8 between calls
  void append(uint64_t value, int width) {
    word |= value << used;
    std::memcpy(at, &word, 8);
    used += width;
    at += used >> 3, word >>= used & ~7, used &= 7;
  }
};

class BitReader {
 public:
  BitReader(const char* from, int64_t bytes) : begin(from), at(from), end(from + bytes) {}
  template <typename U> uint64_t get(int width) {
    if constexpr (sizeof(U) > 4)
      if (width > 32) {
        const uint64_t low = next(32);
        return low | next(width - 32) << 32;
      }
    return next(width);
  }
  bool finished() const { return at + (used > 0) == end; }

 private:
  const char *begin, *at, *end;
  int used = 0;  // < 8 between calls
  uint64_t next(int width) {
    const uint64_t word = loadu<uint64_t>(at < end ? at : begin);  // a damaged stream may ask for more than there is
    const uint64_t value = (word >> used) & kMasks.of[width];
    used += width;
    at += used >> 3, used &= 7;
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
    const uint64_t x = loadu<typename Word<D>::U>(row + j) ^ keys[j];
    // The multiplication spreads bits upwards, the shifts those above downwards, the sign of a double among them.
    const uint64_t y = (x ^ (x >> 32)) * 0xd1342543de82ef95u;
    sum += y ^ (y >> 32);
  }
  return sum * (mixed(uint64_t(index) + (uint64_t(1) << 32)) | 1);
}

}  // namespace slao::SLAO_ISA
