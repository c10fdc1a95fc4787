// G = L Lᵀ and L⁻¹ in fp64, and how far from orthonormal the rows were.
#pragma once
#include <math.h>

#include "../arena.h"
#include "../simd.h"

namespace slao::SLAO_ISA {
namespace {

// Squared sine of a row's angle to the rows before it, below which an fp64 Gram has too few digits left: 1e-6².
constexpr double kPivot = 1e-12;

double dot(const double* x, const double* y, int64_t count) {
  vd sums[2] = {};
  int64_t k = 0;
  for (; k + 2 * kDoubles <= count; k += 2 * kDoubles)
    for (int j = 0; j < 2; ++j) sums[j] += loadu<vd>(x + k + j * kDoubles) * loadu<vd>(y + k + j * kDoubles);
  double total = k ? sum(sums[0] + sums[1]) : 0.0;
  for (; k < count; ++k) total += x[k] * y[k];
  return total;
}

// Lower triangles, row-major r×r. False when a pivot is too small (or not a number). length: scratch for r numbers.
// condition: at least 1/σ²_min = x of the matrix with its rows scaled to length 1 (row scaling costs no accuracy). For
// each of its σ², 1/σ² - 1 + ln σ² >= 0; their sum is known, since ‖L⁻¹‖²_F is the sum of all 1/σ² and Π L²_ii the
// product of all σ². So x - 1 - ln x is at most that sum. It does not loosen with r as norms of L⁻¹ do.
bool factor(double* L, double* inverse, int64_t r, double* length, double* condition) {
  for (int64_t i = 0; i < r; ++i) length[i] = sqrt(L[i * r + i]);
  for (int64_t i = 0; i < r; ++i) {
    const double diagonal = L[i * r + i];
    for (int64_t j = 0; j <= i; ++j) {
      const double s = L[i * r + j] - dot(L + i * r, L + j * r, j);
      if (j < i) {
        L[i * r + j] = s * inverse[j * r + j];
      } else {
        if (!(s > kPivot * diagonal)) return false;
        L[i * r + i] = sqrt(s);
        inverse[i * r + i] = 1 / L[i * r + i];
      }
    }
  }
  for (int64_t i = 0; i < r; ++i) {  // row i of L⁻¹ = -(L_i,:i L⁻¹_:i,:) / L_ii
    double* row = inverse + i * r;
    fill(row, i, 0.0);
    for (int64_t k = 0; k < i; ++k) {
      const double l = L[i * r + k];
      for (int64_t j = 0; j <= k; ++j) row[j] -= l * inverse[k * r + j];
    }
    for (int64_t j = 0; j < i; ++j) row[j] *= row[i];
  }
  double excess = 0;
  for (int64_t i = 0; i < r; ++i) {
    const double sine = L[i * r + i] / length[i];
    excess += 2 * log(sine) - 1;
    for (int64_t j = 0; j <= i; ++j) {
      const double m = inverse[i * r + j] * length[j];
      excess += m * m;
    }
  }
  excess = max(excess, 0.0);
  *condition = 2 * excess + 2;  // above the root of x = excess + 1 + ln x, and so is each step towards it
  for (int step = 0; step < 8; ++step) *condition = excess + 1 + log(*condition);
  return true;
}

}  // namespace
}  // namespace slao::SLAO_ISA
