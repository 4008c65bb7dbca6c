// LayerNorm of a sum, with the residual addition before it fused: forward and backward.
//
//   sum = x + residual, rounded to its dtype;   mean, var over the columns of that rounded sum
//   xhat = (sum - mean) rstd,   rstd = 1 / sqrt(var + eps);   normed = xhat weight + bias
//
//   g = grad_normed weight
//   dsum = rstd (g - mean_j g - xhat mean_j (g xhat)) + grad_sum
//   dweight = Σ_i grad_normed xhat,   dbias = Σ_i grad_normed
//
// Shapes: x, residual (rows, columns) contiguous; weight, bias (columns,) float32; mean (rows,) float64; rstd (rows,)
// float32. The arithmetic is float32.
//
// The statistics are those of the stored sum, so that the backward computes with the same values as the forward. A row
// with a large offset keeps its digits, with a pivot x_0 and m = x_0 + mean(sum - x_0), rounded:
//
//   mean = m + c,   c = mean(sum - m);   var = mean((sum - m)²) - c²;   xhat = ((sum - m) - c) rstd
//
// A constant row has m = x_0 and xhat = 0 exactly. The backward also computes sum - mean in two steps. The terms of the
// first sums are scaled by 2^-24, so that they cannot overflow.
//
// A row stays in registers for its statistics. A row of more than 16384 elements does not fit and is read again (more
// than 8192 in the backward). Bytes moved per element: forward two reads and two writes; backward three reads
// (grad_normed, grad_sum, sum) and one write. xhat is recomputed from sum, mean and rstd. dweight and dbias are summed
// in two stages without atomics: a fixed number of blocks sums strided rows, then PyTorch sums the partial sums.
#pragma once

#include "../formulas.h"
#include "norms.cuh"

namespace fastgpt {

// ---- forward ----

// X and R: the types of x and of the residual. T: the type of their sum. IN_REGISTERS: the row stays in registers;
// otherwise it is read again.
template <typename X, typename R, bool WIDE, bool IN_REGISTERS>
__global__ void __launch_bounds__(THREADS) add_layer_norm_fwd_kernel(
    Global<const X> x,
    Global<const R> residual,
    Global<const float> weight,
    Global<const float> bias,
    Global<X> normed,
    Global<X> sum,
    Global<double> mean,
    Global<float> rstd,
    int64_t rows,
    int columns,
    float eps,
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

  constexpr float PART = 0x1p-24f;
  float origin = 0.0f;  // x_0 · PART / 2
  if (columns > 0) {
    origin = to_float(load(x + start));
    if (residual) origin = to_float(from_float<T>(origin + to_float(load(residual + start))));
    origin *= 0.5f * PART;
  }
  float total[1] = {};
  const auto add_up = [&](const Vector<T, N>& v) {
#pragma unroll
    for (int k = 0; k < N; ++k) total[0] += fmaf(to_float(v.at[k]), 0.5f * PART, -origin);
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
          add_up(cached[part + h] = add(i, in[h]));
    }
  } else {
    for (int i = group.thread; i < vectors; i += row_threads) add_up(add(i, read(i)));
  }
  group.sum(total, shared_memory());
  const float part_of_row = 1.0f / (PART * static_cast<float>(columns));
  const float middle = 2.0f * fmaf(total[0], part_of_row, origin * (1.0f / PART));
  float moments[2] = {};  // of the deviations from `middle`
  for_vectors([&](int, const auto& v) {
#pragma unroll
    for (int k = 0; k < N; ++k) {
      const float d = to_float(v.at[k]) - middle;
      moments[0] += d * PART;
      moments[1] += d * d;
    }
  });
  group.sum(moments, shared_memory() + SLOTS);
  const float rest = moments[0] * part_of_row;
  const float variance = moments[1] / static_cast<float>(columns) - fminf(rest * rest, -LOWEST);
  const float scale = 1.0f / sqrtf((variance < 0.0f ? 0.0f : variance) + eps);
  if (group.thread == 0) {
    store(mean + row, static_cast<double>(middle) + static_cast<double>(rest));
    store(rstd + row, scale);
  }
  for_vectors([&](int i, auto v) {
    Vector<float, N> y;
#pragma unroll
    for (int k = 0; k < N; ++k) y.at[k] = (to_float(v.at[k]) - middle - rest) * scale;
    if (weight) {
      const Vector<float, N> w = load_floats<N>(weight + i * N);
#pragma unroll
      for (int k = 0; k < N; ++k) y.at[k] *= w.at[k];
    }
    if (bias) {
      const Vector<float, N> b = load_floats<N>(bias + i * N);
#pragma unroll
      for (int k = 0; k < N; ++k) y.at[k] += b.at[k];
    }
#pragma unroll
    for (int k = 0; k < N; ++k) v.at[k] = from_float<T>(y.at[k]);
    store_vector(normed + (start + i * N), v);
  });
}

// ---- backward ----

