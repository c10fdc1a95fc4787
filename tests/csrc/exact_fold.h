// For the driver: exact_fold and exact_unfold, after which W has the bits that it had.
#pragma once
#include "guarded.h"

namespace {

using slao::FoldRecord;

struct Exact {
  void (*plan)(const FoldRecord*, int64_t, int64_t&, int64_t&);
  int64_t (*fold)(const FoldRecord*, int64_t, char*, int64_t*, uint64_t*, int);
  bool (*unfold)(const FoldRecord*, int64_t, const char*, const int64_t*, int);
  void (*sums)(const FoldRecord*, int64_t, uint64_t*, int);
};

// A stream of exactly `used` bytes and the eight that may be read behind it, on the heap: the sanitizer sees its end.
struct Folded {
  std::vector<char> stream;
  std::vector<int64_t> lengths;
  std::vector<uint64_t> sums;
};

Folded fold_exactly(const Exact& kernel, const std::vector<FoldRecord>& records, int threads) {
  const int64_t count = int64_t(records.size());
  int64_t pieces = 0, most = 0;
  kernel.plan(records.data(), count, pieces, most);
  Folded found{std::vector<char>(most + 8, char(0xff)), std::vector<int64_t>(pieces), std::vector<uint64_t>(count)};
  const int64_t used =
      kernel.fold(records.data(), count, found.stream.data(), found.lengths.data(), found.sums.data(), threads);
  expect(used <= most, "exact_fold", "the streams are longer than planned");
  found.stream.resize(used + 8), found.stream.shrink_to_fit();
  return found;
}

void check_exact(const Exact& kernel) {
  const int64_t shapes[][3] = {  // rows of W, columns, r
      {1, 1, 1}, {1, 5, 1}, {3, 7, 7}, {7, 33, 8}, {33, 17, 16}, {97, 130, 33}, {6, 700, 64}, {101, 2100, 1},
      {0, 5, 3}, {5, 0, 3}, {4, 6, 0}, {300, 260, 2}};
  std::vector<Tensor> Ws, As, Bs;
  std::vector<FoldRecord> records;
  for (Dtype w : kDtypes)
    for (Dtype a : kDtypes)
      for (double size : {0.003, 0.3, 30.0})
        for (const auto& [rows, cols, r] : shapes) {
          Ws.push_back(random_tensor(rows, cols, w));
          As.push_back(random_tensor(r, cols, a));
          Bs.push_back(random_tensor(rows, r, kDtypes[random_numbers.below(4)]));
          if (random_numbers.below(4) == 0) spoil(Ws.back(), kInfinity), spoil(As.back(), kNaN), spoil(Bs.back(), -kInfinity);
          records.push_back({Ws.back().m, As.back().m, Bs.back().m, size});
        }
  for (auto* tensors : {&Ws, &As, &Bs})
    for (Tensor& tensor : *tensors) tensor.lock();
  const Folded three = fold_exactly(kernel, records, 3);
  std::vector<uint64_t> sums(records.size());
  kernel.sums(records.data(), int64_t(records.size()), sums.data(), 2);
  expect(sums == three.sums, "exact_sums", "differ from the fold's");
  expect(kernel.unfold(records.data(), int64_t(records.size()), three.stream.data(), three.lengths.data(), 1),
         "exact_unfold", "did not use its streams up");
  for (auto* tensors : {&Ws, &As, &Bs})
    for (Tensor& tensor : *tensors) tensor.unlock(), expect(tensor.unchanged(), describe(tensor.m), "did not come back");
  const Folded one = fold_exactly(kernel, records, 1);
  expect(one.stream == three.stream && one.lengths == three.lengths && one.sums == three.sums, "exact_fold",
         "one thread gives other streams than three");
  // Whatever a damaged stream asks for is within it.
  Folded damaged = one;
  for (size_t i = 0; i < damaged.stream.size(); i += 5) damaged.stream[i] = char(random_numbers.bits());
  kernel.unfold(records.data(), int64_t(records.size()), damaged.stream.data(), damaged.lengths.data(), 3);
  for (Tensor& tensor : Ws) expect(tensor.unchanged_outside(), describe(tensor.m), "bytes around W changed");
  std::printf("%-7s exact_fold       %5zu records\n", instruction_set.c_str(), records.size());
}

}  // namespace
