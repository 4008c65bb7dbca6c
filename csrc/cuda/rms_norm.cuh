// RMSNorm, alone and with the residual addition before it: forward and backward.
//
//   sum = x + residual, rounded to its dtype;   n = sum rstd,   rstd = 1 / sqrt(mean(sum²) + eps)
//   normed = n w,   w = offset + weight
//
//   g = grad_normed w
//   dsum = rstd (g - n mean_j (g n)) + grad_sum
//   dweight = Σ_i grad_normed n
//
// Shapes: x, residual (rows, columns) contiguous; weight (columns,) float32; rstd (rows,) float32. The arithmetic is
// float32.
//
// The statistic is that of the stored sum, so that the backward computes with the same values as the forward. If the
// sum of squares overflows, it is computed again for sum 2^-80, and rstd is 2^-80 / sqrt(mean).
//
// A row stays in registers for its statistic. A row of more than 16384 elements does not fit and is read again (more
// than 8192 in the backward). Bytes moved per element: forward two reads and two writes (one of each without a
// residual); backward three reads (grad_normed, grad_sum, sum) and one write. n is recomputed from sum and rstd.
// dweight is summed in two stages without atomics: a fixed number of blocks sums strided rows, then PyTorch sums the
// partial sums.
#pragma once

#include "../formulas.h"
#include "norms.cuh"

