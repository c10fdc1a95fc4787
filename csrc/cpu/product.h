// Products of matrices, a tile of the result in registers.
#pragma once
#include "rows.h"

namespace slao::SLAO_ISA {

// MI rows of w, MJ vectors of each, become b a, or with kAdd w + b a: b (MI, depth), a (depth, MJ vectors). w, stored
// as D, is read and written once and converted in registers; it may be rows of a.
template <bool kAdd, int MI, int MJ, typename T, typename D>
void product_tile(const T* b, int64_t ldb, int64_t depth, const T* a, int64_t lda, D* w, int64_t ldw) {
  using V = typename Lanes<T>::V;
  constexpr int n = Lanes<T>::n;
  V sums[MI][MJ] = {};
  if constexpr (kAdd) {
#pragma GCC unroll 8
    for (int i = 0; i < MI; ++i)
#pragma GCC unroll 8
      for (int j = 0; j < MJ; ++j) sums[i][j] = load_as<V>(w + i * ldw + j * n);
  }
  for (int64_t k = 0; k < depth; ++k) {
    V columns[MJ];
    for (int j = 0; j < MJ; ++j) columns[j] = loadu<V>(a + k * lda + j * n);
    for (int i = 0; i < MI; ++i) {
      const V factor = splat(b[i * ldb + k]);
      for (int j = 0; j < MJ; ++j) sums[i][j] += factor * columns[j];
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < MI; ++i)
#pragma GCC unroll 8
    for (int j = 0; j < MJ; ++j) store(w + i * ldw + j * n, sums[i][j]);
}

}  // namespace slao::SLAO_ISA
