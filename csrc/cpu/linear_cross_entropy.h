// Cross-entropy of a linear layer's output on the CPU, a chunk of rows at a time; cross_entropy.h has the
// mathematics of the loss.
//
//   logits = hidden·weightᵀ + bias        2·N·D·V FLOP, each of three products
//   dhidden = dlogits·weight,  dweight = dlogitsᵀ·hidden,  dbias = Σ dlogits
//
// The logits of a chunk lie transposed, a class a row, so that a vector holds LANES rows of hidden and their
// statistics are vectors. Forward: SLICE classes at a time are multiplied, brought into the running maximum and sum,
// and kept as e = exp(x - running maximum), the one exponential of each; no more than one chunk of them exists.
// Gradients: e becomes dlogits in place (one factor a row and slice), and a BLOCK_V of classes at a time goes
// into dweight, which is float32 and added up over the chunks, and into dhidden. Backward from a given lse: the same,
// but the logits are computed again and never kept (four products).
//
// The classes are divided into PARTS whatever the number of threads, each with its own statistics and its own
// dhidden, so that no bit depends on it. The gradients of the forward are those of the sum of the losses, in
// float32, so that scaling them later neither under- nor overflows in half precision.
//
// Bytes beside the products, which are at the rate of the matrix product: weight is read twice a chunk and
// dweight read and written once; the chunk's logits are written, read and written by those who need them next.
#pragma once

#include "cross_entropy.h"
#include "gemm.h"

namespace fastgpt {

constexpr int64_t SLICE = 64, BLOCK_V = 256, PARTS = 16;

// Rows of a chunk: a quarter of all, so that what is kept is an eighth of what logits and their gradient would take,
// or less. More than 256 rows no longer fit into a second-level cache; fewer add passes over weight and dweight.
inline int64_t chunk_rows(int64_t asked, int64_t rows) {
  const int64_t automatic = std::clamp<int64_t>((rows + 3) / 4, 64, 256);
  return std::clamp<int64_t>(asked > 0 ? asked : automatic, 1, std::max<int64_t>(rows, 1));
}

// What the loss and its gradient need to know of the rows of a chunk, one value a lane.
template <typename A>
struct Lanes {
  std::vector<A> top;                        // m
  std::vector<A> on_exp, spread, on_target;  // the factors of exp(x - m), of the class weight and of [class = target]
  explicit Lanes(int64_t n) : top(n), on_exp(n), spread(n), on_target(n) {}
};

template <typename T>
class Chunks {
  using A = compute_t<T>;
  using E = factor_t<T>;
  using U = Unit<E>;

 public:
  Chunks(
      const Tensor& hidden,
      const Tensor& weight,
      const A* bias,
      const int64_t* target,
      const A* class_weight,
      const LossOptions& options,
      int64_t chunk)
      : hidden_(hidden.const_data_ptr<T>()),
        weight_(weight.const_data_ptr<T>()),
        bias_(bias),
        class_weight_(class_weight),
        target_(target),
        options_(options),
        rows_(hidden.size(0)),
        size_(hidden.size(1)),
        vocab_(weight.size(0)),
        step_(chunk_rows(chunk, rows_)),
        lanes_(padded<U>(step_)),
        depth_(padded<U>(units<E>(size_))),
        width_(padded<U>(size_)),
        parts_(std::clamp<int64_t>((vocab_ + BLOCK_V - 1) / BLOCK_V, 1, PARTS)) {
    total_ = class_weight ? sum_of<A>(vocab_, [&](int64_t j, auto... n) { return load<A>(class_weight + j, n...); })
                          : A(vocab_);
  }

  // ---- forward, with the gradients of the sum of the losses where dhidden is given ----

