// scaled_merge: dst <- dst + lam (src - dst) over a table of records, one sweep over memory.
#include <type_traits>

#include "arena.h"
#include "isa.h"
#include "simd.h"

namespace slao::SLAO_ISA {
namespace {

// Elements a thread takes at a time: 64 KiB of fp32, so that the last tiles even the load out.
constexpr int64_t kTile = 16384;

// torch's two-branch formula: from the near end, so that lam = 0 and lam = 1 are exact.
template <typename T> inline T lerp(T dst, T src, double lam) {
  return lam < 0.5 ? dst + T(lam) * (src - dst) : src - (src - dst) * T(1 - lam);
}

inline vf lerp(vf dst, vf src, vf near, bool from_src) {
  return from_src ? src - (src - dst) * near : dst + near * (src - dst);
}

// lam = 1 is a copy: the formula would let a NaN in dst through.
template <typename D, typename S> void convert(D* dst, const S* src, int64_t count) {
  if constexpr (std::is_same<D, S>::value) {
    std::memmove(dst, src, count * sizeof(D));
  } else {
    int64_t i = 0;
    if constexpr (!std::is_same<D, double>::value && !std::is_same<S, double>::value)
      for (; i + kFloats <= count; i += kFloats) store(dst + i, load(src + i));
    for (; i < count; ++i) put(dst + i, to_double(src[i]));
  }
}

template <typename D, typename S> void run(D* dst, const S* src, int64_t count, double lam) {
  if (lam == 1.0) return convert(dst, src, count);
  int64_t i = 0;
  if constexpr (!std::is_same<D, double>::value) {
    const bool from_src = !(lam < 0.5);
    const vf near = splat(float(from_src ? 1 - lam : lam));
    for (; i + 2 * kFloats <= count; i += 2 * kFloats) {
      if constexpr (std::is_same<D, bf16>::value && std::is_same<S, bf16>::value) {
        vf even, odd, from_even, from_odd;
        load_pairs(dst + i, even, odd);
        load_pairs(src + i, from_even, from_odd);
        store_pairs(dst + i, lerp(even, from_even, near, from_src), lerp(odd, from_odd, near, from_src));
        continue;
      }
      vf first = lerp(load(dst + i), load(src + i), near, from_src);
      vf second = lerp(load(dst + i + kFloats), load(src + i + kFloats), near, from_src);
      store(dst + i, first);
      store(dst + i + kFloats, second);
    }
    for (; i < count; ++i) put(dst + i, lerp(to_float(dst[i]), to_float(src[i]), lam));
  } else {
    for (; i < count; ++i) dst[i] = lerp(dst[i], to_double(src[i]), lam);
  }
}

template <typename D, typename S>
void run_strided(D* dst, int64_t dst_stride, const S* src, int64_t src_stride, int64_t count, double lam) {
  for (int64_t i = 0; i < count; ++i) {
    D* to = dst + i * dst_stride;
    const S from = src[i * src_stride];
    if (lam == 1.0)
      put(to, to_double(from));
    else if constexpr (std::is_same<D, double>::value)
      *to = lerp(*to, to_double(from), lam);
    else
      put(to, lerp(to_float(*to), to_float(from), lam));
  }
}

// Elements [begin, end) of a record, counted row by row.
void merge_range(const MergeRecord& record, int64_t begin, int64_t end) {
  const Matrix &dst = record.dst, &src = record.src;
  with_type(dst.dtype, [&](auto d) {
    with_type(src.dtype, [&](auto s) {
      using D = decltype(d);
      using S = decltype(s);
      while (begin < end) {
        const int64_t row = begin / dst.cols, col = begin % dst.cols;
        const int64_t count = min(end - begin, dst.cols - col);
        D* to = (D*)dst.data + row * dst.row_stride + col * dst.col_stride;
        const S* from = (const S*)src.data + row * src.row_stride + col * src.col_stride;
        if (dst.col_stride == 1 && src.col_stride == 1)
          run(to, from, count, record.lam);
        else
          run_strided(to, dst.col_stride, from, src.col_stride, count, record.lam);
        begin += count;
      }
    });
  });
}

}  // namespace

void scaled_merge(const MergeRecord* records, int64_t count, int threads) {
  struct Tile { int64_t record, begin, end; };
  const auto list = [&](Tile* tiles) {
    int64_t size = 0;
    for (int64_t i = 0; i < count; ++i) {
      const int64_t total = records[i].dst.rows * records[i].dst.cols;
      if (records[i].lam == 0.0) continue;
      for (int64_t begin = 0; begin < total; begin += kTile, ++size)
        if (tiles) tiles[size] = {i, begin, min(begin + kTile, total)};
    }
    return size;
  };
  const int64_t size = list(nullptr);
  const Memory memory(size * sizeof(Tile));
  Tile* const tiles = (Tile*)memory.data;
  list(tiles);
#pragma omp parallel for schedule(dynamic, 4) num_threads(threads)
  for (int64_t t = 0; t < size; ++t) merge_range(records[tiles[t].record], tiles[t].begin, tiles[t].end);
}

}  // namespace slao::SLAO_ISA
