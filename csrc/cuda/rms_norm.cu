// RMSNorm, alone and with the residual addition before it: launchers. The mathematics and the kernels are in
// rms_norm.cuh.
#include "checks.cuh"
#include "rms_norm.cuh"

namespace fastgpt {
namespace {

std::tuple<Tensor, Tensor, Tensor> rms_norm_fwd(
    const Tensor& x_, const OptionalTensor& residual_, const OptionalTensor& weight_, double eps, double offset) {
  const Checks check("rms_norm_fwd_cuda", "x", x_, {ANY, ANY});
  check("residual", residual_, {x_.size(0), x_.size(1)}, FLOATS)("weight", weight_, {x_.size(1)}, FLOATS_OR_DOUBLE);
  check.contiguous("x", x_, "residual", residual_, "weight", weight_);
  // The sum of two different types is float32. If one of the two tensors is float32, it becomes x.
  Tensor x = x_;
  OptionalTensor residual = residual_;
  if (residual.has_value() && residual->scalar_type() != x.scalar_type()) {
    if (residual->scalar_type() == ScalarType::Float) std::swap(x, *residual);
    x = torch::stable::to(x, ScalarType::Float);
  }
  const OptionalTensor weight = as(weight_, ScalarType::Float);
  const int64_t rows = x.size(0);
  const int columns = columns_of("rms_norm", x);
  Tensor normed = empty(x, {rows, columns}, x.scalar_type());
  Tensor sum = residual.has_value() ? torch::stable::empty_like(normed) : empty(x, {0}, x_.scalar_type());
  Tensor rstd = empty(x, {rows}, ScalarType::Float);
  if (rows == 0) return {normed, sum, rstd};
  const bool is_wide = wide_rows(x) && aligned(x, normed, sum) && is_aligned(residual) && is_aligned(weight);
  with_types("rms_norm", x.scalar_type(), residual.value_or(x).scalar_type(), [&](auto x_type, auto residual_type) {
    choose(is_wide, [&](auto wide) {
      choose(columns <= THREADS * FWD_ELEMENTS, [&](auto in_registers) {
        using X = decltype(x_type);
        using R = decltype(residual_type);
        constexpr int N = WIDTH<X, wide>;
        const int row_threads = in_registers ? threads_for(columns / N, FWD_ELEMENTS / N, THREADS) : THREADS;
        const int rows_per_block = row_threads == WARP ? FWD_WARPS : 1;
        launch<rms_norm_fwd_kernel<X, R, wide, in_registers>>(
            device_of(x),
            "rms_norm_fwd",
            Launch{.x = cdiv(rows, rows_per_block), .threads = rows_per_block * row_threads, .shared = 2 * SLOTS},
            global<const X>(x),
            global<const R>(residual),
            global<const float>(weight),
            global<X>(normed),
            global<X>(sum),
            global<float>(rstd),
            rows,
            columns,
            static_cast<float>(eps),
            static_cast<float>(offset),
            row_threads);
      });
    });
  });
  return {normed, sum, rstd};
}

std::tuple<Tensor, Tensor> rms_norm_bwd(
    const Tensor& grad,
    const OptionalTensor& grad_sum,
    const Tensor& sum,
    const OptionalTensor& weight_,
    const Tensor& rstd,
    double offset) {
  const Checks check("rms_norm_bwd_cuda", "total", sum, {ANY, ANY});
  check.like("grad_normed", grad).like("grad_sum", grad_sum)("weight", weight_, {sum.size(1)}, FLOATS_OR_DOUBLE);
  check("rstd", rstd, {sum.size(0)}, {ScalarType::Float});
  check.contiguous("grad_normed", grad, "grad_sum", grad_sum, "total", sum, "weight", weight_, "rstd", rstd);
  const OptionalTensor weight = as(weight_, ScalarType::Float);
  const int64_t rows = sum.size(0);
  const int columns = columns_of("rms_norm", sum), sums = weight.has_value() ? columns : 0;
  Tensor dsum = torch::stable::empty_like(sum);
  if (sum.numel() == 0) return {dsum, zeros(sum, {sums}, ScalarType::Float)};
  const bool is_wide = wide_rows(sum) && aligned(grad, sum, dsum) && is_aligned(grad_sum) && is_aligned(weight);
  Tensor partial;
  dispatch(sum.scalar_type(), "rms_norm", [&](auto element) {
    choose(is_wide, [&](auto wide) {
      choose_elements<wide>(columns, [&](auto elements) {
        using T = decltype(element);
        constexpr int N = WIDTH<T, wide>;
        const int row_threads = elements ? threads_for(columns / N, elements / N, THREADS) : THREADS;
        const int rows_per_block = std::max(BWD_WARPS * WARP / row_threads, 1), threads = rows_per_block * row_threads;
        const int64_t blocks = std::min<int64_t>(cdiv(rows, rows_per_block), PARTIALS);
        partial = (elements ? empty : zeros)(sum, {blocks, sums}, ScalarType::Float);
        launch<rms_norm_bwd_kernel<T, wide, elements>>(
            device_of(sum),
            "rms_norm_bwd",
            Launch{.x = blocks, .threads = threads, .shared = std::max(2 * SLOTS, 4 * elements * threads)},
            global<const T>(grad),
            global<const T>(grad_sum),
            global<const T>(sum),
            global<const float>(weight),
            global<const float>(rstd),
            global<T>(dsum),
            global<float>(partial),
            rows,
            columns,
            static_cast<float>(offset),
            row_threads);
      });
    });
  });
  return {dsum, sum_rows(partial)};
}

STABLE_TORCH_LIBRARY_IMPL(fastgpt, FASTGPT_DISPATCH_KEY, m) {
  m.impl("rms_norm_fwd_cuda", TORCH_BOX(&rms_norm_fwd));
  m.impl("rms_norm_bwd_cuda", TORCH_BOX(&rms_norm_bwd));
}

}  // namespace
}  // namespace fastgpt
