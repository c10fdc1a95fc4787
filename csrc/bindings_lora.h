// lora_linear's products for Python: plain numbers instead of tables, since each is called once a layer and pass. As
// bindings.cpp, this knows Python, and slao_kernels/ops/lora_linear/native.py has checked what comes in.
#pragma once
#include <pybind11/pybind11.h>

#include <stdexcept>
#include <string>
#include <vector>

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
                       : name == "amx"        ? LoraIsa::amx
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

// dtype: x's, y's and t's. other: of the remaining matrices, the same or fp32.

// t (M, R) = scale x (M, K) P (K, R)
void lora_shrink(uintptr_t x, int64_t ldx, uintptr_t P, int64_t p_row, int64_t p_col, uintptr_t t, int64_t ldt, int64_t M,
                 int64_t K, int64_t R, float scale, int dtype, int other, int threads) {
  py::gil_scoped_release release;
  SLAO_LORA_CALL(lora_isa, lora_shrink(matrix(x, M, K, ldx, 1, dtype), matrix(P, K, R, p_row, p_col, other),
                                       matrix(t, M, R, ldt, 1, dtype), scale, threads));
}

// y (M, N) = scale t (M, R) Q (R, N) + bias (N), or no bias
void lora_expand(uintptr_t t, int64_t ldt, uintptr_t Q, int64_t q_row, int64_t q_col, uintptr_t bias, uintptr_t y,
                 int64_t ldy, int64_t M, int64_t N, int64_t R, float scale, int dtype, int other, int threads) {
  py::gil_scoped_release release;
  SLAO_LORA_CALL(lora_isa, lora_expand(matrix(t, M, R, ldt, 1, dtype), matrix(Q, R, N, q_row, q_col, other),
                                       reinterpret_cast<void*>(bias), matrix(y, M, N, ldy, 1, dtype), scale, threads));
}

// d (N, R) = scale xᵀ (N, M) t (M, R)
void lora_outer(uintptr_t x, int64_t ldx, uintptr_t t, int64_t ldt, uintptr_t d, int64_t d_row, int64_t d_col, int64_t M,
                int64_t N, int64_t R, float scale, int dtype, int other, int threads) {
  py::gil_scoped_release release;
  SLAO_LORA_CALL(lora_isa, lora_outer(matrix(x, M, N, ldx, 1, dtype), matrix(t, M, R, ldt, 1, dtype),
                                      matrix(d, N, R, d_row, d_col, other), scale, threads));
}

// The two of a forward pass, then the four of a backward pass, in one call; all but x and dy contiguous. A null g, dA,
// dB or dx is not computed (dA and dx need g). They take integers as they come from Python, at a third of the time of
// pybind11's conversions: a training step makes hundreds of calls.
struct Arguments {
  PyObject* const* next;
  bool has(Py_ssize_t count, Py_ssize_t expected) const {
    if (count != expected) PyErr_Format(PyExc_TypeError, "expected %zd arguments, got %zd", expected, count);
    return count == expected;
  }
  int64_t integer() { return PyLong_AsLongLong(*next++); }
  float number() { return float(PyFloat_AsDouble(*next++)); }
};

// Runs without the GIL; None, or the exception that a call of pybind11's would have made of the C++ one.
template <typename F> PyObject* without_gil(F&& f) {
  try {
    py::gil_scoped_release release;
    f();
  } catch (const std::bad_alloc&) {
    return PyErr_NoMemory();
  } catch (const std::exception& error) {
    PyErr_SetString(PyExc_RuntimeError, error.what());
    return nullptr;
  }
  Py_RETURN_NONE;
}

// x, ldx, A, B, bias, t, ldt, y, M, K, N, R, scale, dtype, other, threads
PyObject* lora_forward(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  Arguments a{arguments};
  if (!a.has(count, 16)) return nullptr;
  const int64_t x = a.integer(), ldx = a.integer(), A = a.integer(), B = a.integer(), bias = a.integer();
  const int64_t t = a.integer(), ldt = a.integer(), y = a.integer();
  const int64_t M = a.integer(), K = a.integer(), N = a.integer(), R = a.integer();
  const float scale = a.number();
  const int dtype = int(a.integer()), other = int(a.integer()), threads = int(a.integer());
  if (PyErr_Occurred()) return nullptr;
  return without_gil([&] {
    SLAO_LORA_CALL(lora_isa, lora_forward(matrix(x, M, K, ldx, 1, dtype), matrix(A, K, R, 1, K, other),
                                          matrix(t, M, R, ldt, 1, dtype), matrix(B, R, N, 1, R, other),
                                          reinterpret_cast<void*>(bias), matrix(y, M, N, N, 1, dtype), scale, threads));
  });
}

// x, ldx, g, A, dx, M, K, R, dtype, other, threads, then for each layer dy, ldy, t, ldt, B, dA, dB, N, r, scale. g (M, R)
// holds the layers' gs side by side, A (R, K) their As; a null dA, dB or dx is not computed, all of them need g.
PyObject* lora_backward(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  constexpr Py_ssize_t kShared = 11, kEach = 10;
  Arguments a{arguments};
  const Py_ssize_t layers = (count - kShared) / kEach;
  if (layers < 1 || !a.has(count, kShared + layers * kEach)) return nullptr;
  const int64_t x = a.integer(), ldx = a.integer(), g = a.integer(), A = a.integer(), dx = a.integer();
  const int64_t M = a.integer(), K = a.integer(), R = a.integer();
  const int dtype = int(a.integer()), other = int(a.integer()), threads = int(a.integer());
  const int64_t size = element_size(static_cast<Dtype>(dtype));
  std::vector<LoraGrads> grads;
  int64_t done = 0;  // ranks
  for (Py_ssize_t i = 0; i < layers; ++i) {
    const int64_t dy = a.integer(), ldy = a.integer(), t = a.integer(), ldt = a.integer(), B = a.integer();
    const int64_t dA = a.integer(), dB = a.integer(), N = a.integer(), r = a.integer();
    const float scale = a.number();
    grads.push_back({matrix(dy, M, N, ldy, 1, dtype), matrix(t, M, r, ldt, 1, dtype), matrix(B, N, r, r, 1, other),
                     matrix(g ? g + done * size : 0, M, r, R, 1, dtype), matrix(dA, K, r, 1, K, other),
                     matrix(dB, N, r, r, 1, other), scale});
    done += r;
  }
  if (PyErr_Occurred()) return nullptr;
  return without_gil([&] {
    SLAO_LORA_CALL(lora_isa, lora_backward(grads.data(), int(grads.size()), matrix(x, M, K, ldx, 1, dtype),
                                           matrix(g, M, R, R, 1, dtype), matrix(A, R, K, K, 1, other),
                                           matrix(dx, M, K, K, 1, dtype), threads));
  });
}

using FastCall = PyObject* (*)(PyObject*, PyObject* const*, Py_ssize_t);
PyCFunction fast(FastCall function) { return reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(function)); }
PyMethodDef lora_methods[] = {{"lora_forward", fast(lora_forward), METH_FASTCALL, nullptr},
                              {"lora_backward", fast(lora_backward), METH_FASTCALL, nullptr},
                              {nullptr, nullptr, 0, nullptr}};

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
  PyModule_AddFunctions(module.ptr(), lora_methods);
#else
  module.def("lora_has", [](int) { return false; });
  module.attr("lora_rank") = 0;
#endif
}

}  // namespace slao
