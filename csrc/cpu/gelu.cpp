// GELU, GELU of a biased input and GELU as a gate on the CPU.
//
//   erf:   y = x·Φ(x)                          dy/dx = Φ(x) + x·φ(x),  φ(x) = exp(-x²/2)/√(2π)
//   tanh:  y = x/2·(1 + t), t = tanh(u)        dy/dx = (1 + t)/2 + x/2·(1 - t²)·u'
//          u = √(2/π)·(x + 0.044715·x³)        u' = √(2/π)·(1 + 3·0.044715·x²)
//   geglu: y = gelu(a)·b                       da = dy·b·gelu'(a),  db = dy·gelu(a)
//
// gelu_cdf = y/x and gelu_grad = dy/dx come from the tables of gelu_tables.h, without an exponential or a division.
//
// Bytes moved: the forward reads x and writes y. The backward reads dy and x and writes dx. In float32 the kernels are
// bound by memory: 20 to 25 instructions per vector take less time than moving two vectors. In 16 bits the two times
// are about equal. Large results are written with streaming (non-temporal) stores, which do not read the cache line
// first.
//
// dbias is the sum of dx over the rows. It is computed over a fixed number of row spans, so its bits do not depend on
// the number of threads.
#include "checks.h"
#include "gelu_tables.h"
#include "kernel.h"
#include "vector_math.h"

namespace fastgpt {
namespace {

template <bool TANH>
inline Floats gelu_cdf(Floats x) {
  return piecewise(x, CDF_TABLE<TANH>);
}
template <bool TANH>
inline Doubles gelu_cdf(Doubles x) {
  return each(x, fastgpt::gelu_cdf<TANH>);
}

template <bool TANH>
inline Floats gelu_grad(Floats x) {
  return piecewise(x, GRAD_TABLE<TANH>);
}
template <bool TANH>
inline Doubles gelu_grad(Doubles x) {
  return each(x, fastgpt::gelu_grad<TANH>);
}

// ---- forward ----

template <bool TANH, bool STREAMING, typename T>
void gelu_forward(const T* x, T* y, int64_t numel) {
  using A = compute_t<T>;
  parallel_for(0, blocks(numel), GRAIN / BLOCK, [&](int64_t begin, int64_t end) {
    fill<STREAMING, A>(y, begin * BLOCK, std::min(end * BLOCK, numel), [&](int64_t i, auto... n) {
      const Vector<A> z = load<A>(x + i, n...);
      return z * gelu_cdf<TANH>(z);
    });
    if (STREAMING) end_streaming();
  });
}

template <bool TANH, bool STREAMING, typename T>
void bias_gelu_forward(const T* x, const T* bias, T* y, int64_t rows, int64_t columns) {
  using A = compute_t<T>;
  parallel_for(0, rows, GRAIN / std::max<int64_t>(columns, 1) + 1, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row)
      fill<STREAMING, A>(y + row * columns, 0, columns, [&](int64_t j, auto... n) {
        const Vector<A> z = load<A>(x + row * columns + j, n...) + load<A>(bias + j, n...);
        return z * gelu_cdf<TANH>(z);
      });
    if (STREAMING) end_streaming();
  });
}

template <bool TANH, bool STREAMING, typename T>
void geglu_forward(const T* a, const T* b, T* y, int64_t numel) {
  using A = compute_t<T>;
  parallel_for(0, blocks(numel), GRAIN / BLOCK, [&](int64_t begin, int64_t end) {
    fill<STREAMING, A>(y, begin * BLOCK, std::min(end * BLOCK, numel), [&](int64_t i, auto... n) {
      const Vector<A> z = load<A>(a + i, n...);
      return z * gelu_cdf<TANH>(z) * load<A>(b + i, n...);
    });
    if (STREAMING) end_streaming();
  });
}

// ---- backward ----

template <bool TANH, bool STREAMING, typename T>
void gelu_backward(const T* grad, const T* x, T* dx, int64_t numel) {
  using A = compute_t<T>;
  parallel_for(0, blocks(numel), GRAIN / BLOCK, [&](int64_t begin, int64_t end) {
    fill<STREAMING, A>(dx, begin * BLOCK, std::min(end * BLOCK, numel), [&](int64_t i, auto... n) {
      return load<A>(grad + i, n...) * gelu_grad<TANH>(load<A>(x + i, n...));
    });
    if (STREAMING) end_streaming();
  });
}

