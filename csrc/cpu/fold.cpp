// fold: W <- W + scaling B A over a table of records. W is read and written once; the only temporaries are a panel of
// A and a few rows of W, both in the cache.
#include "arena.h"
#include "isa.h"
#include "product.h"

namespace slao::SLAO_ISA {
namespace {

constexpr int kRows = kBytes == 64 ? 6 : 2, kVectors = 4;  // accumulators that fit the register file
template <typename T> constexpr int64_t kStep = kVectors * Lanes<T>::n;
constexpr int64_t kUnitRows = 96;                          // rows of W that share one conversion of A's panel
constexpr int64_t kPanelBytes = 128 << 10;                 // of A: half of a small L2

// `rows` <= kRows rows of `count` columns, a multiple of kVectors registers.
template <typename T, typename D>
void strip(const T* b, int64_t r, const T* a, int64_t pitch, D* w, int64_t ldw, int64_t rows, int64_t count) {
  for (int64_t j = 0; j < count; j += kStep<T>) {
    if (rows == kRows)
      product_tile<true, kRows, kVectors>(b, r, r, a + j, pitch, w + j, ldw);
    else
      for (int64_t i = 0; i < rows; ++i)
        product_tile<true, 1, kVectors>(b + i * r, r, r, a + j, pitch, w + i * ldw + j, ldw);
  }
}

// Where a thread's panel of A (r, pitch), its rows of B (kRows, r) and of W (kRows, padded) lie.
template <typename T> struct Workspace {
  int64_t padded, pitch;
  T *A, *B, *W;
  size_t size;
  Workspace(Arena arena, int64_t r, int64_t width)
      : padded(round_up(width, kStep<T>)),
        // A line more than a power of two, or all rows of the panel would share a few sets of the cache.
        pitch(padded + 64 / int64_t(sizeof(T))),
        A(arena.take<T>(r * pitch)), B(arena.take<T>(kRows * r)), W(arena.take<T>(kRows * padded)), size(arena.used) {}
};

// A piece of one record: rows [row, row_end), columns [col, col + width). wide: in double.
struct Unit {
  FoldRecord record;
  int64_t row, row_end, col, width;
  bool wide;
  size_t workspace() const {
    return wide ? Workspace<double>({}, record.A.rows, width).size : Workspace<float>({}, record.A.rows, width).size;
  }
};

template <typename T> void fold_unit(const Unit& unit, Arena arena) {
  const FoldRecord& record = unit.record;
  const int64_t r = record.A.rows, col = unit.col, count = unit.width;
  const Workspace<T> work(arena, r, count);
  const T *a = work.A, *b = work.B;
  fill(work.A, r * work.pitch, T(0));
  for (int64_t k = 0; k < r; ++k) load_span(record.A, k, col, count, work.A + k * work.pitch);
  for (int64_t row = unit.row; row < unit.row_end; row += kRows) {
    const int64_t rows = min<int64_t>(kRows, unit.row_end - row);
    for (int64_t i = 0; i < rows; ++i) {
      load_span(record.B, row + i, 0, r, work.B + i * r);
      for (int64_t k = 0; k < r; ++k) work.B[i * r + k] *= T(record.scaling);
    }
    int64_t direct = 0;  // columns that are updated where they are
    if (record.weight.col_stride == 1)
      with_type(record.weight.dtype, [&](auto d) {
        using D = decltype(d);
        if constexpr (std::is_same<T, double>::value == std::is_same<D, double>::value) {
          direct = count / kStep<T> * kStep<T>;
          D* w = (D*)record.weight.data + row * record.weight.row_stride + col;
          strip(b, r, a, work.pitch, w, record.weight.row_stride, rows, direct);
        }
      });
    if (direct == count) continue;
    const int64_t rest = count - direct, width = work.padded - direct;
    fill(work.W, kRows * width, T(0));
    for (int64_t i = 0; i < rows; ++i) load_span(record.weight, row + i, col + direct, rest, work.W + i * width);
    strip(b, r, a + direct, work.pitch, work.W, width, rows, width);
    for (int64_t i = 0; i < rows; ++i) store_span(record.weight, row + i, col + direct, rest, work.W + i * width);
  }
}

// f(unit) for each piece of a record.
template <typename F> void cut(const FoldRecord& given, F&& f) {
  if (given.A.rows == 0) return;  // r = 0 adds nothing
  const FoldRecord record = in_memory_order(given);
  const int64_t rows = record.weight.rows, cols = record.weight.cols;
  const bool wide = in_double(record);
  const int64_t step = wide ? kStep<double> : kStep<float>;
  const int64_t width = max(step, kPanelBytes / (record.A.rows * (wide ? 8 : 4)) / step * step);
  for (int64_t row = 0; row < rows; row += kUnitRows)
    for (int64_t col = 0; col < cols; col += width)
      f(Unit{record, row, min(row + kUnitRows, rows), col, min(width, cols - col), wide});
}

}  // namespace

void fold(const FoldRecord* records, int64_t count, int threads) {
  int64_t size = 0;
  size_t workspace = 0;
  for (int64_t i = 0; i < count; ++i)
    cut(records[i], [&](const Unit& unit) { ++size, workspace = max(workspace, unit.workspace()); });
  const int team = int(max<int64_t>(1, min<int64_t>(threads, size)));
  const Memory memory(size * sizeof(Unit)), workspaces(team * workspace);
  Unit* const units = (Unit*)memory.data;
  int64_t next = 0;
  for (int64_t i = 0; i < count; ++i) cut(records[i], [&](const Unit& unit) { units[next++] = unit; });
#pragma omp parallel for schedule(dynamic, 1) num_threads(team)
  for (int64_t u = 0; u < size; ++u) {
    const Arena mine{workspaces.data + thread_index() * workspace};
    units[u].wide ? fold_unit<double>(units[u], mine) : fold_unit<float>(units[u], mine);
  }
}

}  // namespace slao::SLAO_ISA
