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

// P, Q or T, and where it is packed piece by piece; none where it has no data.
struct Packed {
  Role role;
  Matrix m;
  bf16* to = nullptr;
  int64_t pieces = 0;
};

// t = t_scale x P (without a P it is there already), then, if there is a Q, y = y_scale t Q + bias while t is in the
// cache.
struct Rows {
  Matrix x, t;
  const Packed *P, *Q;
  Matrix y;
  const void* bias;
  float t_scale, y_scale;
};

// d = scale xᵀ t
struct Columns {
  Matrix x;
  const Packed* t;
  Matrix d;
  float scale;
};

void run_rows(const Rows& rows, int64_t begin, int64_t end) {
  constexpr int64_t kRows = Loops::kRows;
  alignas(64) float sums[kRows * Loops::kMaxRank];
  alignas(64) bf16 lines[kRows * Loops::kMaxRank] = {};  // t without gaps, padded with zeros
  const int64_t r = rows.t.cols, pitch = Loops::pitch(r), ldt = Loops::t_pitch(r);
  for (int64_t row = begin; row < end; row += kRows) {
    const int64_t count = min(kRows, end - row);
    if (rows.P) Loops::shrink(rows.x, row, count, rows.P->to, r, sums);
    for (int64_t i = 0; i < count; ++i) {
      bf16 *line = lines + i * ldt, *out = (bf16*)rows.t.data + (row + i) * rows.t.row_stride;
      if (!rows.P) {
        copy(out, r, line);
        continue;
      }
      int64_t j = 0;
      for (; j + kFloats <= r; j += kFloats) put16(line + j, splat(rows.t_scale) * load(sums + i * pitch + j));
      for (; j < r; ++j) line[j] = to_bf16(rows.t_scale * sums[i * pitch + j]);
      copy(line, r, out);
    }
    if (rows.Q) Loops::expand(lines, count, rows.Q->to, r, rows.y_scale, (const bf16*)rows.bias, rows.y, row);
  }
}

// Work on `size` rows or columns is cut into parts of whole steps, one a thread or of at most `limit`.
int64_t part(int64_t size, int team, int64_t step, int64_t limit) {
  size = max<int64_t>(size, 1), limit = max<int64_t>(limit, 1);
  const int64_t parts = max<int64_t>(1, ((size + team - 1) / team + limit - 1) / limit) * team;
  return round_up((size + parts - 1) / parts, step);
}

// Packs all of `packed`, then computes rows and columns, each if there are any. work: multiply-adds, by which threads
// are woken.
void run(Packed* packed, int count, const Rows* rows, const Columns* columns, int64_t work, int threads) {
  const auto place = [&](Arena arena, int i) {
    const Matrix& m = packed[i].m;
    packed[i].to = arena.take<bf16>(Loops::size(packed[i].role, m));
    bf16* narrow = arena.take<bf16>(m.rows * m.cols);
    if (arena.block) packed[i].m = Loops::source(m, narrow);
    return arena;
  };
  Arena needed;
  for (int i = 0; i < count; ++i) needed = place(needed, i);
  Arena arena{kept_memory(needed.used)};
  int64_t pieces = 0;
  for (int i = 0; i < count; ++i) {
    arena = place(arena, i);
    pieces += packed[i].pieces = Loops::pieces(packed[i].role, packed[i].m);
  }
  const int team = int(max<int64_t>(1, min<int64_t>(threads, work / Loops::kWork)));
  const int64_t height = rows ? rows->t.rows : 0, row_step = part(height, team, Loops::kRowStep, height);
  const int64_t width = columns ? columns->x.cols : 0, column_step = part(width, team, Loops::kColumnStep, Loops::kStrip);
#pragma omp parallel num_threads(team) if (team > 1)
  {
#pragma omp for schedule(static)
    for (int64_t i = 0; i < pieces; ++i) {
      const Packed* at = packed;
      int64_t piece = i;
      while (piece >= at->pieces) piece -= at++->pieces;
      Loops::pack(at->role, at->m, piece, at->to);
    }
#pragma omp for schedule(static) nowait
    for (int64_t i = 0; i < height; i += row_step) run_rows(*rows, i, min(i + row_step, height));
#pragma omp for schedule(dynamic, 1) nowait
    for (int64_t j = 0; j < width; j += column_step)
      Loops::outer(columns->x, columns->t->to, columns->t->m.cols, columns->scale, columns->d, j,
                   min(j + column_step, width));
    Loops::finish();
  }
}

int64_t size(const Matrix& large, const Matrix& t) { return large.rows * large.cols * t.cols; }

void shrink(const Matrix& x, const Matrix& P, const Matrix& t, float scale, int threads) {
  Packed packed[] = {{Role::shrink, P}};
  const Rows rows{x, t, packed, nullptr, {}, nullptr, scale, 1};
  run(packed, 1, &rows, nullptr, size(x, t), threads);
}

void expand(const Matrix& t, const Matrix& Q, const void* bias, const Matrix& y, float scale, int threads) {
  Packed packed[] = {{Role::expand, Q}};
  const Rows rows{{}, t, nullptr, packed, y, bias, 1, scale};
  run(packed, 1, &rows, nullptr, size(y, t), threads);
}

void outer(const Matrix& x, const Matrix& t, const Matrix& d, float scale, int threads) {
  Packed packed[] = {{Role::outer, t}};
  const Columns columns{x, packed, d, scale};
  run(packed, 1, nullptr, &columns, size(x, t), threads);
}

void forward(const Matrix& x, const Matrix& P, const Matrix& t, const Matrix& Q, const void* bias, const Matrix& y,
             float scale, int threads) {
  Packed packed[] = {{Role::shrink, P}, {Role::expand, Q}};
  const Rows rows{x, t, packed, packed + 1, y, bias, 1, scale};
  run(packed, 2, &rows, nullptr, size(x, t) + size(y, t), threads);
}

void backward(const LoraGrads& grads, const Matrix& x, const Matrix& A, const Matrix& dx, int threads) {
  Packed packed[3];
  const Packed *P = nullptr, *Q = nullptr, *T = nullptr;
  int count = 0;
  int64_t work = 0;
  const auto add = [&](Role role, const Matrix& m, const Matrix& large) {
    packed[count] = {role, m};
    work += size(large, grads.t);
    return &packed[count++];
  };
  if (grads.g.data) P = add(Role::shrink, grads.B, grads.dy);
  if (grads.dB.data) T = add(Role::outer, grads.t, grads.dy);
  if (dx.data) Q = add(Role::expand, A, dx);
  const Rows rows{grads.dy, grads.g, P, Q, dx, nullptr, grads.scale, 1};
  const Columns columns{grads.dy, T, grads.dB, grads.scale};
  run(packed, count, P ? &rows : nullptr, T ? &columns : nullptr, work, threads);
  if (grads.dA.data) outer(x, grads.g, grads.dA, 1, threads);
}

}  // namespace

extern const LoraProducts lora_products{shrink, expand, outer, forward, backward};

}  // namespace slao::SLAO_ISA
