// SwiGLU, SiLU as a gate: forward and backward.
//
//   y = silu(a) b,  silu(x) = x σ(x),  σ(x) = 1 / (1 + exp(-x))
//   da = dy b silu'(a),  silu'(x) = σ(x) + silu(x) (1 - σ(x)),  db = dy silu(a)
//
// Shapes: a and b contiguous, of the same shape. The arithmetic is float32. Elements moved: forward two reads and one
// write, backward three reads and two writes. Only the inputs are saved for the backward.
#include "checks.cuh"
#include "elementwise.cuh"
#include "tensors.cuh"

namespace fastgpt {
namespace {

struct SiluAndGrad {
  float value, grad;
};

// exp(-x) is infinite far to the left. Then σ and silu are 0, and silu(-inf) is NaN, as in PyTorch.
__device__ inline SiluAndGrad silu_and_grad(float x) {
  constexpr float MINUS_LOG2E = -1.442695041f;
  const float r = rsqrt_fast(1.0f + exp2_fast(x * MINUS_LOG2E)), s = r * r, y = x * s;
  return {y, s + y * (1.0f - s)};
}

template <typename T, bool WIDE>
__global__ void __launch_bounds__(THREADS)
    swiglu_fwd_kernel(Global<const T> a, Global<const T> b, Global<T> y, int64_t numel) {
  over_elements<WIDTH<T, WIDE>>(numel, [&](int64_t i, auto width) {
    auto v = load_vector<width>(a + i);
    const auto gated = load_vector<width>(b + i);
#pragma unroll
    for (int k = 0; k < width; ++k)
      v.at[k] = from_float<T>(silu_and_grad(to_float(v.at[k])).value * to_float(gated.at[k]));
    store_vector(y + i, v);
  });
}

template <typename T, bool WIDE>
__global__ void __launch_bounds__(THREADS) swiglu_bwd_kernel(
    Global<const T> grad, Global<const T> a, Global<const T> b, Global<T> da, Global<T> db, int64_t numel) {
  over_elements<WIDTH<T, WIDE>>(numel, [&](int64_t i, auto width) {
    auto v = load_vector<width>(a + i), gated = load_vector<width>(b + i);
    const auto g = load_vector<width>(grad + i);
#pragma unroll
    for (int k = 0; k < width; ++k) {
      const float dy = to_float(g.at[k]);
      const SiluAndGrad silu = silu_and_grad(to_float(v.at[k]));
      v.at[k] = from_float<T>(dy * to_float(gated.at[k]) * silu.grad);
      gated.at[k] = from_float<T>(dy * silu.value);
    }
    store_vector(da + i, v);
    store_vector(db + i, gated);
  });
}

// ---- launchers ----

Tensor swiglu_fwd(const Tensor& a, const Tensor& b) {
  Checks("swiglu_fwd_cuda", "a", a).like("b", b).contiguous("a", a, "b", b);
  Tensor y = torch::stable::empty_like(a);
  if (const int64_t numel = a.numel())
    with_width("swiglu", a, aligned(a, b, y), [&](auto element, auto wide) {
      using T = decltype(element);
      launch<swiglu_fwd_kernel<T, wide>>(
          device_of(a),
          "swiglu_fwd",
          over<T, wide>(numel),
          global<const T>(a),
          global<const T>(b),
          global<T>(y),
          numel);
    });
  return y;
}

std::tuple<Tensor, Tensor> swiglu_bwd(const Tensor& grad, const Tensor& a, const Tensor& b) {
  Checks("swiglu_bwd_cuda", "a", a).like("b", b).like("grad", grad).contiguous("grad", grad, "a", a, "b", b);
  Tensor da = torch::stable::empty_like(a), db = torch::stable::empty_like(b);
  if (const int64_t numel = a.numel())
    with_width("swiglu", a, aligned(grad, a, b, da, db), [&](auto element, auto wide) {
      using T = decltype(element);
      launch<swiglu_bwd_kernel<T, wide>>(
          device_of(a),
          "swiglu_bwd",
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
  m.impl("swiglu_fwd_cuda", TORCH_BOX(&swiglu_fwd));
  m.impl("swiglu_bwd_cuda", TORCH_BOX(&swiglu_bwd));
}

}  // namespace
}  // namespace fastgpt
