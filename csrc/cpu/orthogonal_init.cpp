// orthogonal_init: A <- L⁻¹A with A Aᵀ = L Lᵀ, by Cholesky QR; R = Lᵀ has a positive diagonal.
//
// Two phases, each parallel over the matrices. The first reads every matrix and decides: not finite (then nothing is
// written at all), nearly dependent rows (flagged: left to Householder), or how to factor it. The second applies L⁻¹;
// where one pass would not be as orthonormal as Householder's Q, it repeats Gram and apply on the result, which is
// still in the cache. A matrix is one thread's work, in a fixed order: the answer does not depend on the threads.
#include "isa.h"
#include "orthogonal_init/apply.h"
#include "orthogonal_init/factor.h"

namespace slao::SLAO_ISA {
namespace {

// Bounds of 1/σ²_min (see `factor`). With a Gram matrix in fp64, one pass in fp32 leaves at most 4e-7 up to here; SLAO's A
// are below 3, and fresh random ones of up to 64 rows. 16-bit storage rounds by far more.
constexpr double kOnePass = 8, kOnePass16 = 1e4;
// An fp32 Gram matrix is wrong by up to 3e-7 where all products are alike (1e-8 where they are not), and the result by
// that times 1/σ²_min: up to here that is within the contract's 1e-6.
constexpr double kNarrow = 3, kNarrow16 = 300;
// More rows of a few values each would be worse: their products err alike, and G by r times that (60 rows: 1.4e-6).
constexpr int64_t kAlikeRows = 32, kSample = 16;
// Of two passes, the first may leave 1e-3.
constexpr double kNarrowFirst = 1e4;
// Products that are rounded before they are added are alike in whole blocks of G, which then is r times as wrong.
#if defined(__FMA__) || defined(__aarch64__)
constexpr bool kFused = true;
#else
constexpr bool kFused = false;
#endif

// --- the first phase: what each matrix needs -------------------------------------------------------------------------

struct Plan {
  double *L, *inverse;  // (r, r) each
  double condition;
  bool narrow;  // L⁻¹A may be computed in fp32

