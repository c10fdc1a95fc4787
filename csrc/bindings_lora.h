// lora_linear's products for Python: plain numbers instead of tables, since each is called once a layer and pass. As
// bindings.cpp, this knows Python, and slao_kernels/ops/lora_linear/native.py has checked what comes in.
#pragma once
#include <pybind11/pybind11.h>

#include <stdexcept>
#include <string>

#include "cpu/isa.h"

namespace slao {

namespace py = pybind11;

#if defined(__x86_64__)

namespace {

LoraIsa lora_isa = best_lora_isa();

// The tests' way to the other instruction sets; "auto" is the processor's best.
void use_lora_isa(const std::string& name) {
  const LoraIsa best = best_lora_isa();
  const LoraIsa wish = name == "auto"         ? best
                       : name == "avx512bf16" ? LoraIsa::avx512bf16
                       : name == "avx512"     ? LoraIsa::avx512
                                              : LoraIsa::avx2;
  if (wish > best) throw std::invalid_argument("this processor has no " + name);
  lora_isa = wish;
}

Matrix matrix(uintptr_t data, int64_t rows, int64_t cols, int64_t row_stride, int64_t col_stride, int dtype) {
  return {reinterpret_cast<char*>(data), rows, cols, row_stride, col_stride, static_cast<Dtype>(dtype)};
}

bool lora_has(int dtype) {
  return lora_isa != LoraIsa::none && SLAO_LORA_CALL(lora_isa, lora_has(static_cast<Dtype>(dtype)));
}

// t (M, R) = scale x (M, K) P (K, R)
void lora_shrink(uintptr_t x, int64_t ldx, uintptr_t P, int64_t p_row, int64_t p_col, uintptr_t t, int64_t ldt, int64_t M,
                 int64_t K, int64_t R, float scale, int dtype, int threads) {
  py::gil_scoped_release release;
  SLAO_LORA_CALL(lora_isa, lora_shrink(matrix(x, M, K, ldx, 1, dtype), matrix(P, K, R, p_row, p_col, dtype),
                                       matrix(t, M, R, ldt, 1, dtype), scale, threads));
}

// y (M, N) = scale t (M, R) Q (R, N) + bias (N), or no bias
void lora_expand(uintptr_t t, int64_t ldt, uintptr_t Q, int64_t q_row, int64_t q_col, uintptr_t bias, uintptr_t y,
                 int64_t ldy, int64_t M, int64_t N, int64_t R, float scale, int dtype, int threads) {
  py::gil_scoped_release release;
  SLAO_LORA_CALL(lora_isa, lora_expand(matrix(t, M, R, ldt, 1, dtype), matrix(Q, R, N, q_row, q_col, dtype),
                                       reinterpret_cast<void*>(bias), matrix(y, M, N, ldy, 1, dtype), scale, threads));
}

// d (N, R) = scale xᵀ (N, M) t (M, R)
void lora_outer(uintptr_t x, int64_t ldx, uintptr_t t, int64_t ldt, uintptr_t d, int64_t d_row, int64_t d_col, int64_t M,
                int64_t N, int64_t R, float scale, int dtype, int threads) {
  py::gil_scoped_release release;
  SLAO_LORA_CALL(lora_isa, lora_outer(matrix(x, M, N, ldx, 1, dtype), matrix(t, M, R, ldt, 1, dtype),
                                      matrix(d, N, R, d_row, d_col, dtype), scale, threads));
}

// The two of a forward pass, then the four of a backward pass, in one call; all but x and dy contiguous. A null g, dA,
// dB or dx is not computed (dA and dx need g).
void lora_forward(uintptr_t x, int64_t ldx, uintptr_t A, uintptr_t B, uintptr_t bias, uintptr_t t, uintptr_t y, int64_t M,
                  int64_t K, int64_t N, int64_t R, float scale, int dtype, int threads) {
  lora_shrink(x, ldx, A, 1, K, t, R, M, K, R, 1.0f, dtype, threads);
  lora_expand(t, R, B, 1, R, bias, y, N, M, N, R, scale, dtype, threads);
}

void lora_backward(uintptr_t dy, int64_t ldy, uintptr_t x, int64_t ldx, uintptr_t t, uintptr_t A, uintptr_t B, uintptr_t g,
                   uintptr_t dA, uintptr_t dB, uintptr_t dx, int64_t M, int64_t K, int64_t N, int64_t R, float scale,
                   int dtype, int threads) {
  if (g) lora_shrink(dy, ldy, B, R, 1, g, R, M, N, R, scale, dtype, threads);
  if (dB) lora_outer(dy, ldy, t, R, dB, R, 1, M, N, R, scale, dtype, threads);
  if (dA) lora_outer(x, ldx, g, R, dA, 1, K, M, K, R, 1.0f, dtype, threads);
  if (dx) lora_expand(g, R, A, K, 1, 0, dx, K, M, K, R, 1.0f, dtype, threads);
}

}  // namespace

#endif

inline void define_lora(py::module_& module) {
#if defined(__x86_64__)
  // Positional only: they are called once or twice a layer, and a name costs time.
  module.def("lora_has", &lora_has);
  module.def("use_lora_isa", &use_lora_isa);
  module.attr("lora_rank") = lora_isa == LoraIsa::none ? 0 : lora_isa == LoraIsa::avx2 ? 32 : 64;
  module.def("lora_shrink", &lora_shrink);
  module.def("lora_expand", &lora_expand);
  module.def("lora_outer", &lora_outer);
  module.def("lora_forward", &lora_forward);
  module.def("lora_backward", &lora_backward);
#else
  module.def("lora_has", [](int) { return false; });
  module.attr("lora_rank") = 0;
#endif
}

}  // namespace slao
