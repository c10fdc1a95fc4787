// scaled_merge: dst <- dst + lam (src - dst) over a table of records, one sweep over memory, one tile a CTA.
#include <algorithm>
#include <memory>

#include "convert.cuh"
#include "device.h"

namespace slao::cuda {
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

// What a record's lam means for each element, in D's arithmetic.
template <typename D> struct Weight {
  using C = typename std::conditional<std::is_same<D, double>::value, double, float>::type;
  bool from_src, copy;
  C near;
  __device__ explicit Weight(double lam) : from_src(!(lam < 0.5)), copy(lam == 1.0), near(C(from_src ? 1 - lam : lam)) {}

  // torch's two-branch formula: from the near end, so that lam = 0 and lam = 1 are exact. lam = 1 is a copy, since the
  // formula would let a NaN in dst through; between equal types it keeps every bit.
  template <typename S> __device__ void merge(D& dst, S src) const {
    if constexpr (std::is_same<D, S>::value)
      if (copy) return void(dst = src);
    const C y = widen<C>(src);
    if (copy) return narrow(y, dst);
    const C x = widen<C>(dst);
    narrow(from_src ? y - (y - x) * near : x + near * (y - x), dst);
  }
};

template <typename D, typename S> __device__ void merge_vectors(D* dst, const S* src, int count, double lam) {
  constexpr int kEach = 16 / (sizeof(D) > sizeof(S) ? sizeof(D) : sizeof(S));
  constexpr int kBatch = kEach == 8 ? 2 : 4;
  const Weight<D> weight(lam);
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
      if (!weight.copy) d[b] = to[at];
      s[b] = from[at];
    }
#pragma unroll
    for (int b = 0; b < kBatch; ++b) {
      const int at = first + b * kThreads;
      if (at >= whole) continue;
#pragma unroll
      for (int e = 0; e < kEach; ++e) weight.merge(d[b].x[e], s[b].x[e]);
      to[at] = d[b];
    }
  }
  const int at = whole * kEach + threadIdx.x;
  if (at < count) weight.merge(dst[at], src[at]);
}

// Elements [begin, end) of a record of any strides.
template <typename D, typename S>
__device__ void merge_elements(const Record& record, D* dst, const S* src, int64_t begin, int64_t end) {
  const Weight<D> weight(record.lam);
#pragma unroll 4
  for (int64_t i = begin + threadIdx.x; i < end; i += kThreads) {
    const int64_t row = record.cols == record.total ? 0 : i / record.cols, col = i - row * record.cols;
    weight.merge(dst[row * record.dst_row + col * record.dst_col], src[row * record.src_row + col * record.src_col]);
  }
}

__global__ void __launch_bounds__(kThreads) merge_kernel(const __grid_constant__ Parameters p) {
  const Record& record = p.records[find(p.records, p.count, &Record::first, int32_t(blockIdx.x))];
  const int64_t begin = int64_t(int32_t(blockIdx.x) - record.first) * kTile;
  const int64_t end = begin + kTile < record.total ? begin + kTile : record.total;
  with_type(record.dst_type, [&](auto d) {
    with_type(record.src_type, [&](auto s) {
      auto* dst = reinterpret_cast<decltype(d)*>(in_global(record.dst));
      auto* src = reinterpret_cast<const decltype(s)*>(in_global(record.src));
      if (record.vectors)
        merge_vectors(dst + begin, src + begin, int(end - begin), record.lam);
      else
        merge_elements(record, dst, src, begin, end);
    });
  });
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

}  // namespace slao::cuda