  void forward(A* loss, A* statistics, bool with_grad, A* dhidden, A* dweight, A* dbias) {
    const int64_t slices = (vocab_ + SLICE - 1) / SLICE;
    std::vector<Statistics> parts(parts_, Statistics(lanes_));
    kept_.reset(with_grad ? new E[vocab_ * lanes_] : nullptr);
    tops_.reset(with_grad ? new A[slices * lanes_] : nullptr);
    x_target_.resize(lanes_);
    for (begin_ = 0; begin_ < rows_; begin_ += step_) {
      start_chunk(with_grad);
      Lanes<A> lanes(lanes_);
      at::parallel_for(0, parts_, 1, [&](int64_t first, int64_t last) {
        Space space(*this);
        for (int64_t part = first; part < last; ++part) gather(parts[part], span(part), space);
      });
      for (int64_t r = 0; r < n_; ++r) {
        A* const both = statistics + 2 * (begin_ + r);
        loss[begin_ + r] = loss_of(r, parts, both);
        set_lane(lanes, r, both, A(1));
      }
      if (with_grad) gradients(lanes, dhidden, dweight, dbias);
    }
  }

  // ---- backward, for upstream gradients that differ from row to row: the logits are computed again ----

  void backward(const A* grad, const A* statistics, A* dhidden, A* dweight, A* dbias) {
    x_target_.resize(lanes_);
    for (begin_ = 0; begin_ < rows_; begin_ += step_) {
      start_chunk(true);
      Lanes<A> lanes(lanes_);
      for (int64_t r = 0; r < n_; ++r) set_lane(lanes, r, statistics + 2 * (begin_ + r), grad[begin_ + r]);
      gradients(lanes, dhidden, dweight, dbias);
    }
  }

 private:
  // A running softmax over the classes of a part.
  struct Statistics {
    std::vector<A> top, sum, weighted;  // max x, Σ exp(x - top), Σ w·(top - x)
    A total = 0;                        // Σ w
    explicit Statistics(int64_t n) : top(n), sum(n), weighted(n) {}
  };

  // What a thread works in.
  struct Space {
    std::vector<U> rows, pairs, keys;
    std::vector<A> logits, product;
    std::vector<E> block;
    explicit Space(const Chunks& c) : logits(SLICE * c.lanes_) {}
  };

  struct Classes {
    int64_t begin, end;
  };
  Classes span(int64_t part) const {
    const int64_t blocks = (vocab_ + BLOCK_V - 1) / BLOCK_V;
    return {blocks * part / parts_ * BLOCK_V, std::min(vocab_, blocks * (part + 1) / parts_ * BLOCK_V)};
  }

  bool ignored(int64_t r) const { return target_[begin_ + r] == options_.ignore_index; }
  A weight_of(int64_t v) const { return class_weight_ ? class_weight_[v] : A(1); }
  A smooth() const { return A(options_.label_smoothing) / A(vocab_); }

  void start_chunk(bool with_grad) {
    n_ = std::min(step_, rows_ - begin_);
    const T* h = hidden_ + begin_ * size_;
    packed_.assign(lanes_ * depth_, U(0));
    turned_.resize(depth_ * lanes_);
    pack_rows<E>(packed_.data(), depth_, h, size_, n_, size_);
    for (int64_t r = 0; r < lanes_; r += GEMM_N<U>)
      transpose(&turned_[r * depth_], GEMM_N<U>, &packed_[r * depth_], depth_, GEMM_N<U>, units<E>(size_));
    if (with_grad) by_row_ = second_factor<E>(second_, h, size_, n_, size_);
  }

  // logits (classes, lanes) of [v, v + n), with bias and softcap.
  void project(int64_t v, int64_t n, Space& space) const {
    const Operand<U> w = first_factor<E>(space.rows, weight_ + v * size_, size_, n, size_);
    gemm<false>(
        n, lanes_, units<E>(size_), w, Operand<U>{turned_.data(), GEMM_N<U>, depth_}, space.logits.data(), lanes_);
    const A cap = A(options_.softcap);
    if (!bias_ && cap <= A(0)) return;
    for (int64_t c = 0; c < n; ++c)
      over_vectors<A>(0, lanes_, [&](int64_t r, auto...) {
        A* at = &space.logits[c * lanes_ + r];
        const Vector<A> x = load<A>(at) + (bias_ ? bias_[v + c] : A(0));
        store<A, A>(at, cap > A(0) ? cap * tanh(x / cap) : x);
      });
  }