namespace fastgpt {

// ---- forward ----

// X and R: the types of x and of the residual. T: the type of their sum. IN_REGISTERS: the row stays in registers;
// otherwise it is read again.
template <typename X, typename R, bool WIDE, bool IN_REGISTERS>
__global__ void __launch_bounds__(THREADS) rms_norm_fwd_kernel(
    Global<const X> x,
    Global<const R> residual,
    Global<const float> weight,
    Global<X> normed,
    Global<X> sum,
    Global<float> rstd,
    int64_t rows,
    int columns,
    float eps,
    float offset,
    int row_threads) {
  using T = X;
  constexpr int N = WIDTH<T, WIDE>, VECTORS = IN_REGISTERS ? FWD_ELEMENTS / N : 1;
  const int rows_per_block = threads() / row_threads;
  const RowThreads group{thread() % row_threads, row_threads, thread() / row_threads * (row_threads / WARP), 0};
  const int64_t row = int64_t{block_x()} * rows_per_block + thread() / row_threads;
  if (row >= rows) return;  // only if a row has a single warp, so no barrier waits for these threads
  const int64_t start = row * columns;
  const int vectors = columns / N;

  // The sum as stored: first computed from x and the residual, later taken from registers or memory.
  struct Inputs {
    Vector<T, N> x;
    Vector<R, N> residual;
  };
  const auto read = [&](int i) {
    Inputs in{load_vector<N>(x + (start + i * N))};
    if (residual) in.residual = load_vector<N>(residual + (start + i * N));
    return in;
  };
  const auto add = [&](int i, Inputs in) {
    if (residual) {
#pragma unroll
      for (int k = 0; k < N; ++k) in.x.at[k] = from_float<T>(to_float(in.x.at[k]) + to_float(in.residual.at[k]));
      store_vector(sum + (start + i * N), in.x);
    }
    return in.x;
  };
  Vector<T, N> cached[VECTORS];
  // Calls f(i, vector) for each vector of this thread.
  const auto for_vectors = [&](auto&& f) {
    if constexpr (IN_REGISTERS) {
#pragma unroll
      for (int h = 0; h < VECTORS; ++h)
        if (const int i = group.thread + h * row_threads; i < vectors) f(i, cached[h]);
    } else {
      const Global<const T> stored = residual ? Global<const T>(sum) : x;
      for (int i = group.thread; i < vectors; i += row_threads) f(i, load_vector<N>(stored + (start + i * N)));
    }
  };

  float squares[1] = {};
  const auto add_up = [&](const Vector<T, N>& v, float factor) {
#pragma unroll
    for (int k = 0; k < N; ++k) {
      const float z = to_float(v.at[k]) * factor;
      squares[0] += z * z;
    }
  };
  if constexpr (IN_REGISTERS) {
    // Half of the loads are issued before the first sum is stored: 64 KiB per multiprocessor. All of them would not fit
    // into registers.
    constexpr int AHEAD = VECTORS / 2;
#pragma unroll
    for (int part = 0; part < VECTORS; part += AHEAD) {
      Inputs in[AHEAD];
#pragma unroll
      for (int h = 0; h < AHEAD; ++h)
        if (const int i = group.thread + (part + h) * row_threads; i < vectors) in[h] = read(i);
#pragma unroll
      for (int h = 0; h < AHEAD; ++h)
        if (const int i = group.thread + (part + h) * row_threads; i < vectors)
          add_up(cached[part + h] = add(i, in[h]), 1.0f);
    }
  } else {
    for (int i = group.thread; i < vectors; i += row_threads) add_up(add(i, read(i)), 1.0f);
  }
  group.sum(squares, shared_memory());
  float factor = 1.0f;
  if (squares[0] > -LOWEST) {  // the same in all threads of the row
    factor = 0x1p-80f;
    squares[0] = 0.0f;
    for_vectors([&](int, const auto& v) { add_up(v, factor); });
    group.sum(squares, shared_memory() + SLOTS);
  }
  const float scale = factor / sqrtf(squares[0] / static_cast<float>(columns) + eps * factor * factor);
  if (group.thread == 0) store(rstd + row, scale);
  for_vectors([&](int i, auto v) {
    Vector<float, N> y;
#pragma unroll
    for (int k = 0; k < N; ++k) y.at[k] = to_float(v.at[k]) * scale;
    if (weight) {
      const Vector<float, N> w = load_floats<N>(weight + i * N);
#pragma unroll
      for (int k = 0; k < N; ++k) y.at[k] *= offset + w.at[k];
    }
#pragma unroll
    for (int k = 0; k < N; ++k) v.at[k] = from_float<T>(y.at[k]);
    store_vector(normed + (start + i * N), v);
  });
}

// ---- backward ----

// A block processes one or several rows at a time, with a stride over all rows. It writes its sums of dweight to row
// block_x() of partial (blocks, columns), if there is a weight. A thread keeps ELEMENTS of the sum, and of the current
// row, in registers.
//
// ELEMENTS = 0: for rows that are too long. The sums accumulate in partial, which must start as zeros; only one thread
// accesses each element. The row is read again. The block processes one row at a time.
template <typename T, bool WIDE, int ELEMENTS>
__global__ void __launch_bounds__(THREADS) rms_norm_bwd_kernel(
    Global<const T> grad,  // of normed
    Global<const T> grad_sum,
    Global<const T> sum,
    Global<const float> weight,
    Global<const float> rstd,
    Global<T> dsum,
    Global<float> partial,
    int64_t rows,
    int columns,
    float offset,
    int row_threads) {
  constexpr int N = WIDTH<T, WIDE>, VECTORS = ELEMENTS > 0 ? ELEMENTS / N : 1;
  const int rows_per_block = threads() / row_threads, row_in_block = thread() / row_threads;
  const RowThreads group{
      thread() % row_threads,
      row_threads,
      row_in_block * (row_threads / WARP),
      rows_per_block > 1 ? row_in_block + 1 : 0};
  const int vectors = columns / N;
  const int64_t of_block = int64_t{block_x()} * columns;
  const SharedAddress slots = shared_memory();

  struct Terms {
    Vector<float, N> n, g;  // g: grad_normed, until apply_weight multiplies it by the weight
    Vector<T, N> grad_sum;
  };
  const auto terms = [&](int64_t at, float scale) {
    Terms t{load_floats<N>(sum + at), load_floats<N>(grad + at)};
    if (grad_sum) t.grad_sum = load_vector<N>(grad_sum + at);
#pragma unroll
    for (int k = 0; k < N; ++k) t.n.at[k] *= scale;
    return t;
  };
  const auto apply_weight = [&](Terms& t, int i, float (&products)[1]) {
    if (weight) {
      const Vector<float, N> w = load_floats<N>(weight + i * N);
#pragma unroll
      for (int k = 0; k < N; ++k) t.g.at[k] *= offset + w.at[k];
    }
#pragma unroll
    for (int k = 0; k < N; ++k) products[0] += t.g.at[k] * t.n.at[k];
  };
  const auto finish = [&](int64_t at, const Terms& t, float scale, float mean) {
    Vector<T, N> v;
#pragma unroll
    for (int k = 0; k < N; ++k) {
      const float d = (t.g.at[k] - t.n.at[k] * mean) * scale;
      v.at[k] = from_float<T>(grad_sum ? d + to_float(t.grad_sum.at[k]) : d);
    }
    store_vector(dsum + at, v);
  };

  Vector<float, N> dweight[VECTORS] = {};
  // Two sets of slots alternate. When a set is written again, all threads have read it, because the barrier of the
  // other set is in between.
  int turn = 0;
  for (int64_t row = int64_t{block_x()} * rows_per_block + row_in_block; row < rows;
       row += int64_t{blocks_x()} * rows_per_block, turn ^= 1) {
    const int64_t start = row * columns;
    const float scale = load(rstd + row);
    float products[1] = {};  // of g and n; then their mean
    const auto to_mean = [&] {
      group.sum(products, slots + turn * SLOTS);
      products[0] /= static_cast<float>(columns);
    };
    if constexpr (ELEMENTS > 0) {
      Terms cached[VECTORS];
#pragma unroll
      for (int h = 0; h < VECTORS; ++h)
        if (const int i = group.thread + h * row_threads; i < vectors) {
          cached[h] = terms(start + i * N, scale);
#pragma unroll
          for (int k = 0; k < N; ++k) dweight[h].at[k] += cached[h].g.at[k] * cached[h].n.at[k];
          apply_weight(cached[h], i, products);
        }
      to_mean();
#pragma unroll
      for (int h = 0; h < VECTORS; ++h)
        if (const int i = group.thread + h * row_threads; i < vectors)
          finish(start + i * N, cached[h], scale, products[0]);
    } else {
#pragma unroll 1
      for (int i = group.thread; i < vectors; i += row_threads) {
        Terms t = terms(start + i * N, scale);
        if (weight) {
          Vector<float, N> product;
#pragma unroll
          for (int k = 0; k < N; ++k) product.at[k] = t.g.at[k] * t.n.at[k];
          add_floats(partial + (of_block + i * N), product);
        }
        apply_weight(t, i, products);
      }
      to_mean();
#pragma unroll 1
      for (int i = group.thread; i < vectors; i += row_threads) {
        Terms t = terms(start + i * N, scale);
        float known[1];
        apply_weight(t, i, known);
        finish(start + i * N, t, scale, products[0]);
      }
    }
  }
  if constexpr (ELEMENTS > 0) {
    if (!weight) return;
    // Adds up the sums of the rows of the block through shared memory (rows_per_block, elements of a thread,
    // row_threads).
    const int sums_per_row = VECTORS * N * row_threads;
    sync_block();
#pragma unroll
    for (int e = 0; e < VECTORS * N; ++e)
      store_shared(
          slots + 4 * (row_in_block * sums_per_row + e * row_threads + group.thread), dweight[e / N].at[e % N]);
    sync_block();
    for (int i = thread(); i < sums_per_row; i += threads()) {
      const int e = i / row_threads, column = (i % row_threads + e / N * row_threads) * N + e % N;
      float total = 0;
      for (int t = 0; t < rows_per_block; ++t) total += load_shared<float>(slots + 4 * (t * sums_per_row + i));
      if (column < columns) store(partial + (of_block + column), total);
    }
  }
}

}  // namespace fastgpt
