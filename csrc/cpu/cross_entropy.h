// The row mathematics of cross-entropy, shared by cross_entropy.cpp and linear_cross_entropy.cpp.
//
// For a row of logits l, target y, class weights w, smoothing ε, z-loss ζ, softcap c:
//   x = c·tanh(l/c) or l;  lse = log Σ exp(x_j);  a = (1-ε)·w_y,  b = ε/V,  W = Σ w_j
//   loss    = a·(lse - x_y) + b·(W·lse - Σ w_j·x_j) + ζ·lse²
//   dl_j    = [g·((a + b·W + 2ζ·lse)·p_j - a·[j=y] - b·w_j) + g_lse·p_j]·(1 - (x_j/c)²),  p_j = exp(x_j - lse)
//
// lse is kept in double and x - lse taken in two steps, so that p keeps its digits where the logits are
// large; the loss takes log Σ exp(x_j - max) and x_y - max apart for the same reason.
//
// Forward: one read of the row (maximum and sum of exponentials together, a few vectors at a time, the sum
// rescaled when the maximum grows). Backward: one read and one write. All statistics stay in registers.
// About 17 instructions a vector of either pass, what a core does while one vector of float32 travels.
#pragma once

#include "kernel.h"
#include "vector.h"

namespace fastgpt {

struct LossOptions {
  int64_t ignore_index;
  double label_smoothing, z_loss, softcap;
};

// Raises PyTorch's own error before any row is read through a target.
inline void check_targets(const Tensor& target, int64_t vocab, int64_t ignore_index) {
  const int64_t* y = target.const_data_ptr<int64_t>();
  for (int64_t i = 0; i < target.numel(); ++i)
    TORCH_CHECK_INDEX(y[i] == ignore_index || (y[i] >= 0 && y[i] < vocab), "Target ", y[i], " is out of bounds.");
}

template <typename A>
class CrossEntropyRow {
 public:
  // weight: (V,) or null.
  CrossEntropyRow(const A* weight, int64_t vocab, const LossOptions& options)
      : weight_(weight), vocab_(vocab), options_(options) {
    total_ = weight ? sum_of<A>(vocab, [&](int64_t j, auto... n) { return load<A>(weight + j, n...); }) : A(vocab);
  }

  // ---- forward ----

  // The loss of one row; its log-sum-exp into lse.
  template <typename T>
  A forward(const T* logits, int64_t y, double& lse) const {
    Statistics s;
    if (vocab_ > 0) s.origin = read<T>(logits, 1)[0];
    if (!std::isfinite(s.origin)) s.origin = 0;
    int64_t i = 0;
    for (; i + GROUP * LANES<A> <= vocab_; i += GROUP * LANES<A>) gather<T, GROUP>(s, logits, i);
    over_vectors<A>(i, vocab_, [&](int64_t j, auto... n) { gather<T, 1>(s, logits, j, n...); });
    const A log_sum = std::log(lane_sum<A>(s.sum));
    lse = double(s.top) + double(log_sum);
    if (y == options_.ignore_index) return A(0);
    const A target = read<T>(logits + y, 1)[0];
    const A hard = A(1 - options_.label_smoothing) * (weight_ ? weight_[y] : A(1));
    A loss = hard * (log_sum - (target - s.top));
    if (options_.label_smoothing > 0)
      loss += A(options_.label_smoothing) / A(vocab_) * (total_ * A(lse - double(s.origin)) - lane_sum<A>(s.weighted));
    if (options_.z_loss > 0) loss += A(options_.z_loss * lse * lse);
    return loss;
  }

  // ---- backward ----

