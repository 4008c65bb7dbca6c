// Two linear layers with GELU between them:  z = x W₁ᵀ + b₁,  y = gelu(z),  out = y W₂ᵀ + b₂.
//
// The forward is linear_gelu.cu's and PyTorch's product, and so are the backward's products but the one that reaches z:
//
//     dz = (dout W₂) gelu'(z),   db₁ = Σ dz over rows
//
// GELU by tanh of 16-bit numbers has its derivative and the sum in the epilogue of cuBLASLt's product, so that dy =
// dout W₂ is never in memory. Everything else, and what cuBLASLt has no kernel for, is PyTorch's product and a pass
// over dy and z.
#include "checks.cuh"
#include "product.cuh"

namespace fastgpt {
namespace {

// grad (M, C) of the second layer's result, z (M, N) and its weight W₂ (C, N).
std::tuple<Tensor, Tensor> mlp_bwd(
    const Tensor& grad, const Tensor& z, const Tensor& weight, bool tanh, bool with_bias) {
  Checks("mlp_bwd_cuda", "z", z, {ANY, ANY})("weight", weight, {ANY, z.size(1)}, {z.scalar_type()})(
      "grad", grad, {z.size(0), weight.size(0)}, {z.scalar_type()})
      .contiguous("z", z);
  const int64_t size = z.size(1);
#ifdef FASTGPT_EPILOGUE
  const Tensor columns = torch::stable::transpose(weight, 0, 1);
  if (tanh && aligned(z) && Product::takes(grad, columns)) {
    const Tensor dz = torch::stable::empty_like(z), dbias = empty(z, {with_bias ? size : 0}, z.scalar_type());
    Epilogue epilogue{CUBLASLT_EPILOGUE_DGELU, nullptr, &z};
    if (with_bias) epilogue.kind = CUBLASLT_EPILOGUE_DGELU_BGRAD, epilogue.vector = &dbias;
    if (Product(grad, columns, dz, epilogue).run()) return {dz, dbias};
  }
#endif
  const auto [dy, _, __] =
      call<Tensor, Tensor, Tensor>("fastgpt::linear_bwd_cuda", grad, z, weight, true, false, false);
  if (with_bias) {
    const Tensor zero = zeros(z, {size}, z.scalar_type());
    return call<Tensor, Tensor>("fastgpt::bias_gelu_bwd_cuda", dy, z, zero, tanh);
  }
  const auto [dz] = call<Tensor>("fastgpt::gelu_bwd_cuda", dy, z, tanh);
  return {dz, empty(z, {0}, z.scalar_type())};
}

STABLE_TORCH_LIBRARY_IMPL(fastgpt, FASTGPT_DISPATCH_KEY, m) { m.impl("mlp_bwd_cuda", TORCH_BOX(&mlp_bwd)); }

}  // namespace
}  // namespace fastgpt
