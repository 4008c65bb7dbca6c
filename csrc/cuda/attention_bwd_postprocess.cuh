// Attention's backward, last kernel: adds up the float32 sums of dq, scales and rounds them.
#pragma once

#include "attention_bwd_preprocess.cuh"

namespace fastgpt {

// sums: (sum_count, rows, width) float32; sum_stride: between two sums.
template <typename T>
__global__ void __launch_bounds__(ROW_KERNEL_THREADS) attention_bwd_postprocess_kernel(
    const Global<const float> sums,
    const Matrices<T> dqs,
    const int64_t rows,
    const int heads,
    const int64_t length,
    const int D,
    const int width,
    const int64_t sum_stride,
    const int sum_count,
    const float scale) {
  const int64_t i = int64_t{block_x()} * (ROW_KERNEL_THREADS / WARP) + warp();
  if (i >= rows) return;
  const Global<T> dq = dqs.of(i / length / heads, i / length % heads, i % length);
  for (int d = lane(); d < D; d += WARP) {
    float sum = 0;
    for (int n = 0; n < sum_count; ++n) sum += load(sums + (n * sum_stride + i * width + d));
    store(dq + d, from_float<T>(sum * scale));
  }
}

template <typename T>
void launch_postprocess(
    const Attention& a,
    const Gradients& g,
    const Device& device,
    const Launch& shape,
    int64_t rows,
    const Tensor& sums) {
  const Problem& p = a.problem;
  const int64_t width = sums.size(2);
  launch<attention_bwd_postprocess_kernel<T>>(
      device,
      "attention_bwd_postprocess",
      shape,
      global<const float>(sums),
      a.matrices<T>(g.dq),
      rows,
      p.heads,
      int64_t{p.Lq},
      p.D,
      static_cast<int>(width),
      rows * width,
      static_cast<int>(sums.size(0)),
      p.scale);
}

}  // namespace fastgpt
