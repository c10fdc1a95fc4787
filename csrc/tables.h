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

// Records of a few matrices each, numbered by `at` in a record, and a factor each.
template <typename Record, int... at>
std::vector<Record> records_of(const pybind11::buffer& table, const pybind11::buffer& factors) {
  constexpr int64_t each = sizeof...(at);
  const auto m = matrices_of(table, each);
  const auto f = buffer_of<double>(factors, "factors");
  if (f.size * each != m.size) throw std::invalid_argument("factors: one a record");
  std::vector<Record> records(f.size);
  for (int64_t i = 0; i < f.size; ++i) records[i] = {m.data[i * each + at]..., f.data[i]};
  return records;
}

}  // namespace slao
