// Cross-entropy of one row, for cross_entropy.cpp. linear_cross_entropy.cpp uses the same formulas.
//
// For a row of logits l, target y, class weights w, smoothing ε, z-loss ζ, softcap c, logit scale k:
//   x = c·tanh(k·l/c), e = 1 with a softcap; x = l, e = k without
//   m = max x_j,  s = Σ exp(e·(x_j - m)),  lse = e·m + log s;  a = (1-ε)·w_y,  b = ε/V,  W = Σ w_j
//   loss  = a·(log s + e·(m - x_y)) + b·(W·log s + e·Σ w_j·(m - x_j)) + ζ·lse²
//   dl_j  = [c_p·exp(e·(x_j - m)) - c_y·[j=y] - c_w·w_j]·(1 - (x_j/c)²)
//           c_p = k·(g·(a + b·W + 2ζ·lse) + g_lse)/s,  c_y = k·g·a,  c_w = k·g·b
//           (g: gradient of the loss, g_lse: of lse)
//
// e multiplies differences from the maximum. e·x_j - e·m, contracted to one fma, would compare an exact product with a
// rounded one.
//
// m and s are kept as two numbers, here and in what is saved for the backward: in the sum lse, log s would be lost
// beside a large m. All terms of Σ w_j·(m - x_j) have one sign, so they do not cancel. A term that an option of 0
// switches off is not computed, because a class weight may be infinite and 0·inf is NaN.
//
// The forward reads the row once: it computes the maximum and the sum of exponentials together, a few vectors at a
// time, and rescales the sum when the maximum grows. The backward reads and writes the row once. All statistics stay in
// registers. Both take about 17 instructions per vector, about as long as memory takes to deliver a vector of float32.
#pragma once

#include "kernel.h"
#include "vector_math.h"

namespace fastgpt {

struct LossOptions {
  int64_t ignore_index;
  double label_smoothing, z_loss, softcap, logit_scale;
};

// Raises PyTorch's error for a target that is out of bounds.
inline void check_targets(const Tensor& target, int64_t vocab, int64_t ignore_index) {
  const int64_t* y = target.const_data_ptr<int64_t>();
  for (int64_t i = 0; i < target.numel(); ++i)
    require<std::out_of_range>(
        y[i] == ignore_index || (y[i] >= 0 && y[i] < vocab), "Target ", y[i], " is out of bounds.");
}

template <typename A>
class CrossEntropyRow {
 public:
  // weight: (V,) or null.
  CrossEntropyRow(const A* weight, int64_t vocab, const LossOptions& options)
      : weight_(weight), vocab_(vocab), options_(options) {
    W_ = weight ? sum_of<A>(vocab, [&](int64_t j, auto... n) { return load<A>(weight + j, n...); }) : A(vocab);
    if (options.softcap <= 0) e_ = A(options.logit_scale);
  }

  // ---- forward ----

  // Returns the loss of one row. Writes m and s to statistics[0] and [1].
  template <typename T>
  A forward(const T* logits, int64_t y, A* statistics) const {
    const Statistics s = e_ == A(1) ? statistics_of<false>(logits) : statistics_of<true>(logits);
    statistics[0] = s.row_max, statistics[1] = lane_sum<A>(s.sum);
    const A log_sum = std::log(statistics[1]);
    if (y == options_.ignore_index) return A(0);
    const A target = read<T>(logits + y, 1)[0];
    A loss = a(y) * (log_sum - e_ * (target - s.row_max));
    if (options_.label_smoothing > 0)
      loss += b() * (std::isinf(W_) ? W_ : W_ * log_sum + lane_sum<A>(rounded<A>(e_ * s.weighted)));
    if (options_.z_loss > 0) loss += z_loss(e_ * s.row_max + log_sum);
    return loss;
  }

  // ---- backward ----

  // Writes the gradient of one row to out, which may be the row itself. STREAMING: with streaming stores.
  template <bool STREAMING, typename T>
  void backward(const T* logits, T* out, int64_t y, const A* statistics, A grad, A grad_lse) const {
    const bool ignored = y == options_.ignore_index;
    if (ignored) grad = 0;
    const A row_max = statistics[0], row_sum = statistics[1];
    A c_p = grad_lse;  // divided by s below
    if (!ignored) c_p += grad * loss_factor_of_p(a(y), e_ * row_max + std::log(row_sum));
    if (c_p == A(0) && (ignored || grad == A(0))) {
      std::fill(out, out + vocab_, T(0));
      return;
    }
    const A cap = A(options_.softcap), k = A(options_.logit_scale);
    const A c_y = ignored ? A(0) : k * (grad * a(y)), c_w = k * (grad * b());
    c_p = k * (c_p / row_sum);
    const auto gradient = [&](Vector<A> x, Vector<A> w, A c_target) {
      Vector<A> d = c_p * exp<IS_FINE<T>>(e_ * (x - row_max)) - c_target;
      if (c_w != A(0)) d -= c_w * w;
      return cap > A(0) ? d * (A(1) - (x / cap) * (x / cap)) : d;
    };
    const auto without_options = [&](int64_t i, auto... n) {
      return c_p * exp<IS_FINE<T>>(load<A>(logits + i, n...) - row_max);
    };
    const auto with_options = [&](int64_t i, auto... n) {
      const Vector<A> w = weight_ ? load<A>(weight_ + i, n...) : broadcast(A(1));
      return gradient(read<T>(logits + i, n...), w, A(0));
    };
    A dl_y = 0;  // computed before the row may be overwritten
    if (!ignored) {
      const Vector<A> w = broadcast(weight_ ? weight_[y] : A(1));
      dl_y = gradient(read<T>(logits + y, 1), w, c_y)[0];
    }
    // Streaming stores start at the first whole cache line of the result.
    const int64_t head = STREAMING ? std::min(vocab_, to_next_line(out)) : 0;
    const auto row = [&](const auto& piece) {
      fill<false, A>(out, 0, head, piece);
      fill<STREAMING, A>(out, head, vocab_, piece);
    };
    c_w != A(0) || cap > A(0) || k != A(1) ? row(with_options) : row(without_options);
    if (!ignored) out[y] = static_cast<T>(dl_y);
  }

