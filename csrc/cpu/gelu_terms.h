// GELU's factor y/x and its slope dy/dx in float, from tables made of their formulas in double (formulas.h).
//
// Both are functions f with f(x) = 1 - f(-x), so that the tail f(-|x|) is all there is to know. Its graph is cut into
// pieces of width 1/density around the multiples of that, on each of which a polynomial of degree 5 meets f in six
// Chebyshev nodes: a vector looks its coefficients up and needs neither an exponential nor a division. The tables
// are made when the library is loaded. Beyond the table's end f is less than 2e-8 (y/x) or 1.2e-7 (dy/dx) from its
// limit. The largest absolute errors, rounding included: y/x 6.6e-8 (erf), 5.2e-8 (tanh), dy/dx 1.2e-7;
// tests/ops/test_gelu.py holds the kernels to them.
#pragma once

#include "../formulas.h"
#include "vector.h"

namespace fastgpt {

// ---- the tables ----

constexpr int64_t PIECES = 16, TERMS = 6;  // the last piece is 0 and reaches to infinity

struct Pieces {
  float density;
  alignas(64) float terms[TERMS][PIECES];  // of the powers of t = density·a - k in [-1/2, 1/2], the highest first

  // f(-a) for 0 <= a < edge, where the last piece begins.
  template <typename F>
  Pieces(double edge, F&& f) : density(static_cast<float>((PIECES - 1.5) / edge)), terms{} {
    double t[TERMS], c[TERMS];
    for (int64_t i = 0; i < TERMS; ++i) t[i] = 0.5 * std::cos(3.14159265358979323846 * (i + 0.5) / TERMS);
    for (int64_t k = 0; k < PIECES - 1; ++k) {
      for (int64_t i = 0; i < TERMS; ++i) c[i] = f(-(k + t[i]) / density);
      // Newton's divided differences, then powers.
      for (int64_t d = 1; d < TERMS; ++d)
        for (int64_t i = TERMS - 1; i >= d; --i) c[i] = (c[i] - c[i - 1]) / (t[i] - t[i - d]);
      for (int64_t d = TERMS - 2; d >= 0; --d)
        for (int64_t i = d; i < TERMS - 1; ++i) c[i] -= t[d] * c[i + 1];
      for (int64_t i = 0; i < TERMS; ++i) terms[i][k] = static_cast<float>(c[TERMS - 1 - i]);
    }
  }
};

template <bool TANH>
inline const Pieces SHARE(5.5, share_of<TANH>);
template <bool TANH>
inline const Pieces SLOPE(TANH ? 5.5 : 5.8, slope_of<TANH>);

// f(x), NaN where x is.
[[gnu::always_inline]] inline Floats piecewise(Floats x, const Pieces& f) {
  constexpr float ROUND = 12582912.0f;  // 1.5·2^23: what is added to it is rounded to an integer in the low bits
  const Floats a = std::bit_cast<Floats>(std::bit_cast<Bits>(x) & 0x7FFFFFFFu) * f.density;
  const Floats c = min(broadcast(PIECES - 1.0f), a), shifted = c + ROUND, t = c - (shifted - ROUND);
  const Integers k = std::bit_cast<Integers>(shifted);
  Floats tail = lookup(f.terms[0], k);
#pragma GCC unroll 8
  for (int64_t i = 1; i < TERMS; ++i) tail = multiply_add(tail, t, lookup(f.terms[i], k));
  return x > 0.0f ? 1.0f - tail : tail;
}

}  // namespace fastgpt
