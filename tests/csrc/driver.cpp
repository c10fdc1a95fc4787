// Calls the CPU kernels without Python and compares with naive double precision: every instruction set that this
// processor has, tables of shapes, dtypes, layouts, unaligned starts, NaN and infinity, one and three threads. Meant
// for the sanitizers (make asan) and for processors that are only emulated (make aarch64). Prints what failed; exits 1.
#include <cstdlib>
#include <new>

#include "../../csrc/cpu/isa.h"
#include "exact_fold.h"
#include "gram.h"
#include "lora_linear.h"
#include "orthogonal_init.h"

#if defined(SLAO_HAS_AMX)
namespace slao::amx_emulated {
extern const LoraProducts lora_products;
}
#endif

using namespace slao;

// Memory of the kernels, of which there may be too little: so many allocations succeed.
int64_t allocations_left = std::numeric_limits<int64_t>::max();
void* operator new(size_t bytes, std::align_val_t line) {
  void* p = nullptr;
  if (allocations_left-- <= 0 || posix_memalign(&p, size_t(line), bytes + !bytes)) throw std::bad_alloc();
  return p;
}
void operator delete(void* p, std::align_val_t) noexcept { std::free(p); }

namespace {

// --- scaled_merge and fold: one written matrix, some that are only read -------------------------------------------

struct Case {
  std::string label;
  Tensor written;
  std::vector<Tensor> read;
  double factor;
  Values expected, tolerance;
};

void compare(const Case& c) {
  const Values got = c.written.values();
  for (size_t i = 0; i < got.size(); ++i) {
    const double want = c.expected[i], bound = c.tolerance[i];
    const bool same = got[i] == want && (bound != 0 || std::signbit(got[i]) == std::signbit(want));
    const bool near = bound != 0 && std::isfinite(want) && std::abs(got[i] - want) <= bound;
    if (same || near || (std::isnan(got[i]) && std::isnan(want))) continue;
    char text[160];
    std::snprintf(text, sizeof text, "element %zu is %.17g, expected %.17g +- %.3g", i, got[i], want, bound);
    return expect(false, c.label, text);
  }
}

// run(threads) calls the kernel on all cases at once.
template <typename Run> void check_cases(std::vector<Case>& cases, Run run) {
  for (Case& c : cases) {
    c.written.lock();
    for (Tensor& tensor : c.read) tensor.lock();
  }
  run(3);
  std::vector<std::vector<char>> first;
  for (Case& c : cases) {
    c.written.unlock();
    for (Tensor& tensor : c.read) tensor.unlock();
    compare(c);
    expect(c.written.unchanged_outside(), c.label, "bytes around the destination changed");
    for (const Tensor& tensor : c.read) expect(tensor.unchanged(), c.label, "an input changed");
    first.push_back(c.written.restore());
  }
  run(1);
  for (size_t i = 0; i < cases.size(); ++i)
    expect(cases[i].written.holds(first[i]), cases[i].label, "one thread gives other bits than three");
}

using Merge = void (*)(const MergeRecord*, int64_t, int);
using Fold = void (*)(const FoldRecord*, int64_t, int);

// --- scaled_merge: dst + lam (src - dst) -------------------------------------------------------------------------

Case merge_case(Tensor dst, Tensor src, double lam) {
  const Dtype D = dst.m.dtype;
  Case c{"scaled_merge lam " + std::to_string(lam) + " of " + describe(dst.m) + " and " + describe(src.m),
         std::move(dst), {}, lam, {}, {}};
  const Values d = c.written.values(), s = src.values();
  for (size_t i = 0; i < d.size(); ++i) {
    // torch's two branches: they differ where something is infinite. lam 0 and 1 are exact: tolerance 0.
    const double exact = lam == 0   ? d[i]
                         : lam == 1 ? nearest(s[i], D)
                         : lam < 0.5 ? d[i] + lam * (s[i] - d[i])
                                     : s[i] - (s[i] - d[i]) * (1 - lam);
    // Four roundings where it is computed (fp32, or fp64 for fp64), one to storage.
    const double rounding = 4 * unit(D == Dtype::f64 ? D : Dtype::f32) * (std::abs(d[i]) + std::abs(s[i]));
    c.expected.push_back(exact);
    c.tolerance.push_back(lam == 0 || lam == 1 ? 0 : rounding + storage_rounding(exact, D));
  }
  c.read.push_back(std::move(src));
  return c;
}

void check_merge(Merge kernel) {
  const int64_t shapes[][2] = {{1, 1}, {1, 7}, {3, 0}, {0, 3}, {7, 33}, {33, 17}, {130, 257}, {1, 40001}, {64, 64}};
  std::vector<Case> cases;
  for (double lam : {0.0, 0.25, 0.5, 0.75, 1.0})
    for (Dtype D : kDtypes)
      for (Dtype S : kDtypes)
        for (const auto& shape : shapes) {
          Tensor dst = random_tensor(shape[0], shape[1], D), src = random_tensor(shape[0], shape[1], S);
          if (random_numbers.below(3) == 0)
            for (double value : {kNaN, kInfinity, -kInfinity}) spoil(dst, value), spoil(src, value);
          cases.push_back(merge_case(std::move(dst), std::move(src), lam));
        }
  // lam = 1 converts: all 16-bit patterns; and in wider dtypes ties, their neighbours, denormals, overflow.
  for (Dtype D : kDtypes)
    for (Dtype S : kDtypes)
      for (Layout layout : {dense, strided}) {  // with vectors, without
        Tensor src(1, 65536, S, layout, 1);
        for (int64_t j = 0; j < src.m.cols; ++j) {
          const uint16_t pattern = uint16_t(j);
          const double tie = std::ldexp(double(random_numbers.below(8192) - 4096), int(random_numbers.below(64)) - 44);
          const double beside = S == Dtype::f64 ? std::nextafter(tie, 9e9 * (j % 2 ? 1 : -1))
                                                : std::nextafterf(float(tie), 9e9f * (j % 2 ? 1 : -1));
          if (element_size(S) == 2)
            std::memcpy(src.at(0, j), &pattern, 2);
          else
            encode(j % 3 ? beside : j % 7 ? tie : std::ldexp(tie, 126), src.at(0, j), S);
        }
        cases.push_back(merge_case(Tensor(1, 65536, D, layout, 3), std::move(src), 1.0));
      }
  std::vector<MergeRecord> records;
  for (Case& c : cases) records.push_back({c.written.m, c.read[0].m, c.factor});
  check_cases(cases, [&](int threads) { kernel(records.data(), int64_t(records.size()), threads); });
  kernel(nullptr, 0, 3);
  std::printf("%-7s scaled_merge     %5zu records\n", instruction_set.c_str(), records.size());
}

// --- fold: W + scaling B A ---------------------------------------------------------------------------------------

Case fold_case(Tensor W, Tensor A, Tensor B, double scaling) {
  const int64_t rows = W.m.rows, cols = W.m.cols, r = A.m.rows;
  const bool wide = W.m.dtype == Dtype::f64 || A.m.dtype == Dtype::f64 || B.m.dtype == Dtype::f64;
  Case c{"fold r " + std::to_string(r) + " W " + describe(W.m) + " A " + describe(A.m) + " B " + describe(B.m),
         std::move(W), {}, scaling, {}, {}};
  c.expected = c.written.values();
  const Values a = A.values(), b = B.values();
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t j = 0; j < cols; ++j) {
      double& total = c.expected[i * cols + j];
      double size = std::abs(total);
      for (int64_t k = 0; k < r; ++k) {
        const double term = scaling * b[i * r + k] * a[k * cols + j];
        total += term, size += std::abs(term);
      }
      // Every one of r + 4 roundings errs by at most this much; in practice they are far from all alike.
      const double rounding = double(r + 4) * unit(wide ? Dtype::f64 : Dtype::f32) * size;
      c.tolerance.push_back(rounding + storage_rounding(total, c.written.m.dtype));
    }
  c.read.push_back(std::move(A));
  c.read.push_back(std::move(B));
  return c;
}

