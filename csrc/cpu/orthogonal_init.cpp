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
// One pass leaves about 1e-8 κ; up to κ_F = 5 r that is Householder's own error (measured: 3e-7 at r = 16 to 256).
constexpr double kOnePass = 5.0;
// Columns of one sweep: r rows of it stay in the L1 cache up to r = 16, in the L2 beyond.
constexpr int64_t kChunk = 512;

int64_t padded(int64_t n) { return (n + 15) / 16 * 16; }

// The whole matrix as rows of `pitch` elements, zeros behind the last column.
template <typename T> void load_matrix(const Matrix& m, T* scratch, int64_t pitch) {
  for (int64_t i = 0; i < m.rows; ++i) {
    load_span(m, i, 0, m.cols, scratch + i * pitch);
    std::fill(scratch + i * pitch + m.cols, scratch + (i + 1) * pitch, T(0));
  }
}

// --- G = X Xᵀ in fp64: lower triangle of r×r ---------------------------------------------------------------------

// One tile of MI×MJ dot products over `count` columns, added to the vectors in `acc`.
template <int MI, int MJ, typename T>
void gram_tile(const T* x, const T* y, int64_t pitch, int64_t count, vd* acc) {
  vd sums[MI][MJ];
  for (int i = 0; i < MI; ++i)
    for (int j = 0; j < MJ; ++j) sums[i][j] = acc[i * MJ + j];
  for (int64_t k = 0; k < count; k += kDoubles) {
    vd right[MJ];
    for (int j = 0; j < MJ; ++j) right[j] = load_wide(y + j * pitch + k);
    for (int i = 0; i < MI; ++i) {
      const vd left = load_wide(x + i * pitch + k);
      for (int j = 0; j < MJ; ++j) sums[i][j] += left * right[j];
    }
  }
  for (int i = 0; i < MI; ++i)
    for (int j = 0; j < MJ; ++j) acc[i * MJ + j] = sums[i][j];
}

// 16 accumulators fill AVX-512's 32 registers well; the narrower sets have 16 registers.
constexpr int kTile = kBytes == 64 ? 4 : 2;

