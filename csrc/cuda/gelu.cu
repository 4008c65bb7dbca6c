// GELU, GELU of a biased input, and GEGLU: forward and backward. The formulas are in formulas.h.
//
//   geglu:  y = gelu(a) b,  da = dy b gelu'(a),  db = dy gelu(a)
//
// Shapes: x (..., columns) contiguous, bias (columns,); a and b contiguous, of the same shape. The arithmetic is
// float32. Bytes moved per element: forward one read and one write, backward two reads and one write (geglu: two and
// one, three and two). Only the inputs are saved for the backward. dbias is summed in two stages, so its bits do not
// depend on a race: a block sums ROWS_PER_PARTIAL rows, then PyTorch sums the partial sums.
#include "../formulas.h"
#include "checks.cuh"
#include "elementwise.cuh"
#include "tensors.cuh"

namespace fastgpt {
namespace {

constexpr int ROWS_PER_PARTIAL = 64;  // so the partial sums of dbias have 1/64 of the elements

template <bool TANH>
__device__ inline float gelu(float x) {
  return x * gelu_cdf_and_grad<TANH, Fast>(x).cdf;
}
template <bool TANH>
__device__ inline float gelu_grad(float x) {
  return gelu_cdf_and_grad<TANH, Fast>(x).grad;
}

// ---- forward ----

template <typename T, bool TANH, bool WIDE>
__global__ void __launch_bounds__(THREADS) gelu_fwd_kernel(Global<const T> x, Global<T> y, int64_t numel) {
  over_elements<WIDTH<T, WIDE>>(numel, [&](int64_t i, auto width) {
    auto v = load_vector<width>(x + i);
#pragma unroll
    for (int k = 0; k < width; ++k) v.at[k] = from_float<T>(gelu<TANH>(to_float(v.at[k])));
    store_vector(y + i, v);
  });
}

template <typename T, bool TANH, bool WIDE>
__global__ void __launch_bounds__(THREADS)
    geglu_fwd_kernel(Global<const T> a, Global<const T> b, Global<T> y, int64_t numel) {
  over_elements<WIDTH<T, WIDE>>(numel, [&](int64_t i, auto width) {
    auto v = load_vector<width>(a + i);
    const auto gate = load_vector<width>(b + i);
#pragma unroll
    for (int k = 0; k < width; ++k) v.at[k] = from_float<T>(gelu<TANH>(to_float(v.at[k])) * to_float(gate.at[k]));
    store_vector(y + i, v);
  });
}

// A warp processes a stripe of columns, 16 bytes per lane, in every eighth row. The bias stays in registers.
template <typename T, bool WIDE>
struct Stripe {
  static constexpr int N = WIDTH<T, WIDE>, ROWS = THREADS / WARP;
  int64_t column, first_row, end_row;

