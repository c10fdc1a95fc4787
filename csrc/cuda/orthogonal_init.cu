// orthogonal_init: A <- L⁻¹A with A Aᵀ = L Lᵀ, by Cholesky QR with an fp64 Gram matrix; R = Lᵀ has a positive diagonal.
//
// Four launches, none of which the host waits for: Gram, apply, and both once more for the matrices that one pass
// leaves less orthonormal than Householder's Q; the others' CTAs leave at once. The last CTA of a matrix's Gram factors
// it and decides. The second apply has one more CTA a matrix, which writes R and the status and completes nearly
// dependent rows. A single NaN or infinity in any matrix, found in the first launch, makes the others write nothing.
//
// The second Gram is a launch of its own rather than part of the first apply: the apply's CTAs own few columns, and
// partial Grams of so few columns would be larger than the matrix.
#include <algorithm>
#include <memory>

#include "device.h"
#include "orthogonal_init/apply.cuh"
#include "orthogonal_init/complete.cuh"
#include "orthogonal_init/gram.cuh"

namespace slao::cuda {
namespace {

// A vote of all threads. slots: kThreads doubles of shared memory.
__device__ bool any(bool mine, double* slots) { return block_sum(mine ? 1.0 : 0.0, slots) > 0; }

// What the last CTA of a matrix's Gram finds. F holds G's lower triangle and then the factor.
__device__ State decide(const Item& item, double* F, double* lengths, double* slots, int pass) {
  const int r = item.A.rows;
  bool finite = true;
  __syncthreads();
  for (int i = threadIdx.x; i < r; i += kThreads) {
    lengths[i] = sqrt(F[at_L(r, i, i)]);
    finite &= bool(isfinite(F[at_L(r, i, i)]));
  }
  if (any(!finite, slots)) {
    if (item.A.dtype != 0) return kNotFinite;
    // fp64 can overflow its own squares; everything else is finite exactly when its Gram is.
    finite = true;
    for (int i = 0; i < r; ++i)
      for (int c = threadIdx.x; c < item.A.cols; c += kThreads)
        finite &= bool(isfinite(load_element<double>(item.A, i, c)));
    return any(!finite, slots) ? kNotFinite : kFlagged;
  }
  if (!factorize(F, lengths, r)) return kFlagged;
  const double limit = is_short(item.A.dtype) ? kOnePass16 : kOnePass;
  const State found = pass == 0 && condition(F, lengths, r, slots) > limit ? kTwo : kOne;
  __syncthreads();
  for (int at = threadIdx.x; at < r * r; at += kThreads) {  // see apply_columns
    const int i = at / r, k = at % r;
    if (k <= i) F[at_inverse(r, i, k)] = ldexp(F[at_inverse(r, i, k)], ilogb(lengths[k]));
  }
  __syncthreads();
  return found;
}

// kBlocks: 2 for matrices of up to 16 rows, whose few accumulators let two CTAs share a multiprocessor; else 4.
template <int kBlocks>
__global__ void __launch_bounds__(kThreads, kBlocks == 2 ? 2 : 1) gram_kernel(const __grid_constant__ Parameters p) {
  __shared__ int is_last;
  const Item& item = p.items[find(p.items, p.count, &Item::gram, int32_t(blockIdx.x))];
  if (p.pass == 1 && (*not_finite(p) || *state(p, item) != kTwo)) return;
  const View X = p.pass == 0 ? item.A : unrounded(p, item);
  const int r = X.rows, side = 8 * kBlocks, pieces = gram_pieces(r), chunks = gram_chunks(X.cols);
  const int unit = int(blockIdx.x) - item.gram, piece = unit % pieces;
  int I = 0;
  while ((I + 1) * (I + 2) / 2 <= piece) ++I;
  double* shared = reinterpret_cast<double*>(dynamic_shared());
  const int J = piece - I * (I + 1) / 2, begin = unit / pieces * kChunk;
  if (X.dtype == 0)
    gram_piece<kBlocks, 8>(X, I, J, begin, shared);
  else
    gram_piece<kBlocks, 4>(X, I, J, begin, shared);
  double* partial = partials(p, item);
  for (int at = threadIdx.x; at < side * side; at += kThreads)
    if (I != J || at % side / 8 <= at / side / 8) partial[int64_t(unit) * side * side + at] = shared[at];

  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) is_last = atomicAdd(done_count(p, item), 1) == pieces * chunks - 1;
  __syncthreads();
  if (!is_last) return;
  __threadfence();
  double* stored = factor(p, item, p.pass);
  double* slots = shared;
  double* lengths = slots + kThreads;
  double* F = r <= kSharedRank ? lengths + r : stored;
  sum_pieces(partial, r, chunks, F);
  const State found = decide(item, F, lengths, slots, p.pass);
  if (F != stored)
    for (int at = threadIdx.x; at < r * (r + 1); at += kThreads) stored[at] = F[at];
  for (int i = threadIdx.x; i < r; i += kThreads) stored[r * (r + 1) + i] = lengths[i];
  if (p.pass == 0 && threadIdx.x == 0) {
    *state(p, item) = found;
    if (found == kNotFinite) *not_finite(p) = 1;
  }
}

int64_t gram_shared_bytes(int r) {
  const int64_t factoring = kThreads + r + (r <= kSharedRank ? r * (r + 1) : 0);
  return std::max<int64_t>(gram_side(r) * gram_side(r), factoring) * 8;
}

// R = Lᵀ, or (L₁ L₂)ᵀ after two passes: A = L₁ (L₂ Q).
__device__ void write_triangle(const Item& item, const double* first, const double* second) {
  const int r = item.A.rows;
  for (int at = threadIdx.x; at < r * r; at += kThreads) {
    const int i = at / r, j = at % r;
    double x = 0;
    if (i <= j) {
      if (!second) x = first[at_L(r, j, i)];
      else
        for (int k = i; k <= j; ++k) x += first[at_L(r, j, k)] * second[at_L(r, k, i)];
    }
    store_element(item.triangle, i, j, x);
  }
}

__device__ void copy_rows(const View& from, const View& to) {
  for (int i = 0; i < to.rows; ++i)
    for (int c = threadIdx.x; c < to.cols; c += kThreads) store_element(to, i, c, load_element<float>(from, i, c));
}

__device__ void finish(const Parameters& p, const Item& item) {
  const int32_t found = *state(p, item);
  const bool proceed = !*not_finite(p);
  bool deficient = false;
  if (proceed && found == kFlagged) {
    const View X = unrounded(p, item);
    const bool apart = X.data != item.A.data;
    if (apart) copy_rows(item.A, X);
    __syncthreads();
    deficient = complete(X, item.triangle);
    if (apart) copy_rows(X, item.A);
  } else if (proceed && item.triangle.data) {
    write_triangle(item, factor(p, item, 0), found == kTwo ? factor(p, item, 1) : nullptr);
  }
  if (threadIdx.x == 0)
    p.status[item.index] = int32_t(found == kNotFinite ? Status::not_finite
                                   : deficient         ? Status::deficient
                                                       : Status::done);
}

__global__ void __launch_bounds__(kThreads, 2) apply_kernel(const __grid_constant__ Parameters p) {
  if (int(blockIdx.x) >= p.apply_units) return finish(p, p.items[int(blockIdx.x) - p.apply_units]);
  if (*not_finite(p)) return;
  const Item& item = p.items[find(p.items, p.count, &Item::apply, int32_t(blockIdx.x))];
  const int32_t found = *state(p, item);
  if (found != kTwo && !(found == kOne && p.pass == 0)) return;
  const View from = p.pass == 0 ? item.A : unrounded(p, item);
  const View to = p.pass == 0 && found == kTwo ? unrounded(p, item) : item.A;
  const bool wide = item.A.dtype == 0;
  const int width = apply_width(item.A.rows, wide), col = (int(blockIdx.x) - item.apply) * width;
  const double* F = factor(p, item, p.pass);
  if (wide) {
    apply_columns<double>(from, to, F, col, width);
  } else if (p.pass == 0 && found == kTwo) {
    // In fp32 the large entries of L⁻¹ would cancel down to κ·6e-8, and the rows' span be off by that. In two halves,
    // so that no CTA needs shared memory for doubles of its whole width.
    for (int half = 0; half < 2; ++half) {
      apply_columns<double>(from, to, F, col + half * (width / 2), width / 2);
      __syncthreads();
    }
  } else {
    apply_columns<float>(from, to, F, col, width);
  }
}

int64_t head_bytes(int64_t count) { return whole((1 + 3 * count) * 4); }

// One launch's share of the list: up to 16 rows, or more.
struct Batch {
  bool few_rows;
  std::unique_ptr<Parameters> p;
  int64_t gram_shared = 0, apply_shared = 0, finish_shared = 0;
};

void add(Batch& batch, const Matrix& A, const Matrix* triangle, int64_t index, int64_t block) {
  Parameters& p = *batch.p;
  const int r = int(A.rows), cols = int(A.cols);
  const bool wide = A.dtype == Dtype::f64;
  p.items[p.count++] = {view(A), triangle ? view(*triangle) : View{}, block, int32_t(index), p.gram_units,
                        p.apply_units};
  const int width = apply_width(r, wide);
  p.gram_units += int32_t(gram_units(r, cols));
  p.apply_units += (cols + width - 1) / width;
  batch.gram_shared = std::max(batch.gram_shared, gram_shared_bytes(r));
  batch.apply_shared = std::max(batch.apply_shared, apply_shared_bytes(r, wide));
  batch.finish_shared = std::max(batch.finish_shared, complete_shared_bytes(r));
}

}  // namespace

