// The exact fold's part of the module, and the instruction sets by name. A stream is an address of memory that the
// caller keeps; lengths (of the pieces' streams) and sums (a record's) are buffers of 64-bit integers.
#pragma once
#include "cpu/isa.h"
#include "tables.h"

namespace slao {

constexpr const char* kNames[] = {"base", "avx2", "avx512", "avx512bf16", "amx"};  // of Isa's values

inline Isa isa_of(const std::string& name) {
  const Isa best = best_isa();
  for (int isa = 0; isa <= int(best); ++isa)
    if (name == kNames[isa]) return Isa(isa);
  if (name != "auto") throw std::invalid_argument("this processor has no " + name);
  return best;
}

using FoldRecords = std::vector<FoldRecord>;

// How many pieces the records have, and the most bytes that their streams can take.
inline pybind11::tuple exact_plan(const pybind11::buffer& table, const pybind11::buffer& scalings,
                                  const std::string& isa) {
  const FoldRecords records = records_of<FoldRecord, 0, 1, 2>(table, scalings);
  int64_t pieces = 0, bytes = 0;
  SLAO_CALL(isa_of(isa), exact_plan(records.data(), int64_t(records.size()), pieces, bytes));
  return pybind11::make_tuple(pieces, bytes);
}

inline int64_t exact_fold(const pybind11::buffer& table, const pybind11::buffer& scalings, uintptr_t stream,
                          const pybind11::buffer& lengths, const pybind11::buffer& sums, int threads,
                          const std::string& isa) {
  const FoldRecords records = records_of<FoldRecord, 0, 1, 2>(table, scalings);
  int64_t* const into = buffer_of<int64_t>(lengths, "lengths").data;
  uint64_t* const totals = buffer_of<uint64_t>(sums, "sums").data;
  const Isa chosen = isa_of(isa);
  pybind11::gil_scoped_release release;
  return SLAO_CALL(chosen, exact_fold(records.data(), int64_t(records.size()), reinterpret_cast<char*>(stream), into,
                                      totals, threads));
}

inline bool exact_unfold(const pybind11::buffer& table, const pybind11::buffer& scalings, uintptr_t stream,
                         const pybind11::buffer& lengths, int threads, const std::string& isa) {
  const FoldRecords records = records_of<FoldRecord, 0, 1, 2>(table, scalings);
  const int64_t* const of = buffer_of<int64_t>(lengths, "lengths").data;
  const Isa chosen = isa_of(isa);
  pybind11::gil_scoped_release release;
  return SLAO_CALL(chosen, exact_unfold(records.data(), int64_t(records.size()),
                                        reinterpret_cast<const char*>(stream), of, threads));
}

inline void exact_sums(const pybind11::buffer& table, const pybind11::buffer& scalings, const pybind11::buffer& sums,
                       int threads, const std::string& isa) {
  const FoldRecords records = records_of<FoldRecord, 0, 1, 2>(table, scalings);
  uint64_t* const totals = buffer_of<uint64_t>(sums, "sums").data;
  const Isa chosen = isa_of(isa);
  pybind11::gil_scoped_release release;
  SLAO_CALL(chosen, exact_sums(records.data(), int64_t(records.size()), totals, threads));
}

inline void define_exact(pybind11::module_& module) {
  module.def("exact_plan", &exact_plan);
  module.def("exact_fold", &exact_fold);
  module.def("exact_unfold", &exact_unfold);
  module.def("exact_sums", &exact_sums);
}

}  // namespace slao