 private:
  A a(int64_t y) const { return A(1 - options_.label_smoothing) * (weight_ ? weight_[y] : A(1)); }
  A b() const { return A(options_.label_smoothing) / A(vocab_); }
  A z_loss(A lse) const { return A(options_.z_loss) * lse * lse; }
  // a + b·W + 2ζ·lse
  A loss_factor_of_p(A a, A lse) const {
    A factor = a;
    if (options_.label_smoothing > 0) factor += b() * W_;
    if (options_.z_loss > 0) factor += A(2 * options_.z_loss) * lse;
    return factor;
  }

  static constexpr int64_t GROUP = 8;  // vectors per update of the maximum

  // For 16-bit results the coarse exponential is accurate enough.
  template <typename T>
  static constexpr bool IS_FINE = sizeof(T) > 2;

  struct Statistics {
    A row_max = std::numeric_limits<A>::lowest();     // finite, so that a first -inf adds exp(-inf) = 0
    Vector<A> sum = {}, weighted = {}, weights = {};  // Σ exp(x - row_max), Σ w·(row_max - x), Σ w
    Vector<A> lost = {};                              // the rounding error of `weighted`

    // A compensated sum (Kahan, 1965): a masked class of -1e9 must not absorb the terms after it.
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
    return cap > A(0) ? cap * tanh(x / (cap / A(options_.logit_scale))) : x;
  }

  // SCALED: e is not 1.
  template <bool SCALED, typename T>
  Statistics statistics_of(const T* logits) const {
    Statistics s;
    int64_t i = 0;
    for (; i + GROUP * LANES<A> <= vocab_; i += GROUP * LANES<A>) accumulate<SCALED, T, GROUP>(s, logits, i);
    over_vectors<A>(i, vocab_, [&](int64_t j, auto... n) { accumulate<SCALED, T, 1>(s, logits, j, n...); });
    return s;
  }

  // Adds `COUNT` vectors, starting at element i, to the statistics. Of the last vector only the first n elements count.
  template <bool SCALED, typename T, int64_t COUNT, typename... N>
  [[gnu::always_inline]] void accumulate(Statistics& s, const T* logits, int64_t i, N... n) const {
    Vector<A> x[COUNT];
#pragma GCC unroll 8
    for (int64_t v = 0; v < COUNT; ++v) x[v] = read<T>(logits + i + v * LANES<A>, n...);
    x[COUNT - 1] = first<A>(x[COUNT - 1], -std::numeric_limits<A>::infinity(), n...);
    Vector<A> largest = x[0];
#pragma GCC unroll 8
    for (int64_t v = 1; v < COUNT; ++v) largest = max(largest, x[v]);
    if (any_above<A>(largest, broadcast(s.row_max))) {
      const A old = s.row_max;
      for (int64_t l = 0; l < LANES<A>; ++l) s.row_max = largest[l] > s.row_max ? largest[l] : s.row_max;
      s.sum *= exp(broadcast(e_ * (old - s.row_max)));
      if (options_.label_smoothing > 0 && i > 0) s.weighted += (s.row_max - old) * s.weights;
    }
    if (options_.label_smoothing > 0) {
      Vector<A> weighted = {};
      for (int64_t v = 0; v < COUNT; ++v) {
        const Vector<A> w = weight_ ? load<A>(weight_ + i + v * LANES<A>, n...) : first<A>(broadcast(A(1)), A(0), n...);
        weighted += first<A>(w * (s.row_max - x[v]), A(0), n...);
        s.weights += w;
      }
      s.add_weighted(weighted);
    }
#pragma GCC unroll 8
    for (int64_t v = 0; v < COUNT; ++v) x[v] = exp<IS_FINE<T>>(SCALED ? e_ * (x[v] - s.row_max) : x[v] - s.row_max);
#pragma GCC unroll 4
    for (int64_t width = COUNT / 2; width > 0; width /= 2)
      for (int64_t v = 0; v < width; ++v) x[v] += x[v + width];
    s.sum += x[0];
  }

  const A* weight_;
  int64_t vocab_;
  LossOptions options_;
  A W_, e_ = 1;
};

}  // namespace fastgpt
