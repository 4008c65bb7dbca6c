// Dropout factors of a row of scores, from Philox (formulas.h). fastgpt/reference/philox.py is the specification.
#pragma once

#include "../formulas.h"

namespace fastgpt {

struct Dropout {
  uint64_t seed = 0;
  double p = 0;

  bool active() const { return p > 0; }
  // The factors, 0 or 1/(1-p), of n neighbouring columns starting at `column`, a multiple of four.
  template <typename A>
  void row(A* out, int64_t batch, int64_t head, int64_t row, int64_t column, int64_t n) const {
    const uint32_t threshold = dropout_threshold(p);
    const A scale = static_cast<A>(dropout_scale(p));
    for (int64_t j = 0; j < n; j += 4) {
      const Words words = philox(
          seed,
          static_cast<uint32_t>((column + j) / 4),
          static_cast<uint32_t>(row),
          static_cast<uint32_t>(head),
          static_cast<uint32_t>(batch));
      for (int64_t w = 0; w < 4 && j + w < n; ++w) out[j + w] = words.at[w] >= threshold ? scale : A(0);
    }
  }
};

}  // namespace fastgpt
