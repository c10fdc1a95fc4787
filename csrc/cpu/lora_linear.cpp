// lora_linear's rank-r products in bf16, for layers so small that a call of a GEMM library costs more than the
// arithmetic.
//
//   shrink  T (M, R) = s X P      rows of X
//   expand  Y (M, N) = s T Q + b  rows of Y
//   outer   D (N, R) = s Xᵀ T     columns of X
// X, Y and T are bf16 with unit column stride; P, Q and D bf16 or fp32, of any strides. Each loop is parallel without
// partial sums, so that the answer does not depend on the threads. The loops are Vectors' (bf16 dot products) or Tiles'
// (AMX); P, Q and T are first packed into their order.
#include "lora_linear/tiles.h"
#include "lora_linear/vectors.h"

#include "isa.h"

namespace slao::SLAO_ISA {
namespace {

#if defined(__AMX_BF16__)
using Loops = Tiles;
#else
using Loops = Vectors;
#endif

// P, Q or T, and where it is packed piece by piece.
struct Packed {
  Role role;
  Matrix m;
  bf16* to;
  int64_t pieces;
};

// Rows [begin, end), with P and Q where they are packed; y is computed while t is in the cache.
void run_rows(const LoraRows& rows, const bf16* P, const bf16* Q, int64_t begin, int64_t end) {
  constexpr int64_t kRows = Loops::kRows;
  alignas(64) float sums[kRows * Loops::kMaxRank];
  alignas(64) bf16 lines[kRows * Loops::kMaxRank] = {};  // t without gaps, padded with zeros
  const int64_t r = rows.t.cols, pitch = Loops::pitch(r), ldt = Loops::t_pitch(r);
  for (int64_t row = begin; row < end; row += kRows) {
    const int64_t count = min(kRows, end - row);
    if (P) Loops::shrink(rows.x, row, count, P, r, sums);
    for (int64_t i = 0; i < count; ++i) {
      bf16 *line = lines + i * ldt, *out = (bf16*)rows.t.data + (row + i) * rows.t.row_stride;
      if (!P) {
        copy(out, r, line);
        continue;
      }
      int64_t j = 0;
      for (; j + kFloats <= r; j += kFloats) put16(line + j, splat(rows.t_scale) * load(sums + i * pitch + j));
      for (; j < r; ++j) line[j] = to_bf16(rows.t_scale * sums[i * pitch + j]);
      copy(line, r, out);
    }
    if (Q) Loops::expand(lines, count, Q, r, rows.y_scale, (const bf16*)rows.bias, rows.y, row);
  }
}

// Work on `size` rows or columns is cut into parts of whole steps, one a thread or of at most `limit`.
int64_t part(int64_t size, int team, int64_t step, int64_t limit) {
  size = max<int64_t>(size, 1), limit = max<int64_t>(limit, 1);
  const int64_t parts = max<int64_t>(1, ((size + team - 1) / team + limit - 1) / limit) * team;
  return round_up((size + parts - 1) / parts, step);
}

int64_t size(const Matrix& large, const Matrix& t) { return large.rows * large.cols * t.cols; }

// Packs the small matrices that have data, then computes rows and columns, if there are any.
void run(const LoraRows& rows, const LoraOuter& columns, int threads) {
  Packed packed[3], *end = packed;
  int64_t work = 0;  // multiply-adds, by which threads are woken
  const auto add = [&](bool wanted, Role role, const Matrix& m, int64_t more) -> const Packed* {
    if (!wanted) return nullptr;
    *end = {role, m, nullptr, 0}, work += more;
    return end++;
  };
  const Packed* P = add(rows.P.data, Role::shrink, rows.P, size(rows.x, rows.t));
  const Packed* Q = add(rows.Q.data, Role::expand, rows.Q, size(rows.y, rows.t));
  const Packed* T = add(columns.d.data, Role::outer, columns.t, size(columns.x, columns.t));
  const auto place = [&](Arena arena, Packed& p) {
    p.to = arena.take<bf16>(Loops::size(p.role, p.m));
    bf16* narrow = arena.take<bf16>(p.m.rows * p.m.cols);
    if (arena.block) p.m = dense(p.m, narrow);
    return arena;
  };
  Arena needed;
  for (Packed* p = packed; p < end; ++p) needed = place(needed, *p);
  Arena arena{kept_memory(needed.used)};
  int64_t total = 0;
  for (Packed* p = packed; p < end; ++p) {
    arena = place(arena, *p);
    total += p->pieces = pieces(p->role, p->m);
  }
  const int team = int(max<int64_t>(1, min<int64_t>(threads, work / Loops::kWork)));
  const int64_t height = P || Q ? rows.t.rows : 0, row_step = part(height, team, Loops::kRowStep, height);
  const int64_t width = T ? columns.x.cols : 0, column_step = part(width, team, Loops::kColumnStep, Loops::kStrip);
#pragma omp parallel num_threads(team) if (team > 1)
  {
#pragma omp for schedule(static)
    for (int64_t i = 0; i < total; ++i) {
      const Packed* at = packed;
      int64_t piece = i;
      while (piece >= at->pieces) piece -= at++->pieces;
      Loops::pack(at->role, at->m, piece, at->to);
    }
#pragma omp for schedule(static) nowait
    for (int64_t i = 0; i < height; i += row_step)
      run_rows(rows, P ? P->to : nullptr, Q ? Q->to : nullptr, i, min(i + row_step, height));
#pragma omp for schedule(dynamic, 1) nowait
    for (int64_t j = 0; j < width; j += column_step)
      Loops::outer(columns.x, T->to, columns.t.cols, columns.scale, columns.d, j, min(j + column_step, width));
    Loops::finish();
  }
}

void rows(const LoraRows& wanted, int threads) { run(wanted, {}, threads); }

void outer(const LoraOuter& wanted, int threads) { run({}, wanted, threads); }

void backward(const LoraBackward& b, int threads) {
  const Matrix none{}, &P = b.g.data ? b.B : none, &Q = b.dx.data ? b.A : none;
  run({b.dy, P, b.g, Q, b.dx, nullptr, b.scale, 1}, {b.dy, b.t, b.dB, b.scale}, threads);
  if (b.dA.data) outer({b.x, b.g, b.dA, 1}, threads);
}

}  // namespace

extern const LoraProducts lora_products{rows, outer, backward};

}  // namespace slao::SLAO_ISA
