// The GPU kernels' host side: what bindings may call. Nothing here waits for the device, allocates or copies a table,
// so every call can be captured into a CUDA graph. A failing launch throws std::runtime_error.
#pragma once
#include <cstdint>

#include "../tensor_table.h"

namespace slao::cuda {

// More rows than this and one CTA's Cholesky would take seconds; ops/orthogonal_init/native.py knows the number.
constexpr int64_t kMaxRank = 1024;

// CUDA's version in thousands and tens: 12010. The kernels' parameters need that of 12.1 or later.
int driver_version();

void scaled_merge(const MergeRecord* records, int64_t count, int device, uintptr_t stream);
void fold(const FoldRecord* records, int64_t count, int device, uintptr_t stream);

// The bytes that orthogonal_init needs at `workspace`, aligned to 256. status: int32 on the device, public codes.
// triangles: where R goes, or null.
int64_t orthogonal_init_workspace(const Matrix* matrices, int64_t count);
void orthogonal_init(const Matrix* matrices, const Matrix* triangles, int32_t* status, int64_t count, char* workspace,
                     int device, uintptr_t stream);

}  // namespace slao::cuda