int64_t orthogonal_init_workspace(const Matrix* matrices, int64_t count) {
  int64_t bytes = head_bytes(count);
  for (int64_t i = 0; i < count; ++i) {
    const Matrix& A = matrices[i];
    if (A.rows < 1 || A.rows > kMaxRank) throw std::invalid_argument("orthogonal_init: between 1 and 1024 rows");
    bytes += block_bytes(int(A.rows), view(A).cols, int8_t(A.dtype));
  }
  return bytes;
}

void orthogonal_init(const Matrix* matrices, const Matrix* triangles, int32_t* status, int64_t count, char* workspace,
                     int device, uintptr_t stream) {
  if (count == 0) return;
  use_device(device);
  orthogonal_init_workspace(matrices, count);  // checks the sizes
  std::vector<Batch> batches;
  int open[2] = {-1, -1};  // the batches that matrices of many and of few rows go to
  int64_t block = head_bytes(count);
  for (int64_t i = 0; i < count; ++i) {
    const Matrix& A = matrices[i];
    const bool few_rows = gram_side(int(A.rows)) == 16;
    int& at = open[few_rows];
    // Units are counted in 32 bits; the largest matrix has fewer than 2^30.
    if (at < 0 || batches[at].p->count == kItems ||
        std::max(batches[at].p->gram_units, batches[at].p->apply_units) > (1 << 30)) {
      at = int(batches.size());
      batches.push_back({few_rows, std::make_unique<Parameters>()});
      batches[at].p->workspace = workspace;
      batches[at].p->status = status;
    }
    add(batches[at], A, triangles ? &triangles[i] : nullptr, i, block);
    block += block_bytes(int(A.rows), int(A.cols), int8_t(A.dtype));
  }
  zero(workspace, head_bytes(count), stream);
  for (int pass = 0; pass < 2; ++pass) {
    // Every matrix is looked at before any is written.
    for (Batch& batch : batches) {
      batch.p->pass = pass;
      const auto kernel = batch.few_rows ? gram_kernel<2> : gram_kernel<4>;
      launch(kernel, batch.p->gram_units, batch.gram_shared, stream, *batch.p);
    }
    for (Batch& batch : batches) {
      const int64_t extra = pass == 1 ? batch.p->count : 0;
      const int64_t shared = std::max(batch.apply_shared, extra ? batch.finish_shared : 0);
      launch(apply_kernel, batch.p->apply_units + extra, shared, stream, *batch.p);
    }
  }
}

}  // namespace slao::cuda
