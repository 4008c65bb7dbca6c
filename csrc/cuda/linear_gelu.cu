// GELU of a linear layer's output: z = x Wᵀ + b, y = gelu(z). The backward, from z, is in gelu.cu.
//
// For tanh GELU in 16 bits, GELU is the epilogue of a cuBLASLt product: y is computed from the sums before they are
// rounded, and z is written only if a backward needs it. Otherwise, and if cuBLASLt has no kernel, PyTorch computes the
// product and gelu.cu makes a pass over z.
#include "../call_op.h"
#include "checks.cuh"
#include "cublaslt.cuh"

namespace fastgpt {
namespace {

std::tuple<Tensor, Tensor> linear_gelu_fwd(
    const Tensor& x, const Tensor& weight, const OptionalTensor& bias, bool tanh, bool with_z) {
  Checks("linear_gelu_fwd_cuda", "x", x, {ANY, ANY})("weight", weight, {ANY, x.size(1)}, {x.scalar_type()})(
      "bias", bias, {weight.size(0)}, {x.scalar_type()});
  const Tensor none = empty(x, {0}, x.scalar_type());
#ifdef FASTGPT_EPILOGUE
  if (tanh && CublasLtProduct::supports(x, weight) && (!bias.has_value() || (bias->stride(0) == 1 && aligned(*bias)))) {
    const Tensor y = empty(x, {x.size(0), weight.size(0)}, x.scalar_type());
    const Tensor z = with_z ? torch::stable::empty_like(y) : none;
    Epilogue epilogue{CUBLASLT_EPILOGUE_GELU, nullptr, nullptr};
    if (with_z) epilogue.kind |= CUBLASLT_EPILOGUE_GELU_AUX, epilogue.z = &z;
    if (bias.has_value()) epilogue.kind |= CUBLASLT_EPILOGUE_BIAS, epilogue.vector = &*bias;
    if (CublasLtProduct(x, weight, y, epilogue).run()) return {y, z};
  }
#endif
  const auto [z] = call_op<Tensor>("fastgpt::linear_fwd_cuda", x, weight, bias);
  const auto [y] = call_op<Tensor>("fastgpt::gelu_fwd_cuda", z, tanh);
  return {y, with_z ? z : none};
}

STABLE_TORCH_LIBRARY_IMPL(fastgpt, FASTGPT_DISPATCH_KEY, m) {
  m.impl("linear_gelu_fwd_cuda", TORCH_BOX(&linear_gelu_fwd));
}

}  // namespace
}  // namespace fastgpt
