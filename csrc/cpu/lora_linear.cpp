// lora_linear's rank-r products, for layers so small that a call of a GEMM library costs more than the arithmetic.
//
//   shrink  T (M, R) = s X P      rows of X
//   expand  Y (M, N) = s T Q + b  rows of Y
//   outer   D (N, R) = s Xᵀ T     columns of X
// X, Y and T are fp32 or bf16 with unit column stride; P, Q and D of that type or fp32, of any strides. Each loop is
// parallel without partial sums, so that the answer does not depend on the threads. The loops come from a policy,
// Vectors (AVX2, AVX-512, bf16 dot products) or Tiles (AMX); P, Q and T are first packed into its order.
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
  Packed(const Matrix& matrix, Role role, int slot) : m(matrix), role(role) {
    static thread_local Scratch<T> packed[3], narrow[3];
    m = L::source(m, narrow[slot]);
    if ((data = L::as_is(m))) return;
    const int64_t size = L::size(role, m.rows, m.cols);
    if (int64_t(packed[slot].size()) < size) packed[slot].resize(size);
    data = to = packed[slot].data();
    pieces = L::pieces(role, m.rows, m.cols);
  }
  void pack(int64_t piece) const { L::pack(role, m, piece, to); }
};

// Rows [begin, end): t = scale x P, then, if there is a Q, y = scale_y t Q + bias while t is in the cache.
template <typename L> struct Rows {
  using T = typename L::Element;
  const Matrix &x, &t;
  const T* P;
  float scale;
  const Matrix* y = nullptr;
  const T *Q = nullptr, *bias = nullptr;
  float scale_y = 1;

  void operator()(int64_t begin, int64_t end) const {
    alignas(64) float sums[L::kRows * L::kMaxRank];
    alignas(64) T lines[L::kRows * L::kMaxRank] = {};  // t without gaps, padded with zeros
    const int64_t r = t.cols, pitch = L::pitch(r), ldt = L::t_pitch(r);
    for (int64_t row = begin; row < end; row += L::kRows) {
      const int64_t count = std::min(L::kRows, end - row);
      if (P) L::shrink(x, row, count, P, r, sums);
      for (int64_t i = 0; i < count; ++i) {
        T *line = lines + i * ldt, *out = (T*)t.data + (row + i) * t.row_stride;
        if (!P) {
          std::copy(out, out + r, line);
          continue;
        }
        int64_t j = 0;
        for (; j + kFloats <= r; j += kFloats) Step<T>::put(line + j, splat(scale) * load(sums + i * pitch + j));
        for (; j < r; ++j) line[j] = Step<T>::cast(scale * sums[i * pitch + j]);
        std::copy(line, line + r, out);
      }
      if (Q) L::expand(lines, count, Q, r, scale_y, bias, *y, row);
    }
  }
};

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
void run_rows(const Rows<L>& rows, const Packed<L>* P, const Packed<L>* Q, int64_t size, int team) {
  const int64_t step = part(size, team, L::kRowStep, size), p = P ? P->pieces : 0, q = Q ? Q->pieces : 0;
#pragma omp parallel num_threads(team) if (team > 1)
  {
#pragma omp for schedule(static)
    for (int64_t i = 0; i < p + q; ++i) i < p ? P->pack(i) : Q->pack(i - p);
#pragma omp for schedule(static) nowait
    for (int64_t i = 0; i < size; i += step) rows(i, std::min(i + step, size));
    L::finish();
  }
}

template <typename L> void run_shrink(const Matrix& x, const Matrix& P, const Matrix& t, float scale, int threads) {
  const Packed<L> p(P, Role::shrink, 0);
  run_rows<L>({x, t, p.data, scale}, &p, nullptr, x.rows, team_for<L>(x.rows * x.cols * t.cols, threads));
}

template <typename L>
void run_expand(const Matrix& t, const Matrix& Q, const void* bias, const Matrix& y, float scale, int threads) {
  using T = typename L::Element;
  const Packed<L> q(Q, Role::expand, 0);
  const Rows<L> rows{t, t, nullptr, 1, &y, q.data, (const T*)bias, scale};
  run_rows<L>(rows, nullptr, &q, y.rows, team_for<L>(y.rows * y.cols * t.cols, threads));
}

