// GELU and GELU of a biased input on the CPU.
//
//   erf:   y = x·Φ(x)                          dy/dx = Φ(x) + x·φ(x),  φ(x) = exp(-x²/2)/√(2π)
//   tanh:  y = x/2·(1 + t), t = tanh(u)        dy/dx = (1 + t)/2 + x/2·(1 - t²)·u'
//          u = √(2/π)·(x + 0.044715·x³)        u' = √(2/π)·(1 + 3·0.044715·x²)
//
// One pass: the forward reads x and writes y, the backward reads dy and x and writes dx. dbias is the
// sum of dx over the rows, taken over a fixed number of parts so that its bits do not depend on the
// number of threads.
#include "kernel.h"

namespace fastgpt {
namespace {

constexpr double SQRT_2_OVER_PI = 0.79788456080286535588;
constexpr double CUBIC = 0.044715;
constexpr double INV_SQRT_2PI = 0.39894228040143267794;

template <bool TANH, typename A>
inline A value(A x) {
  if constexpr (TANH) {
    const A u = A(SQRT_2_OVER_PI) * (x + A(CUBIC) * x * x * x);
    return A(0.5) * x * (A(1) + vtanh(u));
  } else {
    A gaussian;
    return x * vphi(x, gaussian);
  }
}

template <bool TANH, typename A>
inline A slope(A x) {
  if constexpr (TANH) {
    // Beyond |x| = 20 tanh is 1 to the last bit; x² of a larger x would overflow to inf·0.
    const A c = std::min(std::max(x, A(-20)), A(20));
    const A t = vtanh(A(SQRT_2_OVER_PI) * (c + A(CUBIC) * c * c * c));
    const A inner = A(SQRT_2_OVER_PI) * (A(1) + A(3) * A(CUBIC) * c * c);
    return A(0.5) * (A(1) + t) + A(0.5) * c * (A(1) - t * t) * inner;
  } else {
    A gaussian;
    const A phi = vphi(x, gaussian);
    // Where the density vanishes x may be infinite, and inf·0 is no part of the derivative.
    return phi + (gaussian > A(0) ? x : A(0)) * (A(INV_SQRT_2PI) * gaussian);
  }
}

// ---- forward ----

template <bool TANH, typename T>
void gelu_forward(const T* x, T* y, int64_t numel) {
  at::parallel_for(0, numel, GRAIN, [&](int64_t begin, int64_t end) {
    compute_t<T> z[BLOCK];
    for (int64_t i = begin; i < end; i += BLOCK) {
      const int64_t n = std::min(BLOCK, end - i);
      load(z, x + i, n);
      for (int64_t j = 0; j < n; ++j) z[j] = value<TANH>(z[j]);
      store(y + i, z, n);
    }
  });
}

template <bool TANH, typename T>
void bias_gelu_forward(const T* x, const T* bias, T* y, int64_t rows, int64_t size) {
  at::parallel_for(0, rows, GRAIN / std::max<int64_t>(size, 1) + 1, [&](int64_t begin, int64_t end) {
    compute_t<T> b[BLOCK], z[BLOCK];
    for (int64_t row = begin; row < end; ++row) {
      for (int64_t i = 0; i < size; i += BLOCK) {
        const int64_t n = std::min(BLOCK, size - i);
        load(z, x + row * size + i, n);
        load(b, bias + i, n);
        for (int64_t j = 0; j < n; ++j) z[j] = value<TANH>(z[j] + b[j]);
        store(y + row * size + i, z, n);
      }
    }
  });
}

// ---- backward ----

template <bool TANH, typename T>
void gelu_backward(const T* grad, const T* x, T* dx, int64_t numel) {
  at::parallel_for(0, numel, GRAIN, [&](int64_t begin, int64_t end) {
    compute_t<T> g[BLOCK], z[BLOCK];
    for (int64_t i = begin; i < end; i += BLOCK) {
      const int64_t n = std::min(BLOCK, end - i);
      load(z, x + i, n);
      load(g, grad + i, n);
      for (int64_t j = 0; j < n; ++j) g[j] *= slope<TANH>(z[j]);
      store(dx + i, g, n);
    }
  });
}

// partial (parts, size): the sums of dx over each of `parts` spans of rows.
template <bool TANH, typename T>
void bias_gelu_backward(
    const T* grad, const T* x, const T* bias, T* dx, compute_t<T>* partial, int64_t parts, int64_t rows, int64_t size) {
  const int64_t span = (rows + parts - 1) / parts;
  at::parallel_for(0, parts, 1, [&](int64_t begin, int64_t end) {
    compute_t<T> b[BLOCK], g[BLOCK], z[BLOCK];
    for (int64_t part = begin; part < end; ++part) {
      for (int64_t row = part * span; row < std::min(rows, (part + 1) * span); ++row) {
        for (int64_t i = 0; i < size; i += BLOCK) {
          const int64_t n = std::min(BLOCK, size - i), at = row * size + i;
          load(z, x + at, n);
          load(g, grad + at, n);
          load(b, bias + i, n);
          for (int64_t j = 0; j < n; ++j) g[j] *= slope<TANH>(z[j] + b[j]);
          store(dx + at, g, n);
          compute_t<T>* sums = partial + part * size + i;
          for (int64_t j = 0; j < n; ++j) sums[j] += g[j];
        }
      }
    }
  });
}

// ---- launchers ----

// Calls f(element, kind): kind::value says whether tanh is asked for.
template <typename F>
void dispatch_kind(const Tensor& x, bool tanh, F&& f) {
  dispatch(x.scalar_type(), "gelu", [&](auto element) {
    if (tanh)
      f(element, std::true_type{});
    else
      f(element, std::false_type{});
  });
}

Tensor gelu_fwd(const Tensor& x_, bool tanh) {
  const Tensor x = x_.contiguous();
  Tensor y = at::empty_like(x);
  dispatch_kind(x, tanh, [&](auto element, auto kind) {
    using T = decltype(element);
    gelu_forward<decltype(kind)::value>(x.const_data_ptr<T>(), y.mutable_data_ptr<T>(), x.numel());
  });
  return y;
}

Tensor gelu_bwd(const Tensor& grad_, const Tensor& x_, bool tanh) {
  const Tensor x = x_.contiguous(), grad = grad_.contiguous();
  Tensor dx = at::empty_like(x);
  dispatch_kind(x, tanh, [&](auto element, auto kind) {
    using T = decltype(element);
    gelu_backward<decltype(kind)::value>(
        grad.const_data_ptr<T>(), x.const_data_ptr<T>(), dx.mutable_data_ptr<T>(), x.numel());
  });
  return dx;
}

Tensor bias_gelu_fwd(const Tensor& x_, const Tensor& bias_, bool tanh) {
  const Tensor x = x_.contiguous(), bias = bias_.contiguous();
  Tensor y = at::empty_like(x);
  const int64_t size = bias.numel(), rows = size ? x.numel() / size : 0;
  dispatch_kind(x, tanh, [&](auto element, auto kind) {
    using T = decltype(element);
    bias_gelu_forward<decltype(kind)::value>(
        x.const_data_ptr<T>(), bias.const_data_ptr<T>(), y.mutable_data_ptr<T>(), rows, size);
  });
  return y;
}

std::tuple<Tensor, Tensor> bias_gelu_bwd(const Tensor& grad_, const Tensor& x_, const Tensor& bias_, bool tanh) {
  const Tensor x = x_.contiguous(), bias = bias_.contiguous(), grad = grad_.contiguous();
  Tensor dx = at::empty_like(x);
  const int64_t size = bias.numel(), rows = size ? x.numel() / size : 0;
  const int64_t parts = row_parts(rows);
  Tensor partial = at::zeros({parts, size}, x.options().dtype(accumulator(x.scalar_type())));
  dispatch_kind(x, tanh, [&](auto element, auto kind) {
    using T = decltype(element);
    bias_gelu_backward<decltype(kind)::value>(
        grad.const_data_ptr<T>(),
        x.const_data_ptr<T>(),
        bias.const_data_ptr<T>(),
        dx.mutable_data_ptr<T>(),
        partial.mutable_data_ptr<compute_t<T>>(),
        parts,
        rows,
        size);
  });
  return {dx, at::sum(partial, {0}).to(bias.scalar_type())};
}

TORCH_LIBRARY_IMPL(fastgpt, CPU, m) {
  m.impl("gelu_fwd_cpp", &gelu_fwd);
  m.impl("gelu_bwd_cpp", &gelu_bwd);
  m.impl("bias_gelu_fwd_cpp", &bias_gelu_fwd);
  m.impl("bias_gelu_bwd_cpp", &bias_gelu_bwd);
}

}  // namespace
}  // namespace fastgpt
