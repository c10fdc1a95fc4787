// lora_linear's rank-r products, for layers so small that a call of a GEMM library costs more than the arithmetic.
//
//   shrink  T (M, R) = s X P      rows of X
//   expand  Y (M, N) = s T Q + b  rows of Y
//   outer   D (N, R) = s Xᵀ T     columns of X
// X, Y and T are fp32 or bf16 with unit column stride; P, Q and D of that type or fp32, of any strides. Each loop is
// parallel without partial sums, so that the answer does not depend on the threads. The loops come from a policy,
// Vectors (AVX2, AVX-512, bf16 dot products) or Tiles (AMX); P, Q and T are first packed into its order.
#include <deque>

#include "isa.h"
#include "lora_linear/tiles.h"
#include "lora_linear/vectors.h"

namespace slao::SLAO_ISA {
namespace {

// P, Q or T in a policy's order: packed piece by piece, or left where it is if it lies so already.
template <typename L> struct Packed {
  using T = typename L::Element;
  Matrix m;
  Role role;
  int64_t pieces = 0;
  const T* data = nullptr;
  T* to = nullptr;

  // slot: which of the calling thread's buffers it takes.
  Packed(const Matrix& matrix, Role role, size_t slot) : m(matrix), role(role) {
    static thread_local std::deque<Scratch<T>> packed, narrow;  // a deque's elements stay where they are
    while (packed.size() <= slot) packed.emplace_back(), narrow.emplace_back();
    m = L::source(m, narrow[slot]);
    if ((data = L::as_is(role, m))) return;
    const int64_t size = L::size(role, m.rows, m.cols);
    if (int64_t(packed[slot].size()) < size) packed[slot].resize(size);
    data = to = packed[slot].data();
    pieces = L::pieces(role, m.rows, m.cols);
  }
  void pack(int64_t piece) const { L::pack(role, m, piece, to); }
};

// Piece `i` of all that is in the list.
template <typename L> void pack_piece(const std::vector<Packed<L>>& list, int64_t i) {
  for (const Packed<L>& packed : list) {
    if (i < packed.pieces) return packed.pack(i);
    i -= packed.pieces;
  }
}
template <typename L> int64_t pieces_of(const std::vector<Packed<L>>& list) {
  int64_t total = 0;
  for (const Packed<L>& packed : list) total += packed.pieces;
  return total;
}

// t = scale x P, some columns of a T; without a P they are there already.
template <typename L> struct Source {
  Matrix x, t;
  const typename L::Element* P;
  float scale;
};

// y = scale T Q + bias
template <typename L> struct Target {
  Matrix y;
  const typename L::Element *Q = nullptr, *bias = nullptr;
  float scale = 1;
};

// Rows [begin, end): the sources' columns of T side by side, then, if there is a Q, y while T is in the cache.
template <typename L>
void run_rows(const std::vector<Source<L>>& sources, int64_t r, const Target<L>& target, int64_t begin, int64_t end) {
  using T = typename L::Element;
  alignas(64) float sums[L::kRows * L::kMaxRank];
  alignas(64) T lines[L::kRows * L::kMaxRank] = {};  // T without gaps, padded with zeros
  const int64_t ldt = L::t_pitch(r);
  for (int64_t row = begin; row < end; row += L::kRows) {
    const int64_t count = std::min(L::kRows, end - row);
    T* corner = lines;
    for (const Source<L>& source : sources) {
      const int64_t own = source.t.cols, pitch = L::pitch(own);
      if (source.P) L::shrink(source.x, row, count, source.P, own, sums);
      for (int64_t i = 0; i < count; ++i) {
        T *line = corner + i * ldt, *out = (T*)source.t.data + (row + i) * source.t.row_stride;
        if (!source.P) {
          std::copy(out, out + own, line);
          continue;
        }
        int64_t j = 0;
        for (; j + kFloats <= own; j += kFloats) Step<T>::put(line + j, splat(source.scale) * load(sums + i * pitch + j));
        for (; j < own; ++j) line[j] = Step<T>::cast(source.scale * sums[i * pitch + j]);
        std::copy(line, line + own, out);
      }
      corner += own;
    }
    if (target.Q) L::expand(lines, count, target.Q, r, target.scale, target.bias, target.y, row);
  }
}

// Threads worth waking for so many multiply-adds.
template <typename L> int team_for(int64_t multiply_adds, int threads) {
  return int(std::max<int64_t>(1, std::min<int64_t>(threads, multiply_adds / L::kWork)));
}

// Work on `size` rows or columns is cut into parts of whole steps, one a thread or of at most `limit`.
inline int64_t part(int64_t size, int team, int64_t step, int64_t limit) {
  size = std::max<int64_t>(size, 1), limit = std::max<int64_t>(limit, 1);
  const int64_t parts = std::max<int64_t>(1, ((size + team - 1) / team + limit - 1) / limit) * team;
  return round_up((size + parts - 1) / parts, step);
}

template <typename L>
void pack_and_run(const std::vector<Packed<L>>& packed, const std::vector<Source<L>>& sources, int64_t r,
                  const Target<L>& target, int64_t rows, int team) {
  const int64_t step = part(rows, team, L::kRowStep, rows), pieces = pieces_of(packed);
#pragma omp parallel num_threads(team) if (team > 1)
  {
#pragma omp for schedule(static)
    for (int64_t i = 0; i < pieces; ++i) pack_piece(packed, i);
#pragma omp for schedule(static) nowait
    for (int64_t i = 0; i < rows; i += step) run_rows<L>(sources, r, target, i, std::min(i + step, rows));
    L::finish();
  }
}

template <typename L> void run_shrink(const Matrix& x, const Matrix& P, const Matrix& t, float scale, int threads) {
  const std::vector<Packed<L>> packed{{P, Role::shrink, 0}};
  const int team = team_for<L>(x.rows * x.cols * t.cols, threads);
  pack_and_run<L>(packed, {{x, t, packed[0].data, scale}}, t.cols, {}, x.rows, team);
}

template <typename L>
void run_expand(const Matrix& t, const Matrix& Q, const void* bias, const Matrix& y, float scale, int threads) {
  using T = typename L::Element;
  const std::vector<Packed<L>> packed{{Q, Role::expand, 0}};
  const int team = team_for<L>(y.rows * y.cols * t.cols, threads);
  pack_and_run<L>(packed, {{t, t, nullptr, 1}}, t.cols, {y, packed[0].data, (const T*)bias, scale}, y.rows, team);
}

template <typename L>
void run_forward(const Matrix& x, const Matrix& P, const Matrix& t, const Matrix& Q, const void* bias, const Matrix& y,
                 float scale, int threads) {
  using T = typename L::Element;
  const std::vector<Packed<L>> packed{{P, Role::shrink, 0}, {Q, Role::expand, 1}};
  const int team = team_for<L>(x.rows * (x.cols + y.cols) * t.cols, threads);
  const Target<L> target{y, packed[1].data, (const T*)bias, scale};
  pack_and_run<L>(packed, {{x, t, packed[0].data, 1}}, t.cols, target, x.rows, team);
}

// d: as many matrices as have t's columns together.
template <typename L>
void run_outer(const Matrix& x, const Matrix& t, const Matrix* d, int parts, float scale, int threads) {
  const Packed<L> p(t, Role::outer, 0);
  const int team = team_for<L>(x.rows * x.cols * t.cols, threads);
  const int64_t step = part(x.cols, team, L::kColumnStep, L::kStrip);
#pragma omp parallel num_threads(team) if (team > 1)
  {
#pragma omp for schedule(static)
    for (int64_t i = 0; i < p.pieces; ++i) p.pack(i);
#pragma omp for schedule(dynamic, 1) nowait
    for (int64_t j = 0; j < x.cols; j += step) L::outer(x, p.data, t.cols, scale, d, parts, j, std::min(j + step, x.cols));
    L::finish();
  }
}

template <typename L>
void run_backward(const LoraGrads* layers, int count, const Matrix& x, const Matrix& g, const Matrix& A, const Matrix& dx,
                  int threads) {
  std::vector<Packed<L>> packed;
  std::vector<Source<L>> sources;
  std::vector<int64_t> right;  // where a layer's T is among the packed
  std::vector<Matrix> dAs;
  int64_t work = dx.data ? dx.rows * dx.cols * A.rows : 0;
  for (int i = 0; i < count; ++i) {
    const LoraGrads& layer = layers[i];
    const int64_t size = layer.dy.rows * layer.dy.cols * layer.t.cols;
    if (layer.g.data) {
      packed.emplace_back(layer.B, Role::shrink, packed.size());
      sources.push_back({layer.dy, layer.g, packed.back().data, layer.scale});
      work += size;
    }
    if (layer.dB.data) {
      right.push_back(int64_t(packed.size()));
      packed.emplace_back(layer.t, Role::outer, packed.size());
      work += size;
    }
    if (layer.dA.data) dAs.push_back(layer.dA);
  }
  Target<L> target{dx};
  if (dx.data) {
    packed.emplace_back(A, Role::expand, packed.size());
    target.Q = packed.back().data;
  }
  const int team = team_for<L>(work, threads);
  const int64_t rows = sources.empty() ? 0 : x.rows, step = part(rows, team, L::kRowStep, rows), pieces = pieces_of(packed);
#pragma omp parallel num_threads(team) if (team > 1)
  {
#pragma omp for schedule(static)
    for (int64_t i = 0; i < pieces; ++i) pack_piece(packed, i);
#pragma omp for schedule(static) nowait
    for (int64_t i = 0; i < rows; i += step) run_rows<L>(sources, A.rows, target, i, std::min(i + step, rows));
    size_t next = 0;
    for (int i = 0; i < count; ++i) {
      const LoraGrads& layer = layers[i];
      if (!layer.dB.data) continue;
      const Packed<L>& t = packed[right[next++]];
      const int64_t cols = layer.dy.cols, strip = part(cols, team, L::kColumnStep, L::kStrip);
#pragma omp for schedule(dynamic, 1) nowait
      for (int64_t j = 0; j < cols; j += strip)
        L::outer(layer.dy, t.data, layer.t.cols, layer.scale, &layer.dB, 1, j, std::min(j + strip, cols));
    }
    L::finish();
  }
  if (!dAs.empty()) run_outer<L>(x, g, dAs.data(), int(dAs.size()), 1, threads);
}

// Calls f with the policy for X's dtype, which is one that lora_has() has.
template <typename F> void with_loops(Dtype dtype, F&& f) {
#if defined(__AMX_BF16__)
  if (dtype == Dtype::bf16) return f(Tiles{});
#elif defined(__AVX512BF16__)
  if (dtype == Dtype::bf16) return f(Vectors<bf16>{});
#endif
  if (dtype == Dtype::f32) f(Vectors<float>{});
}

}  // namespace

bool lora_has(Dtype dtype) {
  bool has = false;
  with_loops(dtype, [&](auto) { has = true; });
  return has;
}

void lora_shrink(const Matrix& x, const Matrix& P, const Matrix& t, float scale, int threads) {
  with_loops(x.dtype, [&](auto loops) { run_shrink<decltype(loops)>(x, P, t, scale, threads); });
}

void lora_expand(const Matrix& t, const Matrix& Q, const void* bias, const Matrix& y, float scale, int threads) {
  with_loops(y.dtype, [&](auto loops) { run_expand<decltype(loops)>(t, Q, bias, y, scale, threads); });
}

void lora_outer(const Matrix& x, const Matrix& t, const Matrix& d, float scale, int threads) {
  with_loops(x.dtype, [&](auto loops) { run_outer<decltype(loops)>(x, t, &d, 1, scale, threads); });
}

void lora_forward(const Matrix& x, const Matrix& A, const Matrix& t, const Matrix& B, const void* bias, const Matrix& y,
                  float scale, int threads) {
  with_loops(x.dtype, [&](auto loops) { run_forward<decltype(loops)>(x, A, t, B, bias, y, scale, threads); });
}

void lora_backward(const LoraGrads* layers, int count, const Matrix& x, const Matrix& g, const Matrix& A, const Matrix& dx,
                   int threads) {
  with_loops(x.dtype, [&](auto loops) { run_backward<decltype(loops)>(layers, count, x, g, A, dx, threads); });
}

}  // namespace slao::SLAO_ISA
