// exact_fold: W' = W + d, d = scaling B A, with what rounding loses written down; exact_unfold: W again, bit for bit.
//
// d is computed by the same instructions both times, so W' - d, rounded ("back"), is the same number both times too: what
// is written is W's distance from it, counted in neighbouring numbers. In how many bits follows from W' and back, which
// the reader has as well (lines.h), so the fields need no lengths; what does not fit its field is listed beside.
//
// Pieces of W are independent, in the same places whatever the number of threads. A piece's stream: the number of
// exceptions (32 bits), the fields, the exceptions.
#include "isa.h"
#include "panel.h"
#include "exact_fold/lines.h"

namespace slao::SLAO_ISA {
namespace {

constexpr int64_t kPieceSize = 1 << 16;  // elements, about: a few pages of stream

struct Piece {
  const FoldRecord* record;
  int64_t index, row, row_end, col, width;
  int64_t size() const { return (row_end - row) * width; }
  // Every element with a field of all its bits and an exception, which no element has.
  int64_t most() const { return round_up(8 + size() * (2 * element_size(record->weight.dtype) + 4), 64); }
};

// f(piece) for each piece of the records, which lie as they are to be walked.
template <typename F> void cut(const FoldRecord* records, int64_t count, F&& f) {
  for (int64_t i = 0; i < count; ++i) {
    const FoldRecord& record = records[i];
    const int64_t rows = record.weight.rows, cols = record.weight.cols;
    const int64_t width = max<int64_t>(1, min(cols, panel_width(record)));
    const int64_t step = max(kUnitRows, kPieceSize / width);
    for (int64_t row = 0; row < rows; row += step)
      for (int64_t col = 0; col < cols; col += width)
        f(Piece{&record, i, row, min(row + step, rows), col, min(width, cols - col)});
  }
}

// In every thread: denormals are numbers, and rounding is to nearest, whatever the thread was told before
// (torch.set_flush_denormal holds for the calling thread alone).
class PlainArithmetic {
 public:
#if defined(__x86_64__)
  PlainArithmetic() : before(__builtin_ia32_stmxcsr()) { __builtin_ia32_ldmxcsr(0x1f80); }
  ~PlainArithmetic() { __builtin_ia32_ldmxcsr(before); }
 private:
  unsigned before;
#elif defined(__aarch64__)
  PlainArithmetic() {
    asm volatile("mrs %0, fpcr" : "=r"(before));
    asm volatile("msr fpcr, %0" ::"r"(uint64_t(0)));
  }
  ~PlainArithmetic() { asm volatile("msr fpcr, %0" ::"r"(before)); }
 private:
  uint64_t before;
#else
  PlainArithmetic() {}
#endif
};

// f(T{}, D{}): what the piece is computed in and stored as.
template <typename F> void with_types(const Piece& piece, F&& f) {
  with_type(piece.record->weight.dtype, [&](auto d) {
    if constexpr (!std::is_same<decltype(d), double>::value)
      if (!in_double(*piece.record)) return f(float{}, d);
    f(double{}, d);
  });
}

template <typename T, typename D> D* row_of(const Piece& piece, int64_t row) {
  const Matrix& W = piece.record->weight;
  return (D*)W.data + row * W.row_stride + piece.col * W.col_stride;
}

// d of `rows` rows from `row` on, into the workspace. Never inlined: in two copies of it a compiler might make a product
// and a sum one instruction in the one and two in the other.
template <typename T>
__attribute__((noinline)) void products(const Workspace<T>& work, const FoldRecord& record, int64_t row, int64_t rows) {
  work.load_rows(record, row, rows);
  strip<false>(work.B, record.A.rows, work.A, work.pitch, work.W, work.padded, rows, work.padded);
}

// f(row, d's row, how many rows of the piece were before) for each row, with d in the workspace.
template <typename T, typename F> void each_row(const Piece& piece, const Workspace<T>& work, F&& f) {
  const FoldRecord& record = *piece.record;
  work.load_panel(record.A, piece.col, piece.width);
  for (int64_t row = piece.row; row < piece.row_end; row += kRows) {
    const int64_t rows = min<int64_t>(kRows, piece.row_end - row);
    products(work, record, row, rows);
    for (int64_t i = 0; i < rows; ++i) f(row + i, work.W + i * work.padded, row + i - piece.row);
  }
}

template <typename T, typename D> size_t workspace_of(const Piece& piece) {
  const Workspace<T> work({}, piece.record->A.rows, piece.width);
  return Lines<T, D>({nullptr, work.size}, piece.width, piece.row_end - piece.row).size;
}

// The bytes of the piece's stream, at `to`.
template <typename T, typename D> int64_t fold_piece(const Piece& piece, Arena arena, char* to, uint64_t& sum) {
  const int64_t count = piece.width, stride = piece.record->weight.col_stride;
  const Workspace<T> work(arena, piece.record->A.rows, count);
  const Lines<T, D> l({arena.block, work.size}, count, piece.row_end - piece.row);
  begin(l, piece.col, count);
  BitWriter fields(to + 4);
  char* exceptions = l.exceptions;
  each_row(piece, work, [&](int64_t row, const T* d, int64_t before) {
    D* w = row_of<T, D>(piece, row);
    convert(w, stride, l.was, 1, count);
    add(l, d, count);
    subtract(l, d, count);
    set_widths<true>(l, count);
    encode(l, count, uint32_t(before * count), fields, exceptions);
    convert(l.now, 1, w, stride, count);
    sum += row_sum(l.now, count, l.keys, row);
  });
  const int64_t bytes = fields.finish(), listed = exceptions - l.exceptions;
  const uint32_t number = uint32_t(listed / int64_t(4 + sizeof(D)));
  std::memcpy(to, &number, 4);
  std::memcpy(to + 4 + bytes, l.exceptions, listed);
  return 4 + bytes + listed;
}

// Whether the stream was used up to its last field, as it is where the arithmetic was that of the fold.
template <typename T, typename D> bool unfold_piece(const Piece& piece, Arena arena, const char* from, int64_t length) {
  const int64_t count = piece.width, stride = piece.record->weight.col_stride;
  const Workspace<T> work(arena, piece.record->A.rows, count);
  const Lines<T, D> l({arena.block, work.size}, count, piece.row_end - piece.row);
  begin(l, piece.col, count);
  const int64_t listed = min<int64_t>(loadu<uint32_t>(from) * int64_t(4 + sizeof(D)), length - 4);
  const char *exception = from + length - listed, *const end = from + length;
  BitReader fields(from + 4, length - 4 - listed);
  each_row(piece, work, [&](int64_t row, const T* d, int64_t before) {
    D* w = row_of<T, D>(piece, row);
    convert(w, stride, l.now, 1, count);
    subtract(l, d, count);
    set_widths<false>(l, count);
    decode(l, count, uint32_t(before * count), fields, exception, end);
    convert(l.was, 1, w, stride, count);
  });
  return fields.finished() && exception == end;
}

template <typename T, typename D> uint64_t sum_piece(const Piece& piece, Arena arena) {
  const Lines<T, D> l(arena, piece.width, 0);
  begin(l, piece.col, piece.width);
  uint64_t sum = 0;
  for (int64_t row = piece.row; row < piece.row_end; ++row) {
    convert(row_of<T, D>(piece, row), piece.record->weight.col_stride, l.now, 1, piece.width);
    sum += row_sum(l.now, piece.width, l.keys, row);
  }
  return sum;
}

struct Plan {
  int64_t pieces = 0;
  size_t workspace = 0;  // a thread's
  Plan(const FoldRecord* records, int64_t count) {
    cut(records, count, [&](const Piece& piece) {
      ++pieces;
      with_types(piece, [&](auto t, auto d) { workspace = max(workspace, workspace_of<decltype(t), decltype(d)>(piece)); });
    });
  }
};

// All pieces, and what every thread needs, before the first thread starts.
class Pieces {
 public:
  Pieces(const FoldRecord* records, int64_t count, int threads)
      : plan(records, count), team(int(max<int64_t>(1, min<int64_t>(threads, plan.pieces)))),
        list(plan.pieces * sizeof(Piece)), workspaces(team * plan.workspace) {
    int64_t next = 0;
    cut(records, count, [&](const Piece& piece) { (*this)[next++] = piece; });
  }
  int64_t size() const { return plan.pieces; }
  Piece& operator[](int64_t p) const { return ((Piece*)list.data)[p]; }
  // f(T{}, D{}, p, piece, the thread's memory) for each piece, on all threads.
  template <typename F> void run(F&& f) const {
#pragma omp parallel num_threads(team)
    {
      const PlainArithmetic plain;
      const Arena mine{workspaces.data + thread_index() * plan.workspace};
#pragma omp for schedule(dynamic, 1)
      for (int64_t p = 0; p < plan.pieces; ++p) {
        const Piece& piece = (*this)[p];
        with_types(piece, [&](auto t, auto d) { f(t, d, p, piece, mine); });
      }
    }
  }