  // Calls f(r, class - v) for the rows whose target is among the classes [v, v + n).
  template <typename F>
  void for_targets(int64_t v, int64_t n, F&& f) const {
    for (int64_t r = 0; r < n_; ++r) {
      const int64_t y = target_[begin_ + r] - v;
      if (y >= 0 && y < n && !ignored(r)) f(r, y);
    }
  }

  // The statistics of the classes of a part; their exponentials are kept if there is room for them.
  void gather(Statistics& s, Classes classes, Space& space) {
    std::fill(s.top.begin(), s.top.end(), std::numeric_limits<A>::lowest());
    std::fill(s.sum.begin(), s.sum.end(), A(0));
    std::fill(s.weighted.begin(), s.weighted.end(), A(0));
    s.total = 0;
    const bool smooths = options_.label_smoothing > 0;
    for (int64_t v = classes.begin; v < classes.end; v += SLICE) {
      const int64_t n = std::min(SLICE, classes.end - v);
      project(v, n, space);
      for_targets(v, n, [&](int64_t r, int64_t y) { x_target_[r] = space.logits[y * lanes_ + r]; });
      for (int64_t r = 0; r < lanes_; r += LANES<A>) gather_lanes(s, v, n, v > classes.begin, r, &space.logits[r]);
      if (smooths)
        for (int64_t c = 0; c < n; ++c) s.total += weight_of(v + c);
    }
  }

  // LANES rows from r of the logits of n classes; `more`: not the first of the part.
  void gather_lanes(Statistics& s, int64_t v, int64_t n, bool more, int64_t r, const A* x) {
    const Vector<A> old = load<A>(&s.top[r]);
    Vector<A> top = old, sum = {};
    for (int64_t c = 0; c < n; ++c) top = max(load<A>(x + c * lanes_), top);
    for (int64_t c = 0; c < n; ++c) {
      const Vector<A> e = exp<FOLD<E> == 1>(load<A>(x + c * lanes_) - top);
      sum += e;
      // With a softcap the gradient needs the logit itself.
      if (kept_) store<E, A>(&kept_[(v + c) * lanes_ + r], options_.softcap > 0 ? load<A>(x + c * lanes_) : e);
    }
    if (options_.label_smoothing > 0) {
      Vector<A> weighted = {};
      if (more) weighted = (top - old) * s.total;
      for (int64_t c = 0; c < n; ++c) weighted += weight_of(v + c) * (top - load<A>(x + c * lanes_));
      store<A, A>(&s.weighted[r], load<A>(&s.weighted[r]) + weighted);
    }
    store<A, A>(&s.sum[r], load<A>(&s.sum[r]) * exp(old - top) + sum);
    store<A, A>(&s.top[r], top);
    if (tops_) store<A, A>(&tops_[v / SLICE * lanes_ + r], top);
  }

  // The loss of row r from the statistics of all parts; m and s into both[0] and [1].
  A loss_of(int64_t r, const std::vector<Statistics>& parts, A* both) const {
    A top = std::numeric_limits<A>::lowest(), sum = 0;
    for (const Statistics& s : parts) top = s.top[r] > top ? s.top[r] : top;
    for (const Statistics& s : parts) sum += s.sum[r] * std::exp(s.top[r] - top);
    const A log_sum = std::log(sum);
    both[0] = top, both[1] = sum;
    if (ignored(r)) return A(0);
    const A hard = A(1 - options_.label_smoothing) * weight_of(target_[begin_ + r]);
    A loss = hard * (log_sum - (x_target_[r] - top));
    if (options_.label_smoothing > 0) {
      A weighted = total_ * log_sum;
      for (const Statistics& s : parts) weighted += s.weighted[r] + s.total * (top - s.top[r]);
      loss += smooth() * (std::isinf(total_) ? total_ : weighted);
    }
    if (options_.z_loss > 0) loss += A(options_.z_loss) * (top + log_sum) * (top + log_sum);
    return loss;
  }