  // The gradient of one row into out, which may be the row itself. STREAM: past the caches.
  template <bool STREAM, typename T>
  void backward(const T* logits, T* out, int64_t y, double lse, A grad, A grad_lse) const {
    const bool ignored = y == options_.ignore_index;
    if (ignored) grad = 0;
    const A hard = ignored ? A(0) : A(1 - options_.label_smoothing) * (weight_ ? weight_[y] : A(1));
    const A smooth = A(options_.label_smoothing) / A(vocab_);
    const A on_p = (ignored ? A(0) : grad * (hard + smooth * total_ + A(2 * options_.z_loss * lse))) + grad_lse;
    if (on_p == A(0) && (ignored || grad == A(0))) {
      std::fill(out, out + vocab_, T(0));
      return;
    }
    const A spread = grad * smooth, cap = A(options_.softcap), high = A(lse), low = A(lse - double(high));
    const auto of_p = [&](Vector<A> x) { return on_p * exp<IS_FINE<T>>((x - high) - low); };
    const auto gradient = [&](Vector<A> x, Vector<A> less) {
      const Vector<A> d = of_p(x) - less;
      return cap > A(0) ? d * (A(1) - (x / cap) * (x / cap)) : d;
    };
    const auto plain = [&](int64_t i, auto... n) { return of_p(load<A>(logits + i, n...)); };
    const auto any = [&](int64_t i, auto... n) {
      const Vector<A> w = weight_ ? load<A>(weight_ + i, n...) : broadcast(A(1));
      return gradient(read<T>(logits + i, n...), spread * w);
    };
    A at_target = 0;  // taken before the row may be overwritten
    if (!ignored) {
      const A less = spread * (weight_ ? weight_[y] : A(1)) + grad * hard;
      at_target = gradient(read<T>(logits + y, 1), broadcast(less))[0];
    }
    // Up to the first whole line of the result's memory, where streaming begins.
    const int64_t head = STREAM ? std::min(vocab_, to_whole_line(out)) : 0;
    const auto row = [&](const auto& piece) {
      fill<false, A>(out, 0, head, piece);
      fill<STREAM, A>(out, head, vocab_, piece);
    };
    spread != A(0) || cap > A(0) ? row(any) : row(plain);
    if (!ignored) out[y] = static_cast<T>(at_target);
  }

 private:
  static constexpr int64_t GROUP = 8;  // vectors between two looks at the maximum

  // 16 bits need no finer exponential than they can hold.
  template <typename T>
  static constexpr bool IS_FINE = sizeof(T) > 2;

  struct Statistics {
    A top = std::numeric_limits<A>::lowest();  // finite, so that a first -inf adds exp(-inf) = 0
    A origin = 0;                              // of the smoothing sum, so that a large common offset does not drown it
    Vector<A> sum = {}, weighted = {};
  };

  template <typename T, typename... N>
  [[gnu::always_inline]] Vector<A> read(const T* logits, N... n) const {
    const Vector<A> x = load<A>(logits, n...);
    const A cap = A(options_.softcap);
    return cap > A(0) ? cap * tanh(x / cap) : x;
  }

  // Adds `COUNT` vectors from element i to the statistics; of the last one the first n elements.
  template <typename T, int64_t COUNT, typename... N>
  [[gnu::always_inline]] void gather(Statistics& s, const T* logits, int64_t i, N... n) const {
    Vector<A> x[COUNT];
#pragma GCC unroll 8
    for (int64_t v = 0; v < COUNT; ++v) x[v] = read<T>(logits + i + v * LANES<A>, n...);
    if (options_.label_smoothing > 0)
      for (int64_t v = 0; v < COUNT; ++v) {
        const Vector<A> shifted = first<A>(x[v] - s.origin, A(0), n...);
        s.weighted += weight_ ? load<A>(weight_ + i + v * LANES<A>, n...) * shifted : shifted;
      }
    x[COUNT - 1] = first<A>(x[COUNT - 1], -std::numeric_limits<A>::infinity(), n...);
    Vector<A> largest = x[0];
#pragma GCC unroll 8
    for (int64_t v = 1; v < COUNT; ++v) largest = max(largest, x[v]);
    if (any_above<A>(largest, broadcast(s.top))) {
      const A old = s.top;
      for (int64_t lane = 0; lane < LANES<A>; ++lane) s.top = largest[lane] > s.top ? largest[lane] : s.top;
      s.sum *= exp(broadcast(old - s.top));
    }
#pragma GCC unroll 8
    for (int64_t v = 0; v < COUNT; ++v) x[v] = exp<IS_FINE<T>>(x[v] - s.top);
#pragma GCC unroll 4
    for (int64_t width = COUNT / 2; width > 0; width /= 2)
      for (int64_t v = 0; v < width; ++v) x[v] += x[v + width];
    s.sum += x[0];
  }

  const A* weight_;
  int64_t vocab_;
  LossOptions options_;
  A total_;
};

}  // namespace fastgpt
