// Cross-entropy of a linear layer's output on the CPU, one chunk of rows at a time. The mathematics of the loss, with
// a, b, W, c_p, c_y and c_w, is in cross_entropy.h.
//
//   logits = k·(hidden·weightᵀ + bias)    three products of 2·N·D·V FLOPs each
//   dhidden = dlogits·weight,  dweight = dlogitsᵀ·hidden,  dbias = Σ dlogits
//
// The logits of a chunk are stored transposed, one class per row: a vector holds LANES rows of hidden, and their
// statistics are vectors.
//
// Forward: computes the logits of SLICE classes at a time, updates the running maximum and sum, and stores
// e = exp(x - running maximum). Each exponential is computed once, and only one chunk of them exists at a time.
// Gradients: turns e into dlogits in place, with one factor per row and slice. Then adds BLOCK_V classes at a time to
// dweight, which is float32 and accumulates over the chunks, and to dhidden. The backward from given statistics does
// the same, but computes the logits again and does not store them (four products).
//
// The classes are divided into PARTS, each with its own statistics and its own dhidden. Their number does not depend on
// the number of threads, and so neither do the bits of the result. The gradients that the forward computes are those of
// the sum of the losses, in float32: scaling them later neither underflows nor overflows in half precision.
//
// The products run at the rate of the matrix product. Besides, a chunk reads the weight twice, reads and writes dweight
// once, and writes, reads and writes its logits.
#pragma once

#include "cross_entropy.h"
#include "gemm.h"

namespace fastgpt {

constexpr int64_t SLICE = 64, BLOCK_V = 256, PARTS = 16;

// Rows of a chunk. A quarter of all rows, so that a chunk takes at most an eighth of the memory of all logits and their
// gradient. More than 256 rows do not fit into the L2 cache. Fewer rows mean more passes over weight and dweight.
inline int64_t chunk_rows(int64_t requested, int64_t rows) {
  const int64_t automatic = std::clamp<int64_t>((rows + 3) / 4, 64, 256);
  return std::clamp<int64_t>(requested > 0 ? requested : automatic, 1, std::max<int64_t>(rows, 1));
}

// The gradient of each row of a chunk: dx_j = c_p exp(x_j - row_max) - c_y [j = y] - c_w w_j.
template <typename A>
struct RowGradients {
  std::vector<A> row_max, c_p, c_w, c_y;
  explicit RowGradients(int64_t n) : row_max(n), c_p(n), c_w(n), c_y(n) {}
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
    W_ = class_weight ? sum_of<A>(vocab_, [&](int64_t j, auto... n) { return load<A>(class_weight + j, n...); })
                      : A(vocab_);
  }

  // ---- forward; with_grad: also the gradients of the sum of the losses ----

  void forward(A* loss, A* statistics, bool with_grad, A* dhidden, A* dweight, A* dbias) {
    const int64_t slices = (vocab_ + SLICE - 1) / SLICE;
    std::vector<Statistics> parts(parts_, Statistics(lanes_));
    stored_.reset(with_grad ? new E[vocab_ * lanes_] : nullptr);
    stored_max_.reset(with_grad ? new A[slices * lanes_] : nullptr);
    x_target_.resize(lanes_);
    for (begin_ = 0; begin_ < rows_; begin_ += step_) {
      start_chunk(with_grad);
      RowGradients<A> rows(lanes_);
      parallel_for(0, parts_, 1, [&](int64_t first, int64_t last) {
        const FlushSubnormals flush;
        Workspace space(*this);
        for (int64_t part = first; part < last; ++part) accumulate(parts[part], classes_of(part), space);
      });
      for (int64_t r = 0; r < n_; ++r) {
        A* const of_row = statistics + 2 * (begin_ + r);
        loss[begin_ + r] = loss_of(r, parts, of_row);
        set_gradient(rows, r, of_row, A(1));
      }
      if (with_grad) gradients(rows, dhidden, dweight, dbias);
    }
  }

