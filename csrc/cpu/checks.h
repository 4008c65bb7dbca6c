// The checks of an op's tensors, called first in every launcher: torch.ops.fastgpt can be called by anyone, and a
// kernel reads and writes as far as the sizes of one tensor reach in all of them. Parallel to csrc/cuda/checks.cuh and
// to `Checks` of fastgpt/ops/_checks.py.
#pragma once

#include "kernel.h"

namespace fastgpt {

constexpr int64_t ANY = -1;  // matches every size

constexpr at::ScalarType FLOATS[] = {at::kFloat, at::kBFloat16, at::kHalf, at::kDouble};

class Checks {
 public:
  // The op by its full name, and the argument that the others are compared with, of a floating dtype.
  Checks(const char* op, const char* name, const Tensor& main);
  Checks(const char* op, const char* name, const Tensor& main, at::IntArrayRef sizes);

  // An argument, if it is given, is on the CPU, has these sizes (ANY for any) and one of these dtypes.
  const Checks& operator()(
      const char* name, const Tensor& t, at::IntArrayRef sizes, at::ArrayRef<at::ScalarType> dtypes) const;
  const Checks& operator()(
      const char* name, const OptionalTensor& t, at::IntArrayRef sizes, at::ArrayRef<at::ScalarType> dtypes) const;

  // An argument, if it is given, has the sizes and the dtype of the main one.
  const Checks& like(const char* name, const Tensor& t) const;
  const Checks& like(const char* name, const OptionalTensor& t) const;

 private:
  const char* op_;
  const Tensor& main_;
};

}  // namespace fastgpt
