// Runs the CUDA kernels' source on a CPU, for tests only: it proves their logic (indices, edges, arithmetic, barriers),
// not their speed, and not the absence of races.
//
// Blocks run one after another. The threads of a block are fibers that take turns at barriers and at the warp
// operations, in an order that tests may turn round. What a GPU would do wrong silently stops the process here: a
// barrier that not all threads reach at the same line, a warp operation without all lanes, a write beyond the dynamic
// shared memory. Shared memory starts as NaN.
#pragma once
#include <math.h>
#include <setjmp.h>
#include <ucontext.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <string>
#include <type_traits>
#include <vector>

#define SLAO_ISA base
#include "../../csrc/cpu/simd.h"
#undef SLAO_ISA

#define __global__
#define __device__
#define __host__
#define __grid_constant__
#define __launch_bounds__(...)
#define __shared__ static
#define __syncthreads() ::slao::cuda::block_barrier(__FILE__, __LINE__)
#define __threadfence()
#define __syncwarp()  // what it guards, the warp operations, wait for all lanes themselves

struct Index { unsigned x; };
struct alignas(8) uint2 { uint32_t x, y; };
struct alignas(16) uint4 { uint32_t x, y, z, w; };
enum cudaError_t { cudaSuccess };
inline const char* cudaGetErrorString(cudaError_t) { return ""; }

inline Index threadIdx, blockIdx, blockDim, gridDim;

inline int atomicAdd(int32_t* to, int32_t x) {
  const int32_t before = *to;
  *to += x;
  return before;
}

