// Launches, and the few device operations that the tests' emulator (tests/csrc/cuda_on_cpu.h) spells differently.
#pragma once
#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>

#ifdef __CUDACC__
#include <cuda_runtime.h>
#else
#include "cuda_on_cpu.h"
#endif

namespace slao::cuda {

// Tables travel as kernel parameters: a captured graph keeps its own copy, which it would not of a table that was
// copied to the device. Drivers take so many bytes since CUDA 12.1 (native.py asks), before it 4,096.
constexpr size_t kParameterBytes = 32764;
constexpr int kThreads = 256, kWarps = kThreads / 32;

inline void check(cudaError_t error) {
  if (error != cudaSuccess) throw std::runtime_error(std::string("CUDA: ") + cudaGetErrorString(error));
}

#ifdef __CUDACC__

inline void use_device(int device) { check(cudaSetDevice(device)); }

inline void zero(void* data, size_t bytes, uintptr_t stream) {
  check(cudaMemsetAsync(data, 0, bytes, reinterpret_cast<cudaStream_t>(stream)));
}

template <typename P>
void launch(void (*kernel)(P), int64_t grid, size_t shared_bytes, uintptr_t stream, const P& parameters) {
  if (grid == 0) return;
  if (shared_bytes > (48 << 10))  // what a kernel gets without asking
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared_bytes)));
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(unsigned(grid));
  config.blockDim = dim3(kThreads);
  config.dynamicSmemBytes = shared_bytes;
  config.stream = reinterpret_cast<cudaStream_t>(stream);
  check(cudaLaunchKernelEx(&config, kernel, parameters));
}

__device__ inline char* dynamic_shared() {
  extern __shared__ __align__(16) char slao_shared[];
  return slao_shared;
}

// c (8, 8) += a (8, 4) b (4, 8) in fp64 on the tensor cores. Lane l holds a[l / 4][l % 4], b[l % 4][l / 4] and
// c[l / 4][2 (l % 4) + {0, 1}]. So for X Xᵀ one element of X serves as both a and b.
__device__ inline void mma_f64(double (&c)[2], double a, double b) {
  asm volatile("mma.sync.aligned.m8n8k4.row.col.f64.f64.f64.f64 {%0, %1}, {%2}, {%3}, {%0, %1};"
               : "+d"(c[0]), "+d"(c[1])
               : "d"(a), "d"(b));
}

// Tells the compiler what it cannot see of a pointer that was chosen between two: that it leads to global memory.
template <typename T> __device__ inline T* in_global(T* pointer) {
  __builtin_assume(__isGlobal(pointer));
  return pointer;
}

__device__ inline double shuffle_xor(double x, int mask) { return __shfl_xor_sync(0xffffffffu, x, mask); }

#endif

// Every lane gets the sum over the warp, added in the same order in every run.
__device__ inline double warp_sum(double x) {
  for (int mask = 16; mask; mask /= 2) x += shuffle_xor(x, mask);
  return x;
}

// The record that block `unit` works on: the last whose first unit is not beyond it. `first` are prefix sums.
template <typename Record> __device__ inline int find(const Record* records, int count, int32_t Record::*first,
                                                      int32_t unit) {
  int low = 0, high = count;
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    (records[middle].*first <= unit ? low : high) = middle;
  }
  return low;
}

}  // namespace slao::cuda
