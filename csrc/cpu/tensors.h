// Tensors at the launch boundary, parallel to csrc/cuda/tensors.cuh. They use PyTorch's stable ABI (2.11 and later), so
// one library works with every later PyTorch.
//
// An op on a few elements takes about as long as its calls of PyTorch. The functions here therefore call the functions
// of the C ABI themselves. torch::stable goes through the dispatcher, which looks up an op by its name at each call.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cstdint>
#include <exception>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <type_traits>
#include <vector>

#include "../call_op.h"

namespace fastgpt {

using torch::headeronly::BFloat16;
using torch::headeronly::Half;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;
using Sizes = torch::headeronly::IntHeaderOnlyArrayRef;

// ---- errors ----

// Raises an Error with a message of several parts. Python sees std::out_of_range as IndexError, std::invalid_argument
// as ValueError, and std::runtime_error as RuntimeError.
template <typename Error = std::runtime_error, typename... Parts>
[[noreturn, gnu::cold, gnu::noinline]] void raise(const Parts&... parts) {
  std::ostringstream message;
  (message << ... << parts);
  throw Error(message.str());
}

// The same unless the condition holds.
template <typename Error = std::runtime_error, typename... Parts>
void require(bool condition, const Parts&... parts) {
  if (!condition) [[unlikely]]
    raise<Error>(parts...);
}

// "[1, 2]"
template <typename Range>
std::string listed(const Range& range) {
  std::ostringstream text;
  for (const auto& x : range) text << (text.tellp() > 0 ? ", " : "[") << x;
  return text.tellp() > 0 ? text.str() + "]" : "[]";
}

// ---- creating tensors ----

inline int32_t code_of(ScalarType dtype) {
  return torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype));
}

// Calls the C function that creates a tensor.
template <typename F>
Tensor created(const char* name, F&& create) {
  AtenTensorHandle handle = nullptr;
  check_call(create(&handle), name);
  return Tensor(handle);
}

inline Tensor empty_strided(Sizes sizes, Sizes strides, ScalarType dtype) {
  AtenTensorHandle handle = nullptr;
  const int32_t code = code_of(dtype);
  const AOTITorchError error = aoti_torch_empty_strided(
      static_cast<int64_t>(sizes.size()), sizes.data(), strides.data(), code, aoti_torch_device_type_cpu(), 0, &handle);
  if (error != TORCH_SUCCESS) {
    // The stable ABI drops the reason, which is PyTorch's usual one.
    int64_t bytes = static_cast<int64_t>(aoti_torch_dtype_element_size(code));
    for (const int64_t size : sizes) bytes *= size;
    raise("DefaultCPUAllocator: can't allocate memory: you tried to allocate ", bytes, " bytes.");
  }
  return Tensor(handle);
}

// A contiguous tensor of at most four dimensions.
inline Tensor empty(Sizes sizes, ScalarType dtype) {
  std::array<int64_t, 4> strides;
  int64_t stride = 1;
  for (size_t d = sizes.size(); d-- > 0;) {
    strides[d] = stride;
    stride *= std::max<int64_t>(sizes[d], 1);
  }
  return empty_strided(sizes, Sizes(strides.data(), sizes.size()), dtype);
}

inline Tensor zeros(Sizes sizes, ScalarType dtype) {
  Tensor x = empty(sizes, dtype);
  check_call(aoti_torch_zero_(x.get()), "zero_");
  return x;
}

// A tensor with the sizes, strides and dtype of one that has no gaps.
inline Tensor empty_like(const Tensor& x) { return empty_strided(x.sizes(), x.strides(), x.scalar_type()); }

inline Tensor clone(const Tensor& x) {
  return created("clone", [&](AtenTensorHandle* result) { return aoti_torch_clone(x.get(), result); });
}

// ---- tensors made from others ----

// A view of x with other sizes and strides, which begins `offset` elements later.
inline Tensor as_strided(const Tensor& x, Sizes sizes, Sizes strides, int64_t offset = 0) {
  return created("as_strided", [&](AtenTensorHandle* result) {
    return aoti_torch__reinterpret_tensor(
        x.get(), static_cast<int64_t>(sizes.size()), sizes.data(), strides.data(), offset, result);
  });
}

// x (M, N) as (N, M).
inline Tensor transposed(const Tensor& x) { return as_strided(x, {x.size(1), x.size(0)}, {x.stride(1), x.stride(0)}); }

inline Tensor to(const Tensor& x, ScalarType dtype) {
  if (x.scalar_type() == dtype) return x;
  const std::optional<torch::headeronly::MemoryFormat> preserve;
  return std::get<0>(call_op<Tensor>({"aten::to", "dtype"}, x, dtype, false, false, preserve));
}

inline Tensor contiguous(const Tensor& x) {
  if (x.is_contiguous()) return x;
  return std::get<0>(call_op<Tensor>("aten::contiguous", x, torch::headeronly::MemoryFormat::Contiguous));
}

inline Tensor contiguous(const Tensor& x, ScalarType dtype) { return contiguous(to(x, dtype)); }
inline OptionalTensor contiguous(const OptionalTensor& x, ScalarType dtype) {
  return x ? OptionalTensor(contiguous(*x, dtype)) : x;
}

// Sums over the first dimension.
inline Tensor sum_rows(const Tensor& x, ScalarType dtype) {
  const int64_t first[] = {0};
  return std::get<0>(call_op<Tensor>(
      {"aten::sum", "dim_IntList"}, x, std::optional<Sizes>(first), false, std::optional<ScalarType>(dtype)));
}

// ---- the memory of tensors ----

// The elements of a tensor, or null if it is missing.
template <typename T>
const T* pointer(const OptionalTensor& x) {
  return x ? x->const_data_ptr<T>() : nullptr;
}

// ---- threads ----

// Calls f(first, last) for ranges that divide [begin, end), on PyTorch's threads. A range has at least `grain`
// elements, which must be positive. An exception in f is raised here. (PyTorch would turn it into another.)
template <typename F>
void parallel_for(int64_t begin, int64_t end, int64_t grain, const F& f) {
  if (begin >= end) return;
  if (end - begin <= grain) return f(begin, end);
  struct Task {
    const F& f;
    std::exception_ptr error;
    std::atomic_flag failed;
  } task{f, nullptr, {}};
  const auto run = [](int64_t first, int64_t last, void* context) {
    Task& task = *static_cast<Task*>(context);
    try {
      task.f(first, last);
    } catch (...) {
      if (!task.failed.test_and_set()) task.error = std::current_exception();
    }
  };
  check_call(torch_parallel_for(begin, end, grain, run, &task), "parallel_for");
  if (task.error) std::rethrow_exception(task.error);
}

}  // namespace fastgpt
