// Dropout factors of a tile of scores, from Philox (formulas.h), a vector of rows at a time.
// fastgpt/reference/philox.py is the specification.
#pragma once

#include "../formulas.h"
#include "vector.h"

namespace fastgpt {

// The halves of a 64-bit product of each lane.
struct Halves {
  Bits high, low;
};

[[gnu::always_inline]] inline Halves wide_product(Bits a, uint32_t factor) {
  using Wide = typename VectorOf<uint64_t, LANES<float> / 2>::type;
  constexpr uint64_t LOWER = 0xFFFFFFFF;
  const Wide wide = bit_cast<Wide>(a);
#if defined(__AVX512F__)
  const __m512i by = _mm512_set1_epi64(factor);
  const Wide even = bit_cast<Wide>(_mm512_mul_epu32(bit_cast<__m512i>(wide), by));
  const Wide odd = bit_cast<Wide>(_mm512_mul_epu32(bit_cast<__m512i>(wide >> 32), by));
#elif defined(__AVX2__)
  const __m256i by = _mm256_set1_epi64x(factor);
  const Wide even = bit_cast<Wide>(_mm256_mul_epu32(bit_cast<__m256i>(wide), by));
  const Wide odd = bit_cast<Wide>(_mm256_mul_epu32(bit_cast<__m256i>(wide >> 32), by));
#else
  const Wide even = (wide & LOWER) * factor, odd = (wide >> 32) * factor;
#endif
  return {bit_cast<Bits>((even >> 32) | (odd & ~LOWER)), bit_cast<Bits>((even & LOWER) | (odd << 32))};
}

// `philox` for the rows row, row + 1, …, one a lane; word w of each is in at[w].
struct WordsOfRows {
  Bits at[4];
};
[[gnu::always_inline]] inline WordsOfRows philox_of_rows(
    uint64_t seed, uint32_t quad, uint32_t row, uint32_t head, uint32_t batch) {
  Bits a = Bits{} + quad, b = bit_cast<Bits>(lane_indices<int32_t>()) + row, c = Bits{} + head, d = Bits{} + batch;
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
#pragma GCC unroll 10
  for (int round = 0; round < 10; ++round) {
    const Halves p0 = wide_product(a, 0xD2511F53), p1 = wide_product(c, 0xCD9E8D57);
    a = p1.high ^ b ^ k0;
    b = p1.low;
    c = p0.high ^ d ^ k1;
    d = p0.low;
    k0 += 0x9E3779B9;
    k1 += 0xBB67AE85;
  }
  return {{a, b, c, d}};
}

struct Dropout {
  uint64_t seed = 0;
  double p = 0;

  bool active() const { return p > 0; }

  // Writes the factors, 0 or 1/(1-p), of a tile: out (columns, `rows` of memory), for m rows from `row` and n columns
  // from `column`, a multiple of four. `rows` is a multiple of LANES<float>.
  template <typename A>
  void tile(
      A* out, int64_t rows, int64_t batch, int64_t head, int64_t row, int64_t m, int64_t column, int64_t n) const {
    const uint32_t threshold = dropout_threshold(p);
    const A scale = static_cast<A>(dropout_scale(p));
    for (int64_t c = 0; c < n; c += 4)
      for (int64_t r = 0; r < m; r += LANES<float>) {
        const WordsOfRows words = philox_of_rows(
            seed,
            static_cast<uint32_t>((column + c) / 4),
            static_cast<uint32_t>(row + r),
            static_cast<uint32_t>(head),
            static_cast<uint32_t>(batch));
        for (int64_t w = 0; w < 4 && c + w < n; ++w) {
          A* const to = out + (c + w) * rows + r;
          if constexpr (std::is_same_v<A, float>)
            store<float, float>(to, words.at[w] >= threshold ? broadcast(scale) : Floats{});
          else
            for (int64_t l = 0; l < LANES<float>; ++l) to[l] = words.at[w][l] >= threshold ? scale : A(0);
        }
      }
  }
};

}  // namespace fastgpt
