// orthogonal_init: A <- L⁻¹A with A Aᵀ = L Lᵀ, by Cholesky QR with an fp64 Gram matrix; R = Lᵀ has a positive diagonal.
//
// Two phases, each parallel over the matrices. The first reads every matrix and decides: not finite (then nothing is
// written at all), nearly dependent rows (flagged: left to Householder), or how to factor it. The second applies L⁻¹;
// where one pass would not be as orthonormal as Householder's Q, it repeats Gram and apply on the result, which is
// still in the cache. A matrix is one thread's work, in a fixed order: the answer does not depend on the threads.
#include <algorithm>
#include <cmath>
#include <vector>

#include "isa.h"
#include "rows.h"

namespace slao::SLAO_ISA {
namespace {

// Squared sine of a row's angle to the rows before it, below which an fp64 Gram has too few digits left: 1e-6².
constexpr double kPivot = 1e-12;
// One pass leaves about 1e-8 κ; up to κ_F = 5 r that stays within the contract's 1e-6 (tests: κ from 1 to 1e7).
constexpr double kOnePass = 5.0;
// Columns that are widened to fp64 at a time: r rows of them fit the L1 cache up to r = 16 and the L2 up to r = 256.
int64_t chunk_columns(int64_t r) { return r > 32 && r <= 64 ? 128 : 256; }

// --- G = A Aᵀ in fp64: lower triangle of r×r ---------------------------------------------------------------------

// One tile of MI×MJ dot products over `count` columns, added to the vectors in `acc`.
template <int MI, int MJ>
void gram_tile(const double* x, const double* y, int64_t pitch, int64_t count, vd* acc) {
  vd sums[MI][MJ];
  for (int i = 0; i < MI; ++i)
    for (int j = 0; j < MJ; ++j) sums[i][j] = acc[i * MJ + j];
  for (int64_t k = 0; k < count; k += kDoubles) {
    vd right[MJ];
    for (int j = 0; j < MJ; ++j) right[j] = loadu<vd>(y + j * pitch + k);
    for (int i = 0; i < MI; ++i) {
      const vd left = loadu<vd>(x + i * pitch + k);
      for (int j = 0; j < MJ; ++j) sums[i][j] += left * right[j];
    }
  }
  for (int i = 0; i < MI; ++i)
    for (int j = 0; j < MJ; ++j) acc[i * MJ + j] = sums[i][j];
}

// 16 accumulators fill AVX-512's 32 registers well; the narrower sets have 16 registers.
constexpr int kTile = kBytes == 64 ? 4 : 2;

void gram(const Matrix& m, double* G, Scratch<vd>& acc, Scratch<double>& wide) {
  // Rows are padded to whole tiles with zeros, and columns to whole vectors: no remainders below.
  const int64_t r = m.rows, tiles = (r + kTile - 1) / kTile, chunk = chunk_columns(r);
  acc.assign(tiles * (tiles + 1) / 2 * kTile * kTile, vd{});
  wide.assign(tiles * kTile * chunk, 0.0);
  for (int64_t begin = 0; begin < m.cols; begin += chunk) {
    const int64_t count = std::min(chunk, m.cols - begin), whole = (count + kDoubles - 1) / kDoubles * kDoubles;
    for (int64_t i = 0; i < r; ++i) {
      load_span(m, i, begin, count, wide.data() + i * chunk);
      std::fill(wide.data() + i * chunk + count, wide.data() + i * chunk + whole, 0.0);
    }
    vd* a = acc.data();
    for (int64_t I = 0; I < tiles; ++I)
      for (int64_t J = 0; J <= I; ++J, a += kTile * kTile)
        gram_tile<kTile, kTile>(wide.data() + I * kTile * chunk, wide.data() + J * kTile * chunk, chunk, whole, a);
  }
  const vd* a = acc.data();
  for (int64_t I = 0; I < tiles; ++I)
    for (int64_t J = 0; J <= I; ++J, a += kTile * kTile)
      for (int64_t i = I * kTile; i < std::min(r, (I + 1) * kTile); ++i)
        for (int64_t j = J * kTile; j < std::min(r, (J + 1) * kTile); ++j)
          G[i * r + j] = sum(a[(i - I * kTile) * kTile + (j - J * kTile)]);
}

// --- G = L Lᵀ, and L⁻¹ -------------------------------------------------------------------------------------------

// Lower triangles, row-major r×r. False when a pivot is too small (or not a number). kappa: ‖L‖_F ‖L⁻¹‖_F of the
// matrix with its rows scaled to length 1 (row scaling costs no accuracy).
bool factor(double* L, double* inverse, int64_t r, double* kappa) {
  std::vector<double> length(r);
  for (int64_t i = 0; i < r; ++i) length[i] = std::sqrt(L[i * r + i]);
  for (int64_t i = 0; i < r; ++i) {
    const double diagonal = L[i * r + i];
    for (int64_t j = 0; j <= i; ++j) {
      double s = L[i * r + j];
      for (int64_t k = 0; k < j; ++k) s -= L[i * r + k] * L[j * r + k];
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
  double forward = 0, backward = 0;
  for (int64_t i = 0; i < r; ++i)
    for (int64_t j = 0; j <= i; ++j) {
      const double l = L[i * r + j] / length[i], m = inverse[i * r + j] * length[j];
      forward += l * l;
      backward += m * m;
    }
  *kappa = std::sqrt(forward * backward);
  return true;
}

// --- X <- M X for a lower triangular M, in place ---------------------------------------------------------------------

// MI rows of M, from row i on, times the first i + MI rows of x; the result replaces those MI rows.
template <int MI, int MJ, typename T> void apply_tile(const T* M, int64_t r, int64_t i, T* x, int64_t pitch) {
  using V = typename Lanes<T>::V;
  constexpr int n = Lanes<T>::n;
  const T* m = M + i * r;
  V sums[MI][MJ] = {};
  for (int64_t k = 0; k < i + MI; ++k) {
    V columns[MJ];
    for (int j = 0; j < MJ; ++j) columns[j] = loadu<V>(x + k * pitch + j * n);
    for (int a = 0; a < MI; ++a) {
      const V factor = splat(m[a * r + k]);
      for (int j = 0; j < MJ; ++j) sums[a][j] += factor * columns[j];
    }
  }
  for (int a = 0; a < MI; ++a)
    for (int j = 0; j < MJ; ++j) storeu(x + (i + a) * pitch + j * n, sums[a][j]);
}

// From the last rows up, so that a row is overwritten only when no other needs it any more.
template <int MJ, typename T> void apply_columns(const T* M, int64_t r, T* x, int64_t pitch) {
  constexpr int MI = kTile;
  int64_t i = r;
  for (; i >= MI; i -= MI) apply_tile<MI, MJ>(M, r, i - MI, x, pitch);
  for (; i >= 1; --i) apply_tile<1, MJ>(M, r, i - 1, x, pitch);
}

// M (r, r) has zeros above its diagonal; x has `cols` columns and rows `pitch` apart.
template <typename T> void apply(const T* M, int64_t r, T* x, int64_t pitch, int64_t cols, Scratch<T>& edge) {
  constexpr int n = Lanes<T>::n;
  int64_t j = 0;
  for (; j + 4 * n <= cols; j += 4 * n) apply_columns<4>(M, r, x + j, pitch);
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
  double kappa = 0;
};

struct Workspace {
  Scratch<vd> acc;
  Scratch<double> wide;
  Scratch<float> narrow_scratch, narrow_edge;
  Scratch<double> wide_scratch, wide_edge;
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

Status inspect(const Matrix& m, Plan& plan, Workspace& work) {
  const int64_t r = m.rows;
  plan.L.assign(r * r, 0.0);
  plan.inverse.assign(r * r, 0.0);
  gram(m, plan.L.data(), work.acc, work.wide);
  for (int64_t i = 0; i < r; ++i)
    if (!std::isfinite(plan.L[i * r + i]))
      // fp64 storage can overflow its own squares; everything else is finite exactly when its Gram is.
      return m.dtype == Dtype::f64 && all_finite(m, work.wide) ? Status::flagged : Status::not_finite;
  return factor(plan.L.data(), plan.inverse.data(), r, &plan.kappa) ? Status::done : Status::flagged;
}

// Whether fp32 holds L⁻¹ with all its digits. Rows of denormals have an inverse length above its largest number.
bool fits_float(const std::vector<double>& inverse, int64_t r) {
  for (double x : inverse)
    if (!(std::abs(x) < 0x1p100)) return false;
  for (int64_t i = 0; i < r; ++i)
    if (inverse[i * r + i] < 0x1p-100) return false;
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
  // 16-bit storage rounds by more than the first pass errs, up to κ near 1e3.
  const double limit = m.dtype == Dtype::bf16 || m.dtype == Dtype::f16 ? 1000.0 : kOnePass * r;
  if (plan.kappa > limit) {
    std::vector<double> L(r * r), inverse(r * r), product(r * r, 0.0);
    gram(x, L.data(), work.acc, work.wide);
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

// triangles: where R goes, or null data. Returns false, with nothing written, when a matrix is not finite. Matrices
// that come back flagged are not written either: the caller has Householder for them.
bool orthogonal_init(const Matrix* matrices, const Matrix* triangles, Status* status, int64_t count, int threads) {
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
      for (int64_t i = 0; i < count; ++i) {
        if (status[i] != Status::done) continue;
        const Matrix triangle = triangles ? triangles[i] : Matrix{};
        if (matrices[i].dtype == Dtype::f64 || !fits_float(plans[i].inverse, matrices[i].rows))
          finish<double>(matrices[i], triangle, plans[i], work);
        else
          finish<float>(matrices[i], triangle, plans[i], work);
      }
    }
  }
  return finite;
}

}  // namespace slao::SLAO_ISA