  // ---- backward, for upstream gradients that differ between rows; computes the logits again ----

  void backward(const A* grad, const A* statistics, A* dhidden, A* dweight, A* dbias) {
    x_target_.resize(lanes_);
    for (begin_ = 0; begin_ < rows_; begin_ += step_) {
      start_chunk(true);
      RowGradients<A> rows(lanes_);
      for (int64_t r = 0; r < n_; ++r) set_gradient(rows, r, statistics + 2 * (begin_ + r), grad[begin_ + r]);
      gradients(rows, dhidden, dweight, dbias);
    }
  }

 private:
  // A running softmax over the classes of a part.
  struct Statistics {
    std::vector<A> row_max, row_sum, weighted;  // max x, Σ exp(x - row_max), Σ w·(row_max - x)
    A weights = 0;                              // Σ w
    explicit Statistics(int64_t n) : row_max(n), row_sum(n), weighted(n) {}
  };

  // The buffers of a thread.
  struct Workspace {
    std::vector<U> rows, pairs, panels;
    std::vector<A> logits, product;
    std::vector<E> block;
    explicit Workspace(const Chunks& c) : logits(SLICE * c.lanes_) {}
  };

  struct Classes {
    int64_t begin, end;
  };
  Classes classes_of(int64_t part) const {
    const int64_t blocks = (vocab_ + BLOCK_V - 1) / BLOCK_V;
    return {blocks * part / parts_ * BLOCK_V, std::min(vocab_, blocks * (part + 1) / parts_ * BLOCK_V)};
  }

  bool ignored(int64_t r) const { return target_[begin_ + r] == options_.ignore_index; }
  A weight_of(int64_t v) const { return class_weight_ ? class_weight_[v] : A(1); }
  A a(int64_t r) const { return A(1 - options_.label_smoothing) * weight_of(target_[begin_ + r]); }
  A b() const { return A(options_.label_smoothing) / A(vocab_); }

  void start_chunk(bool with_grad) {
    n_ = std::min(step_, rows_ - begin_);
    const T* h = hidden_ + begin_ * size_;
    packed_.assign(lanes_ * depth_, U(0));
    transposed_.resize(depth_ * lanes_);
    pack_rows<E>(packed_.data(), depth_, h, size_, n_, size_);
    for (int64_t r = 0; r < lanes_; r += GEMM_N<U>)
      transpose(&transposed_[r * depth_], GEMM_N<U>, &packed_[r * depth_], depth_, GEMM_N<U>, units<E>(size_));
    if (with_grad) by_row_ = second_factor<E>(second_, h, size_, n_, size_);
  }

  // Computes the logits (classes, lanes) of the classes [v, v + n), with bias, scale and softcap.
  void project(int64_t v, int64_t n, Workspace& space) const {
    const Operand<U> w = first_factor<E>(space.rows, weight_ + v * size_, size_, n, size_);
    gemm<false>(
        n, lanes_, units<E>(size_), w, Operand<U>{transposed_.data(), GEMM_N<U>, depth_}, space.logits.data(), lanes_);
    const A cap = A(options_.softcap), scale = A(options_.logit_scale);
    if (!bias_ && cap <= A(0) && scale == A(1)) return;
    for (int64_t c = 0; c < n; ++c)
      over_vectors<A>(0, lanes_, [&](int64_t r, auto...) {
        A* at = &space.logits[c * lanes_ + r];
        const Vector<A> x = load<A>(at) + (bias_ ? bias_[v + c] : A(0));
        store<A, A>(at, cap > A(0) ? cap * tanh(x / (cap / scale)) : rounded<A>(scale * x));
      });
  }

  // Calls f(r, class - v) for each row whose target is one of the classes [v, v + n).
  template <typename F>
  void for_targets(int64_t v, int64_t n, F&& f) const {
    for (int64_t r = 0; r < n_; ++r) {
      const int64_t y = target_[begin_ + r] - v;
      if (y >= 0 && y < n && !ignored(r)) f(r, y);
    }
  }

