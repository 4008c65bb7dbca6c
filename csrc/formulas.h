// Device-independent math: GELU and its derivative, the running softmax, Philox. The CPU kernels and the CUDA kernels
// both include this file. fastgpt/reference is the specification.
#pragma once

#include <cmath>
#include <cstdint>

#if defined(__CUDACC__)
#define FASTGPT_HOST_DEVICE __host__ __device__ __forceinline__
#define FASTGPT_UNROLLED _Pragma("unroll")
#else
#define FASTGPT_HOST_DEVICE inline
#define FASTGPT_UNROLLED _Pragma("GCC unroll 16")
#endif

namespace fastgpt {

// ---- GELU ----
//
//   gelu(x) = x cdf(x)
//   exact:  cdf(x) = Φ(x),                         gelu'(x) = Φ(x) + x φ(x)
//   tanh:   cdf(x) = (1 + tanh u) / 2 = sigmoid(2u) = s,  u = √(2/π) (x + 0.044715 x³)
//           gelu'(x) = s + 2 x s (1 - s) du/dx

constexpr double SQRT_2_OVER_PI = 0.79788456080286535588;
constexpr double CUBIC = 0.044715;
constexpr double INV_SQRT_2PI = 0.39894228040143267794;
constexpr double SQRT_1_2 = 0.70710678118654752440;
constexpr double LOG2E = 1.4426950408889634074;
constexpr double LN2 = 0.69314718055994530942;

// cdf(x) in double, directly from the formula.
template <bool TANH>
inline double gelu_cdf(double z) {
  return TANH ? 0.5 + 0.5 * std::tanh(SQRT_2_OVER_PI * (z + CUBIC * z * z * z)) : 0.5 * std::erfc(-z * SQRT_1_2);
}

// gelu'(x) in double, directly from the formula.
template <bool TANH>
inline double gelu_grad(double z) {
  // Beyond |z| = 20 (tanh) or 40 (exact) the derivative is 0 or 1 to the last bit. The clamp keeps z² from overflowing
  // to inf·0. NaN passes through.
  if constexpr (TANH) {
    const double c = z < -20 ? -20 : z > 20 ? 20 : z, t = std::tanh(SQRT_2_OVER_PI * (c + CUBIC * c * c * c));
    return 0.5 * (1 + t) + 0.5 * c * (1 - t * t) * SQRT_2_OVER_PI * (1 + 3 * CUBIC * c * c);
  } else {
    const double c = z < -40 ? -40 : z > 40 ? 40 : z;
    return 0.5 * std::erfc(-c * SQRT_1_2) + c * INV_SQRT_2PI * std::exp(-0.5 * c * c);
  }
}

struct GeluCdfAndGrad {
  float cdf, grad;
};

// Both in float32, for hardware without erf. M::exp2 and M::rsqrt are one instruction each. The error of the cdf is at
// most 3e-7. Both values share one exponential, so they are computed together.
template <bool TANH, typename M>
FASTGPT_HOST_DEVICE GeluCdfAndGrad gelu_cdf_and_grad(float x) {
  if constexpr (TANH) {
    constexpr float TWO_DU = static_cast<float>(2 * SQRT_2_OVER_PI), MINUS_TWO_U = static_cast<float>(-LOG2E) * TWO_DU;
    const float z = x * x, e = M::exp2(x * (MINUS_TWO_U + MINUS_TWO_U * static_cast<float>(CUBIC) * z));
    const float r = M::rsqrt(1.0f + e), s = r * r;
    // s (1 - s) = e s². The clamp is for e = exp(-2u) = infinity: then s = 0, and infinity times 0 would be NaN.
    const float s_grad = (e < 8.5e37f ? e : 8.5e37f) * s * s;
    return {s, s + x * s_grad * (TWO_DU + 3.0f * TWO_DU * static_cast<float>(CUBIC) * z)};
  } else {
    // 1 - Φ(|x|) = exp(-x²/2) t P(t),  t = 1 / (1 + 0.34 |x|). P minimizes the relative error on |x| < 5.6.
    const float e = M::exp2(x * x * static_cast<float>(-0.5 * LOG2E));
    const float r = M::rsqrt(1.0f + 0.34f * fabsf(x)), t = r * r;
    float p = ((0.047052912f * t - 0.20997278f) * t + 0.28044787f) * t - 0.045527373f;
    p = ((p * t + 0.16392295f) * t + 0.12785697f) * t + 0.13621946f;
    const float tail = p * t * e, phi = x < 0.0f ? tail : 1.0f - tail;
    return {phi, phi + x * static_cast<float>(INV_SQRT_2PI) * e};
  }
}

// tanh in float32 to 2 ulp, from M::exp2 and M::rsqrt. 1 - 2 / (exp(2x) + 1) cancels near 0. There an odd polynomial,
// fitted to the relative error, is used instead. exp(2x) may be infinite.
template <typename M>
FASTGPT_HOST_DEVICE float tanh_of(float x) {
  const float z = x * x;
  const float p = ((((-0.00590587f * z + 0.02080539f) * z - 0.05378668f) * z + 0.13331958f) * z - 0.33333299f) * z;
  const float r = M::rsqrt(M::exp2(x * static_cast<float>(2 * LOG2E)) + 1.0f);
  return fabsf(x) < 0.6f ? x + x * p : 1.0f - 2.0f * (r * r);
}

// ---- the running softmax ----
//
// The maximum m and Σ 2^(x - m) over a part of a row. Two parts are merged by rescaling the sum of the part with the
// smaller maximum. The maximum starts at a finite number: a first -inf then adds 2^-inf = 0, and -inf - m is not NaN.
// (Milakov & Gimelshein, 2018, arXiv:1805.02867)

constexpr float LOWEST = -3.4028234663852886e38f;

template <typename A>
struct RunningSoftmax {
  A row_max = LOWEST, row_sum = 0;

