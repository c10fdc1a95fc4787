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

std::string best_isa() {
  const Isa best = slao::best_isa();
  return best == Isa::avx512 ? "avx512" : best == Isa::avx2 ? "avx2" : "base";
}

}  // namespace

PYBIND11_MODULE(_C, module) {
  module.doc() = "Whole-model kernels over tables of raw pointers. Call slao_kernels' ops, not this.";
  module.attr("abi") = 1;
  module.def("best_isa", &best_isa);
  module.def("scaled_merge", &scaled_merge, py::arg("table"), py::arg("lam"), py::arg("threads"), py::arg("isa"));
  module.def("fold", &fold, py::arg("table"), py::arg("scalings"), py::arg("threads"), py::arg("isa"));
  module.def("orthogonal_init", &orthogonal_init, py::arg("table"), py::arg("triangles"), py::arg("status"),
             py::arg("threads"), py::arg("isa"));
}
