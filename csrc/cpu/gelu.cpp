// GELU, GELU of a biased input and GELU as a gate on the CPU.
//
//   erf:   y = x·Φ(x)                          dy/dx = Φ(x) + x·φ(x),  φ(x) = exp(-x²/2)/√(2π)
//   tanh:  y = x/2·(1 + t), t = tanh(u)        dy/dx = (1 + t)/2 + x/2·(1 - t²)·u'
//          u = √(2/π)·(x + 0.044715·x³)        u' = √(2/π)·(1 + 3·0.044715·x²)
//   geglu: y = gelu(a)·b                       da = dy·b·gelu'(a),  db = dy·gelu(a)
//
// y/x and dy/dx are both 1/2 + an odd function of x that is constant beyond |x| = 6: 1/2 + x·P(x²), with a
// polynomial P and no exponential, no division. gelu_terms.h has the coefficients and the error.
//
// Bytes: the forward reads x and writes y, the backward reads dy and x and writes dx; 25 instructions a
// vector are about what a core does while two vectors of float32 travel, so float32 is bound by memory and
// 16 bits by arithmetic. Large results go past the caches (`stream`), which saves reading them first.
// dbias is the sum of dx over the rows, taken over a fixed number of parts so that its bits do not depend
// on the number of threads.
#include "gelu_terms.h"
#include "kernel.h"
#include "vector.h"

namespace fastgpt {
namespace {

// y/x
template <bool TANH>
inline Floats share(Floats x) {
  if constexpr (TANH) return half_plus_odd(x, TANH_VALUE);
  return half_plus_odd(x, ERF_VALUE);
}
template <bool TANH>
inline Doubles share(Doubles x) {
  return each(x, [](double z) {
    return TANH ? 0.5 + 0.5 * std::tanh(SQRT_2_OVER_PI * (z + CUBIC * z * z * z)) : 0.5 * std::erfc(-z * SQRT_1_2);
  });
}

// dy/dx
template <bool TANH>
inline Floats slope(Floats x) {
  if constexpr (TANH) return half_plus_odd(x, TANH_SLOPE);
  return half_plus_odd(x, ERF_SLOPE);
}
template <bool TANH>
inline Doubles slope(Doubles x) {
  return each(x, [](double z) {
    // Beyond |z| = 20 (or 40) the slope is 0 or 1 to the last bit; z² of a larger z would overflow to inf·0.
    if constexpr (TANH) {
      const double c = std::min(std::max(z, -20.0), 20.0), t = std::tanh(SQRT_2_OVER_PI * (c + CUBIC * c * c * c));
      return 0.5 * (1 + t) + 0.5 * c * (1 - t * t) * SQRT_2_OVER_PI * (1 + 3 * CUBIC * c * c);
    } else {
      const double c = std::min(std::max(z, -40.0), 40.0);
      return 0.5 * std::erfc(-c * SQRT_1_2) + c * INV_SQRT_2PI * std::exp(-0.5 * c * c);
    }
  });
}

// ---- forward ----

template <bool TANH, bool STREAM, typename T>
void gelu_forward(const T* x, T* y, int64_t numel) {
  using A = compute_t<T>;
  at::parallel_for(0, blocks(numel), GRAIN / BLOCK, [&](int64_t begin, int64_t end) {
    over_vectors<A>(begin * BLOCK, std::min(end * BLOCK, numel), [&](int64_t i, auto... n) {
      const Vector<A> z = load<A>(x + i, n...);
      put<STREAM, T, A>(y + i, z * share<TANH>(z), n...);
    });
    if (STREAM) end_stream();
  });
}

template <bool TANH, bool STREAM, typename T>
void bias_gelu_forward(const T* x, const T* bias, T* y, int64_t rows, int64_t size) {
  using A = compute_t<T>;
  at::parallel_for(0, rows, GRAIN / std::max<int64_t>(size, 1) + 1, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row)
      over_vectors<A>(0, size, [&](int64_t j, auto... n) {
        const int64_t i = row * size + j;
        const Vector<A> z = load<A>(x + i, n...) + load<A>(bias + j, n...);
        put<STREAM, T, A>(y + i, z * share<TANH>(z), n...);
      });
    if (STREAM) end_stream();
  });
}

