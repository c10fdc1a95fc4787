// scaled_merge: dst <- dst + lam (src - dst) over a table of records, one sweep over memory.
#include "arena.h"
#include "isa.h"
#include "rows.h"

namespace slao::SLAO_ISA {
namespace {

// Elements a thread takes at a time: 64 KiB of fp32, so that the last tiles even the load out.
constexpr int64_t kTile = 16384;

// torch's two-branch formula: from the near end, so that lam = 0 and lam = 1 are exact.
template <typename V> inline V lerp(V dst, V src, V near, bool from_src) {
  return from_src ? src - (src - dst) * near : dst + near * (src - dst);
}

template <typename D, typename S>
void run(D* dst, int64_t dst_stride, const S* src, int64_t src_stride, int64_t count, double lam) {
  // lam = 1 is a copy: the formula would let a NaN in dst through.
  if (lam == 1.0) return convert(src, src_stride, dst, dst_stride, count);
  using C = decltype(widen(*dst));
  const bool from_src = !(lam < 0.5);
  const C near = C(from_src ? 1 - lam : lam);
  int64_t i = 0;
  if constexpr (!std::is_same<D, double>::value)
    for (; dst_stride == 1 && src_stride == 1 && i + 2 * kFloats <= count; i += 2 * kFloats) {
      if constexpr (std::is_same<D, bf16>::value && std::is_same<S, bf16>::value) {
        vf even, odd, from_even, from_odd;
        load_pairs(dst + i, even, odd);
        load_pairs(src + i, from_even, from_odd);
        store_pairs(dst + i, lerp(even, from_even, splat(near), from_src), lerp(odd, from_odd, splat(near), from_src));
      } else {
        for (int64_t j = i; j < i + 2 * kFloats; j += kFloats)
          store(dst + j, lerp(load(dst + j), load(src + j), splat(near), from_src));
      }
    }
  for (; i < count; ++i) {
    D* to = dst + i * dst_stride;
    put(to, lerp(widen(*to), C(widen(src[i * src_stride])), near, from_src));
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
        run(to, dst.col_stride, from, src.col_stride, count, record.lam);
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
