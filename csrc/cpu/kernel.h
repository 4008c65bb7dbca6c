// Common code of the CPU kernels: storage and compute types, how work is divided, and the dispatch on the element type.
//
// Every kernel computes in A = float (double for double tensors) on vectors (vector.h). Vectors are widened when loaded
// and rounded when stored. The kernels are never compiled with -ffast-math, so NaN and infinity keep their meaning.
#pragma once

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

#include "tensors.h"
#include "vector.h"

namespace fastgpt {

// The type in which tensors of T are computed and accumulated.
template <typename T>
using compute_t = std::conditional_t<std::is_same_v<T, double>, double, float>;

inline ScalarType accumulator(ScalarType type) {
  return type == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

// The floating dtype that holds the numbers of both.
inline ScalarType promoted(ScalarType a, ScalarType b) {
  if (a == b) return a;
  return a == ScalarType::Double || b == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

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
inline void dispatch(ScalarType type, const char* name, F&& f) {
  switch (type) {
    case ScalarType::Float:
      return f(float{});
    case ScalarType::Double:
      return f(double{});
    case ScalarType::BFloat16:
      return f(BFloat16{});
    case ScalarType::Half:
      return f(Half{});
    default:
      raise(name, ": the C++ kernels do not support ", type, "; use float32, float64, bfloat16 or float16");
  }
}

// Calls f(element, streaming) for a result like x. streaming: whether to use streaming stores. Each thread's blocks
// must begin at a cache line, which BLOCK ensures.
template <typename F>
inline void dispatch_streaming(const Tensor& x, const char* name, F&& f) {
  dispatch(x.scalar_type(), name, [&](auto element) {
    is_streamed<decltype(element)>(x.numel()) ? f(element, std::true_type{}) : f(element, std::false_type{});
  });
}

}  // namespace fastgpt
