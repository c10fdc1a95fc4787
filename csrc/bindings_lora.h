// lora_linear's products for Python: plain numbers instead of tables, since each is called once a layer and pass. As
// bindings.cpp, this knows Python, and slao_kernels/ops/lora_linear has checked what comes in.
#pragma once
#include <pybind11/pybind11.h>

#include <stdexcept>
#include <string>

#include "cpu/isa.h"

namespace slao {

namespace py = pybind11;

namespace {

const LoraProducts* lora = lora_products(best_lora_isa());

// The tests' way to the other instruction sets; "auto" is the processor's best.
void use_lora_isa(const std::string& name) {
  const LoraIsa best = best_lora_isa();
  const LoraIsa wish = name == "auto"         ? best
                       : name == "amx"        ? LoraIsa::amx
                       : name == "avx512bf16" ? LoraIsa::avx512bf16
                                              : LoraIsa::none;
  if (wish > best || (wish == LoraIsa::none && name != "auto"))
    throw std::invalid_argument("lora_linear has no code for " + name + " on this processor");
  lora = lora_products(wish);
}

const LoraProducts& products(int64_t dtype, int64_t other) {
  if (!lora || dtype != int64_t(Dtype::bf16) || (other != dtype && other != int64_t(Dtype::f32)))
    throw std::invalid_argument("lora_linear's products: bf16, with bf16 or fp32 beside it, on processors that multiply it");
  return *lora;
}

Matrix matrix(uintptr_t data, int64_t rows, int64_t cols, int64_t row_stride, int64_t col_stride, int64_t dtype) {
  return {reinterpret_cast<char*>(data), rows, cols, row_stride, col_stride, static_cast<Dtype>(dtype)};
}

// dtype: x's, y's and t's. other: of the remaining matrices, the same or fp32.

// t (M, R) = scale x (M, K) P (K, R)
void lora_shrink(uintptr_t x, int64_t ldx, uintptr_t P, int64_t p_row, int64_t p_col, uintptr_t t, int64_t ldt, int64_t M,
                 int64_t K, int64_t R, float scale, int dtype, int other, int threads) {
  const LoraProducts& lora = products(dtype, other);
  py::gil_scoped_release release;
  lora.shrink(matrix(x, M, K, ldx, 1, dtype), matrix(P, K, R, p_row, p_col, other), matrix(t, M, R, ldt, 1, dtype), scale,
              threads);
}

// y (M, N) = scale t (M, R) Q (R, N) + bias (N), or no bias
void lora_expand(uintptr_t t, int64_t ldt, uintptr_t Q, int64_t q_row, int64_t q_col, uintptr_t bias, uintptr_t y,
                 int64_t ldy, int64_t M, int64_t N, int64_t R, float scale, int dtype, int other, int threads) {
  const LoraProducts& lora = products(dtype, other);
  py::gil_scoped_release release;
  lora.expand(matrix(t, M, R, ldt, 1, dtype), matrix(Q, R, N, q_row, q_col, other), reinterpret_cast<void*>(bias),
              matrix(y, M, N, ldy, 1, dtype), scale, threads);
}

// d (N, R) = scale xᵀ (N, M) t (M, R)
void lora_outer(uintptr_t x, int64_t ldx, uintptr_t t, int64_t ldt, uintptr_t d, int64_t d_row, int64_t d_col, int64_t M,
                int64_t N, int64_t R, float scale, int dtype, int other, int threads) {
  const LoraProducts& lora = products(dtype, other);
  py::gil_scoped_release release;
  lora.outer(matrix(x, M, N, ldx, 1, dtype), matrix(t, M, R, ldt, 1, dtype), matrix(d, N, R, d_row, d_col, other), scale,
             threads);
}

// The two of a forward pass, then the four of a backward pass, in one call; all but x and dy contiguous. They take
// numbers as they come from Python, at a third of the time of pybind11's conversions: a training step makes hundreds of
// calls.
struct Arguments {
  PyObject* const* next;
  int64_t integer() { return PyLong_AsLongLong(*next++); }
  float number() { return float(PyFloat_AsDouble(*next++)); }
};

// f(arguments) reads them and returns what then runs without the GIL. None, or the exception that a call of pybind11's
// would have made of the C++ one.
template <typename F> PyObject* fast_call(PyObject* const* arguments, Py_ssize_t count, Py_ssize_t expected, F&& f) {
  if (count != expected) return PyErr_Format(PyExc_TypeError, "expected %zd arguments, got %zd", expected, count);
  try {
    const auto work = f(Arguments{arguments});
    if (PyErr_Occurred()) return nullptr;
    py::gil_scoped_release release;
    work();
  } catch (const std::bad_alloc&) {
    return PyErr_NoMemory();
  } catch (const std::exception& error) {
    PyErr_SetString(PyExc_ValueError, error.what());
    return nullptr;
  }
  Py_RETURN_NONE;
}

// x, ldx, A, B, bias, t, ldt, y, M, K, N, R, scale, dtype, other, threads
PyObject* lora_forward(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  return fast_call(arguments, count, 16, [](Arguments a) {
    const int64_t x = a.integer(), ldx = a.integer(), A = a.integer(), B = a.integer(), bias = a.integer();
    const int64_t t = a.integer(), ldt = a.integer(), y = a.integer();
    const int64_t M = a.integer(), K = a.integer(), N = a.integer(), R = a.integer();
    const float scale = a.number();
    const int64_t dtype = a.integer(), other = a.integer(), threads = a.integer();
    return [=] {
      products(dtype, other)
          .forward(matrix(x, M, K, ldx, 1, dtype), matrix(A, K, R, 1, K, other), matrix(t, M, R, ldt, 1, dtype),
                   matrix(B, R, N, 1, R, other), reinterpret_cast<void*>(bias), matrix(y, M, N, N, 1, dtype), scale,
                   int(threads));
    };
  });
}

// x, ldx, g, A, dx, M, K, R, dtype, other, threads, dy, ldy, t, ldt, B, dA, dB, N, R, scale. A null g, dA, dB or dx is
// not computed; dA and dx need g.
PyObject* lora_backward(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  return fast_call(arguments, count, 21, [](Arguments a) {
    const int64_t x = a.integer(), ldx = a.integer(), g = a.integer(), A = a.integer(), dx = a.integer();
    const int64_t M = a.integer(), K = a.integer(), R = a.integer();
    const int64_t dtype = a.integer(), other = a.integer(), threads = a.integer();
    const int64_t dy = a.integer(), ldy = a.integer(), t = a.integer(), ldt = a.integer(), B = a.integer();
    const int64_t dA = a.integer(), dB = a.integer(), N = a.integer(), r = a.integer();
    const float scale = a.number();
    return [=] {
      if (r != R) throw std::invalid_argument("lora_backward: one layer a call");
      products(dtype, other)
          .backward({matrix(dy, M, N, ldy, 1, dtype), matrix(t, M, R, ldt, 1, dtype), matrix(B, N, R, R, 1, other),
                     matrix(g, M, R, R, 1, dtype), matrix(dA, K, R, 1, K, other), matrix(dB, N, R, R, 1, other), scale},
                    matrix(x, M, K, ldx, 1, dtype), matrix(A, R, K, K, 1, other), matrix(dx, M, K, K, 1, dtype),
                    int(threads));
    };
  });
}

using FastCall = PyObject* (*)(PyObject*, PyObject* const*, Py_ssize_t);
PyCFunction fast(FastCall function) { return reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(function)); }
PyMethodDef lora_methods[] = {{"lora_forward", fast(lora_forward), METH_FASTCALL, nullptr},
                              {"lora_backward", fast(lora_backward), METH_FASTCALL, nullptr},
                              {nullptr, nullptr, 0, nullptr}};

}  // namespace

// Positional only: they are called once or twice a layer, and a name costs time. lora_rank: the largest; 0 where the
// processor has no code.
inline void define_lora(py::module_& module) {
  module.attr("lora_rank") = lora ? kLoraRank : 0;
  module.def("use_lora_isa", &use_lora_isa);
  module.def("lora_shrink", &lora_shrink);
  module.def("lora_expand", &lora_expand);
  module.def("lora_outer", &lora_outer);
  PyModule_AddFunctions(module.ptr(), lora_methods);
}

}  // namespace slao
