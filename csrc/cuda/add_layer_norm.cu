// LayerNorm of a sum, the residual connection in front of it included.
//
//   sum = x + residual, rounded to its dtype;   mean, var over D of that rounded value
//   xhat = (sum - mean) rstd,   rstd = 1 / sqrt(var + eps);   normed = xhat weight + bias
//
//   g = grad_normed weight
//   dsum = rstd (g - mean_j g - xhat mean_j (g xhat)) + grad_sum
//   dweight = Σ_i grad_normed xhat,   dbias = Σ_i grad_normed
//
// Shapes: x, residual (N, D) contiguous, weight, bias (D,) float32, mean (N,) float64. The arithmetic is float32. The
// statistics are of the value that is stored, so that the backward sees what the forward saw. Rows with a large offset
// keep their digits: with a pivot x_0 and m = x_0 + mean(sum - x_0), rounded,
//
//   mean = m + c,   c = mean(sum - m);   var = mean((sum - m)²) - c²;   xhat = ((sum - m) - c) rstd
//
// A constant row has m = x_0 and xhat = 0 exactly. sum - mean is taken in two steps in the backward, too. The first
// sums are of 2^-24 of their terms, so that they cannot overflow. A row stays in registers for the statistics. A row of
// more than 16384 elements does not, and is read again (8192 in the backward). Bytes moved per element: forward two
// reads, two writes; backward three reads (grad_normed, grad_sum, sum), one write. xhat is recomputed from sum, mean
// and rstd. dweight and dbias are summed in two stages without atomics: a fixed set of blocks sums strided rows,
// PyTorch sums the partial sums.
#include "../formulas.h"
#include "checks.cuh"
#include "team.cuh"
#include "tensors.cuh"

namespace fastgpt {
namespace {

constexpr int THREADS = 512;                        // of a block, at most
constexpr int FWD_ELEMENTS = 32, BWD_ELEMENTS = 8;  // a thread's of a row, in registers; backward, also twice that
constexpr int FWD_WARPS = 4, BWD_WARPS = 12;        // of a block, where a row needs fewer: then it has several rows
constexpr int PARTIALS = 256;  // backward blocks: about what the GPU holds, and no more, as each leaves partial sums

// Elements in a vector: 16 bytes of the sum, or one element where rows do not begin at multiples of that.
template <typename T, bool WIDE>
constexpr int WIDTH = WIDE ? 16 / sizeof(T) : 1;

// ---- forward ----

// X and R: the types of x and of the residual, T of their sum. IN_REGISTERS: else the row is read again.
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
  constexpr int N = WIDTH<T, WIDE>, HELD = IN_REGISTERS ? FWD_ELEMENTS / N : 1;
  const int teams = threads() / row_threads;
  const Team team{thread() % row_threads, row_threads, thread() / row_threads * (row_threads / WARP), 0};
  const int64_t row = int64_t{block_x()} * teams + thread() / row_threads;
  if (row >= rows) return;  // a warp of its own
  const int64_t start = row * columns;
  const int vectors = columns / N;

  // The sum as it is stored: from x and the residual, later from registers or from memory.
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
  Vector<T, N> held[HELD];
  // Calls f(i, vector) for this thread's vectors.
  const auto over = [&](auto&& f) {
    if constexpr (IN_REGISTERS) {
#pragma unroll
      for (int h = 0; h < HELD; ++h)
        if (const int i = team.thread + h * row_threads; i < vectors) f(i, held[h]);
    } else {
      const Global<const T> stored = residual ? Global<const T>(sum) : x;
      for (int i = team.thread; i < vectors; i += row_threads) f(i, load_vector<N>(stored + (start + i * N)));
    }
  };