template <bool TANH, bool STREAM, typename T>
void geglu_forward(const T* a, const T* b, T* y, int64_t numel) {
  using A = compute_t<T>;
  at::parallel_for(0, blocks(numel), GRAIN / BLOCK, [&](int64_t begin, int64_t end) {
    over_vectors<A>(begin * BLOCK, std::min(end * BLOCK, numel), [&](int64_t i, auto... n) {
      const Vector<A> z = load<A>(a + i, n...);
      put<STREAM, T, A>(y + i, z * share<TANH>(z) * load<A>(b + i, n...), n...);
    });
    if (STREAM) end_stream();
  });
}

// ---- backward ----

template <bool TANH, bool STREAM, typename T>
void gelu_backward(const T* grad, const T* x, T* dx, int64_t numel) {
  using A = compute_t<T>;
  at::parallel_for(0, blocks(numel), GRAIN / BLOCK, [&](int64_t begin, int64_t end) {
    over_vectors<A>(begin * BLOCK, std::min(end * BLOCK, numel), [&](int64_t i, auto... n) {
      put<STREAM, T, A>(dx + i, load<A>(grad + i, n...) * slope<TANH>(load<A>(x + i, n...)), n...);
    });
    if (STREAM) end_stream();
  });
}

template <bool TANH, bool STREAM, typename T>
void geglu_backward(const T* grad, const T* a, const T* b, T* da, T* db, int64_t numel) {
  using A = compute_t<T>;
  at::parallel_for(0, blocks(numel), GRAIN / BLOCK, [&](int64_t begin, int64_t end) {
    over_vectors<A>(begin * BLOCK, std::min(end * BLOCK, numel), [&](int64_t i, auto... n) {
      const Vector<A> g = load<A>(grad + i, n...), z = load<A>(a + i, n...);
      put<STREAM, T, A>(da + i, g * load<A>(b + i, n...) * slope<TANH>(z), n...);
      put<STREAM, T, A>(db + i, g * (z * share<TANH>(z)), n...);
    });
    if (STREAM) end_stream();
  });
}

// partial (parts, size): the sums of dx over each of `parts` spans of rows.
template <bool TANH, bool STREAM, typename T>
void bias_gelu_backward(
    const T* grad, const T* x, const T* bias, T* dx, compute_t<T>* partial, int64_t parts, int64_t rows, int64_t size) {
  using A = compute_t<T>;
  const int64_t span = (rows + parts - 1) / parts;
  at::parallel_for(0, parts, 1, [&](int64_t begin, int64_t end) {
    for (int64_t part = begin; part < end; ++part) {
      A* sums = partial + part * size;
      for (int64_t row = part * span; row < std::min(rows, (part + 1) * span); ++row)
        over_vectors<A>(0, size, [&](int64_t j, auto... n) {
          const int64_t i = row * size + j;
          const Vector<A> z = load<A>(x + i, n...) + load<A>(bias + j, n...);
          const Vector<A> d = load<A>(grad + i, n...) * slope<TANH>(z);
          put<STREAM, T, A>(dx + i, d, n...);
          store<A, A>(sums + j, load<A>(sums + j, n...) + d, n...);
        });
    }
    if (STREAM) end_stream();
  });
}

// ---- launchers ----

