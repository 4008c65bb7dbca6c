// Cross-entropy of one row, for the kernels of cross_entropy.cu: its 16-byte vectors, statistics, loss and gradient.
//
//   x_j = softcap tanh(k logit_j / softcap), e = 1 with a softcap;   x_j = logit_j, e = k without   (k: logit_scale)
//   m = max_j x_j;   s = Σ_j exp(e (x_j - m));   lse = e m + log s;   p_j = exp(e (x_j - m)) / s
//   w_j = class weights, or 1;   W = Σ_j w_j;   a = (1 - eps) w_y;   b = eps / V   (eps: label smoothing)
//
//   loss = a (log s + e (m - x_y)) + b (W log s + e Σ_j w_j (m - x_j)) + z lse²            0 for an ignored row
//   dlogit_j = c_p exp(e (x_j - m)) - c_y [j = y] - c_w w_j      (with a softcap, times 1 - (x_j / softcap)²)
//              c_p = k (grad_loss (a + b W + 2 z lse) + grad_lse) / s,  c_y = k grad_loss a,  c_w = k grad_loss b
//
// e multiplies differences of logits, never a logit: e x_j - e m, contracted to one fma, would compare an exact product
// with a rounded one. It is part of the factor of the base-2 exponentials, the rate, and costs no instruction.
//
// m and s are kept as two numbers, here and in what is saved for the backward, because log s would be lost beside a
// large m in their sum lse. All terms of Σ_j w_j (m - x_j) have one sign, so they do not cancel. A term that an option
// of 0 switches off is not computed, because a class weight may be infinite and 0 inf is NaN.
#pragma once

#include "../formulas.h"
#include "tensors.cuh"

namespace fastgpt {

constexpr int MAX_THREADS = 512;  // of a block, which processes a row
constexpr float LOG2E_32 = static_cast<float>(LOG2E);

struct LossOptions {
  int64_t ignore_index;
  float label_smoothing, z_loss, softcap, logit_scale;

  __device__ float exponent_scale() const { return softcap != 0.0f ? 1.0f : logit_scale; }  // e
};

// The tensors of the loss beside the logits. weight_sum is W, if there are weights and smoothing.
struct LossTensors {
  Global<const int64_t> target;
  Global<const float> weight, weight_sum;
};

// ---- a row's elements ----
//
// Rows of an odd length (V = 50257) start at addresses that are not aligned to 16 bytes. A row is therefore split into
// its aligned vectors of N elements and up to 2 (N - 1) single elements at the two edges, at most one per thread.

template <int N>
struct Row {
  int head, vectors, edges;

  template <typename T>
  __device__ Row(Global<T> row, int columns) {
    const int misaligned = static_cast<int>(address(row) / sizeof(T) % N);
    head = misaligned ? N - misaligned : 0;
    head = head < columns ? head : columns;
    vectors = (columns - head) / N;
    edges = columns - vectors * N;
  }
  __device__ int vector(int i) const { return head + i * N; }
  __device__ int edge(int e) const { return e < head ? e : e + vectors * N; }
};

// Calls f(j, vector) for each vector of this thread; its first element is j. COUNT loads are in flight at once.
template <int COUNT, int N, typename T, typename F>
__device__ inline void over_row(Global<T> row, const Row<N>& r, F&& f) {
  const int step = threads();
  int i = thread();
  for (; i + (COUNT - 1) * step < r.vectors; i += COUNT * step) {
    decltype(load_vector<N>(row)) v[COUNT];
#pragma unroll
    for (int u = 0; u < COUNT; ++u) v[u] = load_vector<N>(row + r.vector(i + u * step));
#pragma unroll
    for (int u = 0; u < COUNT; ++u) f(r.vector(i + u * step), v[u]);
  }
  for (; i < r.vectors; i += step) f(r.vector(i), load_vector<N>(row + r.vector(i)));
  if (thread() < r.edges) f(r.edge(thread()), load_vector<1>(row + r.edge(thread())));
}

// e log2(e). OPTIONS: softcap, smoothing or scale may be set.
template <bool OPTIONS>
__device__ inline float rate_of(const LossOptions& options) {
  return OPTIONS ? options.exponent_scale() * LOG2E_32 : LOG2E_32;
}

// x: the elements in float32, with the softcap applied.
template <bool OPTIONS, typename T, int N>
__device__ inline Vector<float, N> values(const Vector<T, N>& v, const LossOptions& options) {
  Vector<float, N> x;
#pragma unroll
  for (int k = 0; k < N; ++k) x.at[k] = to_float(v.at[k]);
  if (OPTIONS && options.softcap != 0.0f) {
    const float inverse = options.logit_scale / options.softcap;
#pragma unroll
    for (int k = 0; k < N; ++k) x.at[k] = options.softcap * tanh_of<Fast>(x.at[k] * inverse);
  }
  return x;
}

__device__ inline float weight_of(const LossTensors& tensors, int j) {
  return tensors.weight ? load(tensors.weight + j) : 1.0f;
}

// ---- statistics ----

// Statistics of a part of a row: row_max, Σ exp(e (x - row_max)), Σ w (row_max - x), Σ w, and x_y if y is in the part.
struct alignas(16) Statistics {
  RunningSoftmax<float> softmax;
  float weighted = 0, weights = 0, x_target = 0;