void check_fold(Fold kernel) {
  const int64_t shapes[][3] = {  // rows of W, columns, r
      {1, 1, 1},    {1, 5, 1},    {3, 7, 7},      {7, 33, 8},    {5, 64, 12}, {33, 17, 16}, {97, 130, 33}, {6, 700, 64},
      {50, 31, 130}, {7, 300, 256}, {101, 2100, 1}, {16, 16, 16}, {0, 5, 3},   {5, 0, 3},    {4, 6, 0}};
  std::vector<Case> cases;
  for (Dtype w : kDtypes)
    for (Dtype a : kDtypes)
      for (Dtype b : kDtypes)
        for (const auto& [rows, cols, r] : shapes) {
          Tensor W = random_tensor(rows, cols, w), A = random_tensor(r, cols, a), B = random_tensor(rows, r, b);
          if (random_numbers.below(4) == 0) spoil(W, kInfinity), spoil(A, kNaN), spoil(B, -kInfinity);
          cases.push_back(fold_case(std::move(W), std::move(A), std::move(B), random_numbers.normal()));
        }
  std::vector<FoldRecord> records;
  for (Case& c : cases) records.push_back({c.written.m, c.read[0].m, c.read[1].m, c.factor});
  check_cases(cases, [&](int threads) { kernel(records.data(), int64_t(records.size()), threads); });
  kernel(nullptr, 0, 3);
  std::printf("%-7s fold             %5zu records\n", instruction_set.c_str(), records.size());
}

