// orthogonal_init: A <- L⁻¹A with A Aᵀ = L Lᵀ, by Cholesky QR; R = Lᵀ has a positive diagonal.
//
// Two phases, each parallel over the matrices. The first reads every matrix and decides: not finite (then nothing is
// written at all), nearly dependent rows (flagged: left to Householder), or how to factor it. The second applies L⁻¹;
// where one pass would not be as orthonormal as Householder's Q, it repeats Gram and apply on the result, which is
// still in the cache. A matrix is one thread's work, in a fixed order: the answer does not depend on the threads.
#include <algorithm>
#include <cmath>
#include <vector>

#include "gram.h"
#include "isa.h"

namespace slao::SLAO_ISA {
namespace {

// Squared sine of a row's angle to the rows before it, below which an fp64 Gram has too few digits left: 1e-6².
constexpr double kPivot = 1e-12;
// Bounds of 1/σ²_min (see `factor`). One pass leaves up to 7e-8 of it (seen at (2, 3), where errors do not average), so
// fp32 stays within the contract's 1e-6. SLAO's A and fresh random ones are below 4; 16-bit storage rounds by far more.
constexpr double kOnePass = 8, kOnePass16 = 1e4;
// The fp32 Gram is wrong by about 1e-8: this bound leaves 1e-3, which a second pass removes.
constexpr double kNarrow = 1e5;

// --- G = L Lᵀ, and L⁻¹ -------------------------------------------------------------------------------------------

double dot(const double* x, const double* y, int64_t count) {
  vd sums[2] = {};
  int64_t k = 0;
  for (; k + 2 * kDoubles <= count; k += 2 * kDoubles)
    for (int j = 0; j < 2; ++j) sums[j] += loadu<vd>(x + k + j * kDoubles) * loadu<vd>(y + k + j * kDoubles);
  double total = k ? sum(sums[0] + sums[1]) : 0.0;
  for (; k < count; ++k) total += x[k] * y[k];
  return total;
}

// Lower triangles, row-major r×r. False when a pivot is too small (or not a number). condition: at least 1/σ²_min of
// the matrix with its rows scaled to length 1 (row scaling costs no accuracy): their σ² sum to r, so the inverse squares
// of the others sum to r - 2 or more, and all inverse squares are ‖L⁻¹‖²_F.
bool factor(double* L, double* inverse, int64_t r, double* condition) {
  std::vector<double> length(r);
  for (int64_t i = 0; i < r; ++i) length[i] = std::sqrt(L[i * r + i]);
  for (int64_t i = 0; i < r; ++i) {
    const double diagonal = L[i * r + i];
    for (int64_t j = 0; j <= i; ++j) {
      const double s = L[i * r + j] - dot(L + i * r, L + j * r, j);
      if (j < i) {
        L[i * r + j] = s * inverse[j * r + j];
      } else {
        if (!(s > kPivot * diagonal)) return false;
        L[i * r + i] = std::sqrt(s);
        inverse[i * r + i] = 1 / L[i * r + i];
      }
    }
  }
  for (int64_t i = 0; i < r; ++i) {  // row i of L⁻¹ = -(L_i,:i L⁻¹_:i,:) / L_ii
    double* row = inverse + i * r;
    std::fill(row, row + i, 0.0);
    for (int64_t k = 0; k < i; ++k) {
      const double l = L[i * r + k];
      for (int64_t j = 0; j <= k; ++j) row[j] -= l * inverse[k * r + j];
    }
    for (int64_t j = 0; j < i; ++j) row[j] *= row[i];
  }
  double squares = 0;
  for (int64_t i = 0; i < r; ++i)
    for (int64_t j = 0; j <= i; ++j) {
      const double m = inverse[i * r + j] * length[j];
      squares += m * m;
    }
  *condition = squares - r + 2;
  return true;
}

// --- X <- M X for a lower triangular M, in place ---------------------------------------------------------------------

// MI rows of M, from row i on, times the first i + MI rows of x; the result replaces those MI rows.
template <int MI, int MJ, typename T> void apply_tile(const T* M, int64_t r, int64_t i, T* x, int64_t pitch) {
  using V = typename Lanes<T>::V;
  constexpr int n = Lanes<T>::n;
  const T* m = M + i * r;
  V sums[MI][MJ] = {};
  for (int64_t k = 0; k < i; ++k) {
    V columns[MJ];
    for (int j = 0; j < MJ; ++j) columns[j] = loadu<V>(x + k * pitch + j * n);
    for (int a = 0; a < MI; ++a) {
      const V factor = splat(m[a * r + k]);
      for (int j = 0; j < MJ; ++j) sums[a][j] += factor * columns[j];
    }
  }
  for (int k = 0; k < MI; ++k) {  // the triangle at the diagonal
    V columns[MJ];
    for (int j = 0; j < MJ; ++j) columns[j] = loadu<V>(x + (i + k) * pitch + j * n);
    for (int a = k; a < MI; ++a) {
      const V factor = splat(m[a * r + i + k]);
      for (int j = 0; j < MJ; ++j) sums[a][j] += factor * columns[j];
    }
  }
  for (int a = 0; a < MI; ++a)
    for (int j = 0; j < MJ; ++j) storeu(x + (i + a) * pitch + j * n, sums[a][j]);
}

// From the last rows up, so that a row is overwritten only when no other needs it any more. Before each tile, the same
// rows of the columns `ahead` further on are asked for.
template <int MJ, typename T> void apply_columns(const T* M, int64_t r, T* x, int64_t pitch, int64_t ahead = 0) {
  constexpr int MI = kTile;
  constexpr int64_t line = 64 / sizeof(T), width = MJ * Lanes<T>::n;
  int64_t i = r;
  for (; i >= MI; i -= MI) {
    if (ahead)
      for (int a = 1; a <= MI; ++a)
        for (int64_t j = 0; j < width; j += line) __builtin_prefetch(x + (i - a) * pitch + ahead + j, 1, 2);
    apply_tile<MI, MJ>(M, r, i - MI, x, pitch);
  }
  for (; i >= 1; --i) apply_tile<1, MJ>(M, r, i - 1, x, pitch);
}

// One vector of columns of R rows, all in registers. Rows that lie a multiple of 4 KiB apart, as in a contiguous A of
// 4096 columns, share one set of a small cache: it holds 8 of them and would read every line again and again.
template <int R, typename T> void apply_registers(const T* M, T* x, int64_t pitch, int64_t ahead) {
  using V = typename Lanes<T>::V;
  constexpr int MI = kBytes == 64 ? 8 : 4;  // chains of multiply-adds that hide each other's latency
  V rows[R];
#pragma GCC unroll 16
  for (int k = 0; k < R; ++k) {
    rows[k] = loadu<V>(x + k * pitch);
    __builtin_prefetch(x + k * pitch + ahead, 1, 2);
  }
#pragma GCC unroll 16
  for (int i = R - MI; i >= 0; i -= MI) {
    V sums[MI] = {};
#pragma GCC unroll 16
    for (int k = 0; k < i + MI; ++k)
#pragma GCC unroll 16
      for (int a = 0; a < MI; ++a)
        if (k <= i + a) sums[a] += splat(M[(i + a) * R + k]) * rows[k];
#pragma GCC unroll 16
    for (int a = 0; a < MI; ++a) storeu(x + (i + a) * pitch, sums[a]);
  }
}

// M (r, r) has zeros above its diagonal; x has `cols` columns and rows `pitch` apart.
template <typename T> void apply(const T* M, int64_t r, T* x, int64_t pitch, int64_t cols, Scratch<T>& edge) {
  constexpr int n = Lanes<T>::n;
  int64_t j = 0;
  if (r == 8)
    for (; j + n <= cols; j += n) apply_registers<8>(M, x + j, pitch, 8 * n);
  if (kBytes == 64 && r == 16)
    for (; j + n <= cols; j += n) apply_registers<16>(M, x + j, pitch, 8 * n);
  for (; j + 4 * n <= cols; j += 4 * n) apply_columns<4>(M, r, x + j, pitch, j + 16 * n <= cols ? 12 * n : 0);
  for (; j + n <= cols; j += n) apply_columns<1>(M, r, x + j, pitch);
  if (j == cols) return;
  edge.assign(r * n, T(0));  // the last columns, fewer than a vector
  for (int64_t i = 0; i < r; ++i) std::copy(x + i * pitch + j, x + i * pitch + cols, edge.data() + i * n);
  apply_columns<1>(M, r, edge.data(), n);
  for (int64_t i = 0; i < r; ++i) std::copy(edge.data() + i * n, edge.data() + i * n + (cols - j), x + i * pitch + j);
}

// --- the two phases ------------------------------------------------------------------------------------------------

struct Plan {
  std::vector<double> L, inverse;
  double condition = 0;
};

struct Workspace {
  Gram<float> narrow_gram;
  Gram<double> wide_gram;
  Scratch<float> narrow_scratch, narrow_edge;
  Scratch<double> wide_scratch, wide_edge;
  Gram<float>& gram(float) { return narrow_gram; }
  Gram<double>& gram(double) { return wide_gram; }
  Scratch<float>& scratch(float) { return narrow_scratch; }
  Scratch<double>& scratch(double) { return wide_scratch; }
  Scratch<float>& edge(float) { return narrow_edge; }
  Scratch<double>& edge(double) { return wide_edge; }
};

bool all_finite(const Matrix& m, Scratch<double>& row) {
  row.resize(m.cols);
  for (int64_t i = 0; i < m.rows; ++i) {
    load_span(m, i, 0, m.cols, row.data());
    for (double x : row)
      if (!std::isfinite(x)) return false;
  }
  return true;
}

bool needs_second_pass(const Matrix& m, const Plan& plan) {
  return plan.condition > (m.dtype == Dtype::bf16 || m.dtype == Dtype::f16 ? kOnePass16 : kOnePass);
}

// Whether an fp32 Gram matrix was good enough for a first pass.
bool narrow_suffices(const Matrix& m, Plan& plan, Workspace& work) {
  if (m.dtype == Dtype::f64) return false;
  work.narrow_gram(m, plan.L.data());
  for (int64_t i = 0; i < m.rows; ++i) {  // far from where squares overflow or lose digits; false for NaN
    const double square = plan.L[i * m.rows + i];
    if (!(square > 1e-24 && square < 1e+24)) return false;
  }
  return factor(plan.L.data(), plan.inverse.data(), m.rows, &plan.condition) && plan.condition <= kNarrow;
}

Status inspect(const Matrix& m, Plan& plan, Workspace& work) {
  const int64_t r = m.rows;
  plan.L.assign(r * r, 0.0);
  plan.inverse.assign(r * r, 0.0);
  if (narrow_suffices(m, plan, work)) return Status::done;
  work.wide_gram(m, plan.L.data());
  bool lost = false;
  for (int64_t i = 0; i < r; ++i) {
    const double square = plan.L[i * r + i];
    // fp64 storage can overflow its own squares, or lose them; everything else is finite exactly when its Gram is.
    if (!std::isfinite(square)) {
      if (m.dtype != Dtype::f64 || !all_finite(m, work.wide_edge)) return Status::not_finite;
      lost = true;
    }
    lost = lost || square < 1e-200;
  }
  if (lost) return Status::flagged;
  return factor(plan.L.data(), plan.inverse.data(), r, &plan.condition) ? Status::done : Status::flagged;
}

// Whether L⁻¹A may be computed in fp32: one pass is enough (of two, the first one's error would not be in R: R Q would
// miss A by 1e-7 κ), and fp32 holds L⁻¹ with all its digits (rows of denormals have an inverse above its range).
bool narrow_apply(const Matrix& m, const Plan& plan) {
  if (m.dtype == Dtype::f64 || needs_second_pass(m, plan)) return false;
  for (double x : plan.inverse)
    if (!(std::abs(x) < 0x1p100)) return false;
  for (int64_t i = 0; i < m.rows; ++i)
    if (plan.inverse[i * m.rows + i] < 0x1p-100) return false;
  return true;
}

template <typename T> void finish(const Matrix& m, const Matrix& triangle, Plan& plan, Workspace& work) {
  const int64_t r = m.rows, cols = m.cols;
  // Where the storage is what is computed in, the matrix is its own scratch.
  const bool direct = m.col_stride == 1 && m.dtype == (sizeof(T) == 8 ? Dtype::f64 : Dtype::f32);
  Matrix x = m;
  if (!direct) {
    auto& scratch = work.scratch(T{});
    scratch.resize(r * cols);
    x = {(char*)scratch.data(), r, cols, cols, 1, sizeof(T) == 8 ? Dtype::f64 : Dtype::f32};
    for (int64_t i = 0; i < r; ++i) load_span(m, i, 0, cols, scratch.data() + i * cols);
  }
  T* rows = (T*)x.data;
  Scratch<T> M(plan.inverse.begin(), plan.inverse.end());
  apply(M.data(), r, rows, x.row_stride, cols, work.edge(T{}));
  if (needs_second_pass(m, plan)) {
    std::vector<double> L(r * r), inverse(r * r), product(r * r, 0.0);
    work.gram(T{})(x, L.data());
    double ignored;
    factor(L.data(), inverse.data(), r, &ignored);  // of nearly the identity: cannot fail
    for (int64_t i = 0; i < r * r; ++i) M[i] = T(inverse[i]);
    apply(M.data(), r, rows, x.row_stride, cols, work.edge(T{}));
    for (int64_t i = 0; i < r; ++i)  // A = L₁ (L₂ Q)
      for (int64_t k = 0; k <= i; ++k)
        for (int64_t j = 0; j <= k; ++j) product[i * r + j] += plan.L[i * r + k] * L[k * r + j];
    plan.L.swap(product);
  }
  if (!direct)
    for (int64_t i = 0; i < r; ++i) store_span(m, i, 0, cols, rows + i * cols);
  if (triangle.data) {
    std::vector<double> row(r);
    for (int64_t i = 0; i < r; ++i) {  // R = Lᵀ
      for (int64_t j = 0; j < r; ++j) row[j] = j < i ? 0.0 : plan.L[j * r + i];
      store_span(triangle, i, 0, r, row.data());
    }
  }
}

}  // namespace

// triangles: where R goes, or null data. kept: where a matrix is copied before it is written, or null. Returns false, with nothing written, when a matrix is not finite. Matrices
// that come back flagged are not written either: the caller has Householder for them.
bool orthogonal_init(const Matrix* matrices, const Matrix* triangles, const Matrix* kept, Status* status, int64_t count,
                     int threads) {
  std::vector<Plan> plans(count);
  bool finite = true;
#pragma omp parallel num_threads(threads)
  {
    Workspace work;
#pragma omp for schedule(dynamic, 1) reduction(&& : finite)
    for (int64_t i = 0; i < count; ++i) {
      status[i] = inspect(matrices[i], plans[i], work);
      finite = finite && status[i] != Status::not_finite;
    }
    if (finite) {
#pragma omp for schedule(dynamic, 1)
      for (int64_t i = count - 1; i >= 0; --i) {  // backwards: what was read last may still be in a cache
        if (kept) copy_matrix(kept[i], matrices[i]);  // and finds it in the cache, where it then is read once more
        if (status[i] != Status::done) continue;
        const Matrix triangle = triangles ? triangles[i] : Matrix{};
        if (narrow_apply(matrices[i], plans[i]))
          finish<float>(matrices[i], triangle, plans[i], work);
        else
          finish<double>(matrices[i], triangle, plans[i], work);
      }
    }
  }
  return finite;
}

}  // namespace slao::SLAO_ISA
