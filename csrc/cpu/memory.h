// Memory for the kernels, allocated by code that is compiled once. A kernel must not instantiate the C++ library itself:
// std::vector<double> compiled for AVX-512 has the name that it has everywhere, the linker keeps one of them, and which
// one decides whether an older processor can run the others' callers. Nor may anything throw inside an OpenMP region,
// which would end the process: all memory is there before the first thread starts.
#pragma once
#include <cstddef>

namespace slao {

// Bytes on a cache line's boundary, not initialised. std::bad_alloc if there are none.
struct Memory {
  explicit Memory(size_t bytes);
  ~Memory();
  Memory(const Memory&) = delete;
  Memory& operator=(const Memory&) = delete;
  char* const data;
};

// The same, the calling thread's own: it stays from call to call, until one needs more.
char* kept_memory(size_t bytes);

// Which of a parallel region's threads this is.
int thread_index();

}  // namespace slao
