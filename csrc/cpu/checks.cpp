// The functions of checks.h, defined out of line: compiled once instead of once per kernel file.
#include "checks.h"

namespace fastgpt {

Checks::Checks(const char* op, const char* name, const Tensor& main) : Checks(op, name, main, main.sizes()) {}

Checks::Checks(const char* op, const char* name, const Tensor& main, at::IntArrayRef sizes) : op_(op), main_(main) {
  (*this)(name, main, sizes, FLOATS);
}

const Checks& Checks::operator()(
    const char* name, const Tensor& t, at::IntArrayRef sizes, at::ArrayRef<at::ScalarType> dtypes) const {
  const auto matches = [](int64_t is, int64_t wanted) { return wanted == ANY || is == wanted; };
  TORCH_CHECK(t.is_cpu(), op_, ": ", name, " must be on the CPU, got ", t.device());
  TORCH_CHECK(
      std::ranges::equal(t.sizes(), sizes, matches),
      op_,
      ": ",
      name,
      " must have the sizes ",
      sizes,
      " (-1: any), got ",
      t.sizes());
  TORCH_CHECK(
      std::ranges::find(dtypes, t.scalar_type()) != dtypes.end(),
      op_,
      ": ",
      name,
      " must have the dtype ",
      dtypes,
      ", got ",
      t.scalar_type());
  return *this;
}

const Checks& Checks::operator()(
    const char* name, const OptionalTensor& t, at::IntArrayRef sizes, at::ArrayRef<at::ScalarType> dtypes) const {
  return t ? (*this)(name, *t, sizes, dtypes) : *this;
}

const Checks& Checks::like(const char* name, const Tensor& t) const {
  return (*this)(name, t, main_.sizes(), main_.scalar_type());
}

const Checks& Checks::like(const char* name, const OptionalTensor& t) const { return t ? like(name, *t) : *this; }

}  // namespace fastgpt
