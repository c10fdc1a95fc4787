// The GPU kernels' host side: what bindings may call. Nothing here waits for the device, allocates or copies a table,
// so every call can be captured into a CUDA graph. A failing launch throws std::runtime_error.
#pragma once
#include <cstdint>

#include "../tensor_table.h"

namespace slao::cuda {

// More rows than this and one CTA's Cholesky would take seconds; ops/orthogonal_init/native.py knows the number.
constexpr int64_t kMaxRank = 1024;

// Whether the driver takes kernel parameters of more than 4 KiB: CUDA 12.1 and later.
bool takes_many();

}  // namespace slao::cuda

// orthogonal_init_workspace: the bytes that orthogonal_init needs at `workspace`, aligned to 256. status: int32 on the
// device, public codes. triangles: where R goes, or null.
#define SLAO_DECLARE(tables)                                                                                        \
  namespace slao::cuda::tables {                                                                                    \
  void scaled_merge(const MergeRecord* records, int64_t count, int device, uintptr_t stream);                       \
  void fold(const FoldRecord* records, int64_t count, int device, uintptr_t stream);                                \
  int64_t orthogonal_init_workspace(const Matrix* matrices, int64_t count);                                         \
  void orthogonal_init(const Matrix* matrices, const Matrix* triangles, int32_t* status, int64_t count,             \
                       char* workspace, int device, uintptr_t stream);                                              \
  }
SLAO_DECLARE(few)
SLAO_DECLARE(many)
#undef SLAO_DECLARE

// Calls `call` with tables of the size that the driver takes.
#define SLAO_CUDA_CALL(call) (::slao::cuda::takes_many() ? ::slao::cuda::many::call : ::slao::cuda::few::call)