namespace slao::cuda {

template <typename To, typename From> To reinterpret(const From& from) {
  static_assert(sizeof(To) == sizeof(From), "same size");
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}

[[noreturn]] inline void stop(const std::string& what) {
  std::fprintf(stderr, "cuda_on_cpu: %s (block %u, thread %u)\n", what.c_str(), blockIdx.x, threadIdx.x);
  std::abort();
}

enum class Wait { nothing, block, warp };

struct Fiber {
  ucontext_t start;
  jmp_buf position;
  bool started, finished;
  Wait waits;
  const char* file;
  int line;
  // What a lane brings to a warp operation, and takes from it.
  double a, b;
  double* c;
  int mask;
};

struct Emulator {
  int block_order = 0;  // 0 first to last, 1 last to first, 2 every seventh
  bool last_thread_first = false;
  int64_t launches = 0;
  std::vector<Fiber> fibers;
  std::vector<char> stacks, shared;
  std::function<void()> body;
  Fiber* current = nullptr;
  jmp_buf scheduler;
};
inline Emulator emulator;

constexpr size_t kStackBytes = 256 << 10, kGuardBytes = 256;
constexpr size_t kSharedLimit = 99 << 10;  // what the smallest GPU of sm_80 and later offers a CTA

__attribute__((noinline)) inline void yield() {
  if (_setjmp(emulator.current->position) == 0) _longjmp(emulator.scheduler, 1);
}

__attribute__((noinline)) inline void resume(int thread) {
  Fiber& fiber = emulator.fibers[thread];
  emulator.current = &fiber;
  threadIdx.x = thread;
  if (_setjmp(emulator.scheduler)) return;
  if (fiber.started) _longjmp(fiber.position, 1);
  fiber.started = true;
  setcontext(&fiber.start);
}

inline void run_fiber() {
  emulator.body();
  emulator.current->finished = true;
  _longjmp(emulator.scheduler, 1);
}

inline void block_barrier(const char* file, int line) {
  Fiber& self = *emulator.current;
  self.waits = Wait::block, self.file = file, self.line = line;
  yield();
}

inline void mma_lanes(Fiber* lanes) {
  for (int row = 0; row < 8; ++row)
    for (int col = 0; col < 8; ++col) {
      double& c = lanes[row * 4 + col / 2].c[col % 2];
      for (int k = 0; k < 4; ++k) c = fma(lanes[row * 4 + k].a, lanes[col * 4 + k].b, c);
    }
}

inline void shuffle_lanes(Fiber* lanes) {
  for (int lane = 0; lane < 32; ++lane) lanes[lane].b = lanes[lane ^ lanes[lane].mask].a;
}

// The lane that comes last does the work for all.
template <typename Operation> void warp_operation(Operation operation) {
  const int thread = int(threadIdx.x);
  Fiber* lanes = &emulator.fibers[thread / 32 * 32];
  emulator.current->waits = Wait::warp;
  for (int lane = 0; lane < 32; ++lane)
    if (lanes[lane].waits != Wait::warp) return yield();
  operation(lanes);
  for (int lane = 0; lane < 32; ++lane) lanes[lane].waits = Wait::nothing;
}

inline void mma_f64(double (&c)[2], double a, double b) {
  Fiber& self = *emulator.current;
  self.a = a, self.b = b, self.c = c;
  warp_operation(mma_lanes);
}

template <typename T> T* in_global(T* pointer) { return pointer; }

inline double shuffle_xor(double x, int mask) {
  Fiber& self = *emulator.current;
  self.a = x, self.mask = mask;
  warp_operation(shuffle_lanes);
  return self.b;
}

inline char* dynamic_shared() {  // aligned as on the device
  return reinterpret_cast<char*>((reinterpret_cast<uintptr_t>(emulator.shared.data()) + 127) / 128 * 128);
}

inline void run_block(int threads, size_t shared_bytes) {
  std::memset(emulator.shared.data(), 0xff, emulator.shared.size());
  char* guard = dynamic_shared() + shared_bytes;
  std::memset(guard, 0xa5, kGuardBytes);
  for (int t = 0; t < threads; ++t) {
    Fiber& fiber = emulator.fibers[t];
    getcontext(&fiber.start);
    fiber.start.uc_stack.ss_sp = emulator.stacks.data() + t * kStackBytes;
    fiber.start.uc_stack.ss_size = kStackBytes;
    fiber.start.uc_link = nullptr;
    makecontext(&fiber.start, run_fiber, 0);
    fiber.started = fiber.finished = false;
    fiber.waits = Wait::nothing;
  }
  for (;;) {
    bool progress = false;
    for (int i = 0; i < threads; ++i) {
      const int t = emulator.last_thread_first ? threads - 1 - i : i;
      if (emulator.fibers[t].finished || emulator.fibers[t].waits != Wait::nothing) continue;
      progress = true;
      resume(t);
    }
    if (progress) continue;
    const Fiber* first = nullptr;
    for (Fiber& fiber : emulator.fibers) {
      if (fiber.finished) continue;
      if (fiber.waits == Wait::warp) stop("a warp operation that not all lanes reach");
      if (first && (first->line != fiber.line || std::strcmp(first->file, fiber.file)))
        stop("a barrier that threads reach at different lines: " + std::to_string(first->line) + " and " +
             std::to_string(fiber.line));
      first = &fiber;
    }
    if (!first) break;
    for (Fiber& fiber : emulator.fibers) {
      if (fiber.finished) stop("a barrier that some threads never reach, line " + std::to_string(first->line));
      fiber.waits = Wait::nothing;
    }
  }
  for (size_t i = 0; i < kGuardBytes; ++i)
    if (guard[i] != char(0xa5)) stop("a write beyond the shared memory");
}

template <typename P>
void launch(void (*kernel)(P), int64_t grid, size_t shared_bytes, uintptr_t, const P& parameters) {
  if (grid == 0) return;
  if (sizeof(P) > 32764) stop("more parameters than the driver takes");
  if (shared_bytes > kSharedLimit) stop("more shared memory than every GPU has");
  ++emulator.launches;
  constexpr int threads = 256;  // launch.h's kThreads
  emulator.fibers.resize(threads);
  emulator.stacks.resize(threads * kStackBytes);
  emulator.shared.assign(shared_bytes + kGuardBytes + 256, 0);
  emulator.body = [&] { kernel(parameters); };
  blockDim.x = threads, gridDim.x = unsigned(grid);
  for (int64_t i = 0; i < grid; ++i) {
    int64_t block = emulator.block_order == 1 ? grid - 1 - i : i;
    if (emulator.block_order == 2) {  // every seventh, then the next ones
      const int64_t whole = grid / 7 * 7;
      if (i < whole) block = i % (grid / 7) * 7 + i / (grid / 7);
    }
    blockIdx.x = unsigned(block);
    run_block(threads, shared_bytes);
  }
}

inline void use_device(int) {}
inline cudaError_t cudaDriverGetVersion(int* version) { return *version = 12010, cudaSuccess; }
inline void zero(void* data, size_t bytes, uintptr_t) { std::memset(data, 0, bytes); }

}  // namespace slao::cuda