  __device__ explicit Stripe(int64_t rows)
      : column((int64_t{block_y()} * WARP + lane()) * N),
        first_row(int64_t{block_x()} * ROWS_PER_PARTIAL + warp()),
        end_row(int64_t{block_x() + 1} * ROWS_PER_PARTIAL < rows ? int64_t{block_x() + 1} * ROWS_PER_PARTIAL : rows) {}
};

template <typename T, bool TANH, bool WIDE>
__global__ void __launch_bounds__(THREADS)
    bias_gelu_fwd_kernel(Global<const T> x, Global<const T> bias, Global<T> y, int64_t rows, int64_t columns) {
  using S = Stripe<T, WIDE>;
  const S s(rows);
  if (s.column >= columns) return;
  const auto b = load_vector<S::N>(bias + s.column);
#pragma unroll 2
  for (int64_t row = s.first_row; row < s.end_row; row += S::ROWS) {
    auto v = load_vector<S::N>(x + (row * columns + s.column));
#pragma unroll
    for (int k = 0; k < S::N; ++k) v.at[k] = from_float<T>(gelu<TANH>(to_float(v.at[k]) + to_float(b.at[k])));
    store_vector(y + (row * columns + s.column), v);
  }
}

// ---- backward ----

template <typename T, bool TANH, bool WIDE>
__global__ void __launch_bounds__(THREADS)
    gelu_bwd_kernel(Global<const T> grad, Global<const T> x, Global<T> dx, int64_t numel) {
  over_elements<WIDTH<T, WIDE>>(numel, [&](int64_t i, auto width) {
    auto v = load_vector<width>(x + i);
    const auto g = load_vector<width>(grad + i);
#pragma unroll
    for (int k = 0; k < width; ++k) v.at[k] = from_float<T>(to_float(g.at[k]) * gelu_grad<TANH>(to_float(v.at[k])));
    store_vector(dx + i, v);
  });
}

template <typename T, bool TANH, bool WIDE>
__global__ void __launch_bounds__(THREADS) geglu_bwd_kernel(
    Global<const T> grad, Global<const T> a, Global<const T> b, Global<T> da, Global<T> db, int64_t numel) {
  over_elements<WIDTH<T, WIDE>>(numel, [&](int64_t i, auto width) {
    auto v = load_vector<width>(a + i), gate = load_vector<width>(b + i);
    const auto g = load_vector<width>(grad + i);
#pragma unroll
    for (int k = 0; k < width; ++k) {
      const float value = to_float(v.at[k]), dy = to_float(g.at[k]);
      const GeluCdfAndGrad both = gelu_cdf_and_grad<TANH, Fast>(value);
      v.at[k] = from_float<T>(dy * to_float(gate.at[k]) * both.grad);
      gate.at[k] = from_float<T>(dy * (value * both.cdf));
    }
    store_vector(da + i, v);
    store_vector(db + i, gate);
  });
}

// Writes dx, and its sum over the rows of the block to partial (blocks, columns).
template <typename T, bool TANH, bool WIDE>
__global__ void __launch_bounds__(THREADS) bias_gelu_bwd_kernel(
    Global<const T> grad,
    Global<const T> x,
    Global<const T> bias,
    Global<T> dx,
    Global<float> partial,
    int64_t rows,
    int64_t columns) {
  using S = Stripe<T, WIDE>;
  const S s(rows);
  float sum[S::N] = {};
  if (s.column < columns) {
    const auto b = load_vector<S::N>(bias + s.column);
#pragma unroll 2
    for (int64_t row = s.first_row; row < s.end_row; row += S::ROWS) {
      auto v = load_vector<S::N>(x + (row * columns + s.column));
      const auto g = load_vector<S::N>(grad + (row * columns + s.column));
#pragma unroll
      for (int k = 0; k < S::N; ++k) {
        const float d = to_float(g.at[k]) * gelu_grad<TANH>(to_float(v.at[k]) + to_float(b.at[k]));
        sum[k] += d;
        v.at[k] = from_float<T>(d);
      }
      store_vector(dx + (row * columns + s.column), v);
    }
  }
  // Adds up the sums of the warps through shared memory: sums (warps, lanes × N).
  const SharedAddress sums = shared_memory();
#pragma unroll
  for (int k = 0; k < S::N; ++k) store_shared(sums + 4 * (thread() + k * THREADS), sum[k]);
  sync_block();
  for (int i = thread(); i < WARP * S::N; i += THREADS) {
    const int k = i / WARP, l = i % WARP;
    const int64_t column = (int64_t{block_y()} * WARP + l) * S::N + k;
    float total = 0;
    for (int w = 0; w < THREADS / WARP; ++w) total += load_shared<float>(sums + 4 * (w * WARP + l + k * THREADS));
    if (column < columns) store(partial + (block_x() * columns + column), total);
  }
}

// ---- launchers ----

// Calls f with the compile-time arguments of the kernels: element type, formula, width.
template <typename F>
void with_variant(const char* op, const Tensor& x, bool tanh, bool wide, F&& f) {
  dispatch(x.scalar_type(), op, [&](auto element) {
    choose(tanh, [&](auto t) { choose(wide, [&](auto w) { f(element, t, w); }); });
  });
}

template <typename T, bool WIDE>
Launch over_rows(int64_t rows, int64_t columns) {
  using S = Stripe<T, WIDE>;
  return {.x = cdiv(rows, ROWS_PER_PARTIAL), .y = cdiv(columns, WARP * S::N), .threads = THREADS};
}

// Whether rows are a multiple of 16 bytes long, so that each begins aligned if the tensor does.
bool wide_rows(const Tensor& x) { return x.size(-1) * static_cast<int64_t>(x.element_size()) % 16 == 0; }

Tensor gelu_fwd(const Tensor& x, bool tanh) {
  Checks("gelu_fwd_cuda", "x", x).contiguous("x", x);
  Tensor y = torch::stable::empty_like(x);
  if (const int64_t numel = x.numel())
    with_variant("gelu", x, tanh, aligned(x, y), [&](auto element, auto t, auto wide) {
      using T = decltype(element);
      launch<gelu_fwd_kernel<T, t, wide>>(
          device_of(x), "gelu_fwd", over<T, wide>(numel), global<const T>(x), global<T>(y), numel);
    });
  return y;
}

Tensor gelu_bwd(const Tensor& grad, const Tensor& x, bool tanh) {
  Checks("gelu_bwd_cuda", "x", x).like("grad", grad).contiguous("grad", grad, "x", x);
  Tensor dx = torch::stable::empty_like(x);
  if (const int64_t numel = x.numel())
    with_variant("gelu", x, tanh, aligned(grad, x, dx), [&](auto element, auto t, auto wide) {
      using T = decltype(element);
      launch<gelu_bwd_kernel<T, t, wide>>(
          device_of(x),
          "gelu_bwd",
          over<T, wide>(numel),
          global<const T>(grad),
          global<const T>(x),
          global<T>(dx),
          numel);
    });
  return dx;
}

Tensor bias_gelu_fwd(const Tensor& x, const Tensor& bias, bool tanh) {
  Checks("bias_gelu_fwd_cuda", "x", x)("bias", bias, {x.size(-1)}, {x.scalar_type()}).contiguous("x", x, "bias", bias);
  Tensor y = torch::stable::empty_like(x);
  if (x.numel() == 0) return y;
  const int64_t columns = bias.size(0), rows = x.numel() / columns;
  with_variant("bias_gelu", x, tanh, wide_rows(x) && aligned(x, bias, y), [&](auto element, auto t, auto wide) {
    using T = decltype(element);
    launch<bias_gelu_fwd_kernel<T, t, wide>>(
        device_of(x),
        "bias_gelu_fwd",
        over_rows<T, wide>(rows, columns),
        global<const T>(x),
        global<const T>(bias),
        global<T>(y),
        rows,
        columns);
  });
  return y;
}

std::tuple<Tensor, Tensor> bias_gelu_bwd(const Tensor& grad, const Tensor& x, const Tensor& bias, bool tanh) {
  Checks("bias_gelu_bwd_cuda", "x", x)("bias", bias, {x.size(-1)}, {x.scalar_type()})
      .like("grad", grad)
      .contiguous("grad", grad, "x", x, "bias", bias);
  Tensor dx = torch::stable::empty_like(x);
  const int64_t columns = bias.size(0);
  if (x.numel() == 0) return {dx, zeros(x, {columns}, x.scalar_type())};
  const int64_t rows = x.numel() / columns;
  Tensor partial = empty(x, {cdiv(rows, ROWS_PER_PARTIAL), columns}, ScalarType::Float);
  const bool wide_enough = wide_rows(x) && aligned(grad, x, bias, dx);
  with_variant("bias_gelu", x, tanh, wide_enough, [&](auto element, auto t, auto wide) {
    using T = decltype(element);
    Launch shape = over_rows<T, wide>(rows, columns);
    shape.shared = 4 * THREADS * WIDTH<T, wide>;
    launch<bias_gelu_bwd_kernel<T, t, wide>>(
        device_of(x),
        "bias_gelu_bwd",
        shape,
        global<const T>(grad),
        global<const T>(x),
        global<const T>(bias),
        global<T>(dx),
        global<float>(partial),
        rows,
        columns);
  });
  return {dx, torch::stable::to(sum_rows(partial), x.scalar_type())};
}

Tensor geglu_fwd(const Tensor& a, const Tensor& b, bool tanh) {
  Checks("geglu_fwd_cuda", "a", a).like("b", b).contiguous("a", a, "b", b);
  Tensor y = torch::stable::empty_like(a);
  if (const int64_t numel = a.numel())
    with_variant("geglu", a, tanh, aligned(a, b, y), [&](auto element, auto t, auto wide) {
      using T = decltype(element);
      launch<geglu_fwd_kernel<T, t, wide>>(
          device_of(a), "geglu_fwd", over<T, wide>(numel), global<const T>(a), global<const T>(b), global<T>(y), numel);
    });
  return y;
}

std::tuple<Tensor, Tensor> geglu_bwd(const Tensor& grad, const Tensor& a, const Tensor& b, bool tanh) {
  Checks("geglu_bwd_cuda", "a", a).like("b", b).like("grad", grad).contiguous("grad", grad, "a", a, "b", b);
  Tensor da = torch::stable::empty_like(a), db = torch::stable::empty_like(b);
  if (const int64_t numel = a.numel())
    with_variant("geglu", a, tanh, aligned(grad, a, b, da, db), [&](auto element, auto t, auto wide) {
      using T = decltype(element);
      launch<geglu_bwd_kernel<T, t, wide>>(
          device_of(a),
          "geglu_bwd",
          over<T, wide>(numel),
          global<const T>(grad),
          global<const T>(a),
          global<const T>(b),
          global<T>(da),
          global<T>(db),
          numel);
    });
  return {da, db};
}

STABLE_TORCH_LIBRARY_IMPL(fastgpt, FASTGPT_DISPATCH_KEY, m) {
  m.impl("gelu_fwd_cuda", TORCH_BOX(&gelu_fwd));
  m.impl("gelu_bwd_cuda", TORCH_BOX(&gelu_bwd));
  m.impl("bias_gelu_fwd_cuda", TORCH_BOX(&bias_gelu_fwd));
  m.impl("bias_gelu_bwd_cuda", TORCH_BOX(&bias_gelu_bwd));
  m.impl("geglu_fwd_cuda", TORCH_BOX(&geglu_fwd));
  m.impl("geglu_bwd_cuda", TORCH_BOX(&geglu_bwd));
}

}  // namespace
}  // namespace fastgpt
