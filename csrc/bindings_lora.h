// lora_linear's products for Python: plain numbers instead of tables, since each is called once a layer and pass. As
// bindings.cpp, this knows Python, and slao_kernels/ops/lora_linear has checked what comes in: large matrices in bf16
// with unit column stride, `other` the dtype of the small ones (bf16 or fp32).
#pragma once
#include <pybind11/pybind11.h>

#include <stdexcept>
#include <string>

#include "cpu/isa.h"

namespace slao {
namespace {

const LoraProducts* lora = lora_products(best_isa());

const LoraProducts& products(int64_t other) {
  if (!lora || (other != int64_t(Dtype::bf16) && other != int64_t(Dtype::f32)))
    throw std::invalid_argument("lora_linear's products: bf16 or fp32 beside bf16, on processors that multiply bf16");
  return *lora;
}

Matrix small(uintptr_t data, int64_t rows, int64_t cols, int64_t row_stride, int64_t col_stride, int64_t dtype) {
  return {reinterpret_cast<char*>(data), rows, cols, row_stride, col_stride, static_cast<Dtype>(dtype)};
}
Matrix large(uintptr_t data, int64_t rows, int64_t cols, int64_t row_stride) {
  return small(data, rows, cols, row_stride, 1, int64_t(Dtype::bf16));
}

// t (M, R) = t_scale x (M, K) P (K, R), unless P is null; y (M, N) = y_scale t Q (R, N) + bias (or null), unless Q is.
void lora_rows(uintptr_t x, int64_t ldx, uintptr_t P, int64_t p_row, int64_t p_col, uintptr_t t, int64_t ldt,
               uintptr_t Q, int64_t q_row, int64_t q_col, uintptr_t bias, uintptr_t y, int64_t ldy, int64_t M,
               int64_t K, int64_t N, int64_t R, float t_scale, float y_scale, int64_t other, int threads) {
  const LoraProducts& lora = products(other);
  pybind11::gil_scoped_release release;
  lora.rows({large(x, M, K, ldx), small(P, K, R, p_row, p_col, other), large(t, M, R, ldt),
             small(Q, R, N, q_row, q_col, other), large(y, M, N, ldy), reinterpret_cast<void*>(bias), t_scale, y_scale},
            threads);
}

// d (N, R) = scale xᵀ (N, M) t (M, R)
void lora_outer(uintptr_t x, int64_t ldx, uintptr_t t, int64_t ldt, uintptr_t d, int64_t d_row, int64_t d_col,
                int64_t M, int64_t N, int64_t R, float scale, int64_t other, int threads) {
  const LoraProducts& lora = products(other);
  pybind11::gil_scoped_release release;
  lora.outer({large(x, M, N, ldx), large(t, M, R, ldt), small(d, N, R, d_row, d_col, other), scale}, threads);
}

// See LoraBackward; all but dy contiguous. A null g, dA, dB or dx is not computed; dA and dx need g.
void lora_backward(uintptr_t dy, int64_t ldy, uintptr_t t, uintptr_t x, uintptr_t A, uintptr_t B, uintptr_t g,
                   uintptr_t dx, uintptr_t dA, uintptr_t dB, int64_t M, int64_t K, int64_t N, int64_t R, float scale,
                   int64_t other, int threads) {
  const LoraProducts& lora = products(other);
  pybind11::gil_scoped_release release;
  lora.backward({large(dy, M, N, ldy), large(t, M, R, R), large(x, M, K, K), small(A, R, K, K, 1, other),
                 small(B, N, R, R, 1, other), large(g, M, R, R), large(dx, M, K, K), small(dA, K, R, 1, K, other),
                 small(dB, N, R, R, 1, other), scale},
                threads);
}

}  // namespace

// lora_rank: the largest; 0 where the processor has no code.
inline void define_lora(pybind11::module_& module) {
  module.attr("lora_rank") = lora ? kLoraRank : 0;
  module.def("lora_rows", &lora_rows);
  module.def("lora_outer", &lora_outer);
  module.def("lora_backward", &lora_backward);
}

}  // namespace slao
