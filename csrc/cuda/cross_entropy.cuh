// A row of cross-entropy, as the kernels of cross_entropy.cu take it: its 16-byte vectors, statistics and gradient.
//
//   x_j = logit_j, or softcap tanh(logit_j / softcap)
//   m = max_j x_j;   s = Σ_j exp(x_j - m);   lse = m + log s;   p_j = exp(x_j - m) / s
//   w_j = class weights, or 1;   W = Σ_j w_j;   a = (1 - eps) w_y;   b = eps / V   (eps: label smoothing)
//
//   loss = a (log s + m - x_y) + b (W log s + Σ_j w_j (m - x_j)) + z lse²                  0 for an ignored row
//   dx_j = grad_loss [(a + b W + 2 z lse) p_j - a [j = y] - b w_j] + grad_lse p_j
//          (with a softcap, times 1 - (x_j / softcap)²)
//
// m and s are two numbers, here and in what is saved for the backward, because in their sum lse, log s would be lost
// beside a large m. All terms of Σ_j w_j (m - x_j) have one sign, so that none cancels. What an option of 0 switches
// off is not computed: a class weight may be infinite, and 0 inf is NaN.
#pragma once

#include "../formulas.h"
#include "tensors.cuh"

namespace fastgpt {

constexpr int ROW_THREADS = 512;  // of a block, at most
constexpr float LOG2E_32 = static_cast<float>(LOG2E);

struct LossOptions {
  int64_t ignore_index;
  float label_smoothing, z_loss, softcap;
};

// The loss' tensors beside the logits. weight_sum is W, where there are weights and smoothing.
struct LossTensors {
  Global<const int64_t> target;
  Global<const float> weight, weight_sum;
};

// ---- a row's elements ----
//
// Rows of an odd length (V = 50257) start at odd addresses, where 16 bytes cannot be moved at once. So a row is its
// whole aligned vectors of N elements, and up to 2 (N - 1) edges before and behind them, one for a thread.

template <int N>
struct Row {
  int head, vectors, edges;

  template <typename T>
  __device__ Row(Global<T> row, int columns) {
    const int past = static_cast<int>(address(row) / sizeof(T) % N);
    head = past ? N - past : 0;
    head = head < columns ? head : columns;
    vectors = (columns - head) / N;
    edges = columns - vectors * N;
  }
  __device__ int vector(int i) const { return head + i * N; }
  __device__ int edge(int e) const { return e < head ? e : e + vectors * N; }
};

// Calls f(j, vector) for this thread's elements from j on; COUNT vectors are on their way at once.
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

// Their values in float32. OPTIONS: there may be a softcap, smoothing or both.
template <bool OPTIONS, typename T, int N>
__device__ inline Vector<float, N> values(const Vector<T, N>& v, const LossOptions& options) {
  Vector<float, N> x;
#pragma unroll
  for (int k = 0; k < N; ++k) x.at[k] = to_float(v.at[k]);
  if (OPTIONS && options.softcap != 0.0f) {
    const float inverse = 1.0f / options.softcap;
#pragma unroll
    for (int k = 0; k < N; ++k) x.at[k] = options.softcap * tanh_of<Fast>(x.at[k] * inverse);
  }
  return x;
}

__device__ inline float weight_of(const LossTensors& tensors, int j) {
  return tensors.weight ? load(tensors.weight + j) : 1.0f;
}

// ---- statistics ----

// Of some of a row's numbers: their maximum, top, Σ exp(x - top), Σ w (top - x) and Σ w. Σ [j = y] x_y where the row is
// read in parts.
struct alignas(16) Statistics {
  Softmax<float> softmax;
  float smooth = 0, weights = 0, x_target = 0;

  __device__ static float exp(float x) { return exp2_fast(x * LOG2E_32); }

