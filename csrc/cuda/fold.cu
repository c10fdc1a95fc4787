// fold: W <- W + scaling B A over a table of records. A CTA owns a tile of W, which it reads and writes once; the
// panels of A and B come through shared memory, kDepth of the r products at a time.
#include <memory>

#include "device.h"
#include "stage.cuh"

namespace slao::cuda {
namespace {

constexpr int kCols = 128;   // of W in a tile: 32 lanes of four neighbours
constexpr int kDepth = 32;
// Rows of W per thread: as many accumulators as leave room for W itself, which waits in registers meanwhile.
template <typename C> constexpr int kRows = sizeof(C) == 8 ? 4 : 8;
template <typename C> constexpr int kTileRows = kRows<C> * kWarps;

struct Record {
  View weight, A, B;  // A and B stand so that their rows are walked fastest: see flip
  double scaling;
  int32_t depth, first;  // r, and the first tile
  int8_t flip_A, flip_B;
};

constexpr int kRecords = (kParameterBytes - 8) / sizeof(Record);

struct Parameters {
  int32_t count;
  Record records[kRecords];
};
static_assert(sizeof(Parameters) <= kParameterBytes, "kernel parameters");

template <typename C>
__global__ void __launch_bounds__(kThreads, sizeof(C) == 8 ? 1 : 2) fold_kernel(const __grid_constant__ Parameters p) {
  const Record& record = p.records[find(p.records, p.count, &Record::first, int32_t(blockIdx.x))];
  const View& W = record.weight;
  const int tile = int(blockIdx.x) - record.first, across = (W.cols + kCols - 1) / kCols;
  const int row = tile / across * kTileRows<C>, col = tile % across * kCols;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int my_row = row + warp * kRows<C>, my_col = col + lane * 4;

  Quad<kQuadWords<C>> w[kRows<C>];
  const bool inside = W.quads && row + kTileRows<C> <= W.rows && col + kCols <= W.cols;
  fetch_all(W, inside, w, [&](int i, int& at, int& from) {
    at = my_row + i, from = my_col;
    return true;
  });

  const int panel = record.depth < kDepth ? (record.depth + 3) / 4 * 4 : kDepth;
  C* a = reinterpret_cast<C*>(dynamic_shared());  // (panel, kCols)
  C* b = a + panel * kCols;                       // (panel, kTileRows)
  C sums[kRows<C>][4] = {};
  for (int begin = 0; begin < record.depth; begin += kDepth) {
    if (begin) __syncthreads();
    const int count = record.depth - begin < kDepth ? record.depth - begin : kDepth;
    const auto as_it_is = [](C x, int) { return x; };
    if (record.flip_A)
      stage<2>(record.A, col, kCols, begin, panel, a, 1, kCols, as_it_is);
    else
      stage<2>(record.A, begin, panel, col, kCols, a, kCols, 1, as_it_is);
    const auto scale = [factor = C(record.scaling)](C x, int) { return factor * x; };
    if (record.flip_B)
      stage<2>(record.B, begin, panel, row, kTileRows<C>, b, kTileRows<C>, 1, scale);
    else
      stage<2>(record.B, row, kTileRows<C>, begin, panel, b, 1, kTileRows<C>, scale);
    __syncthreads();
    for (int k = 0; k < count; ++k) {
      C columns[4];
      read4(a + k * kCols + lane * 4, columns);
#pragma unroll
      for (int i = 0; i < kRows<C>; i += 4) {
        C factors[4];
        read4(b + k * kTileRows<C> + warp * kRows<C> + i, factors);
#pragma unroll
        for (int f = 0; f < 4; ++f)
#pragma unroll
          for (int j = 0; j < 4; ++j) sums[i + f][j] += factors[f] * columns[j];
      }
    }
  }
#pragma unroll
  for (int i = 0; i < kRows<C>; ++i) {
    C x[4];
    widen(w[i], W.dtype, x);
#pragma unroll
    for (int j = 0; j < 4; ++j) x[j] += sums[i][j];
    store_quad(W, my_row + i, my_col, x);
  }
}

template <typename C> class Launcher {
 public:
  explicit Launcher(uintptr_t stream) : stream_(stream), p_(std::make_unique<Parameters>()) {}

  void add(const FoldRecord& r) {
    const int64_t down = (r.weight.rows + kTileRows<C> - 1) / kTileRows<C>;
    const int64_t across = (r.weight.cols + kCols - 1) / kCols;
    if (down * across == 0) return;
    if (down * across > INT32_MAX) throw std::invalid_argument("fold: a weight of more than 2^31 tiles");
    if (p_->count == kRecords || tiles_ + down * across > INT32_MAX) flush();
    const bool flip_A = r.A.col_stride != 1 && r.A.row_stride == 1, flip_B = r.B.col_stride != 1 && r.B.row_stride == 1;
    p_->records[p_->count++] = {view(r.weight), view(flip_A ? transposed(r.A) : r.A),
                                view(flip_B ? transposed(r.B) : r.B), r.scaling, int32_t(r.A.rows), int32_t(tiles_),
                                flip_A, flip_B};
    tiles_ += down * across;
    const int64_t panel = r.A.rows < kDepth ? (r.A.rows + 3) / 4 * 4 : kDepth;
    if (panel > panel_) panel_ = panel;
  }

  void flush() {
    launch(fold_kernel<C>, tiles_, panel_ * (kCols + kTileRows<C>) * sizeof(C), stream_, *p_);
    p_->count = 0, tiles_ = 0, panel_ = 0;
  }

 private:
  uintptr_t stream_;
  std::unique_ptr<Parameters> p_;
  int64_t tiles_ = 0, panel_ = 0;
};

}  // namespace

void fold(const FoldRecord* records, int64_t count, int device, uintptr_t stream) {
  use_device(device);
  Launcher<float> narrow(stream);
  Launcher<double> wide(stream);
  for (int64_t i = 0; i < count; ++i) {
    const FoldRecord r = in_memory_order(records[i]);
    in_double(r) ? wide.add(r) : narrow.add(r);
  }
  narrow.flush();
  wide.flush();
}

}  // namespace slao::cuda
