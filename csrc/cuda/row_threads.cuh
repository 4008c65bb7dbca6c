// The threads that share a row: sums over them, and float32 vectors of any width.
#pragma once

#include "tensors.cuh"

namespace fastgpt {

// Loads N neighbours as float32, at most 16 bytes per instruction.
template <int N, typename T>
__device__ inline Vector<float, N> load_floats(Global<T> p) {
  constexpr int MOST = 16 / sizeof(T), PART = N < MOST ? N : MOST;
  Vector<float, N> x;
#pragma unroll
  for (int part = 0; part < N; part += PART) {
    const auto v = load_vector<PART>(p + part);
#pragma unroll
    for (int k = 0; k < PART; ++k) x.at[part + k] = to_float(v.at[k]);
  }
  return x;
}
template <int N>
__device__ inline void add_floats(Global<float> p, const Vector<float, N>& more) {
  constexpr int PART = N < 4 ? N : 4;
#pragma unroll
  for (int part = 0; part < N; part += PART) {
    auto v = load_vector<PART>(p + part);
#pragma unroll
    for (int k = 0; k < PART; ++k) v.at[k] += more.at[part + k];
    store_vector(p + part, v);
  }
}

// The threads of a row: whole warps of a block.
struct RowThreads {
  int thread, threads, first_warp;  // this thread's index among them, their number, the first warp in the block
  int barrier;                      // the named barrier, or 0 if they are all threads of the block

  // Sums each x over the threads. `slots`: shared memory for COUNT numbers per warp.
  template <int COUNT>
  __device__ void sum(float (&x)[COUNT], SharedAddress slots) const {
#pragma unroll
    for (int c = 0; c < COUNT; ++c)
#pragma unroll
      for (int mask = WARP / 2; mask > 0; mask /= 2) x[c] += shuffle_xor(x[c], mask);
    if (threads == WARP) return;
    if (lane() == 0)
#pragma unroll
      for (int c = 0; c < COUNT; ++c) store_shared(slots + 4 * (COUNT * warp() + c), x[c]);
    sync_row();
#pragma unroll
    for (int c = 0; c < COUNT; ++c) {
      x[c] = 0;
      for (int w = 0; w < threads / WARP; ++w) x[c] += load_shared<float>(slots + 4 * (COUNT * (first_warp + w) + c));
    }
  }

  // A barrier for the threads of the row.
  __device__ void sync_row() const {
    if (barrier)
      sync_named(barrier, threads);
    else
      sync_block();
  }
};

constexpr int SLOTS = 4 * 32;  // bytes of shared memory: a float for each warp of a block

}  // namespace fastgpt
