// Correct kernels, in which the emulator must not find a fault. test_simt.py computes the expected results in PyTorch.
// nvcc compiles them too, so that a GPU can be compared with the emulator (test_primitives_cuda.py).
#include "cases.h"

namespace fastgpt {
namespace {

__device__ SharedAddress place(int i) { return shared_memory() + 4 * i; }

// ---- through shared memory ----

// Writes the sum of a block to each of its threads.
__global__ void block_sum(In in, Out out) {
  const int64_t own = int64_t{block_x()} * threads() + thread();
  float sum = load(in + own);
  for (int mask = WARP / 2; mask; mask /= 2) sum += shuffle_xor(sum, mask);
  if (lane() == 0) store_shared(place(warp()), sum);
  sync_block();
  float total = 0;
  for (int w = 0; w < threads() / WARP; ++w) total += load_shared<float>(place(w));
  sync_block();
  if (lane() == 0) store_shared(place(warp()), total);  // all threads have read the sums
  sync_warp();
  store(out + own, load_shared<float>(place(warp())));
}

// Reversed within a warp.
__global__ void lanes_reversed(In in, Out out) {
  for (int turn = 0; turn < 3; ++turn) {
    store_shared(place(thread()), load(in + thread()));
    sync_warp();
    const float x = load_shared<float>(place(thread() ^ (WARP - 1)));
    sync_warp();
    if (turn == 2) store(out + thread(), x);
  }
}

// Half of the warps pass tiles to the other half through two stages. Only named barriers synchronize them: barrier 1 +
// s means that stage s is full, barrier 3 + s that it is empty.
__global__ void producers_and_consumers(In in, Out out) {
  const int half = threads() / 2, own = thread() % half;
  constexpr int TILES = 5;
  float sum = 0;
  for (int i = 0; i < TILES; ++i) {
    const int s = i % 2;
    if (thread() < half) {
      if (i >= 2) sync_named(3 + s, threads());
      store_shared(place(s * half + own), load(in + (i * half + own)));
      sync_named(1 + s, threads());
    } else {
      sync_named(1 + s, threads());
      sum += load_shared<float>(place(s * half + (own ^ 33)));
      if (i >= 1 && i + 1 < TILES) sync_named(3 + (1 - s), threads());  // the stage of the previous tile
    }
  }
  if (thread() >= half) store(out + own, sum);
}

// Sums tiles. The next tile is copied while the current one is summed.
__global__ void copies_in_two_stages(In in, Out out) {
  constexpr int TILES = 6;
  const auto fetch = [&](int i) {
    copy_async(place((i % 2) * 4 * threads() + 4 * thread()), in + (i * 4 * threads() + 4 * thread()), i != 3);
    commit_copies();
  };
  float sum = 0;
  fetch(0);
  for (int i = 0; i < TILES; ++i) {
    if (i + 1 < TILES)
      fetch(i + 1);
    else
      commit_copies();
    wait_copies<1>();
    sync_block();
    for (int k = 0; k < 4; ++k)
      sum += load_shared<float>(place((i % 2) * 4 * threads() + k * threads() + (thread() ^ 35)));
    sync_block();
  }
  store(out + thread(), sum);
}

// Writes the sum of a cluster to each of its threads.
__global__ void cluster_sum(In in, Out out) {
  const int64_t own = int64_t{block_x()} * threads() + thread();
  store_shared(place(thread()), load(in + own));
  sync_cluster();
  float sum = 0;
  for (int rank = 0; rank < 4; ++rank)
    for (int i = 0; i < threads(); ++i) sum += load_shared_of<float>(rank, place(i));
  sync_cluster();
  store(out + own, sum);
}

__global__ void everybody_adds(In in, Out out) {
  atomic_add(out + thread() % 4, load(in + (block_x() * threads() + thread())));
}

__global__ void any(In in, Out out) { store(out + thread(), any_lane(load(in + thread()) > 2.0f) ? 1.0f : 0.0f); }

// The order in which the warps continue after a barrier.
__device__ int turn = 0;
__global__ void order(In, Out out) {
  sync_block();
  if (lane() == 0) store(out + warp(), static_cast<float>(turn++ % (threads() / WARP)));
}

// ---- tensor cores: c (16×16) = a (16×16) b (16×16); the input is a, then b ----

__device__ void store_product(Out out, int right, const float (&c)[4]) {
  const int group = lane() / 4, pair = lane() % 4 * 2;
  for (int i = 0; i < 4; ++i) store(out + ((group + 8 * (i / 2)) * 16 + right + pair + i % 2), c[i]);
}

// Loads the factors from shared memory. TRANSPOSED: b is stored with k down its columns.
template <typename T, bool TRANSPOSED>
__global__ void product(In in, Out out) {
  for (int i = lane(); i < 256; i += WARP) {
    const int row = i / 16, column = i % 16;
    store_shared(shared_memory() + 2 * i, from_float<T>(load(in + i)));
    store_shared(shared_memory() + 512 + 2 * (TRANSPOSED ? i : column * 16 + row), from_float<T>(load(in + (256 + i))));
  }
  sync_warp();
  uint32_t a[4], b[4];
  load_matrices(a, shared_memory() + lane() % 16 * 32 + lane() / 16 * 16);
  if (TRANSPOSED)
    load_matrices_transposed(b, shared_memory() + 512 + lane() % 16 * 32 + lane() / 16 * 16);
  else
    load_matrices(b, shared_memory() + 512 + (lane() % 8 + lane() / 16 * 8) * 32 + lane() / 8 % 2 * 16);
  for (int n = 0; n < 2; ++n) {
    float c[4] = {};
    multiply_add<T>(c, a, b[2 * n], b[2 * n + 1]);
    store_product(out, 8 * n, c);
  }
}

// Builds the factors as the figures of the PTX ISA define them for lane 4 g + t.
template <typename T>
__global__ void product_by_figures(In in, Out out) {
  const int g = lane() / 4, t = lane() % 4;
  const auto a = [&](int row, int k) { return load(in + (row * 16 + k)); };
  for (int n = 0; n < 16; n += 8) {
    const auto b = [&](int k) { return load(in + (256 + k * 16 + n + g)); };
    float c[4] = {};
    if constexpr (sizeof(T) == 2) {
      uint32_t left[4];
      for (int i = 0; i < 4; ++i) {
        const int row = g + 8 * (i % 2), k = 2 * t + 8 * (i / 2);
        left[i] = pack<T>(a(row, k), a(row, k + 1));
      }
      multiply_add<T>(c, left, pack<T>(b(2 * t), b(2 * t + 1)), pack<T>(b(2 * t + 8), b(2 * t + 9)));
    } else {
      for (int k = 0; k < 16; k += 8) {
        const uint32_t left[4] = {
            bits_of(a(g, k + t)), bits_of(a(g + 8, k + t)), bits_of(a(g, k + t + 4)), bits_of(a(g + 8, k + t + 4))};
        multiply_add_tf32(c, left, bits_of(b(k + t)), bits_of(b(k + t + 4)));
      }
    }
    store_product(out, n, c);
  }
}

const Case CASES[] = {
    {"block sum", {.x = 3, .threads = 128, .shared = 16}, run<block_sum>},
    {"lanes reversed", {.threads = 64, .shared = 256}, run<lanes_reversed>},
    {"producers and consumers", {.threads = 128, .shared = 512}, run<producers_and_consumers>},
    {"copies in two stages", {.threads = 64, .shared = 2048}, run<copies_in_two_stages>},
    {"cluster sum", {.x = 8, .threads = 64, .shared = 256, .cluster = 4}, run<cluster_sum>},
    {"everybody adds", {.x = 3, .threads = 64}, run<everybody_adds>},
    {"any", {.threads = 96}, run<any>},
    {"order", {.threads = 512}, run<order>},
    {"product bf16 down", {.threads = 32, .shared = 1024}, run<product<bf16, true>>},
    {"product bf16", {.threads = 32, .shared = 1024}, run<product<bf16, false>>},
    {"product fp16 down", {.threads = 32, .shared = 1024}, run<product<fp16, true>>},
    {"product fp16", {.threads = 32, .shared = 1024}, run<product<fp16, false>>},
    {"product bf16 by figures", {.threads = 32}, run<product_by_figures<bf16>>},
    {"product fp16 by figures", {.threads = 32}, run<product_by_figures<fp16>>},
    {"product tf32 by figures", {.threads = 32}, run<product_by_figures<float>>},
};

}  // namespace
}  // namespace fastgpt

FASTGPT_EXPORTED const char* simt_sound(
    const char* name, const float* in, int64_t in_size, float* out, int64_t out_size) {
  return fastgpt::run_case(fastgpt::CASES, name, in, in_size, out, out_size);
}
