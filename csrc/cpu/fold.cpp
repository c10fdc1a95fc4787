// fold: W <- W + scaling B A over a table of records. W is read and written once; the only temporaries are a panel of
// A and a few rows of W, both in the cache.
#include "isa.h"
#include "panel.h"

namespace slao::SLAO_ISA {
namespace {

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
  work.load_panel(record.A, col, count);
  for (int64_t row = unit.row; row < unit.row_end; row += kRows) {
    const int64_t rows = min<int64_t>(kRows, unit.row_end - row);
    work.load_rows(record, row, rows);
    int64_t direct = 0;  // columns that are updated where they are
    if (record.weight.col_stride == 1)
      with_type(record.weight.dtype, [&](auto d) {
        using D = decltype(d);
        if constexpr (std::is_same<T, double>::value == std::is_same<D, double>::value) {
          direct = count / kStep<T> * kStep<T>;
          D* w = (D*)record.weight.data + row * record.weight.row_stride + col;
          strip<true>(b, r, a, work.pitch, w, record.weight.row_stride, rows, direct);
        }
      });
    if (direct == count) continue;
    const int64_t rest = count - direct, width = work.padded - direct;
    fill(work.W, kRows * width, T(0));
    for (int64_t i = 0; i < rows; ++i) load_span(record.weight, row + i, col + direct, rest, work.W + i * width);
    strip<true>(b, r, a + direct, work.pitch, work.W, width, rows, width);
    for (int64_t i = 0; i < rows; ++i) store_span(record.weight, row + i, col + direct, rest, work.W + i * width);
  }
}

// f(unit) for each piece of a record.
template <typename F> void cut(const FoldRecord& given, F&& f) {
  if (given.A.rows == 0) return;  // r = 0 adds nothing
  const FoldRecord record = in_memory_order(given);
  const int64_t rows = record.weight.rows, cols = record.weight.cols;
  const bool wide = in_double(record);
  const int64_t width = panel_width(record);
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