  constexpr float PART = 0x1p-24f;
  float origin = 0.0f;  // x_0 PART / 2
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
    // Half of them on their way before the first sum is stored, 64 KiB of a multiprocessor; all have no registers.
    constexpr int AHEAD = HELD / 2;
#pragma unroll
    for (int part = 0; part < HELD; part += AHEAD) {
      Inputs in[AHEAD];
#pragma unroll
      for (int h = 0; h < AHEAD; ++h)
        if (const int i = team.thread + (part + h) * row_threads; i < vectors) in[h] = read(i);
#pragma unroll
      for (int h = 0; h < AHEAD; ++h)
        if (const int i = team.thread + (part + h) * row_threads; i < vectors) add_up(held[part + h] = add(i, in[h]));
    }
  } else {
    for (int i = team.thread; i < vectors; i += row_threads) add_up(add(i, read(i)));
  }
  team.sum(total, shared_memory());
  const float part_of_row = 1.0f / (PART * static_cast<float>(columns));
  const float middle = 2.0f * fmaf(total[0], part_of_row, origin * (1.0f / PART));
  float moments[2] = {};  // of the deviations from it
  over([&](int, const auto& v) {
#pragma unroll
    for (int k = 0; k < N; ++k) {
      const float d = to_float(v.at[k]) - middle;
      moments[0] += d * PART;
      moments[1] += d * d;
    }
  });
  team.sum(moments, shared_memory() + SLOTS);
  const float rest = moments[0] * part_of_row;
  const float variance = moments[1] / static_cast<float>(columns) - fminf(rest * rest, -LOWEST);
  const float scale = 1.0f / sqrtf((variance < 0.0f ? 0.0f : variance) + eps);
  if (team.thread == 0) {
    store(mean + row, static_cast<double>(middle) + static_cast<double>(rest));
    store(rstd + row, scale);
  }
  over([&](int i, auto v) {
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

// A block has several teams, each with every so-many-th row. The block's sums of dweight and dbias go to row block_x()
// of partial_weight and partial_bias (blocks, D). They stay in registers until the end, ELEMENTS of each a thread, as
// the row does for its turn. ELEMENTS = 0: they grow in that memory, which begins as 0, each element in one thread's
// hands, and the row is read again; there is one team then.
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
  constexpr int N = WIDTH<T, WIDE>, HELD = ELEMENTS > 0 ? ELEMENTS / N : 1;
  const int teams = threads() / row_threads, number = thread() / row_threads;
  const Team team{thread() % row_threads, row_threads, number * (row_threads / WARP), teams > 1 ? number + 1 : 0};
  const int vectors = columns / N;
  const int64_t partial = int64_t{block_x()} * columns;
  const SharedAddress slots = shared_memory();

  struct Terms {
    Vector<float, N> xhat, g;  // g is grad_normed until it is weighed
    Vector<T, N> grad_sum;
  };
  const auto terms = [&](int64_t at, float mu, float low, float scale) {
    Terms t{load_floats<N>(sum + at), load_floats<N>(grad + at)};
    if (grad_sum) t.grad_sum = load_vector<N>(grad_sum + at);
#pragma unroll
    for (int k = 0; k < N; ++k) t.xhat.at[k] = (t.xhat.at[k] - mu - low) * scale;
    return t;
  };
  const auto weigh = [&](Terms& t, int i, float (&sums)[2]) {
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

  Vector<float, N> dweight[HELD] = {}, dbias[HELD] = {};
  int turn = 0;  // the slots of a turn are written again in the one after the next, when all have read them
  for (int64_t row = int64_t{block_x()} * teams + number; row < rows; row += int64_t{blocks_x()} * teams, turn ^= 1) {
    const int64_t start = row * columns;
    const double mean_of_row = load(mean + row);
    const float mu = static_cast<float>(mean_of_row), low = static_cast<float>(mean_of_row - static_cast<double>(mu));
    const float scale = load(rstd + row);
    float sums[2] = {};  // of g and g xhat; then their means
    const auto join = [&] {
      team.sum(sums, slots + turn * 2 * SLOTS);
      for (float& x : sums) x /= static_cast<float>(columns);
    };
    if constexpr (ELEMENTS > 0) {
      Terms held[HELD];
#pragma unroll
      for (int h = 0; h < HELD; ++h)
        if (const int i = team.thread + h * row_threads; i < vectors) {
          held[h] = terms(start + i * N, mu, low, scale);
#pragma unroll
          for (int k = 0; k < N; ++k) {
            dweight[h].at[k] += held[h].g.at[k] * held[h].xhat.at[k];
            dbias[h].at[k] += held[h].g.at[k];
          }
          weigh(held[h], i, sums);
        }
      join();
#pragma unroll
      for (int h = 0; h < HELD; ++h)
        if (const int i = team.thread + h * row_threads; i < vectors) finish(start + i * N, held[h], scale, sums);
    } else {
#pragma unroll 1
      for (int i = team.thread; i < vectors; i += row_threads) {
        Terms t = terms(start + i * N, mu, low, scale);
        Vector<float, N> product;
#pragma unroll
        for (int k = 0; k < N; ++k) product.at[k] = t.g.at[k] * t.xhat.at[k];
        add_floats(partial_weight + (partial + i * N), product);
        add_floats(partial_bias + (partial + i * N), t.g);
        weigh(t, i, sums);
      }
      join();
#pragma unroll 1
      for (int i = team.thread; i < vectors; i += row_threads) {
        Terms t = terms(start + i * N, mu, low, scale);
        float known[2];
        weigh(t, i, known);
        finish(start + i * N, t, scale, sums);
      }
    }
  }
  if constexpr (ELEMENTS > 0) {
    // The teams' sums meet in shared memory, (teams, elements of a thread, row_threads), one kind after the other.
    const int numbers = HELD * N * row_threads;
    const auto join = [&](const Vector<float, N>(&sums)[HELD], Global<float> to) {
      sync_block();
#pragma unroll
      for (int e = 0; e < HELD * N; ++e)
        store_shared(slots + 4 * (number * numbers + e * row_threads + team.thread), sums[e / N].at[e % N]);
      sync_block();
      for (int i = thread(); i < numbers; i += threads()) {
        const int e = i / row_threads, column = (i % row_threads + e / N * row_threads) * N + e % N;
        float total = 0;
        for (int t = 0; t < teams; ++t) total += load_shared<float>(slots + 4 * (t * numbers + i));
        if (column < columns) store(to + (partial + column), total);
      }
    };
    join(dweight, partial_weight);
    join(dbias, partial_bias);
  }
}

// ---- launchers ----

OptionalTensor as(const OptionalTensor& x, ScalarType dtype) {
  return x.has_value() ? OptionalTensor(torch::stable::to(*x, dtype)) : OptionalTensor();
}

bool is_aligned(const OptionalTensor& x) { return !x.has_value() || aligned(*x); }

// Whether the rows of a tensor, too, begin at multiples of 16 bytes.
bool wide_rows(const Tensor& x) { return x.size(1) * static_cast<int64_t>(x.element_size()) % 16 == 0; }

// Whole warps for a row of vectors, of which a thread has `held`.
int threads_for(int64_t vectors, int held, int most) {
  return static_cast<int>(std::clamp<int64_t>(cdiv(cdiv(vectors, held), WARP) * WARP, WARP, most));
}

int columns_of(const Tensor& x) {
  STD_TORCH_CHECK(x.size(1) < (int64_t{1} << 31) - 65536, "fastgpt: add_layer_norm takes rows of less than 2^31");
  return static_cast<int>(x.size(1));
}

// Calls f with the elements of a row that a thread of the backward holds, 0 where there would be too many.
template <bool WIDE, typename F>
void choose_elements(int columns, F&& f) {
  if (columns <= THREADS * BWD_ELEMENTS) return f(std::integral_constant<int, BWD_ELEMENTS>{});
  if constexpr (WIDE)
    if (columns <= THREADS * 2 * BWD_ELEMENTS) return f(std::integral_constant<int, 2 * BWD_ELEMENTS>{});
  f(std::integral_constant<int, 0>{});
}

// Calls f with numbers of the types of x, which is the sum's, and of the residual.
template <typename F>
void with_types(ScalarType x, ScalarType residual, F&& f) {
  if (x == residual)
    dispatch(x, "add_layer_norm", [&](auto element) { f(element, element); });
  else if (residual == ScalarType::BFloat16)
    f(float{}, bf16{});
  else
    f(float{}, fp16{});
}

std::tuple<Tensor, Tensor, Tensor, Tensor> add_layer_norm_fwd(
    const Tensor& x_,
    const OptionalTensor& residual_,
    const OptionalTensor& weight_,
    const OptionalTensor& bias_,
    double eps) {
  const Checks check("add_layer_norm_fwd_cuda", "x", x_, {ANY, ANY});
  check("residual", residual_, {x_.size(0), x_.size(1)}, FLOATS);
  check("weight", weight_, {x_.size(1)}, FLOATS_OR_DOUBLE)("bias", bias_, {x_.size(1)}, FLOATS_OR_DOUBLE);
  check.contiguous("x", x_, "residual", residual_, "weight", weight_, "bias", bias_);
  // A sum of two types is float32. x is then made to be the one that has it already, if one has.
  Tensor x = x_;
  OptionalTensor residual = residual_;
  if (residual.has_value() && residual->scalar_type() != x.scalar_type()) {
    if (residual->scalar_type() == ScalarType::Float) std::swap(x, *residual);
    x = torch::stable::to(x, ScalarType::Float);
  }
  const OptionalTensor weight = as(weight_, ScalarType::Float), bias = as(bias_, ScalarType::Float);
  const int64_t rows = x.size(0);
  const int columns = columns_of(x);
  Tensor normed = empty(x, {rows, columns}, x.scalar_type());
  Tensor sum = residual.has_value() ? torch::stable::empty_like(normed) : empty(x, {0}, x_.scalar_type());
  Tensor mean = empty(x, {rows}, ScalarType::Double), rstd = empty(x, {rows}, ScalarType::Float);
  if (rows == 0) return {normed, sum, mean, rstd};
  const bool is_wide =
      wide_rows(x) && aligned(x, normed, sum) && is_aligned(residual) && is_aligned(weight) && is_aligned(bias);
  with_types(x.scalar_type(), residual.value_or(x).scalar_type(), [&](auto x_element, auto residual_element) {
    choose(is_wide, [&](auto wide) {
      choose(columns <= THREADS * FWD_ELEMENTS, [&](auto in_registers) {
        using X = decltype(x_element);
        using R = decltype(residual_element);
        constexpr int N = WIDTH<X, wide>;
        const int row_threads = in_registers ? threads_for(columns / N, FWD_ELEMENTS / N, THREADS) : THREADS;
        const int teams = row_threads == WARP ? FWD_WARPS : 1;
        launch<add_layer_norm_fwd_kernel<X, R, wide, in_registers>>(
            device_of(x),
            "add_layer_norm_fwd",
            Launch{.x = cdiv(rows, teams), .threads = teams * row_threads, .shared = 3 * SLOTS},
            global<const X>(x),
            global<const R>(residual),
            global<const float>(weight),
            global<const float>(bias),
            global<X>(normed),
            global<X>(sum),
            global<double>(mean),
            global<float>(rstd),
            rows,
            columns,
            static_cast<float>(eps),
            row_threads);
      });
    });
  });
  return {normed, sum, mean, rstd};
}

std::tuple<Tensor, Tensor, Tensor> add_layer_norm_bwd(
    const Tensor& grad,
    const OptionalTensor& grad_sum,
    const Tensor& sum,
    const OptionalTensor& weight_,
    const Tensor& mean,
    const Tensor& rstd) {
  const Checks check("add_layer_norm_bwd_cuda", "total", sum, {ANY, ANY});
  check.like("grad_normed", grad).like("grad_sum", grad_sum)("weight", weight_, {sum.size(1)}, FLOATS_OR_DOUBLE);
  check("mean", mean, {sum.size(0)}, {ScalarType::Double})("rstd", rstd, {sum.size(0)}, {ScalarType::Float});
  check.contiguous("grad_normed", grad, "grad_sum", grad_sum, "total", sum, "weight", weight_);
  check.contiguous("mean", mean, "rstd", rstd);
  const OptionalTensor weight = as(weight_, ScalarType::Float);
  const int64_t rows = sum.size(0);
  const int columns = columns_of(sum);
  Tensor dsum = torch::stable::empty_like(sum);
  if (sum.numel() == 0)
    return {dsum, zeros(sum, {columns}, ScalarType::Float), zeros(sum, {columns}, ScalarType::Float)};
  const bool is_wide = wide_rows(sum) && aligned(grad, sum, dsum) && is_aligned(grad_sum) && is_aligned(weight);
  Tensor partial_weight, partial_bias;
  dispatch(sum.scalar_type(), "add_layer_norm", [&](auto element) {
    choose(is_wide, [&](auto wide) {
      choose_elements<wide>(columns, [&](auto elements) {
        using T = decltype(element);
        constexpr int N = WIDTH<T, wide>;
        const int row_threads = elements ? threads_for(columns / N, elements / N, THREADS) : THREADS;
        const int teams = std::max(BWD_WARPS * WARP / row_threads, 1), threads = teams * row_threads;
        const int64_t blocks = std::min<int64_t>(cdiv(rows, teams), PARTIALS);
        partial_weight = (elements ? empty : zeros)(sum, {blocks, columns}, ScalarType::Float);
        partial_bias = (elements ? empty : zeros)(sum, {blocks, columns}, ScalarType::Float);
        launch<add_layer_norm_bwd_kernel<T, wide, elements>>(
            device_of(sum),
            "add_layer_norm_bwd",
            Launch{.x = blocks, .threads = threads, .shared = std::max(4 * SLOTS, 4 * elements * threads)},
            global<const T>(grad),
            global<const T>(grad_sum),
            global<const T>(sum),
            global<const float>(weight),
            global<const double>(mean),
            global<const float>(rstd),
            global<T>(dsum),
            global<float>(partial_weight),
            global<float>(partial_bias),
            rows,
            columns,
            row_threads);
      });
    });
  });
  return {dsum, sum_rows(partial_weight), sum_rows(partial_bias)};
}

STABLE_TORCH_LIBRARY_IMPL(fastgpt, FASTGPT_DISPATCH_KEY, m) {
  m.impl("add_layer_norm_fwd_cuda", TORCH_BOX(&add_layer_norm_fwd));
  m.impl("add_layer_norm_bwd_cuda", TORCH_BOX(&add_layer_norm_bwd));
}

}  // namespace
}  // namespace fastgpt
