// For the driver: lora_linear's three products against naive double precision, between guard zones, and whole passes
// against the products.
#pragma once
#include "../../csrc/cpu/isa.h"
#include "guarded.h"

#if defined(__x86_64__)

namespace {

using slao::LoraGrads;

struct Products {
  bool (*has)(Dtype);
  void (*shrink)(const Matrix&, const Matrix&, const Matrix&, float, int);
  void (*expand)(const Matrix&, const Matrix&, const void*, const Matrix&, float, int);
  void (*outer)(const Matrix&, const Matrix&, const Matrix&, float, int);
  void (*forward)(const Matrix&, const Matrix&, const Matrix&, const Matrix&, const void*, const Matrix&, float, int);
  void (*backward)(const LoraGrads*, int, const Matrix&, const Matrix&, const Matrix&, const Matrix&, int);
};

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

// Some columns of a matrix, or all of it as the kernel's own copy.
Matrix columns(const Matrix& m, int64_t begin, int64_t count) {
  Matrix part = m;
  part.data += begin * m.col_stride * slao::element_size(m.dtype), part.cols = count;
  return part;
}
Matrix flipped(const Matrix& m) { return {m.data, m.cols, m.rows, m.col_stride, m.row_stride, m.dtype}; }

// The whole passes are the products one after another, to the last bit; the backward one for two layers of one x.
void check_passes(const std::string& label, const Products& kernels, int64_t m, int64_t k, int64_t n, int64_t r, Dtype t,
                  Dtype other) {
  Tensor x = filled(m, k, t, padded), A = filled(2 * r, k, other, dense), bias = filled(1, n, t, dense);
  Tensor B[] = {filled(n, r, other, dense), filled(n, r, other, dense)}, dy[] = {filled(m, n, t, padded), filled(m, n, t, dense)};
  Tensor T(m, 2 * r, t, dense, 0), y(m, n, t, dense, 0), want_t(m, r, t, dense, 0), want_y(m, n, t, dense, 0);
  const Matrix A0 = {A.m.data, r, k, k, 1, other};
  auto same = [&](const Tensor& got, const Tensor& want, const char* what) {
    const Values a = got.values(), b = want.values();
    expect(a == b, label, what);
  };
  kernels.forward(x.m, flipped(A0), want_t.m, flipped(B[0].m), bias.m.data, y.m, 0.5f, 3);
  Tensor again(m, r, t, dense, 0);
  kernels.shrink(x.m, flipped(A0), again.m, 1.0f, 1);
  kernels.expand(again.m, flipped(B[0].m), bias.m.data, want_y.m, 0.5f, 1);
  same(want_t, again, "forward's t is not shrink's");
  same(y, want_y, "forward's y is not expand's");

  T.fill([](int64_t, int64_t) { return random_numbers.normal(); });
  Tensor g(m, 2 * r, t, dense, 0), dx(m, k, t, dense, 0), want_g(m, 2 * r, t, dense, 0), want_dx(m, k, t, dense, 0);
  Tensor dA[] = {Tensor(r, k, other, dense, 0), Tensor(r, k, other, dense, 0)}, dB[] = {Tensor(n, r, other, dense, 0), Tensor(n, r, other, dense, 0)};
  std::vector<LoraGrads> layers;
  for (int i : {0, 1})
    layers.push_back({dy[i].m, columns(T.m, i * r, r), B[i].m, columns(g.m, i * r, r), flipped(dA[i].m), dB[i].m, 0.5f + i});
  kernels.backward(layers.data(), 2, x.m, g.m, A.m, dx.m, 3);
  for (int i : {0, 1}) {
    Tensor want_A(r, k, other, dense, 0), want_B(n, r, other, dense, 0);
    kernels.shrink(dy[i].m, B[i].m, columns(want_g.m, i * r, r), 0.5f + i, 1);
    kernels.outer(dy[i].m, columns(T.m, i * r, r), want_B.m, 0.5f + i, 1);
    kernels.outer(x.m, columns(want_g.m, i * r, r), flipped(want_A.m), 1.0f, 1);
    same(dB[i], want_B, "backward's dB is not outer's");
    same(dA[i], want_A, "backward's dA is not outer's");
  }
  kernels.expand(want_g.m, A.m, nullptr, want_dx.m, 1.0f, 1);
  same(g, want_g, "backward's g is not shrink's");
  same(dx, want_dx, "backward's dx is not expand's");
}

void check_lora(const char* isa, bool here, const Products& kernels, int64_t max_rank) {
  if (!here) return void(std::printf("%-10s not run: this processor does not have it\n", isa));
  instruction_set = isa;
  const int64_t shapes[][3] = {{1, 1, 1},   {1, 30, 8},   {3, 65, 7},   {9, 66, 12},  {33, 96, 16},  {40, 258, 17}, {67, 700, 32},
                               {70, 131, 33}, {35, 34, 64}, {600, 520, 16}, {0, 8, 4}};  // M, K, r
  int count = 0;
  for (Dtype t : {Dtype::f32, Dtype::bf16}) {
    if (!kernels.has(t)) continue;
    for (const auto& [m, k, r] : shapes)
      for (Dtype other : {t, Dtype::f32}) {
        if (r > max_rank || (other == t && t == Dtype::f32 && m == 0)) continue;
        const std::string label = std::string("lora ") + name(t) + " with " + name(other) + " " + std::to_string(m) + "x" +
                                  std::to_string(k) + " r " + std::to_string(r);
        // fp32 beside bf16 is rounded when it is read.
        auto as_read = [&](Tensor& tensor) { return t == Dtype::bf16 ? rounded(tensor.values(), t) : tensor.values(); };
        for (Layout rows : {dense, padded})
          for (Layout factor : {dense, transposed, strided}) {
            Tensor x = filled(m, k, t, rows), P = filled(k, r, other, factor), Q = filled(r, k, other, factor);
            Tensor small = filled(m, r, t, rows), bias = filled(1, k, t, dense);
            Tensor out_small(m, r, t, rows, 1), out_large(m, k, t, rows, 1), out_outer(k, r, other, factor, 1);
            check_product(label + " shrink", out_small, {&x, &P}, x.values(), as_read(P), {}, 0.5,
                          [&](int threads) { kernels.shrink(x.m, P.m, out_small.m, 0.5f, threads); });
            check_product(label + " expand", out_large, {&small, &Q, &bias}, small.values(), as_read(Q), bias.values(), 0.5,
                          [&](int threads) { kernels.expand(small.m, Q.m, bias.m.data, out_large.m, 0.5f, threads); });
            check_product(label + " outer", out_outer, {&x, &small}, transposed_values(x), small.values(), {}, 0.5,
                          [&](int threads) { kernels.outer(x.m, small.m, out_outer.m, 0.5f, threads); });
            count += 3;
          }
        if (2 * r <= max_rank) check_passes(label, kernels, m, k, k + 13, r, t, other), ++count;
      }
  }
  std::printf("%-10s lora_linear     %5d products and passes\n", isa, count);
}

}  // namespace

#define SLAO_PRODUCTS(isa) \
  {isa::lora_has, isa::lora_shrink, isa::lora_expand, isa::lora_outer, isa::lora_forward, isa::lora_backward}

#endif