// --- too little memory: std::bad_alloc comes out, from before the first write -----------------------------------------

template <typename Run> void check_memory(const std::string& label, std::vector<Tensor>& written, Run run) {
  for (Tensor& tensor : written) tensor.lock(), tensor.unlock();
  int64_t failed = 0;
  for (bool done = false; !done; failed += !done) {
    allocations_left = failed;
    try {
      run();
      done = true;
    } catch (const std::bad_alloc&) {
      allocations_left = std::numeric_limits<int64_t>::max();
      for (const Tensor& tensor : written) expect(tensor.unchanged(), label, "was written before memory ran out");
    }
    allocations_left = std::numeric_limits<int64_t>::max();
  }
  expect(failed > 0, label, "takes no memory");
  for (Tensor& tensor : written) expect(!tensor.unchanged(), label, "was not written at last");
}

std::vector<Tensor> four(int64_t rows, int64_t cols, Dtype t) {
  std::vector<Tensor> tensors;
  for (int i = 0; i < 4; ++i) {
    tensors.emplace_back(rows, cols, t, dense, 0);
    tensors.back().fill([](int64_t, int64_t) { return random_numbers.normal(); });
  }
  return tensors;
}

void check_memory(Merge merge, Fold fold, Orthogonal orthogonal) {
  for (Dtype t : {Dtype::f64, Dtype::bf16}) {
    std::vector<Tensor> W = four(60, 70, t), F = four(60, 70, t), A = four(9, 70, t), B = four(60, 9, t);
    std::vector<MergeRecord> merges;
    std::vector<FoldRecord> folds;
    std::vector<Matrix> matrices;
    std::vector<Status> status(4);
    for (int i = 0; i < 4; ++i) {
      merges.push_back({W[i].m, F[i].m, 0.5});
      folds.push_back({F[i].m, A[i].m, B[i].m, 0.5});
      matrices.push_back(A[i].m);
    }
    check_memory("scaled_merge", W, [&] { merge(merges.data(), 4, 3); });
    check_memory("fold", F, [&] { fold(folds.data(), 4, 3); });
    check_memory("orthogonal_init", A, [&] { orthogonal(matrices.data(), nullptr, nullptr, status.data(), 4, 3); });
  }
}

void check_all(const char* isa, bool here, Merge merge, Fold fold, const Exact& exact, Orthogonal orthogonal) {
  if (!here) return void(std::printf("%-7s not run: this processor does not have it\n", isa));
  instruction_set = isa;
  check_merge(merge);
  check_fold(fold);
  check_exact(exact);
  check_orthogonal(orthogonal);
  check_memory(merge, fold, orthogonal);
}

}  // namespace

int main() {
  std::setvbuf(stdout, nullptr, _IONBF, 0);  // a sanitizer's abort loses nothing
#define CHECK_ALL(isa, here)                                                                                  \
  check_all(#isa, here, isa::scaled_merge, isa::fold,                                                         \
            Exact{isa::exact_plan, isa::exact_fold, isa::exact_unfold, isa::exact_sums}, isa::orthogonal_init);       \
  check_gram(#isa, here, isa::gram)
  CHECK_ALL(base, true);
#if defined(__x86_64__)
  CHECK_ALL(avx2, best_isa() >= Isa::avx2);
  CHECK_ALL(avx512, best_isa() >= Isa::avx512);
#endif
  check_lora("avx512bf16", best_isa() >= Isa::avx512bf16 ? lora_products(Isa::avx512bf16) : nullptr);
  check_lora("amx", best_isa() >= Isa::amx ? lora_products(Isa::amx) : nullptr);
#if defined(SLAO_HAS_AMX)
  check_lora("amx_emulated", best_isa() >= Isa::avx512bf16 ? &amx_emulated::lora_products : nullptr);
#endif
  std::printf(failures ? "%d checks FAILED\n" : "every check passed\n", failures);
  return failures ? 1 : 0;
}