  // Raises the maximum to `next`. Returns the factor for all other sums over the same numbers.
  template <typename Exp2>
  FASTGPT_HOST_DEVICE A rescale(A next, Exp2&& exp2) {
    const A factor = exp2(row_max - next);
    row_max = next;
    row_sum *= factor;
    return factor;
  }
  template <typename Exp2>
  FASTGPT_HOST_DEVICE void merge(RunningSoftmax other, Exp2&& exp2) {
    const A next = row_max > other.row_max ? row_max : other.row_max;
    rescale(next, exp2);
    row_sum += other.row_sum * exp2(other.row_max - next);
  }
};

// ---- Philox ----
//
// Dropout is a pure function of (seed, batch, head, row, column): Philox 4×32-10 (Salmon et al., 2011, "Parallel random
// numbers: as easy as 1, 2, 3"). The key is the two halves of the seed. One call gives four neighbouring columns.

struct Words {
  uint32_t at[4];
};

FASTGPT_HOST_DEVICE Words philox(uint64_t seed, uint32_t quad, uint32_t row, uint32_t head, uint32_t batch) {
  uint32_t a = quad, b = row, c = head, d = batch;
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
  FASTGPT_UNROLLED
  for (int round = 0; round < 10; ++round) {
    const uint64_t p0 = uint64_t{0xD2511F53} * a, p1 = uint64_t{0xCD9E8D57} * c;
    a = static_cast<uint32_t>(p1 >> 32) ^ b ^ k0;
    b = static_cast<uint32_t>(p1);
    c = static_cast<uint32_t>(p0 >> 32) ^ d ^ k1;
    d = static_cast<uint32_t>(p0);
    k0 += 0x9E3779B9;
    k1 += 0xBB67AE85;
  }
  return {{a, b, c, d}};
}

// A probability is dropped if its random word is below this.
inline uint32_t dropout_threshold(double p) {
  const double t = std::nearbyint(p * 4294967296.0);
  return t >= 4294967295.0 ? 0xFFFFFFFFu : static_cast<uint32_t>(t);
}

// The factor of a probability that is not dropped.
inline double dropout_scale(double p) { return p < 1 ? 1 / (1 - p) : 0; }

}  // namespace fastgpt
