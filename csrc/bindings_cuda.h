// The GPU kernels' functions of the module: as bindings.cpp's, with a device, a stream and a workspace in place of
// threads and instruction set. A failing launch becomes a RuntimeError with CUDA's own text.
#pragma once
#include "cuda/device.h"
#include "tables.h"

namespace slao {

inline void define_cuda(pybind11::module_& module) {
  using pybind11::buffer, pybind11::gil_scoped_release;
  module.attr("cuda_max_rank") = cuda::kMaxRank;
  module.def("cuda_driver", &cuda::driver_version);
  module.def("cuda_scaled_merge", [](const buffer& table, const buffer& lam, int device, uintptr_t stream) {
    const auto records = records_of<MergeRecord, 0, 1>(table, lam);
    gil_scoped_release release;
    cuda::scaled_merge(records.data(), int64_t(records.size()), device, stream);
  });
  module.def("cuda_fold", [](const buffer& table, const buffer& scalings, int device, uintptr_t stream) {
    const auto records = records_of<FoldRecord, 0, 1, 2>(table, scalings);
    gil_scoped_release release;
    cuda::fold(records.data(), int64_t(records.size()), device, stream);
  });
  module.def("cuda_orthogonal_init_workspace", [](const buffer& table) {
    const auto m = matrices_of(table, 1);
    return cuda::orthogonal_init_workspace(m.data, m.size);
  });
  // status and workspace: addresses on the device.
  module.def("cuda_orthogonal_init", [](const buffer& table, const buffer& triangles, uintptr_t status,
                                        uintptr_t workspace, int device, uintptr_t stream) {
    const auto m = matrices_of(table, 1), r = matrices_of(triangles, 1);
    if (r.size && r.size != m.size) throw std::invalid_argument("one R a matrix");
    gil_scoped_release release;
    cuda::orthogonal_init(m.data, r.size ? r.data : nullptr, reinterpret_cast<int32_t*>(status), m.size,
                          reinterpret_cast<char*>(workspace), device, stream);
  });
}

}  // namespace slao
