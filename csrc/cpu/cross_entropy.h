// The row mathematics of cross-entropy, shared by cross_entropy.cpp and linear_cross_entropy.cpp.
//
// For a row of logits l, target y, class weights w, smoothing ε, z-loss ζ, softcap c:
//   x = c·tanh(l/c) or l;  m = max x_j,  s = Σ exp(x_j - m),  lse = m + log s;  a = (1-ε)·w_y,  b = ε/V,  W = Σ w_j
//   loss    = a·(log s + m - x_y) + b·(W·log s + Σ w_j·(m - x_j)) + ζ·lse²
//   dl_j    = [g·((a + b·W + 2ζ·lse)·p_j - a·[j=y] - b·w_j) + g_lse·p_j]·(1 - (x_j/c)²),  p_j = exp(x_j - m)/s
//
// m and s are two numbers, here and in what is saved for the backward: in their sum lse, log s would be lost beside a
// large m. All terms of Σ w_j·(m - x_j) have one sign, so that none cancels. What an option of 0 switches off is not
// computed: a class weight may be infinite, and 0·inf is NaN.
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

  // The loss of one row; m and s into statistics[0] and [1].
  template <typename T>
  A forward(const T* logits, int64_t y, A* statistics) const {
    Statistics s;
    int64_t i = 0;
    for (; i + GROUP * LANES<A> <= vocab_; i += GROUP * LANES<A>) gather<T, GROUP>(s, logits, i);
    over_vectors<A>(i, vocab_, [&](int64_t j, auto... n) { gather<T, 1>(s, logits, j, n...); });
    statistics[0] = s.top, statistics[1] = lane_sum<A>(s.sum);
    const A log_sum = std::log(statistics[1]);
    if (y == options_.ignore_index) return A(0);
    const A target = read<T>(logits + y, 1)[0];
    const A hard = A(1 - options_.label_smoothing) * (weight_ ? weight_[y] : A(1));
    A loss = hard * (log_sum - (target - s.top));
    if (options_.label_smoothing > 0)
      loss += smooth() * (std::isinf(total_) ? total_ : total_ * log_sum + lane_sum<A>(s.weighted));
    if (options_.z_loss > 0) loss += z_loss(s.top + log_sum);
    return loss;
  }

  // ---- backward ----

  // The gradient of one row into out, which may be the row itself. STREAM: past the caches.
  template <bool STREAM, typename T>
  void backward(const T* logits, T* out, int64_t y, const A* statistics, A grad, A grad_lse) const {
    const bool ignored = y == options_.ignore_index;
    if (ignored) grad = 0;
    const A hard = ignored ? A(0) : A(1 - options_.label_smoothing) * (weight_ ? weight_[y] : A(1));
    const A top = statistics[0], sum = statistics[1];
    A on_p = grad_lse;
    if (!ignored) on_p += grad * on_p_of_loss(hard, top + std::log(sum));
    if (on_p == A(0) && (ignored || grad == A(0))) {
      std::fill(out, out + vocab_, T(0));
      return;
    }
    const A spread = grad * smooth(), cap = A(options_.softcap);
    on_p /= sum;
    const auto of_p = [&](Vector<A> x) { return on_p * exp<IS_FINE<T>>(x - top); };
    const auto gradient = [&](Vector<A> x, Vector<A> w, A less) {
      Vector<A> d = of_p(x) - less;
      if (spread != A(0)) d -= spread * w;
      return cap > A(0) ? d * (A(1) - (x / cap) * (x / cap)) : d;
    };
    const auto plain = [&](int64_t i, auto... n) { return of_p(load<A>(logits + i, n...)); };
    const auto any = [&](int64_t i, auto... n) {
      const Vector<A> w = weight_ ? load<A>(weight_ + i, n...) : broadcast(A(1));
      return gradient(read<T>(logits + i, n...), w, A(0));
    };
    A at_target = 0;  // taken before the row may be overwritten
    if (!ignored) {
      const Vector<A> w = broadcast(weight_ ? weight_[y] : A(1));
      at_target = gradient(read<T>(logits + y, 1), w, grad * hard)[0];
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
  A smooth() const { return A(options_.label_smoothing) / A(vocab_); }  // b
  A z_loss(A lse) const { return A(options_.z_loss) * lse * lse; }
  // a + b·W + 2ζ·lse
  A on_p_of_loss(A hard, A lse) const {
    A factor = hard;
    if (options_.label_smoothing > 0) factor += smooth() * total_;
    if (options_.z_loss > 0) factor += A(2 * options_.z_loss) * lse;
    return factor;
  }

  static constexpr int64_t GROUP = 8;  // vectors between two looks at the maximum

  // 16 bits need no finer exponential than they can hold.
  template <typename T>
  static constexpr bool IS_FINE = sizeof(T) > 2;

  struct Statistics {
    A top = std::numeric_limits<A>::lowest();         // finite, so that a first -inf adds exp(-inf) = 0
    Vector<A> sum = {}, weighted = {}, weights = {};  // Σ exp(x - top), Σ w·(top - x), Σ w
    Vector<A> lost = {};                              // the rounding errors of `weighted`, to be taken from it

    // One masked class of -1e9 must not absorb those after it: a compensated sum (Kahan, 1965).
    [[gnu::always_inline]] void add_weighted(Vector<A> more) {
      const Vector<A> exact = more - lost, next = weighted + exact;
      lost = next - next == A(0) ? (next - weighted) - exact : Vector<A>{};  // 0 beside infinity
      weighted = next;
    }
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
    x[COUNT - 1] = first<A>(x[COUNT - 1], -std::numeric_limits<A>::infinity(), n...);
    Vector<A> largest = x[0];
#pragma GCC unroll 8
    for (int64_t v = 1; v < COUNT; ++v) largest = max(largest, x[v]);
    if (any_above<A>(largest, broadcast(s.top))) {
      const A old = s.top;
      for (int64_t lane = 0; lane < LANES<A>; ++lane) s.top = largest[lane] > s.top ? largest[lane] : s.top;
      s.sum *= exp(broadcast(old - s.top));
      if (options_.label_smoothing > 0 && i > 0) s.weighted += (s.top - old) * s.weights;
    }
    if (options_.label_smoothing > 0) {
      Vector<A> weighted = {};
      for (int64_t v = 0; v < COUNT; ++v) {
        const Vector<A> w = weight_ ? load<A>(weight_ + i + v * LANES<A>, n...) : first<A>(broadcast(A(1)), A(0), n...);
        weighted += first<A>(w * (s.top - x[v]), A(0), n...);
        s.weights += w;
      }
      s.add_weighted(weighted);
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
