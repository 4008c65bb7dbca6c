// Softmax cross-entropy of each row on the CPU. The mathematics is in cross_entropy.h.
//
// Bytes moved: the forward reads the logits once. The backward reads the logits once and writes the gradient once, with
// streaming stores if it is large.
#include "cross_entropy.h"

#include "checks.h"

namespace fastgpt {
namespace {

// Checks logits (N, V) with contiguous rows, target (N,), weight (V,).
Checks check_rows(const char* op, const Tensor& logits, const Tensor& target, const OptionalTensor& weight) {
  const Checks check(op, "logits", logits, {ANY, ANY});
  const int64_t rows = logits.size(0), vocab = logits.size(1);
  check("target", target, {rows}, ScalarType::Long)("weight", weight, {vocab}, accumulator(logits.scalar_type()));
  require(vocab <= 1 || logits.stride(1) == 1, op, ": the classes of a row must be contiguous");
  return check;
}

std::tuple<Tensor, Tensor> cross_entropy_fwd(
    const Tensor& logits,
    const Tensor& target,
    const OptionalTensor& weight,
    int64_t ignore_index,
    double label_smoothing,
    double z_loss,
    double softcap,
    double logit_scale) {
  check_rows("cross_entropy_fwd_cpp", logits, target, weight);
  const int64_t rows = logits.size(0), vocab = logits.size(1), stride = logits.stride(0);
  const Tensor y = contiguous(target);
  check_targets(y, vocab, ignore_index);
  const auto acc = accumulator(logits.scalar_type());
  const OptionalTensor w = contiguous(weight, acc);
  Tensor loss = empty({rows}, acc), statistics = empty({rows, 2}, acc);
  dispatch(logits.scalar_type(), "cross_entropy", [&](auto element) {
    using T = decltype(element);
    using A = compute_t<T>;
    const CrossEntropyRow<A> row(pointer<A>(w), vocab, {ignore_index, label_smoothing, z_loss, softcap, logit_scale});
    const T* x = logits.const_data_ptr<T>();
    const int64_t* targets = y.const_data_ptr<int64_t>();
    A* losses = loss.mutable_data_ptr<A>();
    A* row_statistics = statistics.mutable_data_ptr<A>();
    parallel_for(0, rows, GRAIN / std::max<int64_t>(vocab, 1) + 1, [&](int64_t begin, int64_t end) {
      const FlushSubnormals flush;
      for (int64_t i = begin; i < end; ++i) losses[i] = row.forward(x + i * stride, targets[i], row_statistics + 2 * i);
    });
  });
  return {loss, statistics};
}

void check_backward(
    const char* op,
    const Tensor& grad_loss,
    const OptionalTensor& grad_lse,
    const Tensor& logits,
    const Tensor& target,
    const Tensor& statistics,
    const OptionalTensor& weight) {
  const Checks check = check_rows(op, logits, target, weight);
  const int64_t rows = logits.size(0);
  const auto acc = accumulator(logits.scalar_type());
  check("grad_loss", grad_loss, {rows}, acc)("grad_lse", grad_lse, {rows}, acc)(
      "statistics", statistics, {rows, 2}, acc);
}

// Writes the gradient to `out`, which may be the logits themselves.
void backward_into(
    const Tensor& out,
    const Tensor& grad_loss,
    const OptionalTensor& grad_lse,
    const Tensor& logits,
    const Tensor& target,
    const Tensor& statistics,
    const OptionalTensor& weight,
    const LossOptions& loss_options) {
  const int64_t rows = logits.size(0), vocab = logits.size(1);
  const int64_t stride = logits.stride(0), out_stride = out.stride(0);
  const Tensor y = contiguous(target);
  check_targets(y, vocab, loss_options.ignore_index);
  const auto acc = accumulator(logits.scalar_type());
  const OptionalTensor w = contiguous(weight, acc), gl = contiguous(grad_lse, acc);
  const Tensor g = contiguous(grad_loss), s = contiguous(statistics);
  dispatch(logits.scalar_type(), "cross_entropy", [&](auto element) {
    using T = decltype(element);
    using A = compute_t<T>;
    const CrossEntropyRow<A> row(pointer<A>(w), vocab, loss_options);
    const T* x = logits.const_data_ptr<T>();
    T* dx = out.mutable_data_ptr<T>();
    const int64_t* targets = y.const_data_ptr<int64_t>();
    const A* grads = g.const_data_ptr<A>();
    const A* row_statistics = s.const_data_ptr<A>();
    const A* lse_grads = pointer<A>(gl);
    const auto all = [&](auto streaming) {
      parallel_for(0, rows, GRAIN / std::max<int64_t>(vocab, 1) + 1, [&](int64_t begin, int64_t end) {
        const FlushSubnormals flush;
        for (int64_t i = begin; i < end; ++i)
          row.template backward<streaming.value>(
              x + i * stride,
              dx + i * out_stride,
              targets[i],
              row_statistics + 2 * i,
              grads[i],
              lse_grads ? lse_grads[i] : A(0));
        if (streaming.value) end_streaming();
      });
    };
    // In place, the lines are already in the cache.
    const bool streaming = dx != x && is_streamed<T>(rows * vocab);
    streaming ? all(std::true_type{}) : all(std::false_type{});
  });
}

Tensor cross_entropy_bwd(
    const Tensor& grad_loss,
    const OptionalTensor& grad_lse,
    const Tensor& logits,
    const Tensor& target,
    const Tensor& statistics,
    const OptionalTensor& weight,
    int64_t ignore_index,
    double label_smoothing,
    double z_loss,
    double softcap,
    double logit_scale) {
  check_backward("cross_entropy_bwd_cpp", grad_loss, grad_lse, logits, target, statistics, weight);
  Tensor out = empty(logits.sizes(), logits.scalar_type());
  backward_into(
      out,
      grad_loss,
      grad_lse,
      logits,
      target,
      statistics,
      weight,
      {ignore_index, label_smoothing, z_loss, softcap, logit_scale});
  return out;
}

void cross_entropy_bwd_inplace(
    const Tensor& grad_loss,
    const OptionalTensor& grad_lse,
    Tensor& logits,
    const Tensor& target,
    const Tensor& statistics,
    const OptionalTensor& weight,
    int64_t ignore_index,
    double label_smoothing,
    double z_loss,
    double softcap,
    double logit_scale) {
  check_backward("cross_entropy_bwd_inplace_cpp", grad_loss, grad_lse, logits, target, statistics, weight);
  require(
      logits.size(0) <= 1 || logits.stride(0) >= logits.size(1),
      "cross_entropy_bwd_inplace_cpp: the rows of logits must not overlap, because they are written; pass a copy");
  backward_into(
      logits,
      grad_loss,
      grad_lse,
      logits,
      target,
      statistics,
      weight,
      {ignore_index, label_smoothing, z_loss, softcap, logit_scale});
}

STABLE_TORCH_LIBRARY_IMPL(fastgpt, CPU, m) {
  m.impl("cross_entropy_fwd_cpp", TORCH_BOX(&cross_entropy_fwd));
  m.impl("cross_entropy_bwd_cpp", TORCH_BOX(&cross_entropy_bwd));
  m.impl("cross_entropy_bwd_inplace_cpp", TORCH_BOX(&cross_entropy_bwd_inplace));
}

}  // namespace
}  // namespace fastgpt
