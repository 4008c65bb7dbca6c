// What attention's backward does to every row before and after its pass; a warp takes a row.
#pragma once

#include "attention.cuh"

namespace fastgpt {

constexpr int PASS_THREADS = 256;

// ---- before: (m, l in units of log 2, delta) of each row ----

template <typename T>
__global__ void __launch_bounds__(PASS_THREADS) attention_bwd_rows_kernel(
    const Matrices<const T> outs,
    const Matrices<const T> grads,
    const Global<const float> stats,
    const Global<const float> grad_lses,
    const Global<Vector<float, 4>> by_row,
    const int64_t rows,
    const int heads,
    const int64_t length,
    const int DV) {
  const int64_t i = int64_t{block_x()} * (PASS_THREADS / WARP) + warp();  // a warp a row of (B, H, L)
  if (i >= rows) return;
  const int64_t row = i % length, head = i / length % heads, batch = i / length / heads;
  const Global<const T> out = outs.of(batch, head, row), grad = grads.of(batch, head, row);
  float delta = 0;
  for (int d = lane(); d < DV; d += WARP) delta += to_float(load(out + d)) * to_float(load(grad + d));
#pragma unroll
  for (int mask = 16; mask > 0; mask /= 2) delta += shuffle_xor(delta, mask);
  if (lane() > 0) return;
  if (grad_lses) delta -= load(grad_lses + i);
  const float high = load(stats + 2 * i), low = load(stats + (2 * i + 1));
  // A row that sees nothing: exp2(s - inf) is 0.
  store(
      by_row + i,
      Vector<float, 4>{{high == -INFINITE ? INFINITE : high, low * static_cast<float>(LOG2E), delta, 0.0f}});
}

// ---- after: dq from its sums ----

template <typename T>
__global__ void __launch_bounds__(PASS_THREADS) attention_bwd_dq_kernel(
    const Global<const float> sums,
    const Matrices<T> dqs,
    const int64_t rows,
    const int heads,
    const int64_t length,
    const int D,
    const int width,
    const int64_t sum_of_block,
    const int sums_count,
    const float scale) {
  const int64_t i = int64_t{block_x()} * (PASS_THREADS / WARP) + warp();
  if (i >= rows) return;
  const Global<T> dq = dqs.of(i / length / heads, i / length % heads, i % length);
  for (int d = lane(); d < D; d += WARP) {
    float sum = 0;
    for (int n = 0; n < sums_count; ++n) sum += load(sums + (n * sum_of_block + i * width + d));
    store(dq + d, from_float<T>(sum * scale));
  }
}

}  // namespace fastgpt
