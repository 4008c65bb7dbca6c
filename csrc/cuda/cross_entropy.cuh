// A row of cross-entropy, as the kernels of cross_entropy.cu take it: its 16-byte vectors, statistics and gradient.
//
//   x_j = logit_j, or softcap tanh(logit_j / softcap);   lse = log Σ_j exp x_j;   p_j = exp(x_j - lse)
//   w_j = class weights, or 1;   W = Σ_j w_j;   a = (1 - eps) w_y;   b = eps / V   (eps: label smoothing)
//
//   loss = a (lse - x_y) + b (W (lse - origin) - Σ_j w_j (x_j - origin)) + z lse²          0 for an ignored row
//   dx_j = grad_loss [(a + b W + 2 z lse) p_j - a [j = y] - b w_j] + grad_lse p_j
//          (with a softcap, times 1 - (x_j / softcap)²)
//
// lse is kept in float64 and x - lse taken in two steps, so that p keeps its digits where the logits are large; the
// loss takes log Σ_j exp(x_j - top) and x_y - top apart for the same reason, and the smoothing sum is of the distances
// from a number of the row, its origin, so that an offset common to the row does not drown it.
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

// Of some of a row's numbers: Σ exp(x - top) and Σ w (x - origin). Σ [j = y] x_y where the row is read in parts.
struct alignas(16) Statistics {
  Softmax<float> softmax;
  float smooth = 0, x_target = 0;

  __device__ static float exp(float x) { return exp2_fast(x * LOG2E_32); }

  template <int N>
  __device__ void add(const Vector<float, N>& x) {
    float top = x.at[0];
#pragma unroll
    for (int k = 1; k < N; ++k) top = fmaxf(top, x.at[k]);
    softmax.raise(fmaxf(softmax.top, top), exp);
    float sum = 0;
#pragma unroll
    for (int k = 0; k < N; ++k) sum += exp(x.at[k] - softmax.top);
    softmax.sum += sum;
  }
  template <int N>
  __device__ void add_smooth(const Vector<float, N>& x, float origin, int j, const LossTensors& tensors) {
#pragma unroll
    for (int k = 0; k < N; ++k) smooth += weight_of(tensors, j + k) * (x.at[k] - origin);
  }
  __device__ void join(const Statistics& other) {
    softmax.join(other.softmax, exp);
    smooth += other.smooth;
    x_target += other.x_target;
  }
  __device__ void join_lanes() {
#pragma unroll
    for (int mask = WARP / 2; mask > 0; mask /= 2) {
      Statistics other;
      other.softmax.top = shuffle_xor(softmax.top, mask);
      other.softmax.sum = shuffle_xor(softmax.sum, mask);
      other.smooth = shuffle_xor(smooth, mask);
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

__device__ inline double lse_of(const Statistics& s, float log_sum) {
  return static_cast<double>(s.softmax.top) + static_cast<double>(log_sum);
}

// A finite number to take differences from.
__device__ inline float origin_of(float x) { return fabsf(x) <= -LOWEST ? x : 0.0f; }

template <bool OPTIONS>
__device__ inline float loss_of(
    const Statistics& s,
    float log_sum,
    const Target& target,
    float origin,
    int columns,
    const LossTensors& tensors,
    const LossOptions& options) {
  if (!target.counts) return 0.0f;
  if (!target.is_class) return NAN;
  const double lse = lse_of(s, log_sum);
  const float high = static_cast<float>(lse);
  float loss = target.hard * (log_sum - (s.x_target - s.softmax.top)) + options.z_loss * high * high;
  if (OPTIONS && options.label_smoothing != 0.0f) {
    const float distance = static_cast<float>(lse - static_cast<double>(origin));
    loss += options.label_smoothing / static_cast<float>(columns) *
            (sum_of_weights(tensors, columns) * distance - s.smooth);
  }
  return loss;
}

// ---- a row's gradient ----

// dx_j = c_p p_j - c_y [j = y] - c_w w_j
struct Gradient {
  float high, low_2;  // lse in two parts, the lower one times log2(e)
  float c_p = 0, c_y = 0, c_w = 0;
  int y;
  bool any = false;  // else it is 0, even where the logits are NaN

  template <bool OPTIONS>
  __device__ static Gradient of(
      const Target& target,
      double lse,
      float grad,
      int columns,
      const LossTensors& tensors,
      const LossOptions& options) {
    Gradient g;
    g.high = static_cast<float>(lse);
    g.low_2 = static_cast<float>(lse - static_cast<double>(g.high)) * LOG2E_32;
    g.y = target.y;
    if (!target.counts) return g;
    g.any = true;
    if (!target.is_class) grad = NAN;
    g.c_y = grad * target.hard;
    g.c_p = g.c_y + grad * 2.0f * options.z_loss * g.high;
    if (OPTIONS && options.label_smoothing != 0.0f) {
      g.c_w = grad * options.label_smoothing / static_cast<float>(columns);
      g.c_p += g.c_w * sum_of_weights(tensors, columns);
    }
    return g;
  }

  __device__ void add_grad_lse(float grad) {
    c_p += grad;
    any = true;
  }

  // Of the elements from j on, whose values are x.
  template <bool OPTIONS, typename T, int N>
  __device__ Vector<T, N> at(
      const Vector<float, N>& x, int j, const LossTensors& tensors, const LossOptions& options) const {
    Vector<T, N> out;
    float dx[N] = {};
    if (any) {
#pragma unroll
      for (int k = 0; k < N; ++k) dx[k] = c_p * exp2_fast(fmaf(x.at[k] - high, LOG2E_32, -low_2));
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
