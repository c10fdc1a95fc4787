// G = X Xᵀ in fp64, where X is a stack of matrices, one below another: what QRs and inner products of several adapters'
// factors need of them. A stack is one thread's work, in a fixed order: the answer does not depend on the threads.
#include "gram.h"
#include "isa.h"

namespace slao::SLAO_ISA {

// sizes: how many of `matrices`, of as many columns each, a stack has. G: (R, R) of each stack, R its rows, one after
// another; the lower triangle, zeros above it. std::bad_alloc comes before anything is written.
void gram(const Matrix* matrices, const int64_t* sizes, int64_t count, double* G, int threads) {
  const int team = int(max<int64_t>(1, min<int64_t>(threads, count)));
  const Memory list(3 * count * sizeof(int64_t));
  int64_t *const first = (int64_t*)list.data, *const rows = first + count, *const place = rows + count;
  size_t size = 0;
  for (int64_t s = 0, matrix = 0, at = 0; s < count; ++s) {
    first[s] = matrix, place[s] = at, rows[s] = 0;
    for (int64_t p = 0; p < sizes[s]; ++p) rows[s] += matrices[matrix++].rows;
    at += rows[s] * rows[s];
    Arena of_one;
    Gram<double>(of_one, rows[s]);
    size = max(size, of_one.used);
  }
  const Memory work(team * size);
#pragma omp parallel for schedule(dynamic, 1) num_threads(team)
  for (int64_t s = 0; s < count; ++s) {
    Arena mine{work.data + thread_index() * size};
    Gram<double> one(mine, rows[s]);
    one(matrices + first[s], sizes[s], G + place[s]);
  }
}

}  // namespace slao::SLAO_ISA
