// The only file that knows Python. Tables arrive as buffers of 64-bit integers (six to a matrix, see tensor_table.h),
// already checked by slao_kernels/native.py; the GIL is released while a kernel runs.
#include <pybind11/pybind11.h>

#include <stdexcept>
#include <string>
#include <vector>

#include "cpu/isa.h"

namespace py = pybind11;
using slao::FoldRecord;
using slao::Isa;
using slao::Matrix;
using slao::MergeRecord;

namespace {

static_assert(sizeof(Matrix) == 6 * sizeof(int64_t), "a matrix is six words of the table");

template <typename T> struct View {
  T* data;
  int64_t size;
};

template <typename T> View<T> view(const py::buffer& buffer, const char* what) {
  const py::buffer_info info = buffer.request();
  if (info.itemsize != sizeof(T)) throw std::invalid_argument(std::string(what) + ": wrong item size");
  return {static_cast<T*>(info.ptr), static_cast<int64_t>(info.size)};
}

View<Matrix> matrices(const py::buffer& table, int64_t per_record) {
  const auto words = view<int64_t>(table, "table");
  if (words.size % (6 * per_record)) throw std::invalid_argument("table: incomplete record");
  return {reinterpret_cast<Matrix*>(words.data), words.size / 6};
}

Isa isa_of(const std::string& name) {
  const Isa best = slao::best_isa();
  if (name == "auto") return best;
  const Isa wish = name == "avx512" ? Isa::avx512 : name == "avx2" ? Isa::avx2 : Isa::base;
  if (wish > best) throw std::invalid_argument("this processor has no " + name);
  return wish;
}

void scaled_merge(const py::buffer& table, const py::buffer& lam, int threads, const std::string& isa) {
  const auto m = matrices(table, 2);
  const auto weights = view<double>(lam, "lam");
  if (weights.size * 2 != m.size) throw std::invalid_argument("lam: one a record");
  std::vector<MergeRecord> records(weights.size);
  for (int64_t i = 0; i < weights.size; ++i) records[i] = {m.data[2 * i], m.data[2 * i + 1], weights.data[i]};
  const Isa chosen = isa_of(isa);
  py::gil_scoped_release release;
  SLAO_CALL(chosen, scaled_merge(records.data(), weights.size, threads));
}

void fold(const py::buffer& table, const py::buffer& scalings, int threads, const std::string& isa) {
  const auto m = matrices(table, 3);
  const auto factors = view<double>(scalings, "scalings");
  if (factors.size * 3 != m.size) throw std::invalid_argument("scalings: one a record");
  std::vector<FoldRecord> records(factors.size);
  for (int64_t i = 0; i < factors.size; ++i)
    records[i] = {m.data[3 * i], m.data[3 * i + 1], m.data[3 * i + 2], factors.data[i]};
  const Isa chosen = isa_of(isa);
  py::gil_scoped_release release;
  SLAO_CALL(chosen, fold(records.data(), factors.size, threads));
}

bool orthogonal_init(const py::buffer& table, const py::buffer& triangles, const py::buffer& status, int threads,
                     const std::string& isa) {
  const auto m = matrices(table, 1);
  const auto r = matrices(triangles, 1);
  const auto states = view<int32_t>(status, "status");
  if (states.size != m.size || (r.size && r.size != m.size)) throw std::invalid_argument("one state and R a matrix");
  const Isa chosen = isa_of(isa);
  py::gil_scoped_release release;
  return SLAO_CALL(chosen, orthogonal_init(m.data, r.size ? r.data : nullptr,
                                           reinterpret_cast<slao::Status*>(states.data), m.size, threads));
}

#if defined(__x86_64__)

slao::LoraIsa lora_isa = slao::best_lora_isa();

// The tests' way to the other instruction sets; "auto" is the processor's best.
void use_lora_isa(const std::string& name) {
  using slao::LoraIsa;
  const LoraIsa best = slao::best_lora_isa();
  const LoraIsa wish = name == "auto"         ? best
                       : name == "avx512bf16" ? LoraIsa::avx512bf16
                       : name == "avx512"     ? LoraIsa::avx512
                                              : LoraIsa::avx2;
  if (wish > best) throw std::invalid_argument("this processor has no " + name);
  lora_isa = wish;
}

Matrix matrix(uintptr_t data, int64_t rows, int64_t cols, int64_t row_stride, int64_t col_stride, int dtype) {
  return {reinterpret_cast<char*>(data), rows, cols, row_stride, col_stride, static_cast<slao::Dtype>(dtype)};
}

bool lora_has(int dtype) {
  return lora_isa != slao::LoraIsa::none && SLAO_LORA_CALL(lora_isa, lora_has(static_cast<slao::Dtype>(dtype)));
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

#endif

std::string best_isa() {
  const Isa best = slao::best_isa();
  return best == Isa::avx512 ? "avx512" : best == Isa::avx2 ? "avx2" : "base";
}

}  // namespace

PYBIND11_MODULE(_C, module) {
  module.doc() = "Whole-model kernels over tables of raw pointers. Call slao_kernels' ops, not this.";
  module.attr("abi") = 2;
  module.def("best_isa", &best_isa);
  module.def("scaled_merge", &scaled_merge, py::arg("table"), py::arg("lam"), py::arg("threads"), py::arg("isa"));
  module.def("fold", &fold, py::arg("table"), py::arg("scalings"), py::arg("threads"), py::arg("isa"));
  module.def("orthogonal_init", &orthogonal_init, py::arg("table"), py::arg("triangles"), py::arg("status"),
             py::arg("threads"), py::arg("isa"));
#if defined(__x86_64__)
  // Positional only: they are called once or twice a layer, and a name costs time.
  module.def("lora_has", &lora_has);
  module.def("use_lora_isa", &use_lora_isa);
  module.attr("lora_rank") = lora_isa == slao::LoraIsa::none ? 0 : lora_isa == slao::LoraIsa::avx2 ? 32 : 64;
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
