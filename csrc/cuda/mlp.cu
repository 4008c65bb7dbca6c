// Two linear layers with GELU between them:  z = x W₁ᵀ + b₁,  y = gelu(z),  out = y W₂ᵀ + b₂.
//
// The forward uses linear_gelu.cu and PyTorch's product. In the backward PyTorch computes all products but one:
//
//     dz = (dout W₂) gelu'(z),   db₁ = Σ dz over rows
//
// For tanh GELU in 16 bits, the derivative and the sum are the epilogue of a cuBLASLt product, and dy = dout W₂ is
// never stored. Otherwise, and if cuBLASLt has no kernel, PyTorch computes dy and gelu.cu makes a pass over dy and z.
#include "../call_op.h"
#include "checks.cuh"
#include "cublaslt.cuh"

namespace fastgpt {
namespace {

// grad (M, C): the gradient of the output. z (M, N): the pre-activation. weight (C, N): W₂.
std::tuple<Tensor, Tensor> mlp_bwd(
    const Tensor& grad, const Tensor& z, const Tensor& weight, bool tanh, bool with_bias) {
  Checks("mlp_bwd_cuda", "z", z, {ANY, ANY})("weight", weight, {ANY, z.size(1)}, {z.scalar_type()})(
      "grad", grad, {z.size(0), weight.size(0)}, {z.scalar_type()})
      .contiguous("z", z);
  const int64_t N = z.size(1);
#ifdef FASTGPT_EPILOGUE
  const Tensor weight_t = torch::stable::transpose(weight, 0, 1);
  if (tanh && aligned(z) && CublasLtProduct::supports(grad, weight_t)) {
    const Tensor dz = torch::stable::empty_like(z), dbias = empty(z, {with_bias ? N : 0}, z.scalar_type());
    Epilogue epilogue{CUBLASLT_EPILOGUE_DGELU, nullptr, &z};
    if (with_bias) epilogue.kind = CUBLASLT_EPILOGUE_DGELU_BGRAD, epilogue.vector = &dbias;
    if (CublasLtProduct(grad, weight_t, dz, epilogue).run()) return {dz, dbias};
  }
#endif
  const auto [dy, _, __] =
      call_op<Tensor, Tensor, Tensor>("fastgpt::linear_bwd_cuda", grad, z, weight, true, false, false);
  if (with_bias) {
    const Tensor zero = zeros(z, {N}, z.scalar_type());
    return call_op<Tensor, Tensor>("fastgpt::bias_gelu_bwd_cuda", dy, z, zero, tanh);
  }
  const auto [dz] = call_op<Tensor>("fastgpt::gelu_bwd_cuda", dy, z, tanh);
  return {dz, empty(z, {0}, z.scalar_type())};
}

STABLE_TORCH_LIBRARY_IMPL(fastgpt, FASTGPT_DISPATCH_KEY, m) { m.impl("mlp_bwd_cuda", TORCH_BOX(&mlp_bwd)); }

}  // namespace
}  // namespace fastgpt
