// The module. With tables.h and bindings_*.h the only code that knows Python. Tables arrive as buffers of 64-bit
// integers (six to a matrix, see tensor_table.h), already checked by slao_kernels/native.py; the GIL is released while
// a kernel runs.
#include "bindings_exact.h"
#include "bindings_lora.h"
#include "cpu/isa.h"
#include "tables.h"
#ifdef SLAO_CUDA
#include "bindings_cuda.h"
#endif

namespace py = pybind11;
using slao::Isa;

namespace {

using slao::isa_of;

// The tests' way to the other instruction sets.
void use_lora_isa(const std::string& isa) { slao::lora = slao::lora_products(isa_of(isa)); }

void scaled_merge(const py::buffer& table, const py::buffer& lam, int threads, const std::string& isa) {
  const auto records = slao::records_of<slao::MergeRecord, 0, 1>(table, lam);
  const Isa chosen = isa_of(isa);
  py::gil_scoped_release release;
  SLAO_CALL(chosen, scaled_merge(records.data(), int64_t(records.size()), threads));
}

void fold(const py::buffer& table, const py::buffer& scalings, int threads, const std::string& isa) {
  const auto records = slao::records_of<slao::FoldRecord, 0, 1, 2>(table, scalings);
  const Isa chosen = isa_of(isa);
  py::gil_scoped_release release;
  SLAO_CALL(chosen, fold(records.data(), int64_t(records.size()), threads));
}

// sizes: matrices a stack; G: the address of fp64 numbers, rows² of each stack.
void gram(const py::buffer& table, const py::buffer& sizes, uintptr_t G, int threads, const std::string& isa) {
  const auto m = slao::matrices_of(table, 1);
  const auto stacks = slao::buffer_of<int64_t>(sizes, "sizes");
  int64_t total = 0;
  for (int64_t s = 0; s < stacks.size; ++s) total += stacks.data[s];
  if (total != m.size) throw std::invalid_argument("sizes do not add up to the matrices");
  const Isa chosen = isa_of(isa);
  py::gil_scoped_release release;
  SLAO_CALL(chosen, gram(m.data, stacks.data, stacks.size, reinterpret_cast<double*>(G), threads));
}

// triangles and kept may be empty: R is not wanted, the matrices are not copied.
bool orthogonal_init(const py::buffer& table, const py::buffer& triangles, const py::buffer& kept,
                     const py::buffer& status, int threads, const std::string& isa) {
  const auto m = slao::matrices_of(table, 1), r = slao::matrices_of(triangles, 1), k = slao::matrices_of(kept, 1);
  const auto states = slao::buffer_of<int32_t>(status, "status");
  if (states.size != m.size || (r.size && r.size != m.size) || (k.size && k.size != m.size))
    throw std::invalid_argument("one state, R and copy a matrix");
  const Isa chosen = isa_of(isa);
  py::gil_scoped_release release;
  return SLAO_CALL(chosen, orthogonal_init(m.data, r.size ? r.data : nullptr, k.size ? k.data : nullptr,
                                           reinterpret_cast<slao::Status*>(states.data), m.size, threads));
}

}  // namespace

PYBIND11_MODULE(_C, module) {
  module.doc() = "Whole-model kernels over tables of raw pointers. Call slao_kernels' ops, not this.";
  module.attr("abi") = 8;
  module.def("best_isa", [] { return slao::kNames[int(slao::best_isa())]; });
  module.def("scaled_merge", &scaled_merge);
  module.def("fold", &fold);
  module.def("gram", &gram);
  module.def("orthogonal_init", &orthogonal_init);
  slao::define_exact(module);
  slao::define_lora(module);
  module.def("use_lora_isa", &use_lora_isa);
#ifdef SLAO_CUDA
  module.attr("cuda") = true;
  slao::define_cuda(module);
#else
  module.attr("cuda") = false;
#endif
}