template <bool TANH, bool STREAMING, typename T>
void geglu_backward(const T* grad, const T* a, const T* b, T* da, T* db, int64_t numel) {
  using A = compute_t<T>;
  parallel_for(0, blocks(numel), GRAIN / BLOCK, [&](int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; ++block) {  // the second pass finds its block in the cache
      const int64_t first = block * BLOCK, last = std::min(first + BLOCK, numel);
      fill<STREAMING, A>(da, first, last, [&](int64_t i, auto... n) {
        return load<A>(grad + i, n...) * load<A>(b + i, n...) * gelu_grad<TANH>(load<A>(a + i, n...));
      });
      fill<STREAMING, A>(db, first, last, [&](int64_t i, auto... n) {
        const Vector<A> z = load<A>(a + i, n...);
        return load<A>(grad + i, n...) * (z * gelu_cdf<TANH>(z));
      });
    }
    if (STREAMING) end_streaming();
  });
}

// partial (parts, columns): the sum of dx over each of `parts` spans of rows.
template <bool TANH, bool STREAMING, typename T>
void bias_gelu_backward(
    const T* grad,
    const T* x,
    const T* bias,
    T* dx,
    compute_t<T>* partial,
    int64_t parts,
    int64_t rows,
    int64_t columns) {
  using A = compute_t<T>;
  const int64_t span = (rows + parts - 1) / parts;
  parallel_for(0, parts, 1, [&](int64_t begin, int64_t end) {
    for (int64_t part = begin; part < end; ++part) {
      A* sums = partial + part * columns;
      for (int64_t row = part * span; row < std::min(rows, (part + 1) * span); ++row)
        fill<STREAMING, A>(dx + row * columns, 0, columns, [&](int64_t j, auto... n) {
          const int64_t i = row * columns + j;
          const Vector<A> z = load<A>(x + i, n...) + load<A>(bias + j, n...);
          const Vector<A> d = load<A>(grad + i, n...) * gelu_grad<TANH>(z);
          store<A, A>(sums + j, load<A>(sums + j, n...) + d, n...);
          return d;
        });
    }
    if (STREAMING) end_streaming();
  });
}

// ---- launchers ----

// Calls f(element, kind, streaming). kind: whether the formula is tanh. streaming: whether to use streaming stores.
template <typename F>
void dispatch_kind(const Tensor& x, int64_t row, bool tanh, F&& f) {
  dispatch(x.scalar_type(), "gelu", [&](auto element) {
    // Each row must begin at a multiple of the vector size.
    const bool streaming =
        is_streamed<decltype(element)>(x.numel()) && row * static_cast<int64_t>(x.element_size()) % VECTOR_BYTES == 0;
    const auto kind = [&](auto is_tanh) {
      streaming ? f(element, is_tanh, std::true_type{}) : f(element, is_tanh, std::false_type{});
    };
    tanh ? kind(std::true_type{}) : kind(std::false_type{});
  });
}

Tensor gelu_fwd(const Tensor& x_, bool tanh) {
  Checks("gelu_fwd_cpp", "x", x_);
  const Tensor x = contiguous(x_);
  Tensor y = empty_like(x);
  dispatch_kind(x, BLOCK, tanh, [&](auto element, auto kind, auto streaming) {
    using T = decltype(element);
    gelu_forward<kind.value, streaming.value>(x.const_data_ptr<T>(), y.mutable_data_ptr<T>(), x.numel());
  });
  return y;
}

Tensor gelu_bwd(const Tensor& grad_, const Tensor& x_, bool tanh) {
  Checks("gelu_bwd_cpp", "x", x_).like("grad", grad_);
  const Tensor x = contiguous(x_), grad = contiguous(grad_);
  Tensor dx = empty_like(x);
  dispatch_kind(x, BLOCK, tanh, [&](auto element, auto kind, auto streaming) {
    using T = decltype(element);
    gelu_backward<kind.value, streaming.value>(
        grad.const_data_ptr<T>(), x.const_data_ptr<T>(), dx.mutable_data_ptr<T>(), x.numel());
  });
  return dx;
}

