// For the driver: orthogonal_init, A <- Q with A = L Q. Q is held against what defines it, not against another Q.
#pragma once
#include "guarded.h"

namespace {

using slao::Status;
using Orthogonal = bool (*)(const Matrix*, const Matrix*, const Matrix*, Status*, int64_t, int);

// How a matrix is made. skewed: rows that nearly agree, so that one pass is not enough; graded: rows of all sizes.
enum Kind { plain, skewed, graded, tiny, huge, zero_row, twice_a_row, squares_overflow };

struct Init {
  std::string label;
  Tensor A, R;  // R is not asked for where its data is null
  Tensor kept;  // A as it was
  Kind kind;
  Values before;
};

Init init_case(int64_t r, int64_t n, Dtype t, Layout layout, int64_t offset, Kind kind, bool with_r) {
  Tensor A(r, n, t, layout, offset), R(r, r, t == Dtype::f64 ? t : Dtype::f32, Layout((layout + 1) % 4), offset);
  Tensor kept(r, n, t, Layout((layout + 2) % 4), offset);
  const double skew = slao::element_size(t) == 2 ? 4 : 1000;
  Values common(n), size(r, 1.0);
  for (double& x : common) x = skew * random_numbers.normal();
  if (kind == graded)
    for (double& x : size) x = std::ldexp(1.0, int(random_numbers.below(t == Dtype::f16 ? 8 : 80)));
  if (kind == squares_overflow) size[r / 2] = 1e200;
  A.fill([&](int64_t i, int64_t j) {
    if (kind == zero_row && i == r / 2) return 0.0;
    // Nearly square: a heavy diagonal keeps the condition number near 10.
    const double x = random_numbers.normal() + (n < 2 * r && i == j ? 3 * std::sqrt(double(n)) : 0);
    if (kind == tiny) return x * std::ldexp(1.0, lowest_exponent(t) - (t == Dtype::bf16 ? 0 : 10));  // mostly denormal
    if (kind == huge) return x * std::ldexp(1.0, -lowest_exponent(t) - (n < 2 * r ? 8 : 2));
    return size[i] * (x + (kind == skewed ? common[j] : 0));
  });
  if (kind == twice_a_row)
    for (int64_t j = 0; j < n; ++j) std::memcpy(A.at(r - 1, j), A.at(0, j), slao::element_size(t));
  if (!with_r) R.m.data = nullptr;
  const Values before = A.values();
  const std::string label = "orthogonal_init kind " + std::to_string(kind) + " of " + describe(A.m);
  return {label, std::move(A), std::move(R), std::move(kept), kind, before};
}

double dot(const double* x, const double* y, int64_t n) {
  double total = 0;
  for (int64_t k = 0; k < n; ++k) total += x[k] * y[k];
  return total;
}

// Q's rows are orthonormal, L = A Qᵀ is lower triangular with a positive diagonal, A = L Q, and R = Lᵀ.
void check_factors(const Init& c) {
  const int64_t r = c.A.m.rows, n = c.A.m.cols;
  const Dtype t = c.A.m.dtype;
  const Values Q = c.A.values();
  const double storage = 2 * unit(t), skew = c.kind == skewed ? double(r) : 1;
  const double orthonormal = storage + (t == Dtype::f64 ? 1e-12 : 1e-6);
  // Measured: at most half of either; sums of n products err by their length, and skewed rows by their number.
  const double triangular = storage + (t == Dtype::f64 ? 1e-14 : 1e-6) * skew;
  double worst[5] = {};  // in units of what is allowed
  const auto note = [&](int k, double x) { worst[k] = std::max(worst[k], std::isnan(x) ? kInfinity : x); };
  Values rest(n);
  for (int64_t i = 0; i < r; ++i) {
    const double* a = c.before.data() + i * n;
    const double length = std::sqrt(dot(a, a, n));
    std::copy(a, a + n, rest.begin());
    for (int64_t j = 0; j < r; ++j) {
      const double* q = Q.data() + j * n;
      const double l = dot(a, q, n) / length, product = dot(Q.data() + i * n, q, n);
      const double found = c.R.m.data ? decode(c.R.at(j, i), c.R.m.dtype) / length : j <= i ? l : 0;
      note(0, std::abs(product - (i == j)) / orthonormal);
      note(1, (j > i ? std::abs(l) : 0) / triangular);
      note(2, (j > i ? (found == 0 ? 0 : 9) : std::abs(found - l)) / triangular);
      note(3, i == j && !(l > 0) ? 9 : 0);
      if (j <= i)
        for (int64_t k = 0; k < n; ++k) rest[k] -= l * length * q[k];
    }
    note(4, std::sqrt(dot(rest.data(), rest.data(), n)) / length / triangular);
  }
  const char* const what[] = {"Q Q^T is not 1", "A Q^T is not triangular", "R is not (A Q^T)^T", "diagonal of R <= 0",
                              "A is not L Q"};
  for (int k = 0; k < 5; ++k)
    expect(worst[k] <= 1, c.label, std::string(what[k]) + ": " + std::to_string(worst[k]) + " times the tolerance");
}

void check_inits(Orthogonal kernel, std::vector<Init>& cases, bool any_r, bool spoilt) {
  std::vector<Matrix> As, Rs, kept;
  for (Init& c : cases) {
    c.A.lock(), c.R.lock(), c.kept.lock();
    As.push_back(c.A.m), Rs.push_back(c.R.m), kept.push_back(c.kept.m);
  }
  std::vector<std::vector<char>> first(cases.size());
  const int64_t count = int64_t(cases.size());
  for (int threads : {3, 1}) {
    std::vector<Status> status(cases.size(), Status::deficient);
    const bool finite = kernel(As.data(), any_r ? Rs.data() : nullptr, any_r ? kept.data() : nullptr, status.data(), count, threads);
    expect(finite == !spoilt, "orthogonal_init", "says wrongly whether everything was finite");
    for (size_t i = 0; i < cases.size(); ++i) {
      Init& c = cases[i];
      c.A.unlock(), c.R.unlock(), c.kept.unlock();
      if (any_r && !spoilt)
        expect(c.kept.values() == c.before && c.kept.unchanged_outside(), c.label, "what was to be kept is something else");
      else
        expect(c.kept.unchanged(), c.label, "the copy was written");
      c.kept.restore();
      const bool sound = c.kind < zero_row;
      const bool has_bad = std::any_of(c.before.begin(), c.before.end(), [](double x) { return !std::isfinite(x); });
      expect(status[i] == (has_bad ? Status::not_finite : sound ? Status::done : Status::flagged), c.label,
             "status " + std::to_string(int(status[i])));
      if (spoilt || !sound) {
        expect(c.A.unchanged() && c.R.unchanged(), c.label, "was written");
        continue;
      }
      expect(c.A.unchanged_outside() && c.R.unchanged_outside(), c.label, "bytes around A or R changed");
      expect(any_r || c.R.unchanged(), c.label, "R was not asked for");
      if (threads == 3) check_factors(c);
      std::vector<char> after = c.A.restore(), after_r = c.R.restore();
      after.insert(after.end(), after_r.begin(), after_r.end());
      if (threads == 3) first[i] = after;
      else expect(after == first[i], c.label, "one thread gives other bits than three");
    }
  }
}

void check_orthogonal(Orthogonal kernel) {
  const int64_t shapes[][2] = {{1, 1},   {1, 5},   {7, 7},   {7, 33},   {8, 64},    {12, 12},  {12, 100},  {16, 257},
                               {33, 33}, {33, 70}, {64, 64}, {64, 700}, {130, 131}, {256, 256}, {256, 300}};
  std::vector<Init> with_r, without;
  int next = 0;
  for (Dtype t : kDtypes)
    for (const auto& [r, n] : shapes)
      for (Kind kind : {plain, skewed, graded, tiny, huge, zero_row, twice_a_row, squares_overflow}) {
        if ((kind == tiny || kind == huge) && (t == Dtype::f64 || t == Dtype::f16)) continue;
        if (kind == squares_overflow && t != Dtype::f64) continue;
        if ((kind == twice_a_row || kind == skewed) && (r == 1 || (kind == skewed && n < 2 * r))) continue;
        const bool big = r >= 130;
        if (big && (kind == graded || kind == tiny || kind == huge)) continue;
        for (int layout = 0; layout < (big ? 1 : 4); ++layout, ++next) {
          const Layout chosen = Layout((big ? next : layout) % 4);
          with_r.push_back(init_case(r, n, t, chosen, next % 3, kind, next % 5 != 0 && kind != tiny && kind != huge));
          if (!big) without.push_back(init_case(r, n, t, chosen, next % 3, kind, false));
        }
      }
  check_inits(kernel, with_r, true, false);
  check_inits(kernel, without, false, false);
  size_t total = with_r.size() + without.size();
  for (Dtype t : kDtypes)
    for (double value : {kNaN, kInfinity, -kInfinity})
      for (int64_t bad : {0, 2, 5}) {
        std::vector<Init> cases;
        for (int64_t i = 0; i < 6; ++i) {
          cases.push_back(init_case(5 + i, 40, t, Layout(i % 4), i % 3, plain, true));
          if (i != bad) continue;
          spoil(cases[i].A, value);
          cases[i].before = cases[i].A.values();
        }
        check_inits(kernel, cases, true, true);
        total += cases.size();
      }
  expect(kernel(nullptr, nullptr, nullptr, nullptr, 0, 3), "orthogonal_init", "an empty table is not finite");
  std::printf("%-7s orthogonal_init  %5zu records\n", instruction_set.c_str(), total);
}

}  // namespace
