// SwiGLU, SiLU as a gate, on the CPU.
//
//   y = silu(a)·b,  silu(x) = x·σ(x),  σ(x) = 1/(1 + exp(-x))
//   da = dy·b·silu'(a),  silu'(x) = σ(x) + silu(x)·(1 - σ(x)),  db = dy·silu(a)
//
// Bytes moved: the forward reads a and b and writes y. The backward reads dy, a and b and writes da and db, in one pass
// with one exponential and one division per element. Large results are written with streaming (non-temporal) stores.
#include "checks.h"
#include "kernel.h"
#include "vector_math.h"

namespace fastgpt {
namespace {

// σ(x) from t = exp(-|x|), which is at most 1: 1/(1 + t), and t/(1 + t) for a negative x. Far to the left σ is 0 and
// silu is -0; silu(-inf) is NaN, as in PyTorch. FINE: as in exp.
template <bool FINE>
[[gnu::always_inline]] inline Floats sigmoid(Floats x) {
  const Floats t = exp<FINE>(bit_cast<Floats>(bit_cast<Bits>(x) | 0x80000000u)), d = 1.0f + t;
#if defined(__AVX512F__)
  // One step of Newton's method from an estimate of 14 bits, with FMA, is faster than a division.
  const Floats r = _mm512_rcp14_ps(d);
  const Floats inverse = _mm512_fmadd_ps(r, _mm512_fnmadd_ps(d, r, broadcast(1.0f)), r);
#else
  const Floats inverse = 1.0f / d;
#endif
  return x < 0.0f ? t * inverse : inverse;
}
template <bool FINE>
[[gnu::always_inline]] inline Doubles sigmoid(Doubles x) {
  return 1.0 / (1.0 + exp(-x));
}

template <typename V>
struct SiluAndGrad {
  V value, grad;
};
template <bool FINE, typename V>
[[gnu::always_inline]] inline SiluAndGrad<V> silu_and_grad(V x) {
  const V s = sigmoid<FINE>(x), y = x * s;
  return {y, s + y * (1 - s)};
}

// Results of 16 bits need only the coarse exponential.
template <typename T>
constexpr bool FINE_EXP = sizeof(T) > 2;

// Requests what lies a page after p. The hardware prefetchers stop at the end of a page.
template <typename T>
[[gnu::always_inline]] inline void prefetch_next_page(const T* p) {
  __builtin_prefetch(reinterpret_cast<const void*>(reinterpret_cast<uintptr_t>(p) + 4096));
}

template <bool STREAMING, typename T>
void swiglu_forward(const T* a, const T* b, T* y, int64_t numel) {
  using A = compute_t<T>;
  parallel_for(0, blocks(numel), GRAIN / BLOCK, [&](int64_t begin, int64_t end) {
    fill<STREAMING, A>(y, begin * BLOCK, std::min(end * BLOCK, numel), [&](int64_t i, auto... n) {
      if (STREAMING) prefetch_next_page(a + i), prefetch_next_page(b + i);
      const Vector<A> z = load<A>(a + i, n...);
      return z * sigmoid<FINE_EXP<T>>(z) * load<A>(b + i, n...);
    });
    if (STREAMING) end_streaming();
  });
}

template <bool STREAMING, typename T>
void swiglu_backward(const T* grad, const T* a, const T* b, T* da, T* db, int64_t numel) {
  using A = compute_t<T>;
  parallel_for(0, blocks(numel), GRAIN / BLOCK, [&](int64_t begin, int64_t end) {
    fill_two<STREAMING, A>(da, db, begin * BLOCK, std::min(end * BLOCK, numel), [&](int64_t i, auto... n) {
      if (STREAMING) prefetch_next_page(grad + i), prefetch_next_page(a + i), prefetch_next_page(b + i);
      const Vector<A> dy = load<A>(grad + i, n...);
      const auto silu = silu_and_grad<FINE_EXP<T>>(load<A>(a + i, n...));
      return Two<A>{dy * load<A>(b + i, n...) * silu.grad, dy * silu.value};
    });
    if (STREAMING) end_streaming();
  });
}

// ---- launchers ----

Tensor swiglu_fwd(const Tensor& a_, const Tensor& b_) {
  Checks("swiglu_fwd_cpp", "a", a_).like("b", b_);
  const Tensor a = contiguous(a_), b = contiguous(b_);
  Tensor y = empty_like(a);
  dispatch_streaming(a, "swiglu", [&](auto element, auto streaming) {
    using T = decltype(element);
    swiglu_forward<streaming.value>(a.const_data_ptr<T>(), b.const_data_ptr<T>(), y.mutable_data_ptr<T>(), a.numel());
  });
  return y;
}

std::tuple<Tensor, Tensor> swiglu_bwd(const Tensor& grad_, const Tensor& a_, const Tensor& b_) {
  Checks("swiglu_bwd_cpp", "a", a_).like("b", b_).like("grad", grad_);
  const Tensor a = contiguous(a_), b = contiguous(b_), grad = contiguous(grad_);
  Tensor da = empty_like(a), db = empty_like(b);
  dispatch_streaming(a, "swiglu", [&](auto element, auto streaming) {
    using T = decltype(element);
    swiglu_backward<streaming.value>(
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
  m.impl("swiglu_fwd_cpp", TORCH_BOX(&swiglu_fwd));
  m.impl("swiglu_bwd_cpp", TORCH_BOX(&swiglu_bwd));
}

}  // namespace
}  // namespace fastgpt
