// Cross-entropy of a linear layer's output on the CPU, a chunk of rows at a time.
//
//   logits = hidden·weightᵀ + bias        2·N·D·V FLOP, each of three products
//   dhidden = dlogits·weight,  dweight = dlogitsᵀ·hidden,  dbias = Σ dlogits
//
// The products are PyTorch's GEMMs. A chunk's logits are overwritten by their gradient, so that the
// exponentials are the only other pass over them, and no more than one chunk of logits exists. dweight
// is summed over the chunks in float32. The gradients of the forward are those of the sum of the
// losses, in float32, so that scaling them later neither under- nor overflows in half precision.
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/addmm.h>
#include <ATen/ops/mm.h>

#include "cross_entropy.h"

namespace fastgpt {
namespace {

// Rows of a chunk: 32 MiB of logits. Fewer would add passes over dweight (V·D, once a chunk) and make
// thin products; more would only take memory.
int64_t chunk_rows(int64_t asked, int64_t rows, int64_t vocab, int64_t element_size) {
  const int64_t automatic = (int64_t{32} << 20) / std::max<int64_t>(vocab * element_size, 1);
  return std::clamp<int64_t>(asked > 0 ? asked : automatic, 1, std::max<int64_t>(rows, 1));
}

// logits of the rows [begin, end)
Tensor project(const Tensor& hidden, const Tensor& weight, const OptionalTensor& bias, int64_t begin, int64_t end) {
  const Tensor h = hidden.slice(0, begin, end);
  return bias ? at::addmm(*bias, h, weight.t()) : at::mm(h, weight.t());
}

// Adds this chunk's share of the gradients. dhidden, dweight, dbias are in the accumulation dtype.
void accumulate(
    const Tensor& dlogits,
    const Tensor& hidden,
    const Tensor& weight,
    const Tensor& dhidden,
    Tensor& dweight,
    Tensor& dbias,
    bool has_bias,
    int64_t begin,
    int64_t end) {
  dhidden.slice(0, begin, end).copy_(at::mm(dlogits, weight));
  const Tensor h = hidden.slice(0, begin, end);
  if (h.scalar_type() == dweight.scalar_type())
    dweight.addmm_(dlogits.t(), h);
  else
    dweight.add_(at::mm(dlogits.t(), h));
  if (has_bias) dbias.add_(at::sum(dlogits, {0}, false, dbias.scalar_type()));
}

using Gradients = std::tuple<Tensor, Tensor, Tensor>;

Gradients zero_gradients(const Tensor& hidden, const Tensor& weight, bool has_bias) {
  const auto options = hidden.options().dtype(accumulator(hidden.scalar_type()));
  return {
      at::empty(hidden.sizes(), options),
      at::zeros(weight.sizes(), options),
      at::zeros({has_bias ? weight.size(0) : 0}, options)};
}

// ---- forward, with the gradients of the sum of the losses where they are wanted ----

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> linear_cross_entropy_fwd(
    const Tensor& hidden,
    const Tensor& weight,
    const OptionalTensor& bias,
    const Tensor& target,
    const OptionalTensor& class_weight,
    int64_t ignore_index,
    double label_smoothing,
    double z_loss,
    double softcap,
    int64_t chunk,
    bool with_grad) {
  at::AutoDispatchBelowADInplaceOrView below_autograd;
  c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
  const int64_t rows = hidden.size(0), vocab = weight.size(0);
  const Tensor y = target.contiguous();
  check_targets(y, vocab, ignore_index);
  const auto options = hidden.options().dtype(accumulator(hidden.scalar_type()));
  const Tensor w = class_weight ? class_weight->to(options.dtype()).contiguous() : Tensor();
  Tensor loss = at::empty({rows}, options), lse = at::empty({rows}, options.dtype(at::kDouble));
  Tensor dhidden = at::empty({0}, options), dweight = at::empty({0}, options), dbias = at::empty({0}, options);
  if (with_grad) std::tie(dhidden, dweight, dbias) = zero_gradients(hidden, weight, bias.has_value());

  const int64_t step = chunk_rows(chunk, rows, vocab, hidden.element_size());
  for (int64_t begin = 0; begin < rows; begin += step) {
    const int64_t end = std::min(rows, begin + step);
    const Tensor logits = project(hidden, weight, bias, begin, end).contiguous();
    dispatch(logits.scalar_type(), "linear_cross_entropy", [&](auto element) {
      using T = decltype(element);
      using A = compute_t<T>;
      const CrossEntropyRow<A> row(
          class_weight ? w.const_data_ptr<A>() : nullptr, vocab, {ignore_index, label_smoothing, z_loss, softcap});
      T* x = logits.mutable_data_ptr<T>();
      const int64_t* targets = y.const_data_ptr<int64_t>();
      A* losses = loss.mutable_data_ptr<A>();
      double* lses = lse.mutable_data_ptr<double>();
      at::parallel_for(begin, end, GRAIN / std::max<int64_t>(vocab, 1) + 1, [&](int64_t first, int64_t last) {
        for (int64_t i = first; i < last; ++i) {
          T* at = x + (i - begin) * vocab;
          losses[i] = row.forward(at, targets[i], lses[i]);
          if (with_grad) row.backward(at, at, targets[i], lses[i], A(1), A(0));
        }
      });
    });
    if (with_grad) accumulate(logits, hidden, weight, dhidden, dweight, dbias, bias.has_value(), begin, end);
  }
  return {loss, lse, dhidden, dweight, dbias};
}

// ---- backward, for upstream gradients that differ from row to row: the logits are computed again ----

Gradients linear_cross_entropy_bwd(
    const Tensor& grad_loss,
    const Tensor& hidden,
    const Tensor& weight,
    const OptionalTensor& bias,
    const Tensor& target,
    const Tensor& lse,
    const OptionalTensor& class_weight,
    int64_t ignore_index,
    double label_smoothing,
    double z_loss,
    double softcap,
    int64_t chunk) {
  at::AutoDispatchBelowADInplaceOrView below_autograd;
  c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
  const int64_t rows = hidden.size(0), vocab = weight.size(0);
  const Tensor y = target.contiguous();
  check_targets(y, vocab, ignore_index);
  const auto acc = accumulator(hidden.scalar_type());
  const Tensor w = class_weight ? class_weight->to(acc).contiguous() : Tensor();
  const Tensor g = grad_loss.to(acc).contiguous(), l = lse.to(at::kDouble).contiguous();
  auto [dhidden, dweight, dbias] = zero_gradients(hidden, weight, bias.has_value());

  const int64_t step = chunk_rows(chunk, rows, vocab, hidden.element_size());
  for (int64_t begin = 0; begin < rows; begin += step) {
    const int64_t end = std::min(rows, begin + step);
    const Tensor logits = project(hidden, weight, bias, begin, end).contiguous();
    dispatch(logits.scalar_type(), "linear_cross_entropy", [&](auto element) {
      using T = decltype(element);
      using A = compute_t<T>;
      const CrossEntropyRow<A> row(
          class_weight ? w.const_data_ptr<A>() : nullptr, vocab, {ignore_index, label_smoothing, z_loss, softcap});
      T* x = logits.mutable_data_ptr<T>();
      const int64_t* targets = y.const_data_ptr<int64_t>();
      const A* grads = g.const_data_ptr<A>();
      const double* lses = l.const_data_ptr<double>();
      at::parallel_for(begin, end, GRAIN / std::max<int64_t>(vocab, 1) + 1, [&](int64_t first, int64_t last) {
        for (int64_t i = first; i < last; ++i) {
          T* at = x + (i - begin) * vocab;
          row.backward(at, at, targets[i], lses[i], grads[i], A(0));
        }
      });
    });
    accumulate(logits, hidden, weight, dhidden, dweight, dbias, bias.has_value(), begin, end);
  }
  const auto type = hidden.scalar_type();
  return {dhidden.to(type), dweight.to(type), dbias.to(type)};
}

TORCH_LIBRARY_IMPL(fastgpt, CPU, m) {
  m.impl("linear_cross_entropy_fwd_cpp", &linear_cross_entropy_fwd);
  m.impl("linear_cross_entropy_bwd_cpp", &linear_cross_entropy_bwd);
}

}  // namespace
}  // namespace fastgpt
