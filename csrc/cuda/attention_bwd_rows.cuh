// What attention's backward does to every row before, within and after its pass.
#pragma once

#include "attention_launch.cuh"

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
    const int DV,
    const bool short_rows) {  // delta lacks Σ_j p_ij dp_ij, which the pass adds
  const int64_t i = int64_t{block_x()} * (PASS_THREADS / WARP) + warp();  // a warp a row of (B, H, L)
  if (i >= rows) return;
  const int64_t row = i % length, head = i / length % heads, batch = i / length / heads;
  const Global<const T> out = outs.of(batch, head, row), grad = grads.of(batch, head, row);
  float delta = 0;
  for (int d = lane(); d < DV && !short_rows; d += WARP) delta += to_float(load(out + d)) * to_float(load(grad + d));
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

// What the backward is called with, beside q, k and v.
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

template <typename T>
void launch_rows(
    const Attention& a,
    const Gradients& g,
    const Device& device,
    const Launch& pass,
    int64_t rows,
    const Tensor& by_row) {
  const Problem& p = a.problem;
  launch<attention_bwd_rows_kernel<T>>(
      device,
      "attention_bwd_rows",
      pass,
      a.matrices<const T>(g.out),
      a.matrices<const T>(g.grad_out),
      global<const float>(g.stats),
      global<const float>(g.grad_lse),
      vectors_of_four(by_row),
      rows,
      p.heads,
      int64_t{p.Lq},
      p.DV,
      p.short_rows);
}

// ---- within: delta of rows whose columns are all in one tile ----

// Adds Σ_j p_ij dp_ij to the delta (at[2]) of two rows, over the ACROSS warps that share them. s holds p; `row` and
// `column` are the first of the lane, `place` the row within the tile. slots: (rows of the tile, ACROSS) in shared
// memory, free before and after.
template <int ACROSS, int M>
__device__ inline void add_to_delta(
    Vector<float, 4> (&rows)[2],
    const float (&s)[M][4],
    const float (&dp)[M][4],
    const Scores<true>& scores,
    int row,
    int column,
    int place,
    int warp_of_row,
    SharedAddress slots) {
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    float sum = 0;
#pragma unroll
    for (int n = 0; n < M; ++n) {
      Vector<float, 2> keep{{1.0f, 1.0f}};
      if (scores.p.seed) keep = scores.kept(row + 8 * h, column + 8 * n);
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const float p = s[n][2 * h + i];  // 0 beside a NaN that the band hides
        sum += p == 0.0f ? 0.0f : p * dp[n][2 * h + i] * keep.at[i];
      }
    }
    sum += shuffle_xor(sum, 1);
    sum += shuffle_xor(sum, 2);
    if (lane() % 4 == 0) store_shared(slots + 4 * ((place + 8 * h) * ACROSS + warp_of_row), sum);
  }
  sync_block();
#pragma unroll
  for (int h = 0; h < 2; ++h)
    for (int w = 0; w < ACROSS; ++w) rows[h].at[2] += load_shared<float>(slots + 4 * ((place + 8 * h) * ACROSS + w));
  sync_block();
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
