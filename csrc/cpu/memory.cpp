#include "memory.h"

#include <memory>
#include <new>

#if defined(_OPENMP)
#include <omp.h>
#endif

namespace slao {

constexpr std::align_val_t kLine{64};

Memory::Memory(size_t bytes) : data(static_cast<char*>(::operator new(bytes, kLine))) {}
Memory::~Memory() { ::operator delete(data, kLine); }

char* kept_memory(size_t bytes) {
  static thread_local std::unique_ptr<Memory> kept;
  static thread_local size_t size = 0;
  if (size < bytes) {
    kept.reset(), size = 0;  // the old block first: together they may be too much
    kept = std::make_unique<Memory>(bytes);
    size = bytes;
  }
  return kept ? kept->data : nullptr;
}

int thread_index() {
#if defined(_OPENMP)
  return omp_get_thread_num();
#else
  return 0;
#endif
}

}  // namespace slao