template <typename L> void run_outer(const Matrix& x, const Matrix& t, const Matrix& d, float scale, int threads) {
  const Packed<L> p(t, Role::outer, 0);
  const int team = team_for<L>(x.rows * x.cols * t.cols, threads);
  const int64_t step = part(x.cols, team, L::kColumnStep, L::kStrip);
#pragma omp parallel num_threads(team) if (team > 1)
  {
#pragma omp for schedule(static)
    for (int64_t i = 0; i < p.pieces; ++i) p.pack(i);
#pragma omp for schedule(dynamic, 1) nowait
    for (int64_t j = 0; j < x.cols; j += step) L::outer(x, p.data, t.cols, scale, d, j, std::min(j + step, x.cols));
    L::finish();
  }
}

template <typename L>
void run_forward(const Matrix& x, const Matrix& P, const Matrix& t, const Matrix& Q, const void* bias, const Matrix& y,
                 float scale, int threads) {
  using T = typename L::Element;
  const Packed<L> p(P, Role::shrink, 0), q(Q, Role::expand, 1);
  const Rows<L> rows{x, t, p.data, 1, &y, q.data, (const T*)bias, scale};
  run_rows<L>(rows, &p, &q, x.rows, team_for<L>(x.rows * (x.cols + y.cols) * t.cols, threads));
}

// A result without data is not wanted; dx and dA need g.
template <typename L>
void run_backward(const Matrix& dy, const Matrix& x, const Matrix& t, const Matrix& A, const Matrix& B, const Matrix& g,
                  const Matrix& dA, const Matrix& dB, const Matrix& dx, float scale, int threads) {
  const Packed<L> p(B, Role::shrink, 0), q(A, Role::expand, 1), left(t, Role::outer, 2);
  const Rows<L> rows{dy, g, p.data, scale, &dx, dx.data ? q.data : nullptr};
  const int64_t r = t.cols, with_p = g.data ? p.pieces : 0, with_q = dx.data ? q.pieces : 0;
  const int64_t pieces = with_p + with_q + (dB.data ? left.pieces : 0);
  const int64_t columns = dy.cols * (bool(g.data) + bool(dB.data)) + x.cols * bool(dx.data);
  const int team = team_for<L>(dy.rows * columns * r, threads);
  const int64_t step = part(dy.rows, team, L::kRowStep, dy.rows), strip = part(dy.cols, team, L::kColumnStep, L::kStrip);
#pragma omp parallel num_threads(team) if (team > 1)
  {
#pragma omp for schedule(static)
    for (int64_t i = 0; i < pieces; ++i)
      if (i < with_p)
        p.pack(i);
      else if (i < with_p + with_q)
        q.pack(i - with_p);
      else
        left.pack(i - with_p - with_q);
#pragma omp for schedule(static) nowait
    for (int64_t i = 0; i < (g.data ? dy.rows : 0); i += step) rows(i, std::min(i + step, dy.rows));
#pragma omp for schedule(dynamic, 1) nowait
    for (int64_t j = 0; j < (dB.data ? dy.cols : 0); j += strip)
      L::outer(dy, left.data, r, scale, dB, j, std::min(j + strip, dy.cols));
    L::finish();
  }
  if (dA.data) run_outer<L>(x, g, dA, 1, threads);
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
  with_loops(x.dtype, [&](auto loops) { run_outer<decltype(loops)>(x, t, d, scale, threads); });
}

void lora_forward(const Matrix& x, const Matrix& A, const Matrix& t, const Matrix& B, const void* bias, const Matrix& y,
                  float scale, int threads) {
  with_loops(x.dtype, [&](auto loops) { run_forward<decltype(loops)>(x, A, t, B, bias, y, scale, threads); });
}

void lora_backward(const Matrix& dy, const Matrix& x, const Matrix& t, const Matrix& A, const Matrix& B, const Matrix& g,
                   const Matrix& dA, const Matrix& dB, const Matrix& dx, float scale, int threads) {
  with_loops(x.dtype,
             [&](auto loops) { run_backward<decltype(loops)>(dy, x, t, A, B, g, dA, dB, dx, scale, threads); });
}

}  // namespace slao::SLAO_ISA