// Calls f(element, kind, past): whether tanh is asked for, and whether the result goes past the caches.
template <typename F>
void dispatch_kind(const Tensor& x, int64_t row, bool tanh, F&& f) {
  dispatch(x.scalar_type(), "gelu", [&](auto element) {
    // Rows must begin where a vector may.
    const bool past = streams<decltype(element)>(x.numel()) && row * x.element_size() % VECTOR_BYTES == 0;
    const auto kind = [&](auto is_tanh) {
      past ? f(element, is_tanh, std::true_type{}) : f(element, is_tanh, std::false_type{});
    };
    tanh ? kind(std::true_type{}) : kind(std::false_type{});
  });
}

Tensor gelu_fwd(const Tensor& x_, bool tanh) {
  const Tensor x = x_.contiguous();
  Tensor y = at::empty_like(x);
  dispatch_kind(x, BLOCK, tanh, [&](auto element, auto kind, auto past) {
    using T = decltype(element);
    gelu_forward<kind.value, past.value>(x.const_data_ptr<T>(), y.mutable_data_ptr<T>(), x.numel());
  });
  return y;
}

Tensor gelu_bwd(const Tensor& grad_, const Tensor& x_, bool tanh) {
  const Tensor x = x_.contiguous(), grad = grad_.contiguous();
  Tensor dx = at::empty_like(x);
  dispatch_kind(x, BLOCK, tanh, [&](auto element, auto kind, auto past) {
    using T = decltype(element);
    gelu_backward<kind.value, past.value>(
        grad.const_data_ptr<T>(), x.const_data_ptr<T>(), dx.mutable_data_ptr<T>(), x.numel());
  });
  return dx;
}

Tensor bias_gelu_fwd(const Tensor& x_, const Tensor& bias_, bool tanh) {
  const Tensor x = x_.contiguous(), bias = bias_.contiguous();
  Tensor y = at::empty_like(x);
  const int64_t size = bias.numel(), rows = size ? x.numel() / size : 0;
  dispatch_kind(x, size, tanh, [&](auto element, auto kind, auto past) {
    using T = decltype(element);
    bias_gelu_forward<kind.value, past.value>(
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
  dispatch_kind(x, size, tanh, [&](auto element, auto kind, auto past) {
    using T = decltype(element);
    bias_gelu_backward<kind.value, past.value>(
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

Tensor geglu_fwd(const Tensor& a_, const Tensor& b_, bool tanh) {
  const Tensor a = a_.contiguous(), b = b_.contiguous();
  Tensor y = at::empty_like(a);
  dispatch_kind(a, BLOCK, tanh, [&](auto element, auto kind, auto past) {
    using T = decltype(element);
    geglu_forward<kind.value, past.value>(
        a.const_data_ptr<T>(), b.const_data_ptr<T>(), y.mutable_data_ptr<T>(), a.numel());
  });
  return y;
}

std::tuple<Tensor, Tensor> geglu_bwd(const Tensor& grad_, const Tensor& a_, const Tensor& b_, bool tanh) {
  const Tensor a = a_.contiguous(), b = b_.contiguous(), grad = grad_.contiguous();
  Tensor da = at::empty_like(a), db = at::empty_like(b);
  dispatch_kind(a, BLOCK, tanh, [&](auto element, auto kind, auto past) {
    using T = decltype(element);
    geglu_backward<kind.value, past.value>(
        grad.const_data_ptr<T>(),
        a.const_data_ptr<T>(),
        b.const_data_ptr<T>(),
        da.mutable_data_ptr<T>(),
        db.mutable_data_ptr<T>(),
        a.numel());
  });
  return {da, db};
}

TORCH_LIBRARY_IMPL(fastgpt, CPU, m) {
  m.impl("gelu_fwd_cpp", &gelu_fwd);
  m.impl("gelu_bwd_cpp", &gelu_bwd);
  m.impl("bias_gelu_fwd_cpp", &bias_gelu_fwd);
  m.impl("bias_gelu_bwd_cpp", &bias_gelu_bwd);
  m.impl("geglu_fwd_cpp", &geglu_fwd);
  m.impl("geglu_bwd_cpp", &geglu_bwd);
}

}  // namespace
}  // namespace fastgpt
