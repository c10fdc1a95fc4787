// For the driver: lora_linear's three products against naive double precision, between guard zones, and whole passes
// against the products.
#pragma once
#include "../../csrc/cpu/isa.h"
#include "guarded.h"

namespace {

using slao::LoraProducts;

void shrink(const LoraProducts& kernels, const Matrix& x, const Matrix& P, const Matrix& t, float scale, int threads) {
  kernels.rows({x, P, t, {}, {}, nullptr, scale, 1}, threads);
}
void expand(const LoraProducts& kernels, const Matrix& t, const Matrix& Q, const void* bias, const Matrix& y,
            float scale, int threads) {
  kernels.rows({{}, {}, t, Q, y, bias, 1, scale}, threads);
}

Tensor filled(int64_t rows, int64_t cols, Dtype t, Layout layout) {
  Tensor tensor(rows, cols, t, layout, random_numbers.below(4));
  tensor.fill([](int64_t, int64_t) { return random_numbers.normal(); });
  return tensor;
}

// out (m, n) against scale left (m, k) right (k, n) + bias; run(threads) writes it.
template <typename Run>
void check_product(const std::string& label, Tensor& out, std::vector<Tensor*> inputs, const Values& left,
                   const Values& right, const Values& bias, double scale, Run run) {
  const int64_t m = out.m.rows, n = out.m.cols, k = int64_t(left.size()) / std::max<int64_t>(m, 1);
  out.fill([](int64_t, int64_t) { return kNaN; });  // what is not written shows
  out.lock();
  for (Tensor* tensor : inputs) tensor->lock();
  run(3);
  out.unlock();
  for (Tensor* tensor : inputs) tensor->unlock();
  const Values got = out.values();
  bool near = true;
  for (int64_t i = 0; i < m; ++i)
    for (int64_t j = 0; j < n; ++j) {
      double total = bias.empty() ? 0 : bias[j], size = std::abs(total);
      for (int64_t a = 0; a < k; ++a) {
        const double term = scale * left[i * k + a] * right[a * n + j];
        total += term, size += std::abs(term);
      }
      const double bound = double(k + 4) * unit(Dtype::f32) * size + storage_rounding(total, out.m.dtype);
      near = near && std::abs(got[i * n + j] - total) <= bound;
    }
  expect(near, label, "not the product");
  expect(out.unchanged_outside(), label, "bytes around the result changed");
  for (const Tensor* tensor : inputs) expect(tensor->unchanged(), label, "an input changed");
  const std::vector<char> first = out.restore();
  run(1);
  expect(out.holds(first), label, "one thread gives other bits than three");
}

Values rounded(Values values, Dtype t) {
  for (double& value : values) value = nearest(value, t);
  return values;
}

Values transposed_values(const Tensor& tensor) {
  const Values v = tensor.values();
  Values t;
  for (int64_t j = 0; j < tensor.m.cols; ++j)
    for (int64_t i = 0; i < tensor.m.rows; ++i) t.push_back(v[i * tensor.m.cols + j]);
  return t;
}

Matrix flipped(const Matrix& m) { return {m.data, m.cols, m.rows, m.col_stride, m.row_stride, m.dtype}; }

// The whole passes are the products one after another, to the last bit; backward with all or some of its results.
void check_passes(const std::string& label, const LoraProducts& kernels, int64_t m, int64_t k, int64_t n, int64_t r,
                  Dtype other) {
  const Dtype t = Dtype::bf16;
  Tensor x = filled(m, k, t, padded), A = filled(r, k, other, dense), B = filled(n, r, other, dense);
  Tensor bias = filled(1, n, t, dense), dy = filled(m, n, t, padded);
  Tensor T(m, r, t, dense, 0), y(m, n, t, dense, 0), want_t(m, r, t, dense, 0), want_y(m, n, t, dense, 0);
  kernels.rows({x.m, flipped(A.m), T.m, flipped(B.m), y.m, bias.m.data, 1.0f, 0.5f}, 3);
  shrink(kernels, x.m, flipped(A.m), want_t.m, 1.0f, 1);
  expand(kernels, want_t.m, flipped(B.m), bias.m.data, want_y.m, 0.5f, 1);
  expect(T.values() == want_t.values(), label, "the pass's t is not shrink's");
  expect(y.values() == want_y.values(), label, "the pass's y is not expand's");

  Tensor want_g(m, r, t, dense, 0), want_dx(m, k, t, dense, 0), want_A(r, k, other, dense, 0), want_B(n, r, other, dense, 0);
  shrink(kernels, dy.m, B.m, want_g.m, 0.7f, 1);
  kernels.outer({dy.m, T.m, want_B.m, 0.7f}, 1);
  kernels.outer({x.m, want_g.m, flipped(want_A.m), 1.0f}, 1);
  expand(kernels, want_g.m, A.m, nullptr, want_dx.m, 1.0f, 1);
  for (int wanted = 1; wanted < 8; ++wanted) {  // dB, dA, dx
    Tensor g(m, r, t, dense, 0), dx(m, k, t, dense, 0), dA(r, k, other, dense, 0), dB(n, r, other, dense, 0);
    const auto where = [&](const Matrix& matrix, int bits) {
      Matrix result = matrix;
      if (!(wanted & bits)) result.data = nullptr;
      return result;
    };
    kernels.backward({dy.m, T.m, x.m, A.m, B.m, where(g.m, 6), where(dx.m, 4), where(flipped(dA.m), 2), where(dB.m, 1),
                      0.7f},
                     3);
    expect(!(wanted & 1) || dB.values() == want_B.values(), label, "backward's dB is not outer's");
    expect(!(wanted & 2) || dA.values() == want_A.values(), label, "backward's dA is not outer's");
    expect(!(wanted & 4) || dx.values() == want_dx.values(), label, "backward's dx is not expand's");
    expect(!(wanted & 6) || g.values() == want_g.values(), label, "backward's g is not shrink's");
  }
}

void check_lora(const char* isa, const LoraProducts* found) {
  if (!found) return void(std::printf("%-10s not run: this processor does not have it\n", isa));
  const LoraProducts& kernels = *found;
  instruction_set = isa;
  const int64_t shapes[][3] = {{1, 1, 1},   {1, 30, 8},   {3, 65, 7},   {9, 66, 12},  {33, 96, 16},  {40, 258, 17}, {67, 700, 32},
                               {70, 131, 33}, {35, 34, 64}, {600, 520, 16}, {0, 8, 4}};  // M, K, r
  const Dtype t = Dtype::bf16;
  int count = 0;
  for (const auto& [m, k, r] : shapes)
    for (Dtype other : {t, Dtype::f32}) {
      const std::string label = std::string("lora with ") + name(other) + " " + std::to_string(m) + "x" +
                                std::to_string(k) + " r " + std::to_string(r);
      // fp32 is rounded when it is read.
      auto as_read = [&](Tensor& tensor) { return rounded(tensor.values(), t); };
      for (Layout rows : {dense, padded})
        for (Layout factor : {dense, transposed, strided}) {
          Tensor x = filled(m, k, t, rows), P = filled(k, r, other, factor), Q = filled(r, k, other, factor);
          Tensor small = filled(m, r, t, rows), bias = filled(1, k, t, dense);
          Tensor out_small(m, r, t, rows, 1), out_large(m, k, t, rows, 1), out_outer(k, r, other, factor, 1);
          check_product(label + " shrink", out_small, {&x, &P}, x.values(), as_read(P), {}, 0.5,
                        [&](int threads) { shrink(kernels, x.m, P.m, out_small.m, 0.5f, threads); });
          check_product(label + " expand", out_large, {&small, &Q, &bias}, small.values(), as_read(Q), bias.values(), 0.5,
                        [&](int threads) { expand(kernels, small.m, Q.m, bias.m.data, out_large.m, 0.5f, threads); });
          check_product(label + " outer", out_outer, {&x, &small}, transposed_values(x), small.values(), {}, 0.5,
                        [&](int threads) { kernels.outer({x.m, small.m, out_outer.m, 0.5f}, threads); });
          count += 3;
        }
      check_passes(label, kernels, m, k, k + 13, r, other), ++count;
    }
  std::printf("%-10s lora_linear     %5d products and passes\n", isa, count);
}

}  // namespace
