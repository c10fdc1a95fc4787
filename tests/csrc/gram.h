// For the driver: gram, X Xᵀ of stacks of matrices in fp64.
#pragma once
#include "guarded.h"

namespace {

using GramKernel = void (*)(const Matrix*, const int64_t*, int64_t, double*, int);

struct Stack {
  std::vector<Tensor> parts;
  Values rows;  // all of them, one below another
  int64_t height = 0, cols = 0;
};

Stack random_stack(const std::vector<int64_t>& heights, int64_t cols) {
  Stack stack;
  stack.cols = cols;
  for (int64_t r : heights) {
    stack.parts.push_back(random_tensor(r, cols, kDtypes[random_numbers.below(4)]));
    if (random_numbers.below(8) == 0) spoil(stack.parts.back(), kNaN);
    const Values own = stack.parts.back().values();
    stack.rows.insert(stack.rows.end(), own.begin(), own.end());
    stack.height += r;
  }
  return stack;
}

// A sum of n products in fp64, in any order: n roundings of the sum of their magnitudes.
void compare(const Stack& s, const double* G) {
  for (int64_t i = 0; i < s.height; ++i)
    for (int64_t j = 0; j < s.height; ++j) {
      double want = 0, size = 0;
      for (int64_t k = 0; k < s.cols; ++k) {
        const double term = s.rows[i * s.cols + k] * s.rows[j * s.cols + k];
        want += term, size += std::abs(term);
      }
      const double got = G[i * s.height + j], bound = double(s.cols) * unit(Dtype::f64) * size;
      const bool fine = j > i ? got == 0 : std::isnan(want) ? std::isnan(got) : std::abs(got - want) <= bound;
      expect(fine, "gram of " + std::to_string(s.height) + "x" + std::to_string(s.cols),
             "entry " + std::to_string(i) + "," + std::to_string(j) + " is " + std::to_string(got));
    }
}

void check_gram(const char* isa, bool here, GramKernel kernel) {
  if (!here) return;
  instruction_set = isa;
  std::vector<Stack> stacks;
  const std::vector<int64_t> heights[] = {{1}, {16, 16, 16}, {3, 0, 5}, {0}, {64}, {1, 30}, {4, 4}};
  for (const auto& each : heights)
    for (int64_t cols : {0, 1, 7, 33, 256, 300, 1024, 2100}) stacks.push_back(random_stack(each, cols));
  std::vector<Matrix> matrices;
  std::vector<int64_t> sizes;
  int64_t total = 0;
  for (Stack& stack : stacks) {
    for (Tensor& part : stack.parts) matrices.push_back(part.m), part.lock();
    sizes.push_back(int64_t(stack.parts.size()));
    total += stack.height * stack.height;
  }
  // After the last number stands one that nobody may touch.
  Values three(total + 1, kNaN), one = three;
  three[total] = one[total] = 7;
  kernel(matrices.data(), sizes.data(), int64_t(stacks.size()), three.data(), 3);
  kernel(matrices.data(), sizes.data(), int64_t(stacks.size()), one.data(), 1);
  expect(!std::memcmp(one.data(), three.data(), one.size() * sizeof(double)), "gram", "threads change the bits");
  expect(one[total] == 7, "gram", "wrote behind the last stack");
  const double* G = one.data();
  for (Stack& stack : stacks) {
    for (Tensor& part : stack.parts) {
      part.unlock();
      expect(part.unchanged(), "gram", "an input changed");
    }
    compare(stack, G);
    G += stack.height * stack.height;
  }
  kernel(nullptr, nullptr, 0, nullptr, 3);
  std::printf("%-7s gram             %5zu stacks\n", isa, stacks.size());
}

}  // namespace