Tensor bias_gelu_fwd(const Tensor& x_, const Tensor& bias_, bool tanh) {
  Checks("bias_gelu_fwd_cpp", "x", x_)("bias", bias_, {x_.size(-1)}, x_.scalar_type());
  const Tensor x = contiguous(x_), bias = contiguous(bias_);
  Tensor y = empty_like(x);
  const int64_t columns = bias.numel(), rows = columns ? x.numel() / columns : 0;
  dispatch_kind(x, columns, tanh, [&](auto element, auto kind, auto streaming) {
    using T = decltype(element);
    bias_gelu_forward<kind.value, streaming.value>(
        x.const_data_ptr<T>(), bias.const_data_ptr<T>(), y.mutable_data_ptr<T>(), rows, columns);
  });
  return y;
}

std::tuple<Tensor, Tensor> bias_gelu_bwd(const Tensor& grad_, const Tensor& x_, const Tensor& bias_, bool tanh) {
  Checks("bias_gelu_bwd_cpp", "x", x_)("bias", bias_, {x_.size(-1)}, x_.scalar_type()).like("grad", grad_);
  const Tensor x = contiguous(x_), bias = contiguous(bias_), grad = contiguous(grad_);
  Tensor dx = empty_like(x);
  const int64_t columns = bias.numel(), rows = columns ? x.numel() / columns : 0;
  const int64_t parts = row_parts(rows);
  const ScalarType acc = accumulator(x.scalar_type());
  Tensor partial = zeros({parts, columns}, acc);
  dispatch_kind(x, columns, tanh, [&](auto element, auto kind, auto streaming) {
    using T = decltype(element);
    bias_gelu_backward<kind.value, streaming.value>(
        grad.const_data_ptr<T>(),
        x.const_data_ptr<T>(),
        bias.const_data_ptr<T>(),
        dx.mutable_data_ptr<T>(),
        partial.mutable_data_ptr<compute_t<T>>(),
        parts,
        rows,
        columns);
  });
  return {dx, to(sum_rows(partial, acc), bias.scalar_type())};
}

Tensor geglu_fwd(const Tensor& a_, const Tensor& b_, bool tanh) {
  Checks("geglu_fwd_cpp", "a", a_).like("b", b_);
  const Tensor a = contiguous(a_), b = contiguous(b_);
  Tensor y = empty_like(a);
  dispatch_kind(a, BLOCK, tanh, [&](auto element, auto kind, auto streaming) {
    using T = decltype(element);
    geglu_forward<kind.value, streaming.value>(
        a.const_data_ptr<T>(), b.const_data_ptr<T>(), y.mutable_data_ptr<T>(), a.numel());
  });
  return y;
}

std::tuple<Tensor, Tensor> geglu_bwd(const Tensor& grad_, const Tensor& a_, const Tensor& b_, bool tanh) {
  Checks("geglu_bwd_cpp", "a", a_).like("b", b_).like("grad", grad_);
  const Tensor a = contiguous(a_), b = contiguous(b_), grad = contiguous(grad_);
  Tensor da = empty_like(a), db = empty_like(b);
  dispatch_kind(a, BLOCK, tanh, [&](auto element, auto kind, auto streaming) {
    using T = decltype(element);
    geglu_backward<kind.value, streaming.value>(
        grad.const_data_ptr<T>(),
        a.const_data_ptr<T>(),
        b.const_data_ptr<T>(),
        da.mutable_data_ptr<T>(),
        db.mutable_data_ptr<T>(),
        a.numel());
  });
  return {da, db};
}

STABLE_TORCH_LIBRARY_IMPL(fastgpt, CPU, m) {
  m.impl("gelu_fwd_cpp", TORCH_BOX(&gelu_fwd));
  m.impl("gelu_bwd_cpp", TORCH_BOX(&gelu_bwd));
  m.impl("bias_gelu_fwd_cpp", TORCH_BOX(&bias_gelu_fwd));
  m.impl("bias_gelu_bwd_cpp", TORCH_BOX(&bias_gelu_bwd));
  m.impl("geglu_fwd_cpp", TORCH_BOX(&geglu_fwd));
  m.impl("geglu_bwd_cpp", TORCH_BOX(&geglu_bwd));
}

}  // namespace
}  // namespace fastgpt