  template <int N>
  __device__ void add(const Vector<float, N>& x) {
    float top = x.at[0];
#pragma unroll
    for (int k = 1; k < N; ++k) top = fmaxf(top, x.at[k]);
    raise(fmaxf(softmax.top, top));
    float sum = 0;
#pragma unroll
    for (int k = 0; k < N; ++k) sum += exp(x.at[k] - softmax.top);
    softmax.sum += sum;
  }
  // After `add` of the same numbers.
  template <int N>
  __device__ void add_smooth(const Vector<float, N>& x, int j, const LossTensors& tensors) {
#pragma unroll
    for (int k = 0; k < N; ++k) {
      const float w = weight_of(tensors, j + k);
      smooth += w * (softmax.top - x.at[k]);
      weights += w;
    }
  }
  __device__ void raise(float top) {
    smooth += raised(top);
    softmax.raise(top, exp);
  }
  // What `smooth` grows by with the maximum; 0 where there is no number yet, whose maximum is LOWEST.
  __device__ float raised(float top) const { return weights == 0 ? 0.0f : weights * (top - softmax.top); }
  __device__ void join(Statistics other) {
    const float top = fmaxf(softmax.top, other.softmax.top);
    raise(top);
    other.raise(top);
    softmax.sum += other.softmax.sum;
    smooth += other.smooth;
    weights += other.weights;
    x_target += other.x_target;
  }
  __device__ void join_lanes() {
#pragma unroll
    for (int mask = WARP / 2; mask > 0; mask /= 2) {
      Statistics other;
      other.softmax.top = shuffle_xor(softmax.top, mask);
      other.softmax.sum = shuffle_xor(softmax.sum, mask);
      other.smooth = shuffle_xor(smooth, mask);
      other.weights = shuffle_xor(weights, mask);
      other.x_target = shuffle_xor(x_target, mask);
      join(other);
    }
  }
};

constexpr int SLOTS = ROW_THREADS / WARP * sizeof(Statistics);  // bytes of shared memory: a warp's statistics each

// Until all threads of the row's blocks are here; what they wrote to shared memory is then seen.
__device__ inline void meet(int blocks) {
  if (blocks > 1)
    sync_cluster();
  else
    sync_block();
}

// All threads get the statistics of the row, which `blocks` blocks of a cluster have read.
__device__ inline Statistics join_row(Statistics mine, SharedAddress slots, int blocks) {
  constexpr int SLOT = sizeof(Statistics);
  mine.join_lanes();
  if (lane() == 0) store_shared(slots + SLOT * warp(), mine);
  meet(blocks);
  Statistics all;
  const int warps = threads() / WARP;
  for (int i = lane(); i < blocks * warps; i += WARP) {
    const SharedAddress slot = slots + SLOT * (i % warps);
    all.join(blocks > 1 ? load_shared_of<Statistics>(i / warps, slot) : load_shared<Statistics>(slot));
  }
  all.join_lanes();
  return all;
}

// ---- a row's target and loss ----

// What the row's target says, checked before anything is read through it. The loss and the gradient of a target that is
// no class are NaN: an error would have to wait for the GPU.
struct Target {
  bool counts, is_class;
  int y = -1;      // the class, if it counts
  float hard = 0;  // a

  __device__ Target(int64_t target, int columns, const LossTensors& tensors, const LossOptions& options)
      : counts(target != options.ignore_index), is_class(target >= 0 && target < columns) {
    if (!counts || !is_class) return;
    y = static_cast<int>(target);
    hard = (1.0f - options.label_smoothing) * weight_of(tensors, y);
  }
};

// W, which only smoothing asks for.
__device__ inline float sum_of_weights(const LossTensors& tensors, int columns) {
  return tensors.weight_sum ? load(tensors.weight_sum) : static_cast<float>(columns);
}

template <bool OPTIONS>
__device__ inline float loss_of(
    const Statistics& s, const Target& target, int columns, const LossTensors& tensors, const LossOptions& options) {
  if (!target.counts) return 0.0f;
  if (!target.is_class) return NAN;
  const float log_sum = logf(s.softmax.sum), lse = s.softmax.top + log_sum;
  float loss = target.hard * (log_sum - (s.x_target - s.softmax.top));
  if (options.z_loss != 0.0f) loss += options.z_loss * lse * lse;
  if (OPTIONS && options.label_smoothing != 0.0f) {
    const float total = sum_of_weights(tensors, columns);
    loss += options.label_smoothing / static_cast<float>(columns) *
            (fabsf(total) == INFINITY ? total : total * log_sum + s.smooth);
  }
  return loss;
}

// ---- a row's gradient ----

// dx_j = c_p exp(x_j - m) - c_y [j = y] - c_w w_j
struct Gradient {
  float top;  // m
  float c_p = 0, c_y = 0, c_w = 0;
  int y;
  bool any = false;  // else it is 0, even where the logits are NaN

  // grad_lse: 0 where there is none, which `any_lse` says.
  template <bool OPTIONS>
  __device__ static Gradient of(
      const Target& target,
      float top,
      float sum,
      float grad,
      float grad_lse,
      bool any_lse,
      int columns,
      const LossTensors& tensors,
      const LossOptions& options) {
    Gradient g;
    g.top = top;
    g.y = target.y;
    g.any = target.counts || any_lse;
    g.c_p = grad_lse;
    if (target.counts) {
      if (!target.is_class) grad = NAN;
      g.c_y = grad * target.hard;
      g.c_p += g.c_y;
      if (options.z_loss != 0.0f) g.c_p += grad * 2.0f * options.z_loss * (top + logf(sum));
      if (OPTIONS && options.label_smoothing != 0.0f) {
        g.c_w = grad * options.label_smoothing / static_cast<float>(columns);
        g.c_p += g.c_w * sum_of_weights(tensors, columns);
      }
    }
    g.c_p /= sum;
    return g;
  }

  // Of the elements from j on, whose values are x.
  template <bool OPTIONS, typename T, int N>
  __device__ Vector<T, N> at(
      const Vector<float, N>& x, int j, const LossTensors& tensors, const LossOptions& options) const {
    Vector<T, N> out;
    float dx[N] = {};
    if (any) {
#pragma unroll
      for (int k = 0; k < N; ++k) dx[k] = c_p * exp2_fast((x.at[k] - top) * LOG2E_32);
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