  // Computes the statistics of the classes of a part, and stores the exponentials if the gradients need them.
  void accumulate(Statistics& s, Classes classes, Workspace& space) {
    std::fill(s.row_max.begin(), s.row_max.end(), std::numeric_limits<A>::lowest());
    std::fill(s.row_sum.begin(), s.row_sum.end(), A(0));
    std::fill(s.weighted.begin(), s.weighted.end(), A(0));
    s.weights = 0;
    const bool smooths = options_.label_smoothing > 0;
    for (int64_t v = classes.begin; v < classes.end; v += SLICE) {
      const int64_t n = std::min(SLICE, classes.end - v);
      project(v, n, space);
      for_targets(v, n, [&](int64_t r, int64_t y) { x_target_[r] = space.logits[y * lanes_ + r]; });
      for (int64_t r = 0; r < lanes_; r += LANES<A>) accumulate_lanes(s, v, n, v > classes.begin, r, &space.logits[r]);
      if (smooths)
        for (int64_t c = 0; c < n; ++c) s.weights += weight_of(v + c);
    }
  }

  // Adds n classes of LANES rows, starting at row r, to the statistics. `more`: not the first classes of the part.
  void accumulate_lanes(Statistics& s, int64_t v, int64_t n, bool more, int64_t r, const A* x) {
    const Vector<A> old = load<A>(&s.row_max[r]);
    Vector<A> row_max = old, sum = {};
    for (int64_t c = 0; c < n; ++c) row_max = max(load<A>(x + c * lanes_), row_max);
    for (int64_t c = 0; c < n; ++c) {
      const Vector<A> e = exp<FOLD<E> == 1>(load<A>(x + c * lanes_) - row_max);
      sum += e;
      // With a softcap the gradient needs the logit itself.
      if (stored_) store<E, A>(&stored_[(v + c) * lanes_ + r], options_.softcap > 0 ? load<A>(x + c * lanes_) : e);
    }
    if (options_.label_smoothing > 0) {
      Vector<A> weighted = {};
      if (more) weighted = (row_max - old) * s.weights;
      for (int64_t c = 0; c < n; ++c) weighted += weight_of(v + c) * (row_max - load<A>(x + c * lanes_));
      store<A, A>(&s.weighted[r], load<A>(&s.weighted[r]) + weighted);
    }
    store<A, A>(&s.row_sum[r], load<A>(&s.row_sum[r]) * exp(old - row_max) + sum);
    store<A, A>(&s.row_max[r], row_max);
    if (stored_max_) store<A, A>(&stored_max_[v / SLICE * lanes_ + r], row_max);
  }

  // Returns the loss of row r from the statistics of all parts. Writes m and s to statistics[0] and [1].
  A loss_of(int64_t r, const std::vector<Statistics>& parts, A* statistics) const {
    A row_max = std::numeric_limits<A>::lowest(), row_sum = 0;
    for (const Statistics& s : parts) row_max = s.row_max[r] > row_max ? s.row_max[r] : row_max;
    for (const Statistics& s : parts) row_sum += s.row_sum[r] * std::exp(s.row_max[r] - row_max);
    const A log_sum = std::log(row_sum);
    statistics[0] = row_max, statistics[1] = row_sum;
    if (ignored(r)) return A(0);
    A loss = a(r) * (log_sum - (x_target_[r] - row_max));
    if (options_.label_smoothing > 0) {
      A weighted = W_ * log_sum;
      for (const Statistics& s : parts) weighted += s.weighted[r] + s.weights * (row_max - s.row_max[r]);
      loss += b() * (std::isinf(W_) ? W_ : weighted);
    }
    if (options_.z_loss > 0) loss += A(options_.z_loss) * (row_max + log_sum) * (row_max + log_sum);
    return loss;
  }

