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
// Forward: one read of the row (maximum and sum of exponentials together, rescaled from block to
// block). Backward: one read and one write.
#pragma once

#include "kernel.h"

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
    total_ = weight ? sum_over<A>(vocab, [&](int64_t j) { return weight[j]; }) : A(vocab);
  }

  // ---- forward ----

  // The loss of one row; its log-sum-exp into lse.
  template <typename T>
  A forward(const T* logits, int64_t y, double& lse) const {
    A x[BLOCK];
    A top = -std::numeric_limits<A>::infinity(), sum = 0, weighted = 0;
    A origin = 0;  // of the smoothing sum, so that a large common offset does not drown it
    if (vocab_ > 0) read(&origin, logits, 1);
    if (!std::isfinite(origin)) origin = 0;
    for (int64_t i = 0; i < vocab_; i += BLOCK) {
      const int64_t n = std::min(BLOCK, vocab_ - i);
      read(x, logits + i, n);
      if (options_.label_smoothing > 0)
        weighted += weight_ ? sum_over<A>(n, [&](int64_t j) { return weight_[i + j] * (x[j] - origin); })
                            : sum_over<A>(n, [&](int64_t j) { return x[j] - origin; });
      const A block_top = max_of(x, n);
      const A new_top = block_top > top ? block_top : top;
      if (new_top == -std::numeric_limits<A>::infinity() && block_top == new_top) {
        // Nothing but -inf so far, unless a NaN hides among them.
        sum += sum_over<A>(n, [&](int64_t j) { return x[j] != x[j] ? x[j] : A(0); });
        continue;
      }
      sum = sum * vexp(top - new_top) + sum_over<A>(n, [&](int64_t j) { return vexp(x[j] - new_top); });
      top = new_top;
    }
    const A log_sum = std::log(sum);
    lse = double(top) + double(log_sum);
    if (y == options_.ignore_index) return A(0);
    A target;
    read(&target, logits + y, 1);
    const A hard = A(1 - options_.label_smoothing) * (weight_ ? weight_[y] : A(1));
    A loss = hard * (log_sum - (target - top));
    if (options_.label_smoothing > 0)
      loss += A(options_.label_smoothing) / A(vocab_) * (total_ * A(lse - double(origin)) - weighted);
    if (options_.z_loss > 0) loss += A(options_.z_loss * lse * lse);
    return loss;
  }

  // ---- backward ----

  // The gradient of one row into out, which may be the row itself.
  template <typename T>
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
    const A spread = grad * smooth;
    const A cap = A(options_.softcap);
    const A high = A(lse), low = A(lse - double(high));
    A x[BLOCK], d[BLOCK];
    for (int64_t i = 0; i < vocab_; i += BLOCK) {
      const int64_t n = std::min(BLOCK, vocab_ - i);
      read(x, logits + i, n);
      for (int64_t j = 0; j < n; ++j) d[j] = on_p * vexp((x[j] - high) - low);
      if (spread != A(0))
        for (int64_t j = 0; j < n; ++j) d[j] -= spread * (weight_ ? weight_[i + j] : A(1));
      if (!ignored && y >= i && y < i + n) d[y - i] -= grad * hard;
      if (cap > A(0))
        for (int64_t j = 0; j < n; ++j) d[j] *= A(1) - (x[j] / cap) * (x[j] / cap);
      store(out + i, d, n);
    }
  }

 private:
  template <typename T>
  void read(A* x, const T* logits, int64_t n) const {
    load(x, logits, n);
    const A cap = A(options_.softcap);
    if (cap > A(0))
      for (int64_t j = 0; j < n; ++j) x[j] = cap * vtanh(x[j] / cap);
  }

  const A* weight_;
  int64_t vocab_;
  LossOptions options_;
  A total_;
};

}  // namespace fastgpt
