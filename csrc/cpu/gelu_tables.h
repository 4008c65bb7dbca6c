// gelu_cdf and gelu_grad in float, as piecewise polynomials. The tables are computed from the formulas in double
// (formulas.h) when the library is loaded.
//
// Both functions satisfy f(x) = 1 - f(-x), so only the tail f(-|x|) is tabulated. It is cut into pieces of width
// 1/density, centred at the multiples of 1/density. On each piece a polynomial of degree 5 interpolates f at six
// Chebyshev nodes. A vector looks up its coefficients and needs neither an exponential nor a division. Beyond the end
// of the table f differs from its limit by less than 2e-8 (cdf) or 1.2e-7 (grad). The largest absolute errors with
// rounding: cdf 6.6e-8 (erf) and 5.2e-8 (tanh), grad 1.2e-7. tests/test_gelu.py checks these bounds.
#pragma once

#include "../formulas.h"
#include "vector_math.h"

namespace fastgpt {

// ---- the tables ----

constexpr int64_t PIECES = 16, TERMS = 6;  // the last piece is 0 and extends to infinity

struct PiecewisePolynomial {
  float density;
  // Coefficients of the powers of t = density·a - k in [-1/2, 1/2], the highest power first.
  alignas(64) float terms[TERMS][PIECES];

  // Tabulates f(-a) for 0 <= a < edge. The last piece begins at the edge.
  template <typename F>
  PiecewisePolynomial(double edge, F&& f) : density(static_cast<float>((PIECES - 1.5) / edge)), terms{} {
    double t[TERMS], c[TERMS];
    for (int64_t i = 0; i < TERMS; ++i) t[i] = 0.5 * std::cos(3.14159265358979323846 * (i + 0.5) / TERMS);
    for (int64_t k = 0; k < PIECES - 1; ++k) {
      for (int64_t i = 0; i < TERMS; ++i) c[i] = f(-(k + t[i]) / density);
      // Newton's divided differences, converted to powers of t.
      for (int64_t d = 1; d < TERMS; ++d)
        for (int64_t i = TERMS - 1; i >= d; --i) c[i] = (c[i] - c[i - 1]) / (t[i] - t[i - d]);
      for (int64_t d = TERMS - 2; d >= 0; --d)
        for (int64_t i = d; i < TERMS - 1; ++i) c[i] -= t[d] * c[i + 1];
      for (int64_t i = 0; i < TERMS; ++i) terms[i][k] = static_cast<float>(c[TERMS - 1 - i]);
    }
  }
};

template <bool TANH>
inline const PiecewisePolynomial CDF_TABLE(5.5, gelu_cdf<TANH>);
template <bool TANH>
inline const PiecewisePolynomial GRAD_TABLE(TANH ? 5.5 : 5.8, gelu_grad<TANH>);

// f(x). NaN if x is NaN.
[[gnu::always_inline]] inline Floats piecewise(Floats x, const PiecewisePolynomial& f) {
  constexpr float ROUND = 12582912.0f;  // 1.5·2^23: adding it rounds to an integer, which is in the low bits
  const Floats a = bit_cast<Floats>(bit_cast<Bits>(x) & 0x7FFFFFFFu) * f.density;
  const Floats c = min(broadcast(PIECES - 1.0f), a), shifted = c + ROUND, t = c - (shifted - ROUND);
  const Integers k = bit_cast<Integers>(shifted);
  Floats tail = lookup(f.terms[0], k);
#pragma GCC unroll 8
  for (int64_t i = 1; i < TERMS; ++i) tail = multiply_add(tail, t, lookup(f.terms[i], k));
  return x > 0.0f ? 1.0f - tail : tail;
}

}  // namespace fastgpt
