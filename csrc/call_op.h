// Calls another registered op, of this library or of PyTorch, through the dispatcher and PyTorch's stable ABI.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <array>
#include <stdexcept>
#include <string>
#include <tuple>

// PyTorch has this function from 2.13 on; before, it is null, and PyTorch writes the message to stderr only.
extern "C" __attribute__((weak)) const char* torch_exception_get_what_without_backtrace();

namespace fastgpt {

// The name of an op and of its overload.
struct OpName {
  const char *name, *overload;
  OpName(const char* name, const char* overload = "") : name(name), overload(overload) {}
};

// Raises an error if PyTorch could not complete the op.
inline void check_call(AOTITorchError code, const char* op) {
  if (code == TORCH_SUCCESS) return;
  std::string reason = "PyTorch wrote the reason to stderr";
  if (&torch_exception_get_what_without_backtrace) reason = torch_exception_get_what_without_backtrace();
  throw std::runtime_error(std::string(op) + " failed: " + reason);
}

// call_op<Results...>({"namespace::op", "overload"}, arguments...): the results as a tuple.
template <typename... Results, typename... Arguments>
std::tuple<Results...> call_op(OpName op, const Arguments&... arguments) {
  std::array<StableIValue, std::max(sizeof...(arguments), sizeof...(Results))> stack{
      torch::stable::detail::from(arguments)...};
  check_call(torch_call_dispatcher(op.name, op.overload, stack.data(), TORCH_ABI_VERSION), op.name);
  auto next = stack.begin();
  return {torch::stable::detail::to<Results>(*next++)...};
}

}  // namespace fastgpt
