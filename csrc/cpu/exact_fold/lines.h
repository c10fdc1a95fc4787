// Rows of W while they are folded and unfolded exactly: what was, what is now, what comes back by arithmetic alone, and
// in how many bits the difference is written. exact_fold.cpp says how it all fits together.
#pragma once
#include "bits.h"

namespace slao::SLAO_ISA {

constexpr uint8_t kUnforeseen = 0x80;  // no bits are foreseen, and yet there is a difference

template <typename T, typename D> struct Lines {
  using U = typename Word<D>::U;
  D *was, *now, *back;
  T* x;
  uint8_t* width;
  uint64_t* keys;
  char* exceptions;  // of a whole piece
  size_t size;
  Lines(Arena arena, int64_t count, int64_t rows)
      : was(arena.take<D>(round_up(count, 8))), now(arena.take<D>(count)), back(arena.take<D>(round_up(count, 8))),
        x(arena.take<T>(count)),
        width(arena.take<uint8_t>(round_up(count, 8))), keys(arena.take<uint64_t>(count)),
        exceptions(arena.take<char>(count * rows * (4 + sizeof(D)))), size(arena.used) {}
};

// Keys of `count` columns from `col` on; and the bytes that `width` is longer than a row.
template <typename T, typename D> void begin(const Lines<T, D>& l, int64_t col, int64_t count) {
  for (int64_t j = 0; j < count; ++j) l.keys[j] = mixed(uint64_t(col + j));
  for (int64_t j = count; j < round_up(count, 8); ++j) l.width[j] = 0;
}

// now <- was + d, rounded once from the type that is computed in.
template <typename T, typename D> void add(const Lines<T, D>& l, const T* d, int64_t count) {
  convert(l.was, 1, l.x, 1, count);
  for (int64_t j = 0; j < count; ++j) l.x[j] += d[j];
  convert(l.x, 1, l.now, 1, count);
}

// back <- now - d, likewise; width <- whether the difference lay half-way between two numbers of D (16-bit denormals
// are not looked at), where rounding may take the wrong one.
template <typename T, typename D> void subtract(const Lines<T, D>& l, const T* d, int64_t count) {
  convert(l.now, 1, l.x, 1, count);
  T* const __restrict x = l.x;
  uint8_t* const __restrict half = l.width;
  if constexpr (std::is_same<T, D>::value) {
    for (int64_t j = 0; j < count; ++j) {  // the rounding error of a difference is exact: Knuth's TwoSum
      const T a = x[j], b = -d[j], hi = a + b, part = hi - a, lo = (a - (hi - part)) + (b - part);
      half[j] = (lo != 0) & ((hi + 2 * lo) - hi == 2 * lo);
      x[j] = hi;
    }
  } else if constexpr (std::is_same<T, float>::value) {
    constexpr int dropped = 23 - Word<D>::fraction;
    for (int64_t j = 0; j < count; ++j) {
      x[j] -= d[j];
      half[j] = (loadu<uint32_t>(x + j) & ((1u << dropped) - 1)) == 1u << (dropped - 1);
    }
  } else {
    for (int64_t j = 0; j < count; ++j) x[j] -= d[j], half[j] = 0;
  }
  convert(l.x, 1, l.back, 1, count);
}

// width: the bits of what was, as a difference to back. Rounding moved now by at most half a unit in its last place, so
// that what was lies at most 2^(k-1) of back's units from back, k the difference of their exponents: k + 1 bits with
// the sign; none for k = 0, two there for a tie; all bits where back has no more than the exponent right. A power of
// two counts as of the exponent below, whose units are those below it.
template <bool kWas, typename T, typename D> void set_widths(const Lines<T, D>& l, int64_t count) {
  using U = typename Word<D>::U;
  constexpr int fraction = Word<D>::fraction;
  constexpr U magnitude = U(~U(0)) >> 1;
  // Pointers of the loop's own: a store of bytes may be to anything, members of l included, which forbids vectors.
  const D *const nows = l.now, *const backs = l.back, *const wass = l.was;
  uint8_t* const __restrict widths = l.width;
  for (int64_t j = 0; j < count; ++j) {
    const U now = loadu<U>(nows + j) & magnitude, back = loadu<U>(backs + j), rest = back & magnitude;
    const U high = now >> fraction, low = U(rest - U(rest != 0)) >> fraction;
    const U top = high ? high : 1, bottom = low ? low : 1, k = top > bottom ? U(top - bottom) : U(0);
    const U width = k == 0 ? U(widths[j] ? 2 : 0) : k >= fraction ? U(kBits<U>) : U(k + 1);
    widths[j] = uint8_t(width);
  }
  if constexpr (kWas)  // in a loop of its own: in the one above it becomes a branch
    for (int64_t j = 0; j < count; ++j)
      widths[j] |= uint8_t((widths[j] == 0) & (loadu<U>(wass + j) != loadu<U>(backs + j))) * kUnforeseen;
}

// f(j, width) for at least every element whose width is not zero.
template <typename T, typename D, typename F> void each_field(const Lines<T, D>& l, int64_t count, F&& f) {
  const uint8_t* const widths = l.width;
  for (int64_t first = 0; first < count; first += 8) {
    if (loadu<uint64_t>(widths + first) == 0) continue;
    for (int64_t j = first; j < first + 8; ++j) f(j, int(widths[j] & ~kUnforeseen));
  }
}

// Writes what was; `exceptions` goes on after those that did not fit: their place (32 bits) and all their bits.
template <typename T, typename D>
void encode(const Lines<T, D>& l, int64_t count, uint32_t place, BitWriter& to, char*& exceptions) {
  using U = typename Word<D>::U;
  BitWriter fields = to;  // in registers
  each_field(l, count, [&](int64_t j, int width) {
    const U was = loadu<U>(l.was + j), code = U(ordered(was) - ordered(loadu<U>(l.back + j)));
    fields.put<U>(code, width);
    if (sign_extended<U>(code & kMasks.of[width], width) == code || j >= count) return;
    const uint32_t at = place + uint32_t(j);
    std::memcpy(exceptions, &at, 4);
    std::memcpy(exceptions + 4, &was, sizeof was);
    exceptions += 4 + sizeof was;
  });
  to = fields;
}

template <typename T, typename D>
void decode(const Lines<T, D>& l, int64_t count, uint32_t place, BitReader& from, const char*& exception,
            const char* end) {
  using U = typename Word<D>::U;
  std::memcpy(l.was, l.back, count * sizeof(D));
  BitReader fields = from;
  each_field(l, count, [&](int64_t j, int width) {
    const U code = sign_extended<U>(fields.get<U>(width), width);
    storeu(l.was + j, ordered(U(ordered(loadu<U>(l.back + j)) + code)));
  });
  from = fields;
  for (; exception < end; exception += 4 + sizeof(D)) {
    const uint32_t at = loadu<uint32_t>(exception);
    if (at - place >= uint64_t(count)) break;
    std::memcpy(l.was + (at - place), exception + 4, sizeof(D));
  }
}

}  // namespace slao::SLAO_ISA
