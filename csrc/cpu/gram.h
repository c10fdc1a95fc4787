// G = A Aᵀ: products in T (float or double), sums over more than kRun columns in double.
#pragma once
#include "arena.h"
#include "rows.h"

namespace slao::SLAO_ISA {

// 16 accumulators fill AVX-512's 32 registers well; the narrower sets have 16 registers.
constexpr int kTile = kBytes == 64 ? 4 : 3;
// fp32 sums stay short. Equal products (rows of ±1, cosines) are rounded the same way again and again: 512 of them on
// end were 7e-6 off. So a lane adds up 16 of them, then 8 such sums, and what comes of that goes to double. Where many
// rows take few values, their products err alike, and G by r times that: sums of 8 above 16 rows.
constexpr int64_t short_sum(int64_t r) { return r <= 16 ? 16 : 8; }
constexpr int64_t kShorts = 8;
// Columns of all rows that are multiplied while they are in the cache: 16 KiB of fp32 at r = 16.
template <typename T> constexpr int64_t kChunk = sizeof(T) == 8 ? 1024 : min<int64_t>(1024, 64 * Lanes<T>::n);
// Above 16 rows in fp64, so that the two tiles' rows that are multiplied stay in the first-level cache.
constexpr int64_t kManyRows = 512;
// Between rows of scratch, so that the rows that are read side by side do not share the cache's few places of one
// address modulo 4 KiB.
template <typename T> constexpr int64_t kPitch = kChunk<T> + 64 / int64_t(sizeof(T));

// kTile × kTile dot products of `count` columns, `length` of them on end, added to the vectors in `acc`; kDiagonal: the
// lower triangle of x xᵀ.
// `ahead`: two rows of the next columns, asked for on the way: 16 rows are more streams than a processor follows by
// itself, and a burst of requests would hold up the multiplications.
template <bool kDiagonal, typename T>
void gram_tile(const T* const* x, const T* const* y, int64_t count, int64_t length, typename Lanes<T>::V* acc,
               const T* const* ahead) {
  using V = typename Lanes<T>::V;
  for (int64_t k = 0; k < count;) {
    V sums[kTile][kTile] = {};
    for (const int64_t end = min(count, k + length); k < end; k += Lanes<T>::n) {
      V right[kTile];
      for (int j = 0; j < kTile; ++j) right[j] = loadu<V>(y[j] + k);
      __builtin_prefetch(ahead[0] + k, 0, 2);
      for (int i = 0; i < kTile; ++i) {
        const V left = kDiagonal ? right[i] : loadu<V>(x[i] + k);
        for (int j = 0; j <= (kDiagonal ? i : kTile - 1); ++j) sums[i][j] += left * right[j];
      }
      __builtin_prefetch(ahead[1] + k, 0, 2);
    }
    for (int i = 0; i < kTile; ++i)
      for (int j = 0; j < kTile; ++j) acc[i * kTile + j] += sums[i][j];
  }
}

template <typename T> class Gram {
  using V = typename Lanes<T>::V;
  static constexpr int64_t n = Lanes<T>::n;

 public:
  // For matrices of r rows.
  Gram(Arena& arena, int64_t r)
      : r_(r), columns_(sizeof(T) == 8 && r > 16 ? kManyRows : kChunk<T>),
        length_(sizeof(T) == 8 ? columns_ : short_sum(r) * n), tiles_((r + kTile - 1) / kTile),
        padded_(tiles_ * kTile), vectors_(tiles_ * (tiles_ + 1) / 2 * kTile * kTile),
        acc_(arena.take<V>(vectors_)), scratch_(arena.take<T>(r * kPitch<T>)), zeros_(arena.take<T>(columns_)),
        rows_(arena.take<const T*>(padded_)), next_(arena.take<const T*>(padded_ + 2)) {}

  // G (r, r), row-major: the lower triangle is written, zeros above it.
  void operator()(const Matrix& m, double* G) { (*this)(&m, 1, G); }

  // Of `parts` matrices of as many columns each, one below another, r rows in all.
  void operator()(const Matrix* m, int64_t parts, double* G) {
    fill(acc_, vectors_, V{});
    fill(G, r_ * r_, 0.0);
    // Rows are padded to whole tiles with zeros, and the last columns to a whole vector: no remainders below.
    fill(zeros_, columns_, T(0));
    fill<const T*>(next_, padded_ + 2, zeros_);
    fill<const T*>(rows_, padded_, zeros_);
    const int64_t cols = m->cols;
    bool direct = true;
    for (int64_t p = 0; p < parts; ++p)
      direct = direct && m[p].col_stride == 1 && m[p].dtype == (sizeof(T) == 8 ? Dtype::f64 : Dtype::f32);
    int64_t in_run = 0;
    for (int64_t begin = 0; begin < cols;) {
      int64_t count = min(columns_, cols - begin), at = 0;
      if (direct && count >= n) {
        count = count / n * n;
        for (int64_t p = 0; p < parts; ++p) {
          const T* data = (const T*)m[p].data + begin;
          for (int64_t i = 0; i < m[p].rows; ++i) rows_[at++] = data + i * m[p].row_stride;
        }
        for (int64_t i = 0; i < r_; ++i) next_[i] = rows_[i] + (begin + count < cols ? count : 0);
      } else {
        for (int64_t p = 0; p < parts; ++p) {
          load(m[p], begin, count, scratch_ + at * kPitch<T>);
          if (begin + count < cols) look_ahead(m[p], begin + count, count, next_ + at);
          at += m[p].rows;
        }
        for (int64_t i = 0; i < r_; ++i) {
          T* row = scratch_ + i * kPitch<T>;
          fill(row + count, round_up(count, n) - count, T(0));
          rows_[i] = row;
        }
      }
      multiply(round_up(count, n));
      begin += count;
      if ((sizeof(T) == 4 && (in_run += count) >= kShorts * length_) || begin == cols) flush(G), in_run = 0;
    }
  }

 private:
  // Columns begin to begin + count of all rows of m, one below another. A transposed matrix is read in memory's order.
  void load(const Matrix& m, int64_t begin, int64_t count, T* to) {
    if (m.row_stride != 1 || m.col_stride == 1) {
      for (int64_t i = 0; i < m.rows; ++i) load_span(m, i, begin, count, to + i * kPitch<T>);
      return;
    }
    with_type(m.dtype, [&](auto d) {
      const auto* from = (const decltype(d)*)m.data + begin * m.col_stride;
      typedef decltype(widen(*from)) W __attribute__((vector_size(4 * sizeof(widen(*from)))));
      typedef T Four __attribute__((vector_size(4 * sizeof(T))));
      const int64_t step = m.col_stride;
      int64_t j = 0;
      for (; j + 4 <= count; j += 4, from += 4 * step)  // four at a time: a store each, not four
        for (int64_t i = 0; i < m.rows; ++i) {
          const W four = {widen(from[i]), widen(from[i + step]), widen(from[i + 2 * step]), widen(from[i + 3 * step])};
          const Four wide = __builtin_convertvector(four, Four);
          std::memcpy(to + i * kPitch<T> + j, &wide, sizeof wide);
        }
      for (; j < count; ++j, from += step)
        for (int64_t i = 0; i < m.rows; ++i) to[i * kPitch<T> + j] = T(widen(from[i]));
    });
  }

  // Where the next columns lie, of which as many bytes as a row of T has are asked for: more than there are of narrower
  // ones, so never less than all.
  static void look_ahead(const Matrix& m, int64_t begin, int64_t count, const T** next) {
    const int64_t size = element_size(m.dtype), step = m.row_stride == 1 ? count : m.row_stride;
    for (int64_t i = 0; i < m.rows; ++i) next[i] = (const T*)(m.data + size * (begin * m.col_stride + i * step));
  }

  void multiply(int64_t count) {
    V* acc = acc_;
    const T* const* ahead = next_;
    const T* const* const last = next_ + padded_;
    for (int64_t I = 0; I < tiles_; ++I) {
      for (int64_t J = 0; J < I; ++J, acc += kTile * kTile) {
        gram_tile<false>(rows_ + I * kTile, rows_ + J * kTile, count, length_, acc, ahead);
        ahead = min(ahead + 2, last);
      }
      gram_tile<true>(rows_ + I * kTile, rows_ + I * kTile, count, length_, acc, ahead);
      ahead = min(ahead + 2, last);
      acc += kTile * kTile;
    }
  }

  void flush(double* G) {
    V* acc = acc_;
    for (int64_t I = 0; I < tiles_; ++I)
      for (int64_t J = 0; J <= I; ++J, acc += kTile * kTile)
        for (int64_t i = I * kTile; i < min(r_, (I + 1) * kTile); ++i)
          for (int64_t j = J * kTile; j < min(i + 1, (J + 1) * kTile); ++j)
            G[i * r_ + j] += sum(acc[(i - I * kTile) * kTile + (j - J * kTile)]);
    fill(acc_, vectors_, V{});
  }

  int64_t r_, columns_, length_, tiles_, padded_, vectors_;
  V* acc_;
  T *scratch_, *zeros_;
  const T **rows_, **next_;
};

}  // namespace slao::SLAO_ISA
