// Python buffers as the records of tensor_table.h. For the files that know Python: bindings.cpp, bindings_cuda.h.
#pragma once
#include <pybind11/pybind11.h>

#include <stdexcept>
#include <string>
#include <vector>

#include "tensor_table.h"

namespace slao {

static_assert(sizeof(Matrix) == 6 * sizeof(int64_t), "a matrix is six words of the table");

template <typename T> struct Buffer {
  T* data;
  int64_t size;
};

template <typename T> Buffer<T> buffer_of(const pybind11::buffer& buffer, const char* what) {
  const pybind11::buffer_info info = buffer.request();
  if (info.itemsize != sizeof(T)) throw std::invalid_argument(std::string(what) + ": wrong item size");
  return {static_cast<T*>(info.ptr), static_cast<int64_t>(info.size)};
}

inline Buffer<Matrix> matrices_of(const pybind11::buffer& table, int64_t per_record) {
  const auto words = buffer_of<int64_t>(table, "table");
  if (words.size % (6 * per_record)) throw std::invalid_argument("table: incomplete record");
  return {reinterpret_cast<Matrix*>(words.data), words.size / 6};
}

inline std::vector<MergeRecord> merge_records(const pybind11::buffer& table, const pybind11::buffer& lam) {
  const auto m = matrices_of(table, 2);
  const auto weights = buffer_of<double>(lam, "lam");
  if (weights.size * 2 != m.size) throw std::invalid_argument("lam: one a record");
  std::vector<MergeRecord> records(weights.size);
  for (int64_t i = 0; i < weights.size; ++i) records[i] = {m.data[2 * i], m.data[2 * i + 1], weights.data[i]};
  return records;
}

inline std::vector<FoldRecord> fold_records(const pybind11::buffer& table, const pybind11::buffer& scalings) {
  const auto m = matrices_of(table, 3);
  const auto factors = buffer_of<double>(scalings, "scalings");
  if (factors.size * 3 != m.size) throw std::invalid_argument("scalings: one a record");
  std::vector<FoldRecord> records(factors.size);
  for (int64_t i = 0; i < factors.size; ++i)
    records[i] = {m.data[3 * i], m.data[3 * i + 1], m.data[3 * i + 2], factors.data[i]};
  return records;
}

}  // namespace slao