 private:
  const Plan plan;
  const int team;
  const Memory list, workspaces;
};

}  // namespace

void exact_plan(const FoldRecord* records, int64_t count, int64_t& pieces, int64_t& bytes) {
  pieces = bytes = 0;
  cut(records, count, [&](const Piece& piece) { ++pieces, bytes += piece.most(); });
}

int64_t exact_fold(const FoldRecord* records, int64_t count, char* stream, int64_t* lengths, uint64_t* sums,
                   int threads) {
  const Pieces pieces(records, count, threads);
  const Memory scratch(pieces.size() * 16);
  int64_t* const at = (int64_t*)scratch.data;
  uint64_t* const parts = (uint64_t*)(at + pieces.size());
  int64_t total = 0;
  for (int64_t p = 0; p < pieces.size(); ++p) at[p] = total, parts[p] = 0, total += pieces[p].most();
  pieces.run([&](auto t, auto d, int64_t p, const Piece& piece, Arena mine) {
    lengths[p] = fold_piece<decltype(t), decltype(d)>(piece, mine, stream + at[p], parts[p]);
  });
  fill(sums, count, uint64_t(0));
  int64_t used = 0;
  for (int64_t p = 0; p < pieces.size(); ++p) {  // close up
    std::memmove(stream + used, stream + at[p], lengths[p]);
    used += lengths[p], sums[pieces[p].index] += parts[p];
  }
  return used;
}

bool exact_unfold(const FoldRecord* records, int64_t count, const char* stream, const int64_t* lengths, int threads) {
  const Pieces pieces(records, count, threads);
  const Memory scratch(pieces.size() * 8);
  int64_t* const at = (int64_t*)scratch.data;
  int64_t total = 0, fine = 0;
  for (int64_t p = 0; p < pieces.size(); ++p) at[p] = total, total += lengths[p];
  pieces.run([&](auto t, auto d, int64_t p, const Piece& piece, Arena mine) {
    at[p] = unfold_piece<decltype(t), decltype(d)>(piece, mine, stream + at[p], lengths[p]);
  });
  for (int64_t p = 0; p < pieces.size(); ++p) fine += at[p];
  return fine == pieces.size();
}

void exact_sums(const FoldRecord* records, int64_t count, uint64_t* sums, int threads) {
  const Pieces pieces(records, count, threads);
  const Memory scratch(pieces.size() * 8);
  uint64_t* const parts = (uint64_t*)scratch.data;
  pieces.run([&](auto t, auto d, int64_t p, const Piece& piece, Arena mine) {
    parts[p] = sum_piece<decltype(t), decltype(d)>(piece, mine);
  });
  fill(sums, count, uint64_t(0));
  for (int64_t p = 0; p < pieces.size(); ++p) sums[pieces[p].index] += parts[p];
}

}  // namespace slao::SLAO_ISA