// A block processes one or several rows at a time, with a stride over all rows. It writes its sums of dweight and dbias
// to row block_x() of partial_weight and partial_bias (blocks, columns). A thread keeps ELEMENTS of each sum, and of
// the current row, in registers.
//
// ELEMENTS = 0: for rows that are too long. The sums accumulate in partial_weight and partial_bias, which must start as
// zeros; only one thread accesses each element. The row is read again. The block processes one row at a time.
template <typename T, bool WIDE, int ELEMENTS>
__global__ void __launch_bounds__(THREADS) add_layer_norm_bwd_kernel(
    Global<const T> grad,  // of normed
    Global<const T> grad_sum,
    Global<const T> sum,
    Global<const float> weight,
    Global<const double> mean,
    Global<const float> rstd,
    Global<T> dsum,
    Global<float> partial_weight,
    Global<float> partial_bias,
    int64_t rows,
    int columns,
    int row_threads) {
  constexpr int N = WIDTH<T, WIDE>, VECTORS = ELEMENTS > 0 ? ELEMENTS / N : 1;
  const int rows_per_block = threads() / row_threads, row_in_block = thread() / row_threads;
  const RowThreads group{
      thread() % row_threads,
      row_threads,
      row_in_block * (row_threads / WARP),
      rows_per_block > 1 ? row_in_block + 1 : 0};
  const int vectors = columns / N;
  const int64_t partial = int64_t{block_x()} * columns;
  const SharedAddress slots = shared_memory();

  struct Terms {
    Vector<float, N> xhat, g;  // g: grad_normed, until apply_weight multiplies it by the weight
    Vector<T, N> grad_sum;
  };
  const auto terms = [&](int64_t at, float mu, float low, float scale) {
    Terms t{load_floats<N>(sum + at), load_floats<N>(grad + at)};
    if (grad_sum) t.grad_sum = load_vector<N>(grad_sum + at);
#pragma unroll
    for (int k = 0; k < N; ++k) t.xhat.at[k] = (t.xhat.at[k] - mu - low) * scale;
    return t;
  };
  const auto apply_weight = [&](Terms& t, int i, float (&sums)[2]) {
    if (weight) {
      const Vector<float, N> w = load_floats<N>(weight + i * N);
#pragma unroll
      for (int k = 0; k < N; ++k) t.g.at[k] *= w.at[k];
    }
#pragma unroll
    for (int k = 0; k < N; ++k) {
      sums[0] += t.g.at[k];
      sums[1] += t.g.at[k] * t.xhat.at[k];
    }
  };
  const auto finish = [&](int64_t at, const Terms& t, float scale, const float (&means)[2]) {
    Vector<T, N> v;
#pragma unroll
    for (int k = 0; k < N; ++k) {
      const float d = (t.g.at[k] - means[0] - t.xhat.at[k] * means[1]) * scale;
      v.at[k] = from_float<T>(grad_sum ? d + to_float(t.grad_sum.at[k]) : d);
    }
    store_vector(dsum + at, v);
  };

  Vector<float, N> dweight[VECTORS] = {}, dbias[VECTORS] = {};
  // Two sets of slots alternate. When a set is written again, all threads have read it, because the barrier of the
  // other set is in between.
  int turn = 0;
  for (int64_t row = int64_t{block_x()} * rows_per_block + row_in_block; row < rows;
       row += int64_t{blocks_x()} * rows_per_block, turn ^= 1) {
    const int64_t start = row * columns;
    const double mean_of_row = load(mean + row);
    const float mu = static_cast<float>(mean_of_row), low = static_cast<float>(mean_of_row - static_cast<double>(mu));
    const float scale = load(rstd + row);
    float sums[2] = {};  // of g and g xhat; then their means
    const auto to_means = [&] {
      group.sum(sums, slots + turn * 2 * SLOTS);
      for (float& x : sums) x /= static_cast<float>(columns);
    };
    if constexpr (ELEMENTS > 0) {
      Terms cached[VECTORS];
#pragma unroll
      for (int h = 0; h < VECTORS; ++h)
        if (const int i = group.thread + h * row_threads; i < vectors) {
          cached[h] = terms(start + i * N, mu, low, scale);
#pragma unroll
          for (int k = 0; k < N; ++k) {
            dweight[h].at[k] += cached[h].g.at[k] * cached[h].xhat.at[k];
            dbias[h].at[k] += cached[h].g.at[k];
          }
          apply_weight(cached[h], i, sums);
        }
      to_means();
#pragma unroll
      for (int h = 0; h < VECTORS; ++h)
        if (const int i = group.thread + h * row_threads; i < vectors) finish(start + i * N, cached[h], scale, sums);
    } else {
#pragma unroll 1
      for (int i = group.thread; i < vectors; i += row_threads) {
        Terms t = terms(start + i * N, mu, low, scale);
        Vector<float, N> product;
#pragma unroll
        for (int k = 0; k < N; ++k) product.at[k] = t.g.at[k] * t.xhat.at[k];
        add_floats(partial_weight + (partial + i * N), product);
        add_floats(partial_bias + (partial + i * N), t.g);
        apply_weight(t, i, sums);
      }
      to_means();
#pragma unroll 1
      for (int i = group.thread; i < vectors; i += row_threads) {
        Terms t = terms(start + i * N, mu, low, scale);
        float known[2];
        apply_weight(t, i, known);
        finish(start + i * N, t, scale, sums);
      }
    }
  }
  if constexpr (ELEMENTS > 0) {
    // Adds up the sums of the rows of the block through shared memory (rows_per_block, elements of a thread,
    // row_threads), first dweight, then dbias.
    const int sums_per_row = VECTORS * N * row_threads;
    const auto add_up_rows = [&](const Vector<float, N>(&sums)[VECTORS], Global<float> to) {
      sync_block();
#pragma unroll
      for (int e = 0; e < VECTORS * N; ++e)
        store_shared(slots + 4 * (row_in_block * sums_per_row + e * row_threads + group.thread), sums[e / N].at[e % N]);
      sync_block();
      for (int i = thread(); i < sums_per_row; i += threads()) {
        const int e = i / row_threads, column = (i % row_threads + e / N * row_threads) * N + e % N;
        float total = 0;
        for (int t = 0; t < rows_per_block; ++t) total += load_shared<float>(slots + 4 * (t * sums_per_row + i));
        if (column < columns) store(to + (partial + column), total);
      }
    };
    add_up_rows(dweight, partial_weight);
    add_up_rows(dbias, partial_bias);
  }
}

}  // namespace fastgpt
