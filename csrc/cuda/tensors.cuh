// Tensor helpers at the launch boundary. They use PyTorch's stable ABI (2.11 and later), so one library works with
// every later PyTorch.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <device.cuh>
#include <initializer_list>
#include <optional>
#include <tuple>
#include <vector>

namespace fastgpt {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

inline int64_t cdiv(int64_t a, int64_t b) { return (a + b - 1) / b; }

inline Device device_of(const Tensor& x) { return Device(x.get_device_index()); }

// The memory of a tensor, from its first element to its last.
template <typename T>
Global<T> global(const Tensor& x) {
  int64_t extent = 1;
  for (int64_t d = 0; d < x.dim(); ++d) {
    if (x.size(d) == 0) return Global<T>{};
    extent += (x.size(d) - 1) * x.stride(d);
  }
  return global_memory(static_cast<T*>(x.data_ptr()), extent);
}

template <typename T>
Global<T> global(const OptionalTensor& x) {
  return x.has_value() ? global<T>(*x) : Global<T>{};
}

// A contiguous float32 tensor (N, 4) as N vectors.
inline Global<Vector<float, 4>> vectors_of_four(const Tensor& x) {
  return global_memory(static_cast<Vector<float, 4>*>(x.data_ptr()), x.numel() / 4);
}

// Returns create(sizes). The stable ABI drops the type of an exception. fastgpt.ops recognizes running out of memory by
// this message.
template <typename F>
Tensor allocated(std::initializer_list<int64_t> shape, ScalarType dtype, F&& create) {
  const std::vector<int64_t> sizes(shape);
  try {
    return create(torch::headeronly::IntHeaderOnlyArrayRef(sizes));
  } catch (const std::exception& error) {
    int64_t bytes = dtype == ScalarType::Double  ? 8
                    : dtype == ScalarType::Float ? 4
                    : dtype == ScalarType::Byte  ? 1
                                                 : 2;
    for (int64_t size : sizes) bytes *= size;
    STD_TORCH_CHECK(false, "fastgpt: could not allocate ", bytes, " bytes: ", error.what());
  }
}
inline Tensor empty(const Tensor& like, std::initializer_list<int64_t> shape, ScalarType dtype) {
  return allocated(shape, dtype, [&](auto sizes) { return torch::stable::new_empty(like, sizes, dtype); });
}
inline Tensor zeros(const Tensor& like, std::initializer_list<int64_t> shape, ScalarType dtype) {
  return allocated(shape, dtype, [&](auto sizes) { return torch::stable::new_zeros(like, sizes, dtype); });
}

// Sums over the first dimension.
inline Tensor sum_rows(const Tensor& x) {
  const int64_t first[] = {0};
  return torch::stable::sum(x, torch::headeronly::IntHeaderOnlyArrayRef(first, 1));
}

// Whether the tensors begin at multiples of 16 bytes, as vector loads and stores require.
template <typename... Tensors>
bool aligned(const Tensors&... x) {
  return ((reinterpret_cast<uintptr_t>(x.data_ptr()) % 16 == 0) && ...);
}

// Calls f with a value of the element type.
template <typename F>
auto dispatch(ScalarType dtype, const char* op, F&& f) {
  switch (dtype) {
    case ScalarType::Float:
      return f(float{});
    case ScalarType::BFloat16:
      return f(bf16{});
    case ScalarType::Half:
      return f(fp16{});
    default:
      STD_TORCH_CHECK(false, "fastgpt: ", op, " supports float32, bfloat16 and float16; convert the tensor");
  }
}

// Calls f with std::true_type or std::false_type.
template <typename F>
auto choose(bool value, F&& f) {
  return value ? f(std::true_type{}) : f(std::false_type{});
}

}  // namespace fastgpt