  // f(T{}) with the type in which it is computed.
  template <typename F> void with_precision(const F& f) const { narrow ? f(float{}) : f(double{}); }
};

struct Inspection {
  Gram<float> narrow_gram;
  Gram<double> wide_gram;
  double* row;  // of the matrix
  Inspection(Arena& arena, const Matrix& m)
      : narrow_gram(arena, m.rows), wide_gram(arena, m.rows), row(arena.take<double>(m.cols)) {}
};

bool all_finite(const Matrix& m, double* row) {
  for (int64_t i = 0; i < m.rows; ++i) {
    load_span(m, i, 0, m.cols, row);
    for (int64_t j = 0; j < m.cols; ++j)
      if (!__builtin_isfinite(row[j])) return false;
  }
  return true;
}

bool is_short(const Matrix& m) { return element_size(m.dtype) == 2; }
bool needs_second_pass(const Matrix& m, const Plan& plan) {
  return plan.condition > (is_short(m) ? kOnePass16 : kOnePass);
}

// Whether one of every fourth row's first kSample numbers repeats another's magnitude: surely so where rows have fewer
// values than that, hardly ever where they are trained or random.
bool few_values(const Matrix& m, double* row) {
  for (int64_t i = 0; i < m.rows; i += 4) {
    load_span(m, i, 0, kSample, row);
    for (int j = 1; j < kSample; ++j)
      for (int k = 0; k < j; ++k)
        if (fabs(row[j]) == fabs(row[k])) return true;
  }
  return false;
}

// Whether an fp32 Gram matrix was good enough.
bool narrow_suffices(const Matrix& m, Plan& plan, Inspection& work) {
  if (m.dtype == Dtype::f64 || !kFused || (!is_short(m) && m.rows > kAlikeRows && few_values(m, work.row)))
    return false;
  work.narrow_gram(m, plan.L);
  for (int64_t i = 0; i < m.rows; ++i) {  // far from where squares overflow or lose digits; false for NaN
    const double square = plan.L[i * m.rows + i];
    if (!(square > 1e-24 && square < 1e+24)) return false;
  }
  if (!factor(plan.L, plan.inverse, m.rows, work.row, &plan.condition)) return false;
  if (needs_second_pass(m, plan)) return plan.condition <= kNarrowFirst;
  return plan.condition <= (is_short(m) ? kNarrow16 : kNarrow);
}

// Whether L⁻¹A may be computed in fp32: one pass is enough (of two, the first one's error would not be in R: R Q would
// miss A by 1e-7 κ), and fp32 holds L⁻¹ with all its digits (rows of denormals have an inverse above its range).
bool narrow_apply(const Matrix& m, const Plan& plan) {
  if (m.dtype == Dtype::f64 || needs_second_pass(m, plan)) return false;
  for (int64_t i = 0; i < m.rows * m.rows; ++i)
    if (!(fabs(plan.inverse[i]) < 0x1p100)) return false;
  for (int64_t i = 0; i < m.rows; ++i)
    if (plan.inverse[i * m.rows + i] < 0x1p-100) return false;
  return true;
}

Status inspect(const Matrix& m, Plan& plan, Arena arena) {
  const int64_t r = m.rows;
  Inspection work(arena, m);
  fill(plan.inverse, r * r, 0.0);
  if (narrow_suffices(m, plan, work)) {
    plan.narrow = narrow_apply(m, plan);
    return Status::done;
  }
  work.wide_gram(m, plan.L);
  bool lost = false;
  for (int64_t i = 0; i < r; ++i) {
    const double square = plan.L[i * r + i];
    // fp64 storage can overflow its own squares, or lose them; everything else is finite exactly when its Gram is.
    if (!__builtin_isfinite(square)) {
      if (m.dtype != Dtype::f64 || !all_finite(m, work.row)) return Status::not_finite;
      lost = true;
    }
    lost = lost || square < 1e-200;
  }
  if (lost) return Status::flagged;
  if (!factor(plan.L, plan.inverse, r, work.row, &plan.condition)) return Status::flagged;
  plan.narrow = narrow_apply(m, plan);
  return Status::done;
}

// --- the second: A <- L⁻¹A -------------------------------------------------------------------------------------------

template <typename T> struct Finish {
  static constexpr Dtype kDtype = sizeof(T) == 8 ? Dtype::f64 : Dtype::f32;
  bool direct, twice;
  T *rows, *M, *edge;
  double *L, *inverse, *product;
  Gram<T> gram;
  double* row;
  Finish(Arena& arena, const Matrix& m, const Plan& plan)
      : direct(m.col_stride == 1 && m.dtype == kDtype),  // where it is stored as computed, it is its own scratch
        twice(needs_second_pass(m, plan)),
        rows(direct ? (T*)m.data : arena.take<T>(m.rows * m.cols)), M(arena.take<T>(m.rows * m.rows)),
        edge(arena.take<T>(m.rows * Lanes<T>::n)), L(arena.take<double>(twice * m.rows * m.rows)),
        inverse(arena.take<double>(twice * m.rows * m.rows)), product(arena.take<double>(twice * m.rows * m.rows)),
        gram(arena, twice * m.rows), row(arena.take<double>(m.rows)) {}
};

template <typename T> void finish(const Matrix& m, const Matrix& triangle, const Plan& plan, Arena arena) {
  Finish<T> work(arena, m, plan);
  const int64_t r = m.rows, cols = m.cols, pitch = work.direct ? m.row_stride : cols;
  if (!work.direct)
    for (int64_t i = 0; i < r; ++i) load_span(m, i, 0, cols, work.rows + i * cols);
  for (int64_t i = 0; i < r * r; ++i) work.M[i] = T(plan.inverse[i]);
  apply(work.M, r, work.rows, pitch, cols, work.edge);
  const double* L = plan.L;
  if (work.twice) {
    double ignored;
    work.gram({(char*)work.rows, r, cols, pitch, 1, Finish<T>::kDtype}, work.L);
    fill(work.inverse, r * r, 0.0);
    factor(work.L, work.inverse, r, work.row, &ignored);  // of nearly the identity: cannot fail
    for (int64_t i = 0; i < r * r; ++i) work.M[i] = T(work.inverse[i]);
    apply(work.M, r, work.rows, pitch, cols, work.edge);
    fill(work.product, r * r, 0.0);
    for (int64_t i = 0; i < r; ++i)  // A = L₁ (L₂ Q)
      for (int64_t k = 0; k <= i; ++k)
        for (int64_t j = 0; j <= k; ++j) work.product[i * r + j] += plan.L[i * r + k] * work.L[k * r + j];
    L = work.product;
  }
  if (!work.direct)
    for (int64_t i = 0; i < r; ++i) store_span(m, i, 0, cols, work.rows + i * cols);
  if (triangle.data)
    for (int64_t i = 0; i < r; ++i) {  // R = Lᵀ
      for (int64_t j = 0; j < r; ++j) work.row[j] = j < i ? 0.0 : L[j * r + i];
      store_span(triangle, i, 0, r, work.row);
    }
}

}  // namespace

// triangles: where R goes, or null data. kept: where a matrix is copied before it is written, or null. Returns false,
// with nothing written, when a matrix is not finite. Matrices that come back flagged are not written either: the caller
// has Householder for them. std::bad_alloc comes before anything is written, too.
bool orthogonal_init(const Matrix* matrices, const Matrix* triangles, const Matrix* kept, Status* status, int64_t count,
                     int threads) {
  const int team = int(max<int64_t>(1, min<int64_t>(threads, count)));
  const auto doubles = [&](int64_t i) { return round_up(2 * matrices[i].rows * matrices[i].rows, 8); };
  int64_t total = 0;
  for (int64_t i = 0; i < count; ++i) total += doubles(i);
  const Memory list(count * sizeof(Plan)), factors(total * sizeof(double));
  Plan* const plans = (Plan*)list.data;
  double* next = (double*)factors.data;
  for (int64_t i = 0; i < count; next += doubles(i++))
    plans[i] = {next, next + matrices[i].rows * matrices[i].rows, 0, false};

  size_t size = 0;
  for (int64_t i = 0; i < count; ++i) {
    Arena of_one;
    Inspection(of_one, matrices[i]);
    size = max(size, of_one.used);
  }
  bool finite = true;
  {
    const Memory work(team * size);
#pragma omp parallel for schedule(dynamic, 1) reduction(&& : finite) num_threads(team)
    for (int64_t i = 0; i < count; ++i) {
      status[i] = inspect(matrices[i], plans[i], {work.data + thread_index() * size});
      finite = finite && status[i] != Status::not_finite;
    }
  }
  if (!finite) return false;

  size = 0;
  for (int64_t i = 0; i < count; ++i) {
    Arena of_one;
    plans[i].with_precision([&](auto t) { Finish<decltype(t)>(of_one, matrices[i], plans[i]); });
    size = max(size, of_one.used);
  }
  const Memory work(team * size);
#pragma omp parallel for schedule(dynamic, 1) num_threads(team)
  for (int64_t i = count - 1; i >= 0; --i) {  // backwards: what was read last may still be in a cache
    if (kept) copy_matrix(kept[i], matrices[i]);  // and finds it in the cache, where it then is read once more
    if (status[i] != Status::done) continue;
    const Matrix triangle = triangles ? triangles[i] : Matrix{};
    const Arena mine{work.data + thread_index() * size};
    plans[i].with_precision([&](auto t) { finish<decltype(t)>(matrices[i], triangle, plans[i], mine); });
  }
  return true;
}

}  // namespace slao::SLAO_ISA
