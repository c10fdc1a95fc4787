// For the driver: lora_linear's three products against naive double precision, between guard zones.
#pragma once
#include "../../csrc/cpu/isa.h"
#include "guarded.h"

#if defined(__x86_64__)

namespace {

struct Products {
  bool (*has)(Dtype);
  void (*shrink)(const Matrix&, const Matrix&, const Matrix&, float, int);
  void (*expand)(const Matrix&, const Matrix&, const void*, const Matrix&, float, int);
  void (*outer)(const Matrix&, const Matrix&, const Matrix&, float, int);
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

Values transposed_values(const Tensor& tensor) {
  const Values v = tensor.values();
  Values t;
  for (int64_t j = 0; j < tensor.m.cols; ++j)
    for (int64_t i = 0; i < tensor.m.rows; ++i) t.push_back(v[i * tensor.m.cols + j]);
  return t;
}

void check_lora(const char* isa, bool here, const Products& kernels, int64_t max_rank) {
  if (!here) return void(std::printf("%-10s not run: this processor does not have it\n", isa));
  instruction_set = isa;
  const int64_t shapes[][3] = {  // M, K (even: bf16 is read in pairs), r
      {1, 2, 1}, {1, 30, 8}, {3, 64, 7}, {9, 66, 12}, {33, 96, 16}, {40, 258, 17}, {67, 700, 32}, {70, 130, 33}, {35, 34, 64},
      {600, 520, 16}};
  int count = 0;
  for (Dtype t : {Dtype::f32, Dtype::bf16}) {
    if (!kernels.has(t)) continue;
    for (const auto& [m, k, r] : shapes)
      for (Layout rows : {dense, padded})
        for (Layout factor : {dense, transposed}) {
          if (r > max_rank) continue;
          const std::string label = std::string("lora ") + name(t) + " " + std::to_string(m) + "x" + std::to_string(k) +
                                    " r " + std::to_string(r);
          Tensor x = filled(m, k, t, rows), P = filled(k, r, t, factor), Q = filled(r, k, t, factor);
          Tensor small = filled(m, r, t, rows), bias = filled(1, k, t, dense);
          Tensor out_small(m, r, t, rows, 1), out_large(m, k, t, rows, 1), out_outer(k, r, t, factor, 1);
          check_product(label + " shrink", out_small, {&x, &P}, x.values(), P.values(), {}, 0.5,
                        [&](int threads) { kernels.shrink(x.m, P.m, out_small.m, 0.5f, threads); });
          check_product(label + " expand", out_large, {&small, &Q, &bias}, small.values(), Q.values(), bias.values(), 0.5,
                        [&](int threads) { kernels.expand(small.m, Q.m, bias.m.data, out_large.m, 0.5f, threads); });
          check_product(label + " outer", out_outer, {&x, &small}, transposed_values(x), small.values(), {}, 0.5,
                        [&](int threads) { kernels.outer(x.m, small.m, out_outer.m, 0.5f, threads); });
          count += 3;
        }
  }
  std::printf("%-10s lora_linear     %5d products\n", isa, count);
}

}  // namespace

#define SLAO_PRODUCTS(isa) {isa::lora_has, isa::lora_shrink, isa::lora_expand, isa::lora_outer}

#endif