  void set_lane(Lanes<A>& lanes, int64_t r, const A* both, A grad) const {
    if (ignored(r)) grad = 0;
    const A hard = ignored(r) ? A(0) : A(1 - options_.label_smoothing) * weight_of(target_[begin_ + r]);
    A on_p = hard;
    if (options_.label_smoothing > 0) on_p += smooth() * total_;
    if (options_.z_loss > 0) on_p += A(2 * options_.z_loss) * (both[0] + std::log(both[1]));
    lanes.top[r] = both[0];
    lanes.spread[r] = grad * smooth(), lanes.on_target[r] = grad * hard;
    lanes.on_exp[r] = grad == A(0) ? A(0) : grad * on_p / both[1];
  }

  // ---- gradients of a chunk ----

  void gradients(const Lanes<A>& lanes, A* dhidden, A* dweight, A* dbias) {
    sums_.resize(parts_ * step_ * width_);
    at::parallel_for(0, parts_, 1, [&](int64_t first, int64_t last) {
      Space space(*this);
      space.block.resize(kept_ ? 0 : BLOCK_V * lanes_);
      for (int64_t part = first; part < last; ++part) {
        const Classes classes = span(part);
        for (int64_t v = classes.begin; v < classes.end; v += BLOCK_V) {
          const int64_t n = std::min(BLOCK_V, classes.end - v);
          E* const d = kept_ ? &kept_[v * lanes_] : space.block.data();
          for (int64_t c = 0; c < n; c += SLICE)
            slice_gradient(lanes, v + c, std::min(SLICE, n - c), d + c * lanes_, space);
          if (dbias)
            for (int64_t c = 0; c < n; ++c)
              dbias[v + c] +=
                  sum_of<A>(lanes_, [&](int64_t r, auto... some) { return load<A>(d + c * lanes_ + r, some...); });
          add_to_weight(dweight + v * size_, n, reinterpret_cast<const U*>(d), space);
          add_to_hidden(&sums_[part * step_ * width_], v, n, v > classes.begin, d, space);
        }
      }
    });
    at::parallel_for(0, n_, 16, [&](int64_t first, int64_t last) {
      for (int64_t r = first; r < last; ++r)
        over_vectors<A>(0, size_, [&](int64_t j, auto... n) {
          Vector<A> x = {};
          for (int64_t part = 0; part < parts_; ++part) x += load<A>(&sums_[(part * step_ + r) * width_ + j], n...);
          store<A, A>(dhidden + (begin_ + r) * size_ + j, x, n...);
        });
    });
  }