  void set_gradient(RowGradients<A>& rows, int64_t r, const A* statistics, A grad) const {
    if (ignored(r)) grad = 0;
    const A a_y = ignored(r) ? A(0) : a(r);
    A factor = a_y;  // a + b·W + 2ζ·lse
    if (options_.label_smoothing > 0) factor += b() * W_;
    if (options_.z_loss > 0) factor += A(2 * options_.z_loss) * (statistics[0] + std::log(statistics[1]));
    const A scale = A(options_.logit_scale);
    rows.row_max[r] = statistics[0];
    rows.c_w[r] = scale * (grad * b()), rows.c_y[r] = scale * (grad * a_y);
    rows.c_p[r] = grad == A(0) ? A(0) : scale * (grad * factor / statistics[1]);
  }

  // ---- gradients of a chunk ----

  void gradients(const RowGradients<A>& rows, A* dhidden, A* dweight, A* dbias) {
    sums_.resize(parts_ * step_ * width_);
    parallel_for(0, parts_, 1, [&](int64_t first, int64_t last) {
      const FlushSubnormals flush;
      Workspace space(*this);
      space.block.resize(stored_ ? 0 : BLOCK_V * lanes_);
      for (int64_t part = first; part < last; ++part) {
        const Classes classes = classes_of(part);
        for (int64_t v = classes.begin; v < classes.end; v += BLOCK_V) {
          const int64_t n = std::min(BLOCK_V, classes.end - v);
          E* const d = stored_ ? &stored_[v * lanes_] : space.block.data();
          for (int64_t c = 0; c < n; c += SLICE)
            slice_gradient(rows, v + c, std::min(SLICE, n - c), d + c * lanes_, space);
          if (dbias)
            for (int64_t c = 0; c < n; ++c)
              dbias[v + c] +=
                  sum_of<A>(lanes_, [&](int64_t r, auto... some) { return load<A>(d + c * lanes_ + r, some...); });
          add_to_weight(dweight + v * size_, n, reinterpret_cast<const U*>(d), space);
          add_to_hidden(&sums_[part * step_ * width_], v, n, v > classes.begin, d, space);
        }
      }
    });
    parallel_for(0, n_, 16, [&](int64_t first, int64_t last) {
      for (int64_t r = first; r < last; ++r)
        over_vectors<A>(0, size_, [&](int64_t j, auto... n) {
          Vector<A> x = {};
          for (int64_t part = 0; part < parts_; ++part) x += load<A>(&sums_[(part * step_ + r) * width_ + j], n...);
          store<A, A>(dhidden + (begin_ + r) * size_ + j, x, n...);
        });
    });
  }

  // Writes dlogits of the classes [v, v + n) to d (classes, lanes): in place of the stored exponentials or logits, or
  // from logits that are computed again.
  void slice_gradient(const RowGradients<A>& rows, int64_t v, int64_t n, E* d, Workspace& space) {
    const A cap = A(options_.softcap);
    const bool recompute = !stored_, has_exp = stored_ && cap <= A(0), smooths = options_.label_smoothing > 0;
    if (recompute) {
      project(v, n, space);
      for_targets(v, n, [&](int64_t r, int64_t y) { x_target_[r] = space.logits[y * lanes_ + r]; });
    }
    for (int64_t r = 0; r < lanes_; r += LANES<A>) {
      const Vector<A> row_max = load<A>(&rows.row_max[r]);
      const Vector<A> c_p = load<A>(&rows.c_p[r]), c_w = load<A>(&rows.c_w[r]);
      // The gradient of an ignored row is 0 even if its logits are NaN.
      const auto is_zero = c_p == A(0) && c_w == A(0);
      const Vector<A> factor = has_exp ? c_p * exp(load<A>(&stored_max_[v / SLICE * lanes_ + r]) - row_max) : c_p;
      for (int64_t c = 0; c < n; ++c) {
        const Vector<A> x = recompute ? load<A>(&space.logits[c * lanes_ + r]) : load<A>(d + c * lanes_ + r);
        Vector<A> g = factor * (has_exp ? x : exp<FOLD<E> == 1>(x - row_max));
        if (smooths) g -= c_w * weight_of(v + c);
        if (cap > A(0)) g *= A(1) - (x / cap) * (x / cap);
        store<E, A>(d + c * lanes_ + r, is_zero ? Vector<A>{} : g);
      }
    }
    for_targets(v, n, [&](int64_t r, int64_t y) {
      const A x = x_target_[r];
      A g = rows.c_p[r] * std::exp(x - rows.row_max[r]) - rows.c_y[r];
      if (smooths) g -= rows.c_w[r] * weight_of(v + y);
      if (cap > A(0)) g *= A(1) - (x / cap) * (x / cap);
      d[y * lanes_ + r] = static_cast<E>(g);
    });
  }

