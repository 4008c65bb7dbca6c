// How elementwise kernels divide a tensor among threads: vectors of 16 bytes, two for each thread.
#pragma once

#include "tensors.cuh"

namespace fastgpt {

constexpr int THREADS = 256;
constexpr int VECTORS = 2;  // per thread; both loads of 16 bytes are in flight at once

// Elements in a vector: 16 bytes, or one element if the tensors are not aligned to 16 bytes.
template <typename T, bool WIDE>
constexpr int WIDTH = WIDE ? 16 / sizeof(T) : 1;

// Calls f(i, constant N) for each vector of N elements of this thread, and f(j, constant 1) for each remaining element.
template <int N, typename F>
__device__ inline void over_elements(int64_t numel, F&& f) {
  const int64_t first = (int64_t{block_x()} * VECTORS * THREADS + thread()) * N;
#pragma unroll
  for (int v = 0; v < VECTORS; ++v) {
    const int64_t i = first + int64_t{v} * THREADS * N;
    if (i + N <= numel)
      f(i, std::integral_constant<int, N>{});
    else
      for (int64_t j = i; j < numel; ++j) f(j, std::integral_constant<int, 1>{});
  }
}

template <typename T, bool WIDE>
Launch over(int64_t numel) {
  return {.x = cdiv(numel, int64_t{THREADS} * VECTORS * WIDTH<T, WIDE>), .threads = THREADS};
}

// Calls f with the compile-time arguments of a kernel without options: element type, width.
template <typename F>
void with_width(const char* op, const Tensor& x, bool wide, F&& f) {
  dispatch(x.scalar_type(), op, [&](auto element) { choose(wide, [&](auto w) { f(element, w); }); });
}

}  // namespace fastgpt
