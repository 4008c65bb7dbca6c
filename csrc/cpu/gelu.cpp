// GELU, GELU of a biased input and GELU as a gate on the CPU.
//
//   erf:   y = x·Φ(x)                          dy/dx = Φ(x) + x·φ(x),  φ(x) = exp(-x²/2)/√(2π)
//   tanh:  y = x/2·(1 + t), t = tanh(u)        dy/dx = (1 + t)/2 + x/2·(1 - t²)·u'
//          u = √(2/π)·(x + 0.044715·x³)        u' = √(2/π)·(1 + 3·0.044715·x²)
//   geglu: y = gelu(a)·b                       da = dy·b·gelu'(a),  db = dy·gelu(a)
//
// Neither exponential nor division: gelu_terms.h has the tables from which y/x and dy/dx are taken, and their error.
//
// Bytes: the forward reads x and writes y, the backward reads dy and x and writes dx; 20 to 25
// instructions a vector are less than a core does while two vectors of float32 travel, and about what it does for 16
// bits. Large results go past the caches, which saves reading them first.
// dbias is the sum of dx over the rows, taken over a fixed number of parts so that its bits do not depend
// on the number of threads.
#include "checks.h"
#include "gelu_terms.h"
#include "kernel.h"
#include "vector.h"

namespace fastgpt {
namespace {

// y/x
template <bool TANH>
inline Floats share(Floats x) {
  return piecewise(x, SHARE<TANH>);
}
template <bool TANH>
inline Doubles share(Doubles x) {
  return each(x, share_of<TANH>);
}

// dy/dx
template <bool TANH>
inline Floats slope(Floats x) {
  return piecewise(x, SLOPE<TANH>);
}
template <bool TANH>
inline Doubles slope(Doubles x) {
  return each(x, slope_of<TANH>);
}

// ---- forward ----

template <bool TANH, bool STREAM, typename T>
void gelu_forward(const T* x, T* y, int64_t numel) {
  using A = compute_t<T>;
  at::parallel_for(0, blocks(numel), GRAIN / BLOCK, [&](int64_t begin, int64_t end) {
    fill<STREAM, A>(y, begin * BLOCK, std::min(end * BLOCK, numel), [&](int64_t i, auto... n) {
      const Vector<A> z = load<A>(x + i, n...);
      return z * share<TANH>(z);
    });
    if (STREAM) end_stream();
  });
}

template <bool TANH, bool STREAM, typename T>
void bias_gelu_forward(const T* x, const T* bias, T* y, int64_t rows, int64_t size) {
  using A = compute_t<T>;
  at::parallel_for(0, rows, GRAIN / std::max<int64_t>(size, 1) + 1, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row)
      fill<STREAM, A>(y + row * size, 0, size, [&](int64_t j, auto... n) {
        const Vector<A> z = load<A>(x + row * size + j, n...) + load<A>(bias + j, n...);
        return z * share<TANH>(z);
      });
    if (STREAM) end_stream();
  });
}

template <bool TANH, bool STREAM, typename T>
void geglu_forward(const T* a, const T* b, T* y, int64_t numel) {
  using A = compute_t<T>;
  at::parallel_for(0, blocks(numel), GRAIN / BLOCK, [&](int64_t begin, int64_t end) {
    fill<STREAM, A>(y, begin * BLOCK, std::min(end * BLOCK, numel), [&](int64_t i, auto... n) {
      const Vector<A> z = load<A>(a + i, n...);
      return z * share<TANH>(z) * load<A>(b + i, n...);
    });
    if (STREAM) end_stream();
  });
}

// ---- backward ----

template <bool TANH, bool STREAM, typename T>
void gelu_backward(const T* grad, const T* x, T* dx, int64_t numel) {
  using A = compute_t<T>;
  at::parallel_for(0, blocks(numel), GRAIN / BLOCK, [&](int64_t begin, int64_t end) {
    fill<STREAM, A>(dx, begin * BLOCK, std::min(end * BLOCK, numel), [&](int64_t i, auto... n) {
      return load<A>(grad + i, n...) * slope<TANH>(load<A>(x + i, n...));
    });
    if (STREAM) end_stream();
  });
}

template <bool TANH, bool STREAM, typename T>
void geglu_backward(const T* grad, const T* a, const T* b, T* da, T* db, int64_t numel) {
  using A = compute_t<T>;
  at::parallel_for(0, blocks(numel), GRAIN / BLOCK, [&](int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; ++block) {  // the second pass finds its block in the cache
      const int64_t first = block * BLOCK, last = std::min(first + BLOCK, numel);
      fill<STREAM, A>(da, first, last, [&](int64_t i, auto... n) {
        return load<A>(grad + i, n...) * load<A>(b + i, n...) * slope<TANH>(load<A>(a + i, n...));
      });
      fill<STREAM, A>(db, first, last, [&](int64_t i, auto... n) {
        const Vector<A> z = load<A>(a + i, n...);
        return load<A>(grad + i, n...) * (z * share<TANH>(z));
      });
    }
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
        fill<STREAM, A>(dx + row * size, 0, size, [&](int64_t j, auto... n) {
          const int64_t i = row * size + j;
          const Vector<A> z = load<A>(x + i, n...) + load<A>(bias + j, n...);
          const Vector<A> d = load<A>(grad + i, n...) * slope<TANH>(z);
          store<A, A>(sums + j, load<A>(sums + j, n...) + d, n...);
          return d;
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
  Checks("gelu_fwd_cpp", "x", x_);
  const Tensor x = x_.contiguous();
  Tensor y = at::empty_like(x);
  dispatch_kind(x, BLOCK, tanh, [&](auto element, auto kind, auto past) {
    using T = decltype(element);
    gelu_forward<kind.value, past.value>(x.const_data_ptr<T>(), y.mutable_data_ptr<T>(), x.numel());
  });
  return y;
}

Tensor gelu_bwd(const Tensor& grad_, const Tensor& x_, bool tanh) {
  Checks("gelu_bwd_cpp", "x", x_).like("grad", grad_);
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
  Checks("bias_gelu_fwd_cpp", "x", x_)("bias", bias_, {x_.size(-1)}, x_.scalar_type());
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
  Checks("bias_gelu_bwd_cpp", "x", x_)("bias", bias_, {x_.size(-1)}, x_.scalar_type()).like("grad", grad_);
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
  Checks("geglu_fwd_cpp", "a", a_).like("b", b_);
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
  Checks("geglu_bwd_cpp", "a", a_).like("b", b_).like("grad", grad_);
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