template <typename T> void gram(const T* x, int64_t r, int64_t pitch, double* G, std::vector<vd>& acc) {
  const int64_t tiles = (r + kTile - 1) / kTile, full = r / kTile;
  acc.assign(tiles * (tiles + 1) / 2 * kTile * kTile, vd{});
  for (int64_t begin = 0; begin < pitch; begin += kChunk) {
    const int64_t count = std::min(kChunk, pitch - begin);
    vd* a = acc.data();
    for (int64_t I = 0; I < tiles; ++I)
      for (int64_t J = 0; J <= I; ++J, a += kTile * kTile) {
        const T *left = x + I * kTile * pitch + begin, *right = x + J * kTile * pitch + begin;
        if (I < full) {
          gram_tile<kTile, kTile>(left, right, pitch, count, a);
        } else {  // the last rows, one by one (J may be such a tile too)
          for (int64_t i = I * kTile; i < r; ++i)
            for (int64_t j = J * kTile; j < std::min(r, (J + 1) * kTile); ++j)
              gram_tile<1, 1>(x + i * pitch + begin, x + j * pitch + begin, pitch, count,
                              a + (i - I * kTile) * kTile + (j - J * kTile));
        }
      }
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

// --- Y = M X for a lower triangular M, a block of columns at a time ------------------------------------------------

template <int MI, int MJ, typename T>
void apply_tile(const T* m, int64_t ldm, int64_t k_end, const T* x, int64_t pitch, T* y, int64_t ldy) {
  using V = typename Lanes<T>::V;
  constexpr int n = Lanes<T>::n;
  V sums[MI][MJ] = {};
  for (int64_t k = 0; k < k_end; ++k) {
    V columns[MJ];
    for (int j = 0; j < MJ; ++j) columns[j] = loadu<V>(x + k * pitch + j * n);
    for (int i = 0; i < MI; ++i) {
      const V factor = splat(m[i * ldm + k]);
      for (int j = 0; j < MJ; ++j) sums[i][j] += factor * columns[j];
    }
  }
  for (int i = 0; i < MI; ++i)
    for (int j = 0; j < MJ; ++j) storeu(y + i * ldy + j * n, sums[i][j]);
}

constexpr int kApplyRows = kBytes == 64 ? 6 : 2, kApplyVectors = 4;

// `sink(i, begin, count, row)` takes row i's columns. M (r, r) has zeros above its diagonal.
template <typename T, typename Sink>
void apply(const T* M, int64_t r, const T* x, int64_t pitch, T* block, Sink&& sink) {
  constexpr int64_t width = kApplyVectors * Lanes<T>::n;
  for (int64_t begin = 0; begin < pitch; begin += width) {
    const int64_t count = std::min(width, pitch - begin);
    const T* columns = x + begin;
    int64_t i = 0;
    if (count == width) {
      for (; i + kApplyRows <= r; i += kApplyRows)
        apply_tile<kApplyRows, kApplyVectors>(M + i * r, r, i + kApplyRows, columns, pitch, block + i * width, width);
      for (; i < r; ++i) apply_tile<1, kApplyVectors>(M + i * r, r, i + 1, columns, pitch, block + i * width, width);
    } else {
      for (; i < r; ++i)
        for (int64_t j = 0; j < count; j += Lanes<T>::n)
          apply_tile<1, 1>(M + i * r, r, i + 1, columns + j, pitch, block + i * width + j, width);
    }
    for (i = 0; i < r; ++i) sink(i, begin, count, block + i * width);
  }
}

// --- the two phases ------------------------------------------------------------------------------------------------

struct Plan {
  std::vector<double> L, inverse;
  double kappa = 0;
};

template <typename T> struct Workspace {
  std::vector<T> scratch, second, block, triangle;
  std::vector<vd> acc;
  T* rows(std::vector<T>& v, int64_t size) {
    if (int64_t(v.size()) < size) v.resize(size);
    return v.data();
  }
};

template <typename T> Status inspect(const Matrix& m, Plan& plan, Workspace<T>& work) {
  const int64_t r = m.rows, pitch = padded(m.cols);
  T* x = work.rows(work.scratch, r * pitch);
  load_matrix(m, x, pitch);
  plan.L.assign(r * r, 0.0);
  plan.inverse.assign(r * r, 0.0);
  gram(x, r, pitch, plan.L.data(), work.acc);
  for (int64_t i = 0; i < r; ++i)
    if (!std::isfinite(plan.L[i * r + i])) {
      // fp64 storage can overflow its own squares; everything else is finite exactly when its Gram is.
      bool finite = m.dtype == Dtype::f64;
      for (int64_t k = 0; finite && k < r * pitch; ++k) finite = std::isfinite(x[k]);
      return finite ? Status::flagged : Status::not_finite;
    }
  return factor(plan.L.data(), plan.inverse.data(), r, &plan.kappa) ? Status::done : Status::flagged;
}

template <typename T> void finish(const Matrix& m, const Matrix& triangle, Plan& plan, Workspace<T>& work) {
  const int64_t r = m.rows, pitch = padded(m.cols);
  T* x = work.rows(work.scratch, r * pitch);
  T* block = work.rows(work.block, r * kApplyVectors * Lanes<T>::n);
  load_matrix(m, x, pitch);
  auto to_matrix = [&](int64_t i, int64_t begin, int64_t count, const T* row) {
    if (begin < m.cols) store_span(m, i, begin, std::min(count, m.cols - begin), row);
  };
  // 16-bit storage rounds by more than the first pass errs, up to κ near 1e3.
  const double limit = m.dtype == Dtype::bf16 || m.dtype == Dtype::f16 ? 1000.0 : kOnePass * r;
  std::vector<T> M(plan.inverse.begin(), plan.inverse.end());
  if (plan.kappa <= limit) {
    apply(M.data(), r, x, pitch, block, to_matrix);
  } else {
    T* q = work.rows(work.second, r * pitch);
    apply(M.data(), r, x, pitch, block, [&](int64_t i, int64_t begin, int64_t count, const T* row) {
      std::memcpy(q + i * pitch + begin, row, count * sizeof(T));
    });
    std::vector<double> L(r * r), inverse(r * r), product(r * r, 0.0);
    gram(q, r, pitch, L.data(), work.acc);
    double ignored;
    factor(L.data(), inverse.data(), r, &ignored);  // of nearly the identity: cannot fail
    for (int64_t i = 0; i < r * r; ++i) M[i] = T(inverse[i]);
    apply(M.data(), r, q, pitch, block, to_matrix);
    for (int64_t i = 0; i < r; ++i)  // A = L₁ (L₂ Q)
      for (int64_t k = 0; k <= i; ++k)
        for (int64_t j = 0; j <= k; ++j) product[i * r + j] += plan.L[i * r + k] * L[k * r + j];
    plan.L.swap(product);
  }
  if (triangle.data)
    for (int64_t i = 0; i < r; ++i) {
      std::vector<double> row(r, 0.0);
      for (int64_t j = i; j < r; ++j) row[j] = plan.L[j * r + i];  // R = Lᵀ
      store_span(triangle, i, 0, r, row.data());
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
    Workspace<float> narrow;
    Workspace<double> wide;
#pragma omp for schedule(dynamic, 1) reduction(&& : finite)
    for (int64_t i = 0; i < count; ++i) {
      const bool is_wide = matrices[i].dtype == Dtype::f64;
      status[i] = is_wide ? inspect(matrices[i], plans[i], wide) : inspect(matrices[i], plans[i], narrow);
      finite = finite && status[i] != Status::not_finite;
    }
    if (finite) {
#pragma omp for schedule(dynamic, 1)
      for (int64_t i = 0; i < count; ++i) {
        if (status[i] != Status::done) continue;
        const Matrix triangle = triangles ? triangles[i] : Matrix{};
        if (matrices[i].dtype == Dtype::f64)
          finish(matrices[i], triangle, plans[i], wide);
        else
          finish(matrices[i], triangle, plans[i], narrow);
      }
    }
  }
  return finite;
}

}  // namespace slao::SLAO_ISA
