// Cross-entropy of a linear layer's output on the CPU: launchers. The mathematics and the chunks are in
// linear_cross_entropy.h, and for bfloat16 on CPUs with AMX in linear_cross_entropy_mm.h.
#include "linear_cross_entropy.h"

#include "checks.h"
#include "linear_cross_entropy_mm.h"

namespace fastgpt {
namespace {

// ---- launchers ----

using Gradients = std::tuple<Tensor, Tensor, Tensor>;

// The elements of a tensor, or null if it has none.
template <typename A>
A* mutable_pointer(const Tensor& t) {
  return t.numel() > 0 ? t.mutable_data_ptr<A>() : nullptr;
}

// Checks hidden (N, D), weight (V, D), bias (V,), target (N,), class_weight (V,).
Checks check_layer(
    const char* op,
    const Tensor& hidden,
    const Tensor& weight,
    const OptionalTensor& bias,
    const Tensor& target,
    const OptionalTensor& class_weight) {
  const Checks check(op, "hidden", hidden, {ANY, ANY});
  const auto type = hidden.scalar_type();
  check("weight", weight, {ANY, hidden.size(1)}, type)("bias", bias, {weight.size(0)}, type);
  check("target", target, {hidden.size(0)}, ScalarType::Long);
  check("class_weight", class_weight, {weight.size(0)}, accumulator(type));
  return check;
}

// Calls f(chunks, value of the compute type) for the dtype of the inputs.
template <typename F>
void with_chunks(
    const Tensor& hidden,
    const Tensor& weight,
    const OptionalTensor& bias,
    const Tensor& target,
    const OptionalTensor& class_weight,
    const LossOptions& options,
    int64_t chunk,
    F&& f) {
  check_targets(target, weight.size(0), options.ignore_index);
  const auto acc = accumulator(hidden.scalar_type());
  const OptionalTensor b = contiguous(bias, acc), w = contiguous(class_weight, acc);
  dispatch(hidden.scalar_type(), "linear_cross_entropy", [&](auto element) {
    using T = decltype(element);
    using A = compute_t<T>;
    Chunks<T> chunks(hidden, weight, pointer<A>(b), target.const_data_ptr<int64_t>(), pointer<A>(w), options, chunk);
    f(chunks, A{});
  });
}

// Whether the products are PyTorch's. On CPUs without AMX they are ours.
bool uses_mm(const Tensor& hidden, const Tensor& weight) {
  return FOLD<factor_t<BFloat16>> > 1 && has_amx() && hidden.scalar_type() == ScalarType::BFloat16 &&
         hidden.numel() > 0 && weight.numel() > 0;
}

// The arguments of mm_chunks.
Layer layer_of(
    const Tensor& hidden,
    const Tensor& weight,
    const OptionalTensor& bias,
    const Tensor& target,
    const OptionalTensor& class_weight,
    const LossOptions& options,
    int64_t chunk) {
  check_targets(target, weight.size(0), options.ignore_index);
  return {
      hidden,
      weight,
      target,
      contiguous(bias, ScalarType::BFloat16),
      contiguous(class_weight, ScalarType::Float),
      options,
      chunk};
}
LayerGradients pointers(const Gradients& gradients) {
  const auto& [dhidden, dweight, dbias] = gradients;
  return {mutable_pointer<float>(dhidden), mutable_pointer<float>(dweight), mutable_pointer<float>(dbias)};
}

// dweight is not initialized, because the first chunk writes all of it. If there are no chunks, it is zero.
Gradients empty_gradients(const Tensor& hidden, const Tensor& weight, bool has_bias) {
  const auto acc = accumulator(hidden.scalar_type());
  return {
      empty(hidden.sizes(), acc),
      hidden.size(0) > 0 ? empty(weight.sizes(), acc) : zeros(weight.sizes(), acc),
      zeros({has_bias ? weight.size(0) : 0}, acc)};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> linear_cross_entropy_fwd(
    const Tensor& hidden_,
    const Tensor& weight_,
    const OptionalTensor& bias,
    const Tensor& target_,
    const OptionalTensor& class_weight,
    int64_t ignore_index,
    double label_smoothing,
    double z_loss,
    double softcap,
    double logit_scale,
    int64_t chunk,
    bool with_grad) {
  check_layer("linear_cross_entropy_fwd_cpp", hidden_, weight_, bias, target_, class_weight);
  const Tensor hidden = contiguous(hidden_), weight = contiguous(weight_), target = contiguous(target_);
  const auto acc = accumulator(hidden.scalar_type());
  Tensor loss = empty({hidden.size(0)}, acc), statistics = empty({hidden.size(0), 2}, acc);
  Tensor dhidden = empty({0}, acc), dweight = empty({0}, acc), dbias = empty({0}, acc);
  if (with_grad) std::tie(dhidden, dweight, dbias) = empty_gradients(hidden, weight, bias.has_value());
  const LossOptions loss_options{ignore_index, label_smoothing, z_loss, softcap, logit_scale};
  if (uses_mm(hidden, weight)) {
    mm_forward(
        layer_of(hidden, weight, bias, target, class_weight, loss_options, chunk),
        loss.mutable_data_ptr<float>(),
        statistics.mutable_data_ptr<float>(),
        with_grad,
        pointers({dhidden, dweight, dbias}));
    return {loss, statistics, dhidden, dweight, dbias};
  }
  with_chunks(hidden, weight, bias, target, class_weight, loss_options, chunk, [&](auto& chunks, auto element) {
    using A = decltype(element);
    chunks.forward(
        loss.mutable_data_ptr<A>(),
        statistics.mutable_data_ptr<A>(),
        with_grad,
        mutable_pointer<A>(dhidden),
        mutable_pointer<A>(dweight),
        mutable_pointer<A>(dbias));
  });
  return {loss, statistics, dhidden, dweight, dbias};
}

Gradients linear_cross_entropy_bwd(
    const Tensor& grad_loss,
    const Tensor& hidden_,
    const Tensor& weight_,
    const OptionalTensor& bias,
    const Tensor& target_,
    const Tensor& statistics_,
    const OptionalTensor& class_weight,
    int64_t ignore_index,
    double label_smoothing,
    double z_loss,
    double softcap,
    double logit_scale,
    int64_t chunk) {
  const Checks check = check_layer("linear_cross_entropy_bwd_cpp", hidden_, weight_, bias, target_, class_weight);
  check("grad_loss", grad_loss, {hidden_.size(0)}, accumulator(hidden_.scalar_type()));
  check("statistics", statistics_, {hidden_.size(0), 2}, accumulator(hidden_.scalar_type()));
  const Tensor hidden = contiguous(hidden_), weight = contiguous(weight_), target = contiguous(target_);
  const Tensor grad = contiguous(grad_loss), statistics = contiguous(statistics_);
  auto [dhidden, dweight, dbias] = empty_gradients(hidden, weight, bias.has_value());
  const LossOptions loss_options{ignore_index, label_smoothing, z_loss, softcap, logit_scale};
  const auto type = hidden.scalar_type();
  if (uses_mm(hidden, weight)) {
    mm_backward(
        layer_of(hidden, weight, bias, target, class_weight, loss_options, chunk),
        grad.const_data_ptr<float>(),
        statistics.const_data_ptr<float>(),
        pointers({dhidden, dweight, dbias}));
    return {to(dhidden, type), to(dweight, type), to(dbias, type)};
  }
  with_chunks(hidden, weight, bias, target, class_weight, loss_options, chunk, [&](auto& chunks, auto element) {
    using A = decltype(element);
    chunks.backward(
        grad.const_data_ptr<A>(),
        statistics.const_data_ptr<A>(),
        mutable_pointer<A>(dhidden),
        mutable_pointer<A>(dweight),
        mutable_pointer<A>(dbias));
  });
  return {to(dhidden, type), to(dweight, type), to(dbias, type)};
}

STABLE_TORCH_LIBRARY_IMPL(fastgpt, CPU, m) {
  m.impl("linear_cross_entropy_fwd_cpp", TORCH_BOX(&linear_cross_entropy_fwd));
  m.impl("linear_cross_entropy_bwd_cpp", TORCH_BOX(&linear_cross_entropy_bwd));
}

}  // namespace
}  // namespace fastgpt
