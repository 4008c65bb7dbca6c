// The square of ReLU on the CPU.
//
//   y = max(x, 0)²,  dx = 2·max(x, 0)·dy
//
// Bytes moved: the forward reads x and writes y. The backward reads dy and x and writes dx. The kernels are bound by
// memory. Large results are written with streaming (non-temporal) stores. Where x ≤ 0, dx is 0 even if dy is not
// finite, as in PyTorch; a NaN in x stays NaN.
#include "checks.h"
#include "kernel.h"
#include "vector.h"

namespace fastgpt {
namespace {

template <bool STREAMING, typename T>
void relu_squared_forward(const T* x, T* y, int64_t numel) {
  using A = compute_t<T>;
  parallel_for(0, blocks(numel), GRAIN / BLOCK, [&](int64_t begin, int64_t end) {
    fill<STREAMING, A>(y, begin * BLOCK, std::min(end * BLOCK, numel), [&](int64_t i, auto... n) {
      const Vector<A> z = load<A>(x + i, n...);
      return z <= A(0) ? Vector<A>{} : z * z;
    });
    if (STREAMING) end_streaming();
  });
}

template <bool STREAMING, typename T>
void relu_squared_backward(const T* grad, const T* x, T* dx, int64_t numel) {
  using A = compute_t<T>;
  parallel_for(0, blocks(numel), GRAIN / BLOCK, [&](int64_t begin, int64_t end) {
    fill<STREAMING, A>(dx, begin * BLOCK, std::min(end * BLOCK, numel), [&](int64_t i, auto... n) {
      const Vector<A> z = load<A>(x + i, n...);
      return z <= A(0) ? Vector<A>{} : (z + z) * load<A>(grad + i, n...);
    });
    if (STREAMING) end_streaming();
  });
}

// ---- launchers ----

Tensor relu_squared_fwd(const Tensor& x_) {
  Checks("relu_squared_fwd_cpp", "x", x_);
  const Tensor x = contiguous(x_);
  Tensor y = empty_like(x);
  dispatch_streaming(x, "relu_squared", [&](auto element, auto streaming) {
    using T = decltype(element);
    relu_squared_forward<streaming.value>(x.const_data_ptr<T>(), y.mutable_data_ptr<T>(), x.numel());
  });
  return y;
}

Tensor relu_squared_bwd(const Tensor& grad_, const Tensor& x_) {
  Checks("relu_squared_bwd_cpp", "x", x_).like("grad", grad_);
  const Tensor x = contiguous(x_), grad = contiguous(grad_);
  Tensor dx = empty_like(x);
  dispatch_streaming(x, "relu_squared", [&](auto element, auto streaming) {
    using T = decltype(element);
    relu_squared_backward<streaming.value>(
        grad.const_data_ptr<T>(), x.const_data_ptr<T>(), dx.mutable_data_ptr<T>(), x.numel());
  });
  return dx;
}

STABLE_TORCH_LIBRARY_IMPL(fastgpt, CPU, m) {
  m.impl("relu_squared_fwd_cpp", TORCH_BOX(&relu_squared_fwd));
  m.impl("relu_squared_bwd_cpp", TORCH_BOX(&relu_squared_bwd));
}

}  // namespace
}  // namespace fastgpt
