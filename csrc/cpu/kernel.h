// Common code of the CPU kernels: storage and compute types, how work is divided, and the dispatch on the element type.
//
// Every kernel computes in A = float (double for double tensors) on vectors (vector.h). Vectors are widened when loaded
// and rounded when stored. The kernels are never compiled with -ffast-math, so NaN and infinity keep their meaning.
#pragma once

#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/sum.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <memory>
#include <optional>
#include <tuple>
#include <type_traits>
#include <vector>

namespace fastgpt {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

// The type in which tensors of T are computed and accumulated.
template <typename T>
using compute_t = std::conditional_t<std::is_same_v<T, double>, double, float>;

inline at::ScalarType accumulator(at::ScalarType type) { return type == at::kDouble ? at::kDouble : at::kFloat; }

// The unit of work in elements: a thread processes whole blocks.
constexpr int64_t BLOCK = 1024;

inline int64_t blocks(int64_t numel) { return (numel + BLOCK - 1) / BLOCK; }

// Less work than this many elements is not worth another thread.
constexpr int64_t GRAIN = 16384;

// Into how many spans a sum over rows is cut. It depends only on the number of rows, so the bits of the sum do not
// depend on the number of threads.
inline int64_t row_parts(int64_t rows) { return std::clamp<int64_t>(rows / 16, 1, 64); }

// Calls f with a value of the tensor's element type.
template <typename F>
inline void dispatch(at::ScalarType type, const char* name, F&& f) {
  switch (type) {
    case at::kFloat:
      return f(float{});
    case at::kDouble:
      return f(double{});
    case at::kBFloat16:
      return f(at::BFloat16{});
    case at::kHalf:
      return f(at::Half{});
    default:
      TORCH_CHECK_NOT_IMPLEMENTED(
          false, name, ": the C++ kernels do not support ", type, "; use float32, float64, bfloat16 or float16");
  }
}

}  // namespace fastgpt
