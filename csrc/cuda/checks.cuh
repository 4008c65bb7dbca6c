// Checks of the tensors of an op. Every launcher calls them first, because torch.ops.fastgpt can be called directly and
// a kernel takes the sizes of all tensors from one of them. Parallel to csrc/cpu/checks.h and to `Checks` of
// fastgpt/ops/_checks.py. The kernels here also rely on strides.
#pragma once

#include <span>
#include <sstream>
#include <string>

#include "tensors.cuh"

namespace fastgpt {

constexpr int64_t ANY = -1;  // matches every size

using Dtypes = std::initializer_list<ScalarType>;
inline constexpr Dtypes FLOATS{ScalarType::Float, ScalarType::BFloat16, ScalarType::Half};
inline constexpr Dtypes FLOATS_OR_DOUBLE{ScalarType::Float, ScalarType::BFloat16, ScalarType::Half, ScalarType::Double};

class Checks {
 public:
  // `op`: the full name of the op. `main`: the argument that the others are compared with, of a dtype that the kernels
  // support.
  Checks(const char* op, const char* name, const Tensor& main) : op_(op), main_(main), sizes_(sizes_of(main)) {
    check(name, main, sizes_, FLOATS);
  }
  Checks(const char* op, const char* name, const Tensor& main, std::initializer_list<int64_t> sizes)
      : Checks(op, name, main) {
    (*this)(name, main, sizes, FLOATS);
  }

  // Checks that an argument is on the device of the main one and has these sizes (ANY matches any) and one of these
  // dtypes.
  const Checks& operator()(
      const char* name, const Tensor& t, std::initializer_list<int64_t> sizes, Dtypes dtypes) const {
    return check(name, t, {sizes.begin(), sizes.size()}, dtypes);
  }

  // The same for an optional argument, if given.
  const Checks& operator()(
      const char* name, const OptionalTensor& t, std::initializer_list<int64_t> sizes, Dtypes dtypes) const {
    return t.has_value() ? (*this)(name, *t, sizes, dtypes) : *this;
  }

  // Checks that an argument, if given, has the sizes and the dtype of the main one.
  const Checks& like(const char* name, const OptionalTensor& t) const {
    return t.has_value() ? check(name, *t, sizes_, {main_.scalar_type()}) : *this;
  }

  // Checks pairs of a name and an argument: each argument, if given, is contiguous.
  template <typename... Rest>
  const Checks& contiguous(const char* name, const OptionalTensor& t, const Rest&... rest) const {
    STD_TORCH_CHECK(!t.has_value() || t->is_contiguous(), op_, ": ", name, " must be contiguous");
    if constexpr (sizeof...(rest) > 0) contiguous(rest...);
    return *this;
  }

  // Checks pairs of a name and an argument: the last dimension of each argument is contiguous.
  template <typename... Rest>
  const Checks& rows_contiguous(const char* name, const Tensor& t, const Rest&... rest) const {
    STD_TORCH_CHECK(
        t.size(-1) <= 1 || t.stride(-1) == 1 || t.numel() == 0, op_, ": the rows of ", name, " must be contiguous");
    if constexpr (sizeof...(rest) > 0) rows_contiguous(rest...);
    return *this;
  }

 private:
  static std::vector<int64_t> sizes_of(const Tensor& t) {
    std::vector<int64_t> sizes(t.dim());
    for (int64_t d = 0; d < t.dim(); ++d) sizes[d] = t.size(d);
    return sizes;
  }

  template <typename Range>
  static std::string listed(const Range& range) {
    std::ostringstream text;
    for (const auto& x : range) text << (text.tellp() > 0 ? ", " : "[") << x;
    return text.tellp() > 0 ? text.str() + "]" : "[]";
  }

  const Checks& check(const char* name, const Tensor& t, std::span<const int64_t> sizes, Dtypes dtypes) const {
    const auto matches = [](int64_t is, int64_t wanted) { return wanted == ANY || is == wanted; };
    const std::vector<int64_t> found = sizes_of(t);
    STD_TORCH_CHECK(
        t.get_device_index() == main_.get_device_index(),
        op_,
        ": ",
        name,
        " must be on device ",
        main_.get_device_index(),
        ", got ",
        t.get_device_index());
    STD_TORCH_CHECK(
        std::ranges::equal(found, sizes, matches),
        op_,
        ": ",
        name,
        " must have the sizes ",
        listed(sizes),
        " (-1: any), got ",
        listed(found));
    STD_TORCH_CHECK(
        std::ranges::find(dtypes, t.scalar_type()) != dtypes.end(),
        op_,
        ": ",
        name,
        " must have the dtype ",
        listed(dtypes),
        ", got ",
        t.scalar_type());
    return *this;
  }

  const char* op_;
  const Tensor& main_;
  std::vector<int64_t> sizes_;
};

}  // namespace fastgpt
