// Dropout as a pure function of (seed, batch, head, row, column); fastgpt/reference/philox.py is the
// specification: Philox 4×32-10 (Salmon et al., 2011), one call for four neighbouring columns.
#pragma once

#include <cmath>
#include <cstdint>

namespace fastgpt {

struct Dropout {
  uint64_t seed = 0;
  double p = 0;

  bool active() const { return p > 0; }
  uint32_t threshold() const {
    const double t = std::nearbyint(p * 4294967296.0);
    return t >= 4294967295.0 ? 0xFFFFFFFFu : static_cast<uint32_t>(t);
  }
  double kept_scale() const { return p < 1 ? 1 / (1 - p) : 0; }

  // Multipliers of n neighbouring columns from `column`, a multiple of four: 0 or 1/(1-p).
  template <typename A>
  void row(A* out, int64_t batch, int64_t head, int64_t row, int64_t column, int64_t n) const {
    const uint32_t limit = threshold();
    const A scale = static_cast<A>(kept_scale());
    for (int64_t j = 0; j < n; j += 4) {
      uint32_t c[4] = {
          static_cast<uint32_t>((column + j) / 4),
          static_cast<uint32_t>(row),
          static_cast<uint32_t>(head),
          static_cast<uint32_t>(batch)};
      uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
      for (int round = 0; round < 10; ++round) {
        const uint64_t p0 = uint64_t{0xD2511F53} * c[0], p1 = uint64_t{0xCD9E8D57} * c[2];
        const uint32_t next[4] = {
            static_cast<uint32_t>(p1 >> 32) ^ c[1] ^ k0,
            static_cast<uint32_t>(p1),
            static_cast<uint32_t>(p0 >> 32) ^ c[3] ^ k1,
            static_cast<uint32_t>(p0)};
        for (int w = 0; w < 4; ++w) c[w] = next[w];
        k0 += 0x9E3779B9;
        k1 += 0xBB67AE85;
      }
      for (int64_t w = 0; w < 4 && j + w < n; ++w) out[j + w] = c[w] >= limit ? scale : A(0);
    }
  }
};

}  // namespace fastgpt
