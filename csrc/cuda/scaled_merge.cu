// scaled_merge: dst <- dst + lam (src - dst) over a table of records, one sweep over memory, one tile a CTA.
#include <algorithm>
#include <memory>

#include "convert.cuh"
#include "device.h"

namespace slao::cuda::SLAO_TABLES {
namespace {

// Elements a CTA takes: each thread has all its loads of a tile in flight at once (fp32: 4 × 16 bytes of each side).
constexpr int kTile = 4096;

struct Record {
  char* dst;
  const char* src;
  int64_t total, cols;  // elements in all, and in a row
  int64_t dst_row, dst_col, src_row, src_col;
  double lam;
  int32_t first;  // tile
  int8_t dst_type, src_type;
  int8_t vectors;  // both sides contiguous and aligned
};

constexpr int kRecords = (kParameterBytes - 8) / sizeof(Record);

struct Parameters {
  int32_t count;
  Record records[kRecords];
};
static_assert(sizeof(Parameters) <= kParameterBytes, "kernel parameters");

// torch's two-branch formula: from the near end, so that lam = 0 and lam = 1 are exact.
template <typename C> __device__ inline C lerp(C dst, C src, C near, bool from_src) {
  return from_src ? src - (src - dst) * near : dst + near * (src - dst);
}

// lam = 1 is a copy: the formula would let a NaN in dst through. Between equal types it keeps every bit.
template <typename D, typename S, typename C>
__device__ inline void merge(D& dst, S src, C near, bool from_src, bool copy) {
  if constexpr (std::is_same<D, S>::value) {
    if (copy) {
      dst = src;
      return;
    }
  }
  narrow(copy ? widen<C>(src) : lerp(widen<C>(dst), widen<C>(src), near, from_src), dst);
}

template <typename D, typename S> __device__ void merge_vectors(D* dst, const S* src, int count, double lam) {
  using C = typename std::conditional<std::is_same<D, double>::value, double, float>::type;
  constexpr int kEach = 16 / (sizeof(D) > sizeof(S) ? sizeof(D) : sizeof(S));
  constexpr int kBatch = kEach == 8 ? 2 : 4;
  const bool from_src = !(lam < 0.5), copy = lam == 1.0;
  const C near = C(from_src ? 1 - lam : lam);
  auto* to = reinterpret_cast<Pack<D, kEach>*>(dst);
  auto* from = reinterpret_cast<const Pack<S, kEach>*>(src);
  const int whole = count / kEach;
  for (int first = threadIdx.x; first < whole; first += kBatch * kThreads) {
    Pack<D, kEach> d[kBatch];
    Pack<S, kEach> s[kBatch];
#pragma unroll
    for (int b = 0; b < kBatch; ++b) {
      const int at = first + b * kThreads;
      if (at >= whole) continue;
      if (!copy) d[b] = to[at];
      s[b] = from[at];
    }
#pragma unroll
    for (int b = 0; b < kBatch; ++b) {
      const int at = first + b * kThreads;
      if (at >= whole) continue;
#pragma unroll
      for (int e = 0; e < kEach; ++e) merge(d[b].x[e], s[b].x[e], near, from_src, copy);
      to[at] = d[b];
    }
  }
  const int at = whole * kEach + threadIdx.x;
  if (at < count) merge(dst[at], src[at], near, from_src, copy);
}

template <typename D> __device__ inline void merge_vectors(D* dst, const char* src, int8_t src_type, int count,
                                                           double lam) {
  switch (src_type) {
    case 0: return merge_vectors(dst, reinterpret_cast<const double*>(src), count, lam);
    case 1: return merge_vectors(dst, reinterpret_cast<const float*>(src), count, lam);
    case 2: return merge_vectors(dst, reinterpret_cast<const bf16*>(src), count, lam);
    default: return merge_vectors(dst, reinterpret_cast<const f16*>(src), count, lam);
  }
}

template <typename C> __device__ void merge_elements(const Record& record, int64_t begin, int64_t end) {
  const bool from_src = !(record.lam < 0.5), copy = record.lam == 1.0;
  const C near = C(from_src ? 1 - record.lam : record.lam);
#pragma unroll 4
  for (int64_t i = begin + threadIdx.x; i < end; i += kThreads) {
    const int64_t row = record.cols == record.total ? 0 : i / record.cols, col = i - row * record.cols;
    const int64_t to = row * record.dst_row + col * record.dst_col;
    const int64_t from = row * record.src_row + col * record.src_col;
    if (copy && record.dst_type == record.src_type) {  // NaN payloads too
      if (element_bytes(record.dst_type) == 8)
        reinterpret_cast<uint64_t*>(record.dst)[to] = reinterpret_cast<const uint64_t*>(record.src)[from];
      else if (element_bytes(record.dst_type) == 4)
        reinterpret_cast<uint32_t*>(record.dst)[to] = reinterpret_cast<const uint32_t*>(record.src)[from];
      else
        reinterpret_cast<uint16_t*>(record.dst)[to] = reinterpret_cast<const uint16_t*>(record.src)[from];
      continue;
    }
    const C s = load_element<C>(record.src, from, record.src_type);
    const C x = copy ? s : lerp(load_element<C>(record.dst, to, record.dst_type), s, near, from_src);
    store_element(record.dst, to, record.dst_type, x);
  }
}

__global__ void __launch_bounds__(kThreads) merge_kernel(const __grid_constant__ Parameters p) {
  const Record& record = p.records[find(p.records, p.count, &Record::first, int32_t(blockIdx.x))];
  const int64_t begin = int64_t(int32_t(blockIdx.x) - record.first) * kTile;
  const int64_t end = begin + kTile < record.total ? begin + kTile : record.total;
  if (!record.vectors) {
    if (record.dst_type == 0)
      merge_elements<double>(record, begin, end);
    else
      merge_elements<float>(record, begin, end);
    return;
  }
  const int count = int(end - begin);
  char* dst = record.dst + begin * element_bytes(record.dst_type);
  const char* src = record.src + begin * element_bytes(record.src_type);
  switch (record.dst_type) {
    case 0: return merge_vectors(reinterpret_cast<double*>(dst), src, record.src_type, count, record.lam);
    case 1: return merge_vectors(reinterpret_cast<float*>(dst), src, record.src_type, count, record.lam);
    case 2: return merge_vectors(reinterpret_cast<bf16*>(dst), src, record.src_type, count, record.lam);
    default: return merge_vectors(reinterpret_cast<f16*>(dst), src, record.src_type, count, record.lam);
  }
}

bool aligned(const Matrix& m, int64_t total) {
  const bool contiguous = m.col_stride == 1 && m.cols == total;
  return contiguous && reinterpret_cast<uintptr_t>(m.data) % 16 == 0;
}

}  // namespace

void scaled_merge(const MergeRecord* records, int64_t count, int device, uintptr_t stream) {
  use_device(device);
  const auto p = std::make_unique<Parameters>();
  int64_t tiles = 0;
  const auto flush = [&] {
    launch(merge_kernel, tiles, 0, stream, *p);
    p->count = 0, tiles = 0;
  };
  for (int64_t i = 0; i < count; ++i) {
    const MergeRecord& r = records[i];
    const int64_t total = r.dst.rows * r.dst.cols, more = (total + kTile - 1) / kTile;
    if (r.lam == 0.0 || total == 0) continue;
    if (p->count == kRecords || tiles + more > INT32_MAX) flush();
    p->records[p->count++] = {r.dst.data, r.src.data, total, r.dst.cols, r.dst.row_stride, r.dst.col_stride,
                              r.src.row_stride, r.src.col_stride, r.lam, int32_t(tiles), int8_t(r.dst.dtype),
                              int8_t(r.src.dtype), int8_t(aligned(r.dst, total) && aligned(r.src, total))};
    tiles += more;
  }
  flush();
}

}  // namespace slao::cuda::SLAO_TABLES
