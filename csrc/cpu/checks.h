// Checks of the tensors of an op. Every launcher calls them first, because torch.ops.fastgpt can be called directly and
// a kernel takes the sizes of all tensors from one of them. Parallel to csrc/cuda/checks.cuh and to `Checks` of
// fastgpt/ops/_checks.py.
#pragma once

#include "kernel.h"

namespace fastgpt {

constexpr int64_t ANY = -1;  // matches every size

using Dtypes = torch::headeronly::HeaderOnlyArrayRef<ScalarType>;
inline constexpr ScalarType FLOATS[] = {ScalarType::Float, ScalarType::BFloat16, ScalarType::Half, ScalarType::Double};

class Checks {
 public:
  // `op`: the full name of the op. `main`: the argument that the others are compared with, of a floating dtype.
  Checks(const char* op, const char* name, const Tensor& main);
  Checks(const char* op, const char* name, const Tensor& main, Sizes sizes);

  // Checks that an argument, if given, is on the CPU and has these sizes (ANY matches any) and one of these dtypes.
  const Checks& operator()(const char* name, const Tensor& t, Sizes sizes, Dtypes dtypes) const;
  const Checks& operator()(const char* name, const OptionalTensor& t, Sizes sizes, Dtypes dtypes) const;

  // Checks that an argument, if given, has the sizes and the dtype of the main one.
  const Checks& like(const char* name, const Tensor& t) const;
  const Checks& like(const char* name, const OptionalTensor& t) const;

 private:
  const char* op_;
  const Tensor& main_;
};

}  // namespace fastgpt
