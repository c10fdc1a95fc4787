// The GPU kernels' functions of the module: as bindings.cpp's, with a device, a stream and a workspace in place of
// threads and instruction set. A failing launch becomes a RuntimeError with CUDA's own text.
#pragma once
#include "cuda/device.h"
#include "tables.h"

namespace slao {

inline void define_cuda(pybind11::module_& module) {
  namespace py = pybind11;
  module.attr("cuda_max_rank") = cuda::kMaxRank;
  module.def(
      "cuda_scaled_merge",
      [](const py::buffer& table, const py::buffer& lam, int device, uintptr_t stream) {
        const auto records = merge_records(table, lam);
        py::gil_scoped_release release;
        SLAO_CUDA_CALL(scaled_merge(records.data(), int64_t(records.size()), device, stream));
      },
      py::arg("table"), py::arg("lam"), py::arg("device"), py::arg("stream"));
  module.def(
      "cuda_fold",
      [](const py::buffer& table, const py::buffer& scalings, int device, uintptr_t stream) {
        const auto records = fold_records(table, scalings);
        py::gil_scoped_release release;
        SLAO_CUDA_CALL(fold(records.data(), int64_t(records.size()), device, stream));
      },
      py::arg("table"), py::arg("scalings"), py::arg("device"), py::arg("stream"));
  module.def(
      "cuda_orthogonal_init_workspace",
      [](const py::buffer& table) {
        const auto m = matrices_of(table, 1);
        return cuda::many::orthogonal_init_workspace(m.data, m.size);
      },
      py::arg("table"));
  // status and workspace: addresses on the device.
  module.def(
      "cuda_orthogonal_init",
      [](const py::buffer& table, const py::buffer& triangles, uintptr_t status, uintptr_t workspace, int device,
         uintptr_t stream) {
        const auto m = matrices_of(table, 1);
        const auto r = matrices_of(triangles, 1);
        if (r.size && r.size != m.size) throw std::invalid_argument("one R a matrix");
        py::gil_scoped_release release;
        SLAO_CUDA_CALL(orthogonal_init(m.data, r.size ? r.data : nullptr, reinterpret_cast<int32_t*>(status), m.size,
                                       reinterpret_cast<char*>(workspace), device, stream));
      },
      py::arg("table"), py::arg("triangles"), py::arg("status"), py::arg("workspace"), py::arg("device"),
      py::arg("stream"));
}

}  // namespace slao
