// The functions of checks.h, defined out of line: compiled once instead of once per kernel file.
#include "checks.h"

namespace fastgpt {

Checks::Checks(const char* op, const char* name, const Tensor& main) : Checks(op, name, main, main.sizes()) {}

Checks::Checks(const char* op, const char* name, const Tensor& main, Sizes sizes) : op_(op), main_(main) {
  (*this)(name, main, sizes, FLOATS);
}

const Checks& Checks::operator()(const char* name, const Tensor& t, Sizes sizes, Dtypes dtypes) const {
  const auto matches = [](int64_t is, int64_t wanted) { return wanted == ANY || is == wanted; };
  const Sizes found = t.sizes();
  const ScalarType dtype = t.scalar_type();
  require(t.is_cpu(), op_, ": ", name, " must be on the CPU");
  if (!std::ranges::equal(found, sizes, matches))
    raise(op_, ": ", name, " must have the sizes ", listed(sizes), " (-1: any), got ", listed(found));
  if (std::ranges::find(dtypes, dtype) == dtypes.end())
    raise(op_, ": ", name, " must have the dtype ", listed(dtypes), ", got ", dtype);
  return *this;
}

const Checks& Checks::operator()(const char* name, const OptionalTensor& t, Sizes sizes, Dtypes dtypes) const {
  return t ? (*this)(name, *t, sizes, dtypes) : *this;
}

const Checks& Checks::like(const char* name, const Tensor& t) const {
  return (*this)(name, t, main_.sizes(), main_.scalar_type());
}

const Checks& Checks::like(const char* name, const OptionalTensor& t) const { return t ? like(name, *t) : *this; }

}  // namespace fastgpt
