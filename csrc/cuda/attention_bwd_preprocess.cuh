// Attention's backward, first kernel: computes delta of each row and stores it beside m and l.
//
//   ds_ij = p_ij (dp_ij - Σ_k p_ik dp_ik) + p_ij dlse_i = p_ij (dp_ij - delta_i)
//   delta_i = Σ_k p_ik dp_ik - dlse_i = Σ_d out_id dout_id - dlse_i,    because Σ_k p_ik (dout_i·v_k) = dout_i·out_i
//
// If a tile of the main kernel has all columns of a row (delta_in_tile), the main kernel sums p_ij dp_ij itself, and
// delta is only -dlse_i here.
#pragma once

#include "attention_launch.cuh"

namespace fastgpt {

constexpr int ROW_KERNEL_THREADS = 256;  // of the preprocess and the postprocess kernels, one warp per row

// The arguments and results of the backward beside q, k and v.
struct Gradients {
  Tensor grad_out, out, stats, dq, dk, dv;
  OptionalTensor grad_lse;
  bool deterministic;

  using Sizes = std::initializer_list<int64_t>;
  void check(Sizes of_out, Sizes of_lse, Sizes of_stats, const Checks& check) const {
    check("grad_out", grad_out, of_out, {dq.scalar_type()})("out", out, of_out, {dq.scalar_type()});
    check("grad_lse", grad_lse, of_lse, {ScalarType::Float})("stats", stats, of_stats, {ScalarType::Float});
    check.rows_contiguous("out", out).contiguous("grad_lse", grad_lse, "stats", stats);
  }
};

// row_stats: (m, l in units of log 2, delta, 0) of each row.
template <typename T>
__global__ void __launch_bounds__(ROW_KERNEL_THREADS) attention_bwd_preprocess_kernel(
    const Matrices<const T> outs,
    const Matrices<const T> grads,
    const Global<const float> stats,
    const Global<const float> grad_lses,
    const Global<Vector<float, 4>> row_stats,
    const int64_t rows,
    const int heads,
    const int64_t length,
    const int DV,
    const bool delta_in_tile) {
  const int64_t i = int64_t{block_x()} * (ROW_KERNEL_THREADS / WARP) + warp();  // a row of (B, H, L)
  if (i >= rows) return;
  const int64_t row = i % length, head = i / length % heads, batch = i / length / heads;
  const Global<const T> out = outs.of(batch, head, row), grad = grads.of(batch, head, row);
  float delta = 0;
  for (int d = lane(); d < DV && !delta_in_tile; d += WARP) delta += to_float(load(out + d)) * to_float(load(grad + d));
#pragma unroll
  for (int mask = 16; mask > 0; mask /= 2) delta += shuffle_xor(delta, mask);
  if (lane() > 0) return;
  if (grad_lses) delta -= load(grad_lses + i);
  const float m = load(stats + 2 * i), l = load(stats + (2 * i + 1));
  // A row that sees no column gets m = +inf, so that exp2(s - inf) is 0.
  store(row_stats + i, Vector<float, 4>{{m == -INFINITE ? INFINITE : m, l * static_cast<float>(LOG2E), delta, 0.0f}});
}

template <typename T>
void launch_preprocess(
    const Attention& a,
    const Gradients& g,
    const Device& device,
    const Launch& shape,
    int64_t rows,
    const Tensor& row_stats) {
  const Problem& p = a.problem;
  launch<attention_bwd_preprocess_kernel<T>>(
      device,
      "attention_bwd_preprocess",
      shape,
      a.matrices<const T>(g.out),
      a.matrices<const T>(g.grad_out),
      global<const float>(g.stats),
      global<const float>(g.grad_lse),
      vectors_of_four(row_stats),
      rows,
      p.heads,
      int64_t{p.Lq},
      p.DV,
      p.delta_in_tile);
}

}  // namespace fastgpt