  template <int N>
  __device__ void add(const Vector<float, N>& x, float rate) {
    float largest = x.at[0];
#pragma unroll
    for (int k = 1; k < N; ++k) largest = fmaxf(largest, x.at[k]);
    rescale(fmaxf(softmax.row_max, largest), rate);
    float sum = 0;
#pragma unroll
    for (int k = 0; k < N; ++k) sum += exp2_fast((x.at[k] - softmax.row_max) * rate);
    softmax.row_sum += sum;
  }
  // Adds Σ w (row_max - x) and Σ w. Call it after `add` of the same numbers.
  template <int N>
  __device__ void add_weighted(const Vector<float, N>& x, int j, const LossTensors& tensors) {
#pragma unroll
    for (int k = 0; k < N; ++k) {
      const float w = weight_of(tensors, j + k);
      weighted += w * (softmax.row_max - x.at[k]);
      weights += w;
    }
  }
  __device__ void rescale(float row_max, float rate) {
    weighted += weighted_increase(row_max);
    softmax.rescale(row_max, [&](float x) { return exp2_fast(x * rate); });
  }
  // The increase of `weighted` with the maximum. It is 0 for an empty part, whose maximum is LOWEST.
  __device__ float weighted_increase(float row_max) const {
    return weights == 0 ? 0.0f : weights * (row_max - softmax.row_max);
  }
  __device__ void merge(Statistics other, float rate) {
    const float row_max = fmaxf(softmax.row_max, other.softmax.row_max);
    rescale(row_max, rate);
    other.rescale(row_max, rate);
    softmax.row_sum += other.softmax.row_sum;
    weighted += other.weighted;
    weights += other.weights;
    x_target += other.x_target;
  }
  __device__ void merge_lanes(float rate) {
#pragma unroll
    for (int mask = WARP / 2; mask > 0; mask /= 2) {
      Statistics other;
      other.softmax.row_max = shuffle_xor(softmax.row_max, mask);
      other.softmax.row_sum = shuffle_xor(softmax.row_sum, mask);
      other.weighted = shuffle_xor(weighted, mask);
      other.weights = shuffle_xor(weights, mask);
      other.x_target = shuffle_xor(x_target, mask);
      merge(other, rate);
    }
  }
};

constexpr int SLOTS = MAX_THREADS / WARP * sizeof(Statistics);  // bytes of shared memory: one Statistics per warp

// A barrier for all threads of the row, which `blocks` blocks of a cluster share.
__device__ inline void sync_row(int blocks) {
  if (blocks > 1)
    sync_cluster();
  else
    sync_block();
}

// Merges the statistics of all threads of the row. Every thread gets the result.
__device__ inline Statistics merge_row(Statistics mine, SharedAddress slots, int blocks, float rate) {
  constexpr int SLOT = sizeof(Statistics);
  mine.merge_lanes(rate);
  if (lane() == 0) store_shared(slots + SLOT * warp(), mine);
  sync_row(blocks);
  Statistics all;
  const int warps = threads() / WARP;
  for (int i = lane(); i < blocks * warps; i += WARP) {
    const SharedAddress slot = slots + SLOT * (i % warps);
    all.merge(blocks > 1 ? load_shared_of<Statistics>(i / warps, slot) : load_shared<Statistics>(slot), rate);
  }
  all.merge_lanes(rate);
  return all;
}

// ---- a row's target and loss ----

// The target of a row. It is checked before it is used as an index. If it is out of bounds, the loss and the gradient
// are NaN, because raising an error would need to synchronize with the GPU.
struct Target {
  bool counts, is_class;  // not ignored; within bounds
  int y = -1;             // the class, or -1
  float a = 0;

