// What every launch of orthogonal_init knows about a matrix, and where its intermediate results lie.
//
// Workspace: { not_finite, then per matrix: CTAs done in the first Gram, in the second, state } as int32, zeroed at
// the start; then per matrix, each from a multiple of 256 bytes on: two factors, the partial Grams, the scratch.
#pragma once
#include <vector>

#include "../convert.cuh"

namespace slao::cuda {

// Squared sine of a row's angle to the rows before it, below which an fp64 Gram has too few digits left: 1e-6².
constexpr double kPivot = 1e-12;
// Bounds of 1/σ²_min up to which one pass stays within the contract's 1e-6, and within the rounding of 16-bit storage:
// the CPU's (csrc/cpu/orthogonal_init.cpp).
constexpr double kOnePass = 8, kOnePass16 = 1e4;
// Squared length of an fp64 row below which products of two entries may have lost digits to underflow.
constexpr double kTooSmall = 0x1p-900;
// Columns of one CTA's Gram. Fixed, so that a matrix's result does not depend on what else is in the list.
constexpr int kChunk = 1024;
// Up to this r a factor lies in shared memory.
constexpr int kSharedRank = 64;

enum State : int32_t { kUnknown = 0, kOne = 1, kTwo = 2, kFlagged = 3, kNotFinite = 4 };

struct Item {
  View A, triangle;            // triangle.data is null when R is not wanted
  int64_t block;               // byte offset in the workspace
  int32_t index;               // in the caller's list
  int32_t gram, apply;         // first unit of work in this launch
};

constexpr int kItems = (kParameterBytes - 40) / sizeof(Item);

struct Parameters {
  char* workspace;
  int32_t* status;
  int32_t count, pass;
  int32_t gram_units, apply_units;
  Item items[kItems];
};
static_assert(sizeof(Parameters) <= kParameterBytes, "kernel parameters");

#ifdef __CUDACC__
#define SLAO_BOTH __host__ __device__ inline
#else
#define SLAO_BOTH inline
#endif

// A CTA's piece of the Gram: side × side. Matrices of more rows have several, the lower triangle of a grid of them.
SLAO_BOTH int gram_side(int r) { return r <= 16 ? 16 : 32; }
SLAO_BOTH int gram_pieces(int r) {
  const int along = (r + gram_side(r) - 1) / gram_side(r);
  return along * (along + 1) / 2;
}
SLAO_BOTH int gram_chunks(int cols) { return (cols + kChunk - 1) / kChunk; }
SLAO_BOTH int64_t gram_units(int r, int cols) { return int64_t(gram_pieces(r)) * gram_chunks(cols); }

SLAO_BOTH int padded(int r) { return (r + 3) / 4 * 4; }

// Columns of one CTA's apply: 16 KiB of shared memory for few rows, so that several CTAs fit, 32 KiB for many.
SLAO_BOTH int apply_width(int r, bool wide) {
  const int fits = (r <= 16 ? 16384 : 32768) / (padded(r) * (wide ? 8 : 4));
  int width = 4;
  while (width * 2 <= fits && width < 512) width *= 2;
  return width;
}

// L (lower triangle with the diagonal) and L⁻¹ share one buffer: L[i][j] at i (r + 1) + j, L⁻¹[i][j] at
// j (r + 1) + i + 1. Behind it: the rows' lengths.
SLAO_BOTH int64_t at_L(int r, int i, int j) { return int64_t(i) * (r + 1) + j; }
SLAO_BOTH int64_t at_inverse(int r, int i, int j) { return int64_t(j) * (r + 1) + i + 1; }
SLAO_BOTH int64_t factor_size(int r) { return int64_t(r) * (r + 1) + r; }

SLAO_BOTH int64_t whole(int64_t bytes) { return (bytes + 255) / 256 * 256; }
SLAO_BOTH bool is_short(int8_t dtype) { return dtype >= 2; }

SLAO_BOTH int64_t partials_offset(int r) { return whole(2 * factor_size(r) * 8); }
SLAO_BOTH int64_t scratch_offset(int r, int cols) {
  return partials_offset(r) + whole(gram_units(r, cols) * gram_side(r) * gram_side(r) * 8);
}
// Rows of 16 bits must not feed later rows: what is not final waits in fp32.
SLAO_BOTH int64_t block_bytes(int r, int cols, int8_t dtype) {
  return scratch_offset(r, cols) + (is_short(dtype) ? whole(int64_t(r) * ((cols + 3) / 4 * 4) * 4) : 0);
}

// --- on the device: a matrix's parts of the workspace --------------------------------------------------------------

__device__ inline int32_t* not_finite(const Parameters& p) { return reinterpret_cast<int32_t*>(p.workspace); }
__device__ inline int32_t* done_count(const Parameters& p, const Item& item) {
  return reinterpret_cast<int32_t*>(p.workspace) + 1 + 3 * item.index + p.pass;
}
__device__ inline int32_t* state(const Parameters& p, const Item& item) {
  return reinterpret_cast<int32_t*>(p.workspace) + 1 + 3 * item.index + 2;
}
__device__ inline double* factor(const Parameters& p, const Item& item, int pass) {
  return reinterpret_cast<double*>(p.workspace + item.block) + pass * factor_size(item.A.rows);
}
__device__ inline double* partials(const Parameters& p, const Item& item) {
  return reinterpret_cast<double*>(p.workspace + item.block + partials_offset(item.A.rows));
}
// Where the matrix lies between two passes: in its own memory unless that is too short.
__device__ inline View unrounded(const Parameters& p, const Item& item) {
  if (!is_short(item.A.dtype)) return item.A;
  const int64_t pitch = (item.A.cols + 3) / 4 * 4;
  return {p.workspace + item.block + scratch_offset(item.A.rows, item.A.cols), pitch, 1, item.A.rows, item.A.cols,
          1, 1};
}

}  // namespace slao::cuda
