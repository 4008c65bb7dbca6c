// Residual addition + layer normalisation on the CPU.
//
//   sum = x + residual, rounded;  n = (sum - mean)·rstd;  normed = n·weight + bias
//   with g = grad·weight:  dsum = rstd·(g - mean(g) - n·mean(g·n)) + grad_sum
//   dweight = Σ grad·n,  dbias = Σ grad over the rows
//
// Bytes: the forward reads x and residual and writes sum and normed; the backward reads grad_normed,
// grad_sum and sum and writes dsum. mean and rstd are kept, n is recomputed.
#include "kernel.h"

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
    compute_t<T>* mean,
    compute_t<T>* rstd,
    int64_t rows,
    int64_t size,
    double eps) {
  using A = compute_t<T>;
  at::parallel_for(0, rows, GRAIN / std::max<int64_t>(size, 1) + 1, [&](int64_t begin, int64_t end) {
    std::vector<A> z(size), r(residual ? size : 0);
    for (int64_t row = begin; row < end; ++row) {
      load(z.data(), x + row * size, size);
      if (residual) {
        load(r.data(), residual + row * size, size);
        for (int64_t j = 0; j < size; ++j) z[j] += r[j];
        store(total + row * size, z.data(), size);
        load(z.data(), total + row * size, size);  // the statistics are those of the rounded sum
      }
      const A mu = sum_over<A>(size, [&](int64_t j) { return z[j]; }) / A(size);
      const A variance = sum_over<A>(size, [&](int64_t j) { return (z[j] - mu) * (z[j] - mu); }) / A(size);
      const A scale = A(1) / std::sqrt(variance + A(eps));
      mean[row] = mu;
      rstd[row] = scale;
      for (int64_t j = 0; j < size; ++j) z[j] = (z[j] - mu) * scale;
      if (weight)
        for (int64_t j = 0; j < size; ++j) z[j] *= weight[j];
      if (bias)
        for (int64_t j = 0; j < size; ++j) z[j] += bias[j];
      store(normed + row * size, z.data(), size);
    }
  });
}

// ---- backward ----

// partial (parts, 2, size): the sums of dweight and dbias over each of `parts` spans of rows.
template <typename T>
void backward(
    const T* grad_normed,
    const T* grad_sum,
    const T* total,
    const compute_t<T>* weight,
    const compute_t<T>* mean,
    const compute_t<T>* rstd,
    T* dsum,
    compute_t<T>* partial,
    int64_t parts,
    int64_t rows,
    int64_t size) {
  using A = compute_t<T>;
  const int64_t span = (rows + parts - 1) / parts;
  at::parallel_for(0, parts, 1, [&](int64_t begin, int64_t end) {
    std::vector<A> n(size), g(size), s(grad_sum ? size : 0);
    for (int64_t part = begin; part < end; ++part) {
      A *dweight = partial + 2 * part * size, *dbias = dweight + size;
      for (int64_t row = part * span; row < std::min(rows, (part + 1) * span); ++row) {
        load(n.data(), total + row * size, size);
        load(g.data(), grad_normed + row * size, size);
        const A mu = mean[row], scale = rstd[row];
        for (int64_t j = 0; j < size; ++j) n[j] = (n[j] - mu) * scale;
        for (int64_t j = 0; j < size; ++j) dweight[j] += g[j] * n[j];
        for (int64_t j = 0; j < size; ++j) dbias[j] += g[j];
        if (weight)
          for (int64_t j = 0; j < size; ++j) g[j] *= weight[j];
        const A mean_g = sum_over<A>(size, [&](int64_t j) { return g[j]; }) / A(size);
        const A mean_gn = sum_over<A>(size, [&](int64_t j) { return g[j] * n[j]; }) / A(size);
        for (int64_t j = 0; j < size; ++j) g[j] = scale * (g[j] - mean_g - n[j] * mean_gn);
        if (grad_sum) {
          load(s.data(), grad_sum + row * size, size);
          for (int64_t j = 0; j < size; ++j) g[j] += s[j];
        }
        store(dsum + row * size, g.data(), size);
      }
    }
  });
}

// ---- launchers ----

Tensor in(at::ScalarType type, const OptionalTensor& t) { return t ? t->to(type).contiguous() : Tensor(); }

template <typename A>
const A* pointer(const Tensor& t) {
  return t.defined() ? t.const_data_ptr<A>() : nullptr;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> add_layer_norm_fwd(
    const Tensor& x_,
    const OptionalTensor& residual_,
    const OptionalTensor& weight_,
    const OptionalTensor& bias_,
    double eps) {
  const auto type = residual_ ? c10::promoteTypes(x_.scalar_type(), residual_->scalar_type()) : x_.scalar_type();
  const auto acc = accumulator(type);
  const Tensor x = in(type, x_), residual = in(type, residual_), weight = in(acc, weight_), bias = in(acc, bias_);
  const int64_t rows = x.size(0), size = x.size(1);
  Tensor normed = at::empty(x.sizes(), x.options());
  Tensor total = residual_ ? at::empty(x.sizes(), x.options()) : at::empty({0}, x.options());
  Tensor mean = at::empty({rows}, x.options().dtype(acc)), rstd = at::empty_like(mean);
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
        mean.mutable_data_ptr<A>(),
        rstd.mutable_data_ptr<A>(),
        rows,
        size,
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
  const auto type = total_.scalar_type(), acc = accumulator(type);
  const Tensor grad_normed = in(type, grad_normed_), grad_sum = in(type, grad_sum_), total = in(type, total_);
  const Tensor weight = in(acc, weight_), mu = in(acc, mean), scale = in(acc, rstd);
  const int64_t rows = total.size(0), size = total.size(1), parts = row_parts(rows);
  Tensor dsum = at::empty(total.sizes(), total.options());
  Tensor partial = at::zeros({parts, 2, size}, total.options().dtype(acc));
  dispatch(type, "add_layer_norm", [&](auto element) {
    using T = decltype(element);
    using A = compute_t<T>;
    backward<T>(
        grad_normed.const_data_ptr<T>(),
        pointer<T>(grad_sum),
        total.const_data_ptr<T>(),
        pointer<A>(weight),
        mu.const_data_ptr<A>(),
        scale.const_data_ptr<A>(),
        dsum.mutable_data_ptr<T>(),
        partial.mutable_data_ptr<A>(),
        parts,
        rows,
        size);
  });
  const Tensor sums = at::sum(partial, {0});
  return {dsum, sums.select(0, 0).clone(), sums.select(0, 1).clone()};
}

TORCH_LIBRARY_IMPL(fastgpt, CPU, m) {
  m.impl("add_layer_norm_fwd_cpp", &add_layer_norm_fwd);
  m.impl("add_layer_norm_bwd_cpp", &add_layer_norm_bwd);
}

}  // namespace
}  // namespace fastgpt