  // dlogits of n classes from v into d (classes, lanes): over what was kept of them, or from the logits again.
  void slice_gradient(const Lanes<A>& lanes, int64_t v, int64_t n, E* d, Space& space) {
    const A cap = A(options_.softcap);
    const bool again = !kept_, exponents = kept_ && cap <= A(0), smooths = options_.label_smoothing > 0;
    if (again) {
      project(v, n, space);
      for_targets(v, n, [&](int64_t r, int64_t y) { x_target_[r] = space.logits[y * lanes_ + r]; });
    }
    for (int64_t r = 0; r < lanes_; r += LANES<A>) {
      const Vector<A> top = load<A>(&lanes.top[r]);
      const Vector<A> on_exp = load<A>(&lanes.on_exp[r]), spread = load<A>(&lanes.spread[r]);
      // Rows without a gradient have none even if their logits are NaN.
      const auto dead = on_exp == A(0) && spread == A(0);
      const Vector<A> factor = exponents ? on_exp * exp(load<A>(&tops_[v / SLICE * lanes_ + r]) - top) : on_exp;
      for (int64_t c = 0; c < n; ++c) {
        const Vector<A> x = again ? load<A>(&space.logits[c * lanes_ + r]) : load<A>(d + c * lanes_ + r);
        Vector<A> g = factor * (exponents ? x : exp<FOLD<E> == 1>(x - top));
        if (smooths) g -= spread * weight_of(v + c);
        if (cap > A(0)) g *= A(1) - (x / cap) * (x / cap);
        store<E, A>(d + c * lanes_ + r, dead ? Vector<A>{} : g);
      }
    }
    for_targets(v, n, [&](int64_t r, int64_t y) {
      const A x = x_target_[r];
      A g = lanes.on_exp[r] * std::exp(x - lanes.top[r]) - lanes.on_target[r];
      if (smooths) g -= lanes.spread[r] * weight_of(v + y);
      if (cap > A(0)) g *= A(1) - (x / cap) * (x / cap);
      d[y * lanes_ + r] = static_cast<E>(g);
    });
  }

  // dhidden (rows, width) += dlogits·weight over n classes from v; the first of a part find no sum yet.
  void add_to_hidden(A* dhidden, int64_t v, int64_t n, bool add, const E* d, Space& space) const {
    const Operand<U> w = second_factor<E>(space.pairs, weight_ + v * size_, size_, n, size_);
    const Operand<U> keys = second_factor<E>(space.keys, d, lanes_, n, lanes_);
    for (int64_t j = 0; j < width_; j += GEMM_N<U>)
      for (int64_t r = 0; r < n_; r += GEMM_N<U>) {
        const Operand<U> rows{keys.data + r * keys.column, 1, keys.row}, panel{w.data + j * w.column, w.row};
        const int64_t some = std::min(GEMM_N<U>, n_ - r);
        A* const c = dhidden + r * width_ + j;
        add ? gemm<true>(some, GEMM_N<U>, units<E>(n), rows, panel, c, width_)
            : gemm<false>(some, GEMM_N<U>, units<E>(n), rows, panel, c, width_);
      }
  }

  // dweight (n, size) += dlogits·hidden; the first chunk finds no sum yet.
  void add_to_weight(A* dweight, int64_t n, const U* d, Space& space) const {
    const int64_t k = units<E>(n_);
    const Operand<U> a{d, lanes_ / FOLD<E>};
    const Operand<U>& b = by_row_;
    if (size_ == width_) {
      begin_ > 0 ? gemm<true>(n, width_, k, a, b, dweight, width_) : gemm<false>(n, width_, k, a, b, dweight, width_);
      return;
    }
    space.product.resize(n * width_);
    gemm<false>(n, width_, k, a, b, space.product.data(), width_);
    for (int64_t c = 0; c < n; ++c)
      for (int64_t j = 0; j < size_; ++j)
        dweight[c * size_ + j] = (begin_ > 0 ? dweight[c * size_ + j] : A(0)) + space.product[c * width_ + j];
  }

  const T *hidden_, *weight_;
  const A *bias_, *class_weight_;
  const int64_t* target_;
  LossOptions options_;
  int64_t rows_, size_, vocab_, step_, lanes_, depth_, width_,
      parts_;  // depth_, width_: units of a row, columns; both padded
  A total_;

  // The chunk at hand: n_ rows from begin_.
  int64_t begin_ = 0, n_ = 0;
  std::vector<U> packed_, turned_, second_;  // hidden in rows; in panels, over its size and over its rows
  Operand<U> by_row_;                        // second_
  std::vector<A> x_target_, sums_;           // the target's logit; dhidden of each part
  std::unique_ptr<E[]> kept_;                // (classes, lanes): exponentials, then dlogits
  std::unique_ptr<A[]> tops_;                // (slices, lanes): the maxima they were taken at
};

}  // namespace fastgpt
