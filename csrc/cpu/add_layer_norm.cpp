// LayerNorm of a sum, with the residual addition before it fused, on the CPU.
//
//   sum = x + residual, rounded;  n = (sum - mean)·rstd;  normed = n·weight + bias
//   with g = grad·weight:  dsum = rstd·(g - mean(g) - n·mean(g·n)) + grad_sum
//   dweight = Σ grad·n,  dbias = Σ grad over the rows
//
// A row with a large offset keeps its digits, with a pivot x_0 and m = x_0 + mean(sum - x_0), rounded:
//   mean = m + c,  c = mean(sum - m);  variance = mean((sum - m)²) - c²;  n = ((sum - m) - c)·rstd
// A constant row has m = x_0 and n = 0 exactly. The mean is saved in double, and the backward computes sum - mean in
// two steps. The terms of the first sum are halved and divided by the number of columns, so that it cannot overflow.
//
// Bytes moved: the forward reads x and residual and writes sum and normed. The backward reads grad_normed, grad_sum and
// sum and writes dsum. mean and rstd are saved, n is recomputed.
#include "checks.h"
#include "kernel.h"
#include "vector.h"

namespace fastgpt {
namespace {

// ---- forward ----

template <typename T>
void forward(
    const T* x,
    const T* residual,
    const compute_t<T>* weight,
    const compute_t<T>* bias,
    T* normed,
    T* total,
    double* mean,
    compute_t<T>* rstd,
    int64_t rows,
    int64_t columns,
    double eps) {
  using A = compute_t<T>;
  // Computes the sum, stores it rounded and returns the rounded value, from which the statistics are computed.
  const auto read = [&](int64_t i, auto... n) __attribute__((always_inline)) {
    Vector<A> v = load<A>(x + i, n...);
    if (!residual) return v;
    v += load<A>(residual + i, n...);
    store<T, A>(total + i, v, n...);
    return load<A>(total + i, n...);
  };
  parallel_for(0, rows, GRAIN / std::max<int64_t>(columns, 1) + 1, [&](int64_t begin, int64_t end) {
    std::vector<A> z(columns);
    for (int64_t row = begin; row < end; ++row) {
      const int64_t at = row * columns;
      const A inverse = A(1) / A(columns), origin = columns > 0 ? read(at, 1)[0] / 2 : A(0);
      const A middle = 2 * (origin + sum_of<A>(columns, [&](int64_t j, auto... n) {
                              const Vector<A> v = read(at + j, n...);
                              store<A, A>(&z[j], v, n...);
                              return first<A>(v * A(0.5) - origin, A(0), n...) * inverse;
                            }));
      // Two accumulators for neighbouring vectors, so that an addition does not wait for the previous one.
      Vector<A> sum[2] = {}, squares[2] = {};
      const auto accumulate = [&](int of, int64_t j, auto... n) __attribute__((always_inline)) {
        const Vector<A> d = first<A>(load<A>(&z[j], n...) - middle, A(0), n...);
        sum[of] += d * inverse;
        squares[of] += d * d;
      };
      int64_t j = 0;
      for (; j + 2 * LANES<A> <= columns; j += 2 * LANES<A>) accumulate(0, j), accumulate(1, j + LANES<A>);
      over_vectors<A>(j, columns, [&](int64_t i, auto... n) { accumulate(0, i, n...); });
      const A rest = lane_sum<A>(sum[0] + sum[1]), square = lane_sum<A>(squares[0] + squares[1]) / A(columns);
      const A variance = square - std::min(rest * rest, std::numeric_limits<A>::max());
      const A scale = A(1) / std::sqrt((variance < A(0) ? A(0) : variance) + A(eps));
      mean[row] = double(middle) + double(rest);
      rstd[row] = scale;
      over_vectors<A>(0, columns, [&](int64_t j, auto... n) {
        Vector<A> v = ((load<A>(&z[j], n...) - middle) - rest) * scale;
        if (weight) v *= load<A>(weight + j, n...);
        if (bias) v += load<A>(bias + j, n...);
        store<T, A>(normed + at + j, v, n...);
      });
    }
  });
}

// ---- backward ----

// partial (parts, 2, columns): the sums of dweight and of dbias over each of `parts` spans of rows.
template <typename T>
void backward(
    const T* grad_normed,
    const T* grad_sum,
    const T* total,
    const compute_t<T>* weight,
    const double* mean,
    const compute_t<T>* rstd,
    T* dsum,
    compute_t<T>* partial,
    int64_t parts,
    int64_t rows,
    int64_t columns) {
  using A = compute_t<T>;
  const int64_t span = (rows + parts - 1) / parts;
  parallel_for(0, parts, 1, [&](int64_t begin, int64_t end) {
    std::vector<A> normed(columns), g(columns);
    for (int64_t part = begin; part < end; ++part) {
      A *dweight = partial + 2 * part * columns, *dbias = dweight + columns;
      for (int64_t row = part * span; row < std::min(rows, (part + 1) * span); ++row) {
        const int64_t at = row * columns;
        const A mu = A(mean[row]), low = A(mean[row] - double(mu)), scale = rstd[row];
        Vector<A> sum_g = {}, sum_gn = {};
        over_vectors<A>(0, columns, [&](int64_t j, auto... n) {
          const Vector<A> x = first<A>((load<A>(total + at + j, n...) - mu) - low, A(0), n...), z = x * scale;
          const Vector<A> d = load<A>(grad_normed + at + j, n...);
          store<A, A>(dweight + j, load<A>(dweight + j, n...) + d * z, n...);
          store<A, A>(dbias + j, load<A>(dbias + j, n...) + d, n...);
          const Vector<A> dw = weight ? d * load<A>(weight + j, n...) : d;
          sum_g += dw;
          sum_gn += dw * z;
          store<A, A>(&normed[j], z, n...);
          store<A, A>(&g[j], dw, n...);
        });
        const A mean_g = lane_sum<A>(sum_g) / A(columns), mean_gn = lane_sum<A>(sum_gn) / A(columns);
        over_vectors<A>(0, columns, [&](int64_t j, auto... n) {
          Vector<A> d = scale * (load<A>(&g[j], n...) - mean_g - load<A>(&normed[j], n...) * mean_gn);
          if (grad_sum) d += load<A>(grad_sum + at + j, n...);
          store<T, A>(dsum + at + j, d, n...);
        });
      }
    }
  });
}

// ---- launchers ----

std::tuple<Tensor, Tensor, Tensor, Tensor> add_layer_norm_fwd(
    const Tensor& x_,
    const OptionalTensor& residual_,
    const OptionalTensor& weight_,
    const OptionalTensor& bias_,
    double eps) {
  Checks("add_layer_norm_fwd_cpp", "x", x_, {ANY, ANY})("residual", residual_, x_.sizes(), FLOATS)(
      "weight", weight_, {x_.size(1)}, FLOATS)("bias", bias_, {x_.size(1)}, FLOATS);
  const auto type = residual_ ? promoted(x_.scalar_type(), residual_->scalar_type()) : x_.scalar_type();
  const auto acc = accumulator(type);
  const Tensor x = contiguous(x_, type);
  const OptionalTensor residual = contiguous(residual_, type), weight = contiguous(weight_, acc),
                       bias = contiguous(bias_, acc);
  const int64_t rows = x.size(0), columns = x.size(1);
  Tensor normed = empty({rows, columns}, type);
  Tensor total = residual_ ? empty({rows, columns}, type) : empty({0}, type);
  Tensor mean = empty({rows}, ScalarType::Double), rstd = empty({rows}, acc);
  dispatch(type, "add_layer_norm", [&](auto element) {
    using T = decltype(element);
    using A = compute_t<T>;
    forward<T>(
        x.const_data_ptr<T>(),
        pointer<T>(residual),
        pointer<A>(weight),
        pointer<A>(bias),
        normed.mutable_data_ptr<T>(),
        total.mutable_data_ptr<T>(),
        mean.mutable_data_ptr<double>(),
        rstd.mutable_data_ptr<A>(),
        rows,
        columns,
        eps);
  });
  return {normed, total, mean, rstd};
}

std::tuple<Tensor, Tensor, Tensor> add_layer_norm_bwd(
    const Tensor& grad_normed_,
    const OptionalTensor& grad_sum_,
    const Tensor& total_,
    const OptionalTensor& weight_,
    const Tensor& mean,
    const Tensor& rstd) {
  const Checks check("add_layer_norm_bwd_cpp", "total", total_, {ANY, ANY});
  const auto type = total_.scalar_type(), acc = accumulator(type);
  check.like("grad_normed", grad_normed_).like("grad_sum", grad_sum_);
  check("weight", weight_, {total_.size(1)}, FLOATS);
  check("mean", mean, {total_.size(0)}, ScalarType::Double)("rstd", rstd, {total_.size(0)}, acc);
  const Tensor grad_normed = contiguous(grad_normed_), total = contiguous(total_), mu = contiguous(mean),
               scale = contiguous(rstd);
  const OptionalTensor grad_sum = contiguous(grad_sum_, type), weight = contiguous(weight_, acc);
  const int64_t rows = total.size(0), columns = total.size(1), parts = row_parts(rows);
  Tensor dsum = empty({rows, columns}, type);
  Tensor partial = zeros({parts, 2, columns}, acc);
  dispatch(type, "add_layer_norm", [&](auto element) {
    using T = decltype(element);
    using A = compute_t<T>;
    backward<T>(
        grad_normed.const_data_ptr<T>(),
        pointer<T>(grad_sum),
        total.const_data_ptr<T>(),
        pointer<A>(weight),
        mu.const_data_ptr<double>(),
        scale.const_data_ptr<A>(),
        dsum.mutable_data_ptr<T>(),
        partial.mutable_data_ptr<A>(),
        parts,
        rows,
        columns);
  });
  const Tensor sums = sum_rows(partial, acc);
  const auto row = [&](int64_t i) { return clone(as_strided(sums, {columns}, {1}, i * columns)); };
  return {dsum, row(0), row(1)};
}

STABLE_TORCH_LIBRARY_IMPL(fastgpt, CPU, m) {
  m.impl("add_layer_norm_fwd_cpp", TORCH_BOX(&add_layer_norm_fwd));
  m.impl("add_layer_norm_bwd_cpp", TORCH_BOX(&add_layer_norm_bwd));
}

}  // namespace
}  // namespace fastgpt
