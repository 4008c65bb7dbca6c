// The coefficients of GELU: y/x and dy/dx as 1/2 + x·P(x²).
//
// P is a polynomial in u = 2x²/edge² - 1, which lies in [-1, 1] for |x| < edge: the truncated Chebyshev series
// of (f(x) - 1/2)/x there, in powers of u, highest first. Their absolute values add up to less than 1.5, so that
// Horner's scheme in float32 rounds at the size of the result. Beyond the edge f is 0 or 1. The largest
// absolute errors in float32 (tests/test_gelu.py holds the kernels to them) stand beside each.
#pragma once

#include "vector.h"

namespace fastgpt {

constexpr double SQRT_2_OVER_PI = 0.79788456080286535588;
constexpr double CUBIC = 0.044715;
constexpr double INV_SQRT_2PI = 0.39894228040143267794;
constexpr double SQRT_1_2 = 0.70710678118654752440;

template <int64_t N>
struct Odd {
  float edge;
  float terms[N];
};

// Φ(x): 8.2e-8
constexpr Odd<17> ERF_VALUE{
    5.75f,
    {0.000293490448f,
     -0.000656435965f,
     0.000221639828f,
     -0.000352739356f,
     0.00239455397f,
     -0.00422638422f,
     0.00542426622f,
     -0.00822252501f,
     0.0124813262f,
     -0.016930148f,
     0.0215771105f,
     -0.0265349932f,
     0.0317249261f,
     -0.0376363844f,
     0.0458628759f,
     -0.0614332668f,
     0.12296921f}};

// Φ(x) + x·φ(x): 2.5e-7
constexpr Odd<19> ERF_SLOPE{
    6.0f,
    {0.0033994664f,
     -0.0072050551f,
     -0.000781870505f,
     0.00288871815f,
     0.0207387432f,
     -0.0350321494f,
     0.0269433893f,
     -0.0345483124f,
     0.0568967909f,
     -0.0666327998f,
     0.0660776421f,
     -0.0640681162f,
     0.0588360317f,
     -0.0509718023f,
     0.0445428453f,
     -0.0423632301f,
     0.0460581519f,
     -0.0593428537f,
     0.117897756f}};

// (1 + tanh u)/2: 9.2e-8
constexpr Odd<18> TANH_VALUE{
    5.25f,
    {0.00106693071f,
     -0.0011619369f,
     -0.00343093323f,
     0.0038829064f,
     0.00376391644f,
     -0.003348578f,
     -0.0050719236f,
     0.00602471735f,
     -0.00359461084f,
     0.00686606439f,
     -0.0127106002f,
     0.0183325801f,
     -0.0247747824f,
     0.0320578367f,
     -0.0399238877f,
     0.0497683175f,
     -0.0671762079f,
     0.134668291f}};

// its derivative times x, plus itself: 2.5e-7
constexpr Odd<21> TANH_SLOPE{
    5.4f,
    {-0.0168765225f, 0.0194727555f,  0.0632867366f, -0.0715620369f, -0.102287598f,  0.106705569f,   0.106779911f,
     -0.108779714f,  -0.0440523475f, 0.032010749f,  0.0518847555f,  -0.0608895421f, 0.054219991f,   -0.0692616776f,
     0.0795771331f,  -0.0761232674f, 0.0661758333f, -0.0571787432f, 0.0553956218f,  -0.0670400783f, 0.131135076f}};

// 1/2 + x·P(x²) within the edge; NaN where x is.
template <int64_t N>
[[gnu::always_inline]] inline Floats half_plus_odd(Floats x, const Odd<N>& f) {
  const Floats s = x * x, u = s * (2 / (f.edge * f.edge)) - 1.0f;
  const Floats step = x > 0.0f ? broadcast(1.0f) : Floats{};
  return s >= f.edge * f.edge ? step : polynomial(u, f.terms) * x + 0.5f;
}

}  // namespace fastgpt