  __device__ Target(int64_t target, int columns, const LossTensors& tensors, const LossOptions& options)
      : counts(target != options.ignore_index), is_class(target >= 0 && target < columns) {
    if (!counts || !is_class) return;
    y = static_cast<int>(target);
    a = (1.0f - options.label_smoothing) * weight_of(tensors, y);
  }
};

// W, which only smoothing needs.
__device__ inline float sum_of_weights(const LossTensors& tensors, int columns) {
  return tensors.weight_sum ? load(tensors.weight_sum) : static_cast<float>(columns);
}

template <bool OPTIONS>
__device__ inline float loss_of(
    const Statistics& s, const Target& target, int columns, const LossTensors& tensors, const LossOptions& options) {
  if (!target.counts) return 0.0f;
  if (!target.is_class) return NAN;
  const float e = OPTIONS ? options.exponent_scale() : 1.0f;
  const float log_sum = logf(s.softmax.row_sum), lse = e * s.softmax.row_max + log_sum;
  float loss = target.a * (log_sum - e * (s.x_target - s.softmax.row_max));
  if (options.z_loss != 0.0f) loss += options.z_loss * lse * lse;
  if (OPTIONS && options.label_smoothing != 0.0f) {
    const float W = sum_of_weights(tensors, columns);
    const float smooth = fabsf(W) == INFINITY ? W : W * log_sum + e * s.weighted;
    loss += options.label_smoothing / static_cast<float>(columns) * smooth;
  }
  return loss;
}

// ---- a row's gradient ----

// dlogit_j = c_p exp(e (x_j - m)) - c_y [j = y] - c_w w_j
struct Gradient {
  float row_max, rate;  // m, e log2(e)
  float c_p = 0, c_y = 0, c_w = 0;
  int y;
  bool is_nonzero = false;  // otherwise all of it is 0, even if the logits are NaN

  // grad_lse: 0 if there is none. has_grad_lse: whether there is one.
  template <bool OPTIONS>
  __device__ static Gradient of(
      const Target& target,
      float row_max,
      float row_sum,
      float grad,
      float grad_lse,
      bool has_grad_lse,
      int columns,
      const LossTensors& tensors,
      const LossOptions& options) {
    const float e = OPTIONS ? options.exponent_scale() : 1.0f;
    Gradient g;
    g.row_max = row_max;
    g.rate = rate_of<OPTIONS>(options);
    g.y = target.y;
    g.is_nonzero = target.counts || has_grad_lse;
    g.c_p = grad_lse;
    if (target.counts) {
      if (!target.is_class) grad = NAN;
      g.c_y = grad * target.a;
      g.c_p += g.c_y;
      if (options.z_loss != 0.0f) g.c_p += grad * 2.0f * options.z_loss * (e * row_max + logf(row_sum));
      if (OPTIONS && options.label_smoothing != 0.0f) {
        g.c_w = grad * options.label_smoothing / static_cast<float>(columns);
        g.c_p += g.c_w * sum_of_weights(tensors, columns);
      }
    }
    g.c_p /= row_sum;
    if (OPTIONS) g.c_p *= options.logit_scale, g.c_y *= options.logit_scale, g.c_w *= options.logit_scale;
    return g;
  }

  // The gradient of N elements, starting at j, whose values are x.
  template <bool OPTIONS, typename T, int N>
  __device__ Vector<T, N> at(
      const Vector<float, N>& x, int j, const LossTensors& tensors, const LossOptions& options) const {
    Vector<T, N> out;
    float dx[N] = {};
    if (is_nonzero) {
#pragma unroll
      for (int k = 0; k < N; ++k) dx[k] = c_p * exp2_fast((x.at[k] - row_max) * rate);
      if (OPTIONS && c_w != 0.0f) {
#pragma unroll
        for (int k = 0; k < N; ++k) dx[k] -= c_w * weight_of(tensors, j + k);
      }
      if (static_cast<unsigned>(y - j) < static_cast<unsigned>(N)) {
#pragma unroll
        for (int k = 0; k < N; ++k) dx[k] -= k == y - j ? c_y : 0.0f;
      }
      if (OPTIONS && options.softcap != 0.0f) {
        const float inverse = 1.0f / options.softcap;
#pragma unroll
        for (int k = 0; k < N; ++k) dx[k] *= 1.0f - (x.at[k] * inverse) * (x.at[k] * inverse);
      }
    }
#pragma unroll
    for (int k = 0; k < N; ++k) out.at[k] = from_float<T>(dx[k]);
    return out;
  }
};

}  // namespace fastgpt
