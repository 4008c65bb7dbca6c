// Calls another registered op, of this library or of PyTorch, through the dispatcher.
#pragma once

#include <array>

#include "tensors.cuh"

namespace fastgpt {

// call_op<Results...>("namespace::op", arguments...): the results as a tuple.
template <typename... Results, typename... Arguments>
std::tuple<Results...> call_op(const char* op, const Arguments&... arguments) {
  std::array<StableIValue, std::max(sizeof...(arguments), sizeof...(Results))> stack{
      torch::stable::detail::from(arguments)...};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher(op, "", stack.data(), TORCH_ABI_VERSION));
  auto next = stack.begin();
  return {torch::stable::detail::to<Results>(*next++)...};
}

}  // namespace fastgpt