  // dhidden (rows, width) += dlogits·weight over the classes [v, v + n). `add` is false for the first classes of a
  // part.
  void add_to_hidden(A* dhidden, int64_t v, int64_t n, bool add, const E* d, Workspace& space) const {
    const Operand<U> w = second_factor<E>(space.pairs, weight_ + v * size_, size_, n, size_);
    const Operand<U> dlogits = second_factor<E>(space.panels, d, lanes_, n, lanes_);
    for (int64_t j = 0; j < width_; j += GEMM_N<U>)
      for (int64_t r = 0; r < n_; r += GEMM_N<U>) {
        const Operand<U> rows{dlogits.data + r * dlogits.column, 1, dlogits.row}, panel{w.data + j * w.column, w.row};
        const int64_t some = std::min(GEMM_N<U>, n_ - r);
        A* const c = dhidden + r * width_ + j;
        add ? gemm<true>(some, GEMM_N<U>, units<E>(n), rows, panel, c, width_)
            : gemm<false>(some, GEMM_N<U>, units<E>(n), rows, panel, c, width_);
      }
  }

  // dweight (n, size) += dlogits·hidden. The first chunk overwrites dweight.
  void add_to_weight(A* dweight, int64_t n, const U* d, Workspace& space) const {
    const int64_t k = units<E>(n_);
    const Operand<U> dlogits{d, lanes_ / FOLD<E>};
    if (size_ == width_) {
      begin_ > 0 ? gemm<true>(n, width_, k, dlogits, by_row_, dweight, width_)
                 : gemm<false>(n, width_, k, dlogits, by_row_, dweight, width_);
      return;
    }
    space.product.resize(n * width_);
    gemm<false>(n, width_, k, dlogits, by_row_, space.product.data(), width_);
    for (int64_t c = 0; c < n; ++c)
      for (int64_t j = 0; j < size_; ++j)
        dweight[c * size_ + j] = (begin_ > 0 ? dweight[c * size_ + j] : A(0)) + space.product[c * width_ + j];
  }

  const T *hidden_, *weight_;
  const A *bias_, *class_weight_;
  const int64_t* target_;
  LossOptions options_;
  int64_t rows_, size_, vocab_;
  int64_t step_, lanes_;   // rows of a chunk, and padded to whole register tiles
  int64_t depth_, width_;  // units of a row of hidden, and its columns; both padded
  int64_t parts_;
  A W_;

  // The current chunk: rows [begin_, begin_ + n_).
  int64_t begin_ = 0, n_ = 0;
  std::vector<U> packed_, transposed_, second_;  // hidden: in rows; transposed in panels; as a second factor
  Operand<U> by_row_;                            // refers to second_
  std::vector<A> x_target_, sums_;               // the logit of the target; dhidden of each part
  std::unique_ptr<E[]> stored_;                  // (classes, lanes): exponentials or logits, then dlogits
  std::unique_ptr<A[]> stored_max_;              // (slices, lanes): the running maxima of the exponentials
};

}  // namespace fastgpt
