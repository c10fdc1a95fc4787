// For the driver: matrices between guard zones, random numbers, and the four dtypes without a look at simd.h.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <limits>
#include <string>
#include <vector>

#include "../../csrc/tensor_table.h"

#if __has_include(<sanitizer/asan_interface.h>)
#include <sanitizer/asan_interface.h>  // its macros do nothing without the sanitizer
#else
#define ASAN_POISON_MEMORY_REGION(start, size) ((void)(start), (void)(size))
#define ASAN_UNPOISON_MEMORY_REGION(start, size) ((void)(start), (void)(size))
#endif

namespace {  // the driver is one translation unit

using slao::Dtype;
using slao::Matrix;
using Values = std::vector<double>;

const Dtype kDtypes[] = {Dtype::f64, Dtype::f32, Dtype::bf16, Dtype::f16};
const char* const kNames[] = {"f64", "f32", "bf16", "f16"};
const char* name(Dtype t) { return kNames[int(t)]; }
const double kInfinity = std::numeric_limits<double>::infinity(), kNaN = std::numeric_limits<double>::quiet_NaN();
// Digits of the significand. Half a unit in the last place is 2^-digits, relative.
int digits(Dtype t) { return t == Dtype::f64 ? 53 : t == Dtype::f32 ? 24 : t == Dtype::bf16 ? 8 : 11; }
int lowest_exponent(Dtype t) { return t == Dtype::f64 ? -1022 : t == Dtype::f16 ? -14 : -126; }
double unit(Dtype t) { return std::ldexp(1.0, -digits(t)); }
double storage_rounding(double x, Dtype t) {
  return unit(t) * std::max(std::abs(x), std::ldexp(1.0, lowest_exponent(t)));
}

int failures = 0;
std::string instruction_set;
void expect(bool fine, const std::string& label, const std::string& what) {
  if (fine) return;
  if (++failures <= 20) std::printf("FAILED %s %s: %s\n", instruction_set.c_str(), label.c_str(), what.c_str());
}

struct Random {  // splitmix64: the same numbers on every machine
  uint64_t state;
  uint64_t bits() {
    uint64_t z = state += 0x9e3779b97f4a7c15u;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return z ^ (z >> 31);
  }
  int64_t below(int64_t n) { return int64_t(bits() % uint64_t(n)); }
  double normal() {
    double total = -2;
    for (int i = 0; i < 4; ++i) total += double(bits() >> 11) * 0x1p-53;
    return total * std::sqrt(3.0);  // nearly: within 3.5
  }
} random_numbers{2512};

// --- the four dtypes -----------------------------------------------------------

double decode(const char* p, Dtype t) {
  double wide;
  float narrow;
  uint16_t h;
  if (t == Dtype::f64) return std::memcpy(&wide, p, 8), wide;
  if (t == Dtype::f32) return std::memcpy(&narrow, p, 4), narrow;
  std::memcpy(&h, p, 2);
  const int field = t == Dtype::bf16 ? h >> 7 & 255 : h >> 10 & 31, full = t == Dtype::bf16 ? 255 : 31;
  const int fraction_bits = digits(t) - 1, fraction = h & ((1 << fraction_bits) - 1);
  const int significand = field ? fraction + (1 << fraction_bits) : fraction;
  const int exponent = lowest_exponent(t) - fraction_bits + std::max(field, 1) - 1;
  const double magnitude = field == full ? (fraction ? kNaN : kInfinity) : std::ldexp(significand, exponent);
  return h & 0x8000 ? -magnitude : magnitude;
}

double nearest(double x, Dtype t) {  // ties to even
  if (t == Dtype::f64 || !std::isfinite(x) || x == 0) return x;
  const double step = std::ldexp(1.0, std::max(std::ilogb(x), lowest_exponent(t)) - digits(t) + 1);
  const double y = std::copysign(std::nearbyint(x / step) * step, x);
  return std::abs(y) >= std::ldexp(1.0, 2 - lowest_exponent(t)) ? std::copysign(kInfinity, x) : y;
}

void encode(double x, char* p, Dtype t) {  // x: one of the dtype's numbers
  if (t == Dtype::f64) return void(std::memcpy(p, &x, 8));
  if (t == Dtype::f32) {
    const float narrow = float(x);
    return void(std::memcpy(p, &narrow, 4));
  }
  const int fraction_bits = digits(t) - 1, exponent = std::max(x == 0 ? -9999 : std::ilogb(x), lowest_exponent(t));
  const int top = (t == Dtype::bf16 ? 255 : 31) << fraction_bits;
  const int bits = std::isnan(x)   ? top + (1 << (fraction_bits - 1))
                   : std::isinf(x) ? top
                                   : int(std::ldexp(std::abs(x), fraction_bits - exponent)) +
                                         ((exponent - lowest_exponent(t)) << fraction_bits);
  const uint16_t h = uint16_t(bits | (std::signbit(x) ? 0x8000 : 0));
  std::memcpy(p, &h, 2);
}

// --- a matrix between guard zones --------------------------------------------------------------------------------

enum Layout { dense, padded, transposed, strided };  // padded and strided rows have gaps, which are guarded as well

class Tensor {
 public:
  Matrix m{};
  Tensor(int64_t rows, int64_t cols, Dtype t, Layout layout, int64_t offset) {
    const int64_t row_stride[] = {cols, cols + 5, 1, 2 * cols + 3}, col_stride[] = {1, 1, rows + 3, 2};
    const bool empty = rows == 0 || cols == 0;
    const int64_t reach = empty ? 0 : (rows - 1) * row_stride[layout] + (cols - 1) * col_stride[layout] + 1;
    const int64_t size = slao::element_size(t);
    start_ = kGuard + offset * size, end_ = start_ + reach * size;
    bytes_.assign(end_ + kGuard, char(0xff));  // a NaN in every dtype: what reads it shows it
    m = {bytes_.data() + start_, rows, cols, row_stride[layout], col_stride[layout], t};
  }
  Tensor(Tensor&&) = default;
  ~Tensor() { unlock(); }
  char* at(int64_t i, int64_t j) const {
    return m.data + (i * m.row_stride + j * m.col_stride) * slao::element_size(m.dtype);
  }
  Values values() const {
    Values all;
    for (int64_t i = 0; i < m.rows; ++i)
      for (int64_t j = 0; j < m.cols; ++j) all.push_back(decode(at(i, j), m.dtype));
    return all;
  }
  template <typename F> void fill(F value) {
    for (int64_t i = 0; i < m.rows; ++i)
      for (int64_t j = 0; j < m.cols; ++j) encode(nearest(value(i, j), m.dtype), at(i, j), m.dtype);
  }
  // The address sanitizer stops at the first touch of a guard zone; without it, writes are seen afterwards.
  void lock() {
    before_ = bytes_;
    ASAN_POISON_MEMORY_REGION(bytes_.data(), start_);
    ASAN_POISON_MEMORY_REGION(bytes_.data() + end_, kGuard);
  }
  void unlock() { ASAN_UNPOISON_MEMORY_REGION(bytes_.data(), bytes_.size()); }
  bool unchanged() const { return bytes_ == before_; }
  bool unchanged_outside() const {
    if (!m.data) return unchanged();
    std::vector<char> expected = before_;
    for (int64_t i = 0; i < m.rows; ++i)
      for (int64_t j = 0; j < m.cols; ++j)
        std::memcpy(expected.data() + (at(i, j) - bytes_.data()), at(i, j), slao::element_size(m.dtype));
    return bytes_ == expected;
  }
  // Back to what lock() saw; returns what stood here.
  std::vector<char> restore() {
    std::vector<char> after = bytes_;
    std::memcpy(bytes_.data(), before_.data(), bytes_.size());
    return after;
  }
  bool holds(const std::vector<char>& bytes) const { return bytes_ == bytes; }

 private:
  static constexpr int64_t kGuard = 128;
  int64_t start_, end_;
  std::vector<char> bytes_, before_;
};

Tensor random_tensor(int64_t rows, int64_t cols, Dtype t) {
  const Layout layout = Layout(random_numbers.below(4));
  Tensor tensor(rows, cols, t, layout, random_numbers.below(4));
  tensor.fill([](int64_t, int64_t) { return random_numbers.normal(); });
  return tensor;
}

void spoil(Tensor& tensor, double value) {
  if (tensor.m.rows && tensor.m.cols)
    encode(value, tensor.at(random_numbers.below(tensor.m.rows), random_numbers.below(tensor.m.cols)), tensor.m.dtype);
}

std::string describe(const Matrix& m) {
  return std::string(name(m.dtype)) + " " + std::to_string(m.rows) + "x" + std::to_string(m.cols) + " strides " +
         std::to_string(m.row_stride) + "," + std::to_string(m.col_stride);
}

}  // namespace
