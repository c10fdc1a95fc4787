// fold: W <- W + scaling B A over a table of records. W is read and written once; the only temporaries are a panel of
// A and a few rows of W, both in the cache.
#include <vector>

#include "isa.h"
#include "rows.h"

namespace slao::SLAO_ISA {
namespace {

constexpr int kRows = kBytes == 64 ? 6 : 2, kVectors = 4;  // accumulators that fit the register file
constexpr int64_t kUnitRows = 96;                          // rows of W that share one conversion of A's panel
constexpr int64_t kPanelBytes = 128 << 10;                 // of A: half of a small L2

template <typename T> struct Workspace {
  Scratch<T> A, B, W;
};

// MI rows of W, MJ vectors of each, stored as D: read once, written once, converted in registers.
template <int MI, int MJ, typename T, typename D>
void tile(const T* b, int64_t r, const T* a, int64_t pitch, D* w, int64_t ldw) {
  using V = typename Lanes<T>::V;
  constexpr int n = Lanes<T>::n;
  V sums[MI][MJ];
#pragma GCC unroll 8
  for (int i = 0; i < MI; ++i)
#pragma GCC unroll 8
    for (int j = 0; j < MJ; ++j) sums[i][j] = load_as<V>(w + i * ldw + j * n);
  for (int64_t k = 0; k < r; ++k) {
    V columns[MJ];
    for (int j = 0; j < MJ; ++j) columns[j] = loadu<V>(a + k * pitch + j * n);
    for (int i = 0; i < MI; ++i) {
      const V factor = splat(b[i * r + k]);
      for (int j = 0; j < MJ; ++j) sums[i][j] += factor * columns[j];
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < MI; ++i)
#pragma GCC unroll 8
    for (int j = 0; j < MJ; ++j) store(w + i * ldw + j * n, sums[i][j]);
}

// `rows` <= kRows rows of `count` columns, a multiple of kVectors registers.
template <typename T, typename D>
void strip(const T* b, int64_t r, const T* a, int64_t pitch, D* w, int64_t ldw, int64_t rows, int64_t count) {
  constexpr int64_t step = kVectors * Lanes<T>::n;
  for (int64_t j = 0; j < count; j += step) {
    if (rows == kRows)
      tile<kRows, kVectors>(b, r, a + j, pitch, w + j, ldw);
    else
      for (int64_t i = 0; i < rows; ++i) tile<1, kVectors>(b + i * r, r, a + j, pitch, w + i * ldw + j, ldw);
  }
}

int64_t panel_width(int64_t r, int64_t cols, int64_t step, int64_t size) {
  const int64_t fits = std::max<int64_t>(step, kPanelBytes / (r * size) / step * step);
  return std::min(fits, (cols + step - 1) / step * step);
}

// Rows [row, row_end) and columns [col, col + width) of one record.
template <typename T>
void fold_unit(const FoldRecord& record, int64_t row, int64_t row_end, int64_t col, int64_t width, Workspace<T>& work) {
  constexpr int64_t step = kVectors * Lanes<T>::n;
  const int64_t r = record.A.rows, count = std::min(width, record.weight.cols - col);
  // A line more than a power of two, or all rows of the panel would share a few sets of the cache.
  const int64_t padded = (count + step - 1) / step * step, pitch = padded + 64 / int64_t(sizeof(T));
  work.A.assign(r * pitch, T(0));
  for (int64_t k = 0; k < r; ++k) load_span(record.A, k, col, count, work.A.data() + k * pitch);
  work.B.resize(kRows * r);
  for (; row < row_end; row += kRows) {
    const int64_t rows = std::min<int64_t>(kRows, row_end - row);
    for (int64_t i = 0; i < rows; ++i) {
      load_span(record.B, row + i, 0, r, work.B.data() + i * r);
      for (int64_t k = 0; k < r; ++k) work.B[i * r + k] *= T(record.scaling);
    }
    const T *a = work.A.data(), *b = work.B.data();
    int64_t direct = 0;  // columns that are updated where they are
    if (record.weight.col_stride == 1)
      with_type(record.weight.dtype, [&](auto d) {
        using D = decltype(d);
        if constexpr (std::is_same<T, double>::value == std::is_same<D, double>::value) {
          direct = count / step * step;
          D* w = (D*)record.weight.data + row * record.weight.row_stride + col;
          strip(b, r, a, pitch, w, record.weight.row_stride, rows, direct);
        }
      });
    if (direct == count) continue;
    const int64_t rest = count - direct, width = padded - direct;
    work.W.assign(kRows * width, T(0));
    for (int64_t i = 0; i < rows; ++i)
      load_span(record.weight, row + i, col + direct, rest, work.W.data() + i * width);
    strip(b, r, a + direct, pitch, work.W.data(), width, rows, width);
    for (int64_t i = 0; i < rows; ++i)
      store_span(record.weight, row + i, col + direct, rest, work.W.data() + i * width);
  }
}

Matrix transposed(const Matrix& m) { return {m.data, m.cols, m.rows, m.col_stride, m.row_stride, m.dtype}; }

}  // namespace

void fold(const FoldRecord* records, int64_t count, int threads) {
  std::vector<FoldRecord> table(records, records + count);
  struct Unit { int64_t record, row, col, width; bool wide; };
  std::vector<Unit> units;
  for (int64_t i = 0; i < count; ++i) {
    FoldRecord& record = table[i];
    if (record.A.rows == 0) continue;  // r = 0 adds nothing
    // A weight stored (in, out) has its rows along the columns: Wᵀ += s Aᵀ Bᵀ walks it in memory order.
    if (record.weight.col_stride != 1 && record.weight.row_stride == 1)
      record = {transposed(record.weight), transposed(record.B), transposed(record.A), record.scaling};
    const bool wide = record.weight.dtype == Dtype::f64 || record.A.dtype == Dtype::f64 || record.B.dtype == Dtype::f64;
    const int64_t width = panel_width(record.A.rows, record.weight.cols, kVectors * kBytes / (wide ? 8 : 4), wide ? 8 : 4);
    for (int64_t row = 0; row < record.weight.rows; row += kUnitRows)
      for (int64_t col = 0; col < record.weight.cols; col += width) units.push_back({i, row, col, width, wide});
  }
#pragma omp parallel num_threads(threads)
  {
    Workspace<float> narrow;
    Workspace<double> wide;
#pragma omp for schedule(dynamic, 1)
    for (size_t u = 0; u < units.size(); ++u) {
      const Unit& unit = units[u];
      const FoldRecord& record = table[unit.record];
      const int64_t end = std::min(unit.row + kUnitRows, record.weight.rows);
      if (unit.wide)
        fold_unit(record, unit.row, end, unit.col, unit.width, wide);
      else
        fold_unit(record, unit.row, end, unit.col, unit.width, narrow);
    }
  }
}

}  // namespace slao::SLAO_ISA
