// Elementary functions on vectors (vector.h): exp, tanh, polynomials. NaN and infinity keep their meaning.
#pragma once

#include "vector.h"

namespace fastgpt {

// a·b + c, rounded once if the CPU has FMA. GCC contracts the expression a * b + c at some of the places where it is
// inlined and not at others. The results of the same formula would then differ by a rounding.
[[gnu::always_inline]] inline Floats multiply_add(Floats a, Floats b, Floats c) {
#if defined(__AVX512F__)
  return _mm512_fmadd_ps(a, b, c);
#elif defined(__FMA__)
  return _mm256_fmadd_ps(a, b, c);
#else
  return a * b + c;
#endif
}

// c[0]·uⁿ + … + c[n]
template <int64_t N>
[[gnu::always_inline]] inline Floats polynomial(Floats u, const float (&c)[N]) {
  Floats p = broadcast(c[0]);
#pragma GCC unroll 32
  for (int64_t i = 1; i < N; ++i) p = p * u + c[i];
  return p;
}

template <typename F>
[[gnu::always_inline]] inline Doubles each(Doubles x, F&& f) {
  for (int64_t i = 0; i < LANES<double>; ++i) x[i] = f(x[i]);
  return x;
}

constexpr float LOG2_E = 1.442695041f;

#if defined(__AVX512F__)
// 2^t = 2^floor(t)·2^r with r in [0, 1), relative error below 7e-6. Both instructions handle infinity.
[[gnu::always_inline]] inline Floats coarse_exp2(Floats t) {
  constexpr float TERMS[] = {1.34267012e-2f, 5.22424358e-2f, 2.41280232e-1f, 6.93044839e-1f, 1.0f};
  const Floats r = _mm512_reduce_ps(t, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
  return _mm512_scalef_ps(polynomial(r, TERMS), t);
}
#endif

// exp(x) = 2^k·exp(r) with k = round(x/ln 2), |r| ≤ ln 2 / 2. FINE: a polynomial of degree 6, relative error below
// 1.5e-7. Otherwise degree 4, relative error below 7e-6, for results that are rounded to 16 bits. Subnormal results may
// be flushed to 0. The result is infinite above 88.73.
template <bool FINE = true>
[[gnu::always_inline]] inline Floats exp(Floats x) {
  constexpr float FINE_TERMS[] = {1.39485808e-3f, 8.37512889e-3f, 4.16662183e-2f, 1.66664155e-1f, 0.5f, 1.0f, 1.0f};
  constexpr float TERMS[] = {4.19175297e-2f, 1.67921610e-1f, 4.99988691e-1f, 9.99962279e-1f, 1.0f};
  constexpr float LOWEST = -87.33654f, HIGHEST = 88.72284f;
#if defined(__AVX512F__)
  if constexpr (!FINE) {
    return coarse_exp2(x * LOG2_E);
  }
  const Floats clamped = _mm512_min_ps(_mm512_set1_ps(HIGHEST + 1), _mm512_max_ps(_mm512_set1_ps(LOWEST - 20), x));
  const Floats k = _mm512_roundscale_ps(clamped * LOG2_E, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
  const Floats low = broadcast(LOWEST), high = broadcast(HIGHEST);
  const Floats above = x < low ? low : x, clamped = above > high ? high : above;
  const Floats shifted = clamped * LOG2_E + 12582912.0f;  // 1.5·2^23: rounds to an integer, which is in the low bits
  const Floats k = shifted - 12582912.0f;
#endif
  // ln 2 as a sum of two parts. The first has few bits, so its product with k is exact.
  const Floats r = clamped - k * 0.693359375f + k * 2.12194440e-4f;
  Floats p;
  if constexpr (FINE)
    p = polynomial(r, FINE_TERMS);
  else
    p = polynomial(r, TERMS);
#if defined(__AVX512F__)
  return _mm512_scalef_ps(p, k);
#else
  // 2^k as two factors, because k can be 128.
  const Integers n = bit_cast<Integers>(shifted) - 0x4B400000;
  const Floats half = bit_cast<Floats>(((n >> 1) + 127) << 23);
  const Floats rest = bit_cast<Floats>((n - (n >> 1) + 127) << 23);
  const Floats y = x < low ? Floats{} : p * half * rest;
  return x > high ? Floats{} + std::numeric_limits<float>::infinity() : y;
#endif
}
template <bool FINE = true>
[[gnu::always_inline]] inline Doubles exp(Doubles x) {
  return each(x, [](double y) { return std::exp(y); });
}

// exp(a - b), for a small b that many values of a share. On AVX-512 the coarse version costs no more than exp(a).
template <bool FINE = true>
[[gnu::always_inline]] inline Floats exp_difference(Floats a, Floats b) {
#if defined(__AVX512F__)
  if constexpr (!FINE) {
    return coarse_exp2(a * LOG2_E - b * LOG2_E);
  }
#endif
  return exp<FINE>(a - b);
}
template <bool FINE = true>
[[gnu::always_inline]] inline Doubles exp_difference(Doubles a, Doubles b) {
  return exp(a - b);
}

// tanh: an odd polynomial for |x| < 0.625, otherwise 1 - 2/(exp(2|x|) + 1). Relative error below 3e-7.
[[gnu::always_inline]] inline Floats tanh(Floats x) {
  constexpr float TERMS[] = {-5.66477535e-3f, 2.05956800e-2f, -5.37226793e-2f, 1.33311502e-1f, -3.33332616e-1f};
  const Bits sign = bit_cast<Bits>(x) & 0x80000000u;
  const Floats a = bit_cast<Floats>(bit_cast<Bits>(x) ^ sign), s = a * a;
  const Floats small = polynomial(s, TERMS) * s * a + a;
  const Floats large = 1.0f - 2.0f / (exp(2.0f * a) + 1.0f);
  const Floats y = a >= 0.625f ? large : small;
  return bit_cast<Floats>(bit_cast<Bits>(y) | sign);
}
[[gnu::always_inline]] inline Doubles tanh(Doubles x) {
  return each(x, [](double y) { return std::tanh(y); });
}

}  // namespace fastgpt
