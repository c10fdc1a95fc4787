// The records that describe tensors to every kernel: raw pointers, sizes in elements, dtype codes. Plain C data,
// the same on the host and in CUDA code. Who fills them in has checked them (slao_kernels/native.py).
#pragma once
#include <cstdint>

namespace slao {

// The codes are part of the ABI: slao_kernels/native.py writes them.
enum class Dtype : int64_t { f64 = 0, f32 = 1, bf16 = 2, f16 = 3 };

// A matrix of any strides. A dense tensor of any shape can be described as one row.
struct Matrix {
  char* data;
  int64_t rows, cols;
  int64_t row_stride, col_stride;  // in elements
  Dtype dtype;
};

// static, as all functions here: kernels that are compiled once per instruction set must not share a definition.
static inline int64_t element_size(Dtype dtype) { return dtype == Dtype::f64 ? 8 : dtype == Dtype::f32 ? 4 : 2; }

static inline Matrix transposed(const Matrix& m) {
  return {m.data, m.cols, m.rows, m.col_stride, m.row_stride, m.dtype};
}

// dst <- dst + lam (src - dst)
struct MergeRecord {
  Matrix dst, src;
  double lam;
};

// W (n, k) <- W + scaling B (n, r) A (r, k)
struct FoldRecord {
  Matrix weight, A, B;
  double scaling;
};

// A weight stored (in, out) has its rows along the columns: Wᵀ += s Aᵀ Bᵀ walks it in memory order.
static inline FoldRecord in_memory_order(const FoldRecord& r) {
  if (r.weight.col_stride == 1 || r.weight.row_stride != 1) return r;
  return {transposed(r.weight), transposed(r.B), transposed(r.A), r.scaling};
}

static inline bool in_double(const FoldRecord& r) {
  return r.weight.dtype == Dtype::f64 || r.A.dtype == Dtype::f64 || r.B.dtype == Dtype::f64;
}

// What orthogonal_init found out about a matrix; 0 to 2 are the public codes of ops/schema.py.
enum class Status : int32_t { done = 0, deficient = 1, not_finite = 2, flagged = 3 };

}  // namespace slao
