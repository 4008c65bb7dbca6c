// The square of ReLU: forward and backward.
//
//   y = max(x, 0)²,  dx = 2 max(x, 0) dy
//
// Shapes: x contiguous. The arithmetic is float32. Elements moved: forward one read and one write, backward two reads
// and one write. Where x ≤ 0, dx is 0 even if dy is not finite, as in PyTorch; a NaN in x stays NaN.
#include "checks.cuh"
#include "elementwise.cuh"
#include "tensors.cuh"

namespace fastgpt {
namespace {

template <typename T, bool WIDE>
__global__ void __launch_bounds__(THREADS) relu_squared_fwd_kernel(Global<const T> x, Global<T> y, int64_t numel) {
  over_elements<WIDTH<T, WIDE>>(numel, [&](int64_t i, auto width) {
    auto v = load_vector<width>(x + i);
#pragma unroll
    for (int k = 0; k < width; ++k) {
      const float z = to_float(v.at[k]);
      v.at[k] = from_float<T>(z <= 0.0f ? 0.0f : z * z);
    }
    store_vector(y + i, v);
  });
}

template <typename T, bool WIDE>
__global__ void __launch_bounds__(THREADS)
    relu_squared_bwd_kernel(Global<const T> grad, Global<const T> x, Global<T> dx, int64_t numel) {
  over_elements<WIDTH<T, WIDE>>(numel, [&](int64_t i, auto width) {
    auto v = load_vector<width>(x + i);
    const auto g = load_vector<width>(grad + i);
#pragma unroll
    for (int k = 0; k < width; ++k) {
      const float z = to_float(v.at[k]);
      v.at[k] = from_float<T>(z <= 0.0f ? 0.0f : (z + z) * to_float(g.at[k]));
    }
    store_vector(dx + i, v);
  });
}

// ---- launchers ----

Tensor relu_squared_fwd(const Tensor& x) {
  Checks("relu_squared_fwd_cuda", "x", x).contiguous("x", x);
  Tensor y = torch::stable::empty_like(x);
  if (const int64_t numel = x.numel())
    with_width("relu_squared", x, aligned(x, y), [&](auto element, auto wide) {
      using T = decltype(element);
      launch<relu_squared_fwd_kernel<T, wide>>(
          device_of(x), "relu_squared_fwd", over<T, wide>(numel), global<const T>(x), global<T>(y), numel);
    });
  return y;
}

Tensor relu_squared_bwd(const Tensor& grad, const Tensor& x) {
  Checks("relu_squared_bwd_cuda", "x", x).like("grad", grad).contiguous("grad", grad, "x", x);
  Tensor dx = torch::stable::empty_like(x);
  if (const int64_t numel = x.numel())
    with_width("relu_squared", x, aligned(grad, x, dx), [&](auto element, auto wide) {
      using T = decltype(element);
      launch<relu_squared_bwd_kernel<T, wide>>(
          device_of(x),
          "relu_squared_bwd",
          over<T, wide>(numel),
          global<const T>(grad),
          global<const T>(x),
          global<T>(dx),
          numel);
    });
  return dx;
}

STABLE_TORCH_LIBRARY_IMPL(fastgpt, FASTGPT_DISPATCH_KEY, m) {
  m.impl("relu_squared_fwd_cuda", TORCH_BOX(&relu_squared_fwd));
  m.impl("relu_squared_bwd_cuda", TORCH_BOX(&relu_squared_bwd));
}

}  // namespace
}  // namespace fastgpt
