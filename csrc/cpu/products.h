// Matrix products of PyTorch, and whether they are faster than the ones in gemm.h.
#pragma once

#include "tensors.h"

namespace fastgpt {

// Whether PyTorch multiplies bfloat16 matrices on the tiles of AMX (Intel, from Sapphire Rapids on): about six times
// the rate of gemm.h, whose fastest instructions are those of AVX512-BF16. The op `use_amx_cpp` overrides it, for
// tests.
bool has_amx();

// a (M, K) times b (K, N)
Tensor mm(const Tensor& a, const Tensor& b);

// x (M, K) times the transpose of weight (N, K), and bias (N,).
Tensor linear(const Tensor& x, const Tensor& weight, const OptionalTensor& bias);

}  // namespace fastgpt
