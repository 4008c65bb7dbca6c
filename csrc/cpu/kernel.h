// What the CPU kernels share: storage and compute types, rows, and the vectorised elementary functions.
//
// Every kernel computes in A = float (double for double tensors) on short buffers that stay in the
// first-level cache: `load` widens a piece of a row into one, `store` rounds it back. The loops over
// the buffers are plain C++ that the compiler vectorises for the instruction set at hand, without
// -ffast-math: NaN and infinity keep their meaning.
#pragma once

#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/sum.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <optional>
#include <tuple>
#include <type_traits>
#include <vector>

#if defined(__F16C__)
#include <immintrin.h>
#endif

namespace fastgpt {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

// The type in which tensors of T are computed and accumulated.
template <typename T>
using compute_t = std::conditional_t<std::is_same_v<T, double>, double, float>;

inline at::ScalarType accumulator(at::ScalarType type) { return type == at::kDouble ? at::kDouble : at::kFloat; }

// Elements of a buffer: 4 KiB of float, a few of which fit into a 32 KiB cache.
constexpr int64_t BLOCK = 1024;

// Work below this many elements is not worth another thread.
constexpr int64_t GRAIN = 16384;

template <typename A, typename T>
inline void load(A* __restrict out, const T* __restrict in, int64_t n) {
#if defined(__F16C__)
  if constexpr (std::is_same_v<T, at::Half> && std::is_same_v<A, float>) {
    int64_t i = 0;
    for (; i + 8 <= n; i += 8)
      _mm256_storeu_ps(out + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(in + i))));
    for (; i < n; ++i) out[i] = static_cast<float>(in[i]);
    return;
  }
#endif
  for (int64_t i = 0; i < n; ++i) out[i] = static_cast<A>(in[i]);
}

template <typename T, typename A>
inline void store(T* __restrict out, const A* __restrict in, int64_t n) {
#if defined(__F16C__)
  if constexpr (std::is_same_v<T, at::Half> && std::is_same_v<A, float>) {
    int64_t i = 0;
    for (; i + 8 <= n; i += 8)
      _mm_storeu_si128(reinterpret_cast<__m128i*>(out + i), _mm256_cvtps_ph(_mm256_loadu_ps(in + i), 0));
    for (; i < n; ++i) out[i] = static_cast<T>(in[i]);
    return;
  }
#endif
  if constexpr (std::is_same_v<T, at::BFloat16>) {
    // Round to nearest even on the bits; a NaN stays a NaN. Without a branch, so that it vectorises.
    auto* bits = reinterpret_cast<uint16_t*>(out);
    for (int64_t i = 0; i < n; ++i) {
      const uint32_t u = std::bit_cast<uint32_t>(static_cast<float>(in[i]));
      const uint32_t rounded = (u + 0x7FFFu + ((u >> 16) & 1u)) >> 16;
      bits[i] = static_cast<uint16_t>((u & 0x7FFFFFFFu) > 0x7F800000u ? 0x7FC0u : rounded);
    }
  } else {
    for (int64_t i = 0; i < n; ++i) out[i] = static_cast<T>(in[i]);
  }
}

// exp. float: 2^k·p(r) with r in ±ln2/2 and p of degree 6; relative error below 1.5e-7. Flushes to 0
// below -87.3 (where the result would be subnormal), inf above 88.7. A NaN passes through std::max and std::min
// as their first argument does when the comparison is false.
[[gnu::always_inline]] inline float vexp(float x) {
  const float clamped = std::min(std::max(x, -87.33654f), 88.72283f);
  const float shifted = clamped * 1.442695041f + 12582912.0f;  // 1.5·2^23: rounds to an integer in the low bits
  const float k = shifted - 12582912.0f;
  float r = clamped - k * 0.693359375f;  // ln 2 in two parts, the first exact in few bits
  r = r + k * 2.12194440e-4f;
  float p = 1.39485808e-3f;
  p = p * r + 8.37512889e-3f;
  p = p * r + 4.16662183e-2f;
  p = p * r + 1.66664155e-1f;
  p = p * r + 0.5f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  // 2^k in two factors, since k can be 128.
  const int32_t n = std::bit_cast<int32_t>(shifted) - 0x4B400000;
  const float half = std::bit_cast<float>(((n >> 1) + 127) << 23);
  const float rest = std::bit_cast<float>((n - (n >> 1) + 127) << 23);
  float y = p * half * rest;
  y = x < -87.33654f ? 0.0f : y;
  return x > 88.72283f ? std::numeric_limits<float>::infinity() : y;
}
inline double vexp(double x) { return std::exp(x); }

// tanh. float: odd polynomial below 0.625, else 1 - 2/(exp(2|x|) + 1); relative error below 3e-7.
[[gnu::always_inline]] inline float vtanh(float x) {
  const float a = std::fabs(x);
  const float large = 1.0f - 2.0f / (vexp(2.0f * a) + 1.0f);
  const float s = x * x;
  float p = -5.66477535e-3f;
  p = p * s + 2.05956800e-2f;
  p = p * s - 5.37226793e-2f;
  p = p * s + 1.33311502e-1f;
  p = p * s - 3.33332616e-1f;
  p = p * s * a + a;
  const float y = a < 0.625f ? p : large;
  return std::copysign(y, x);
}
inline double vtanh(double x) { return std::tanh(x); }

// Φ(x), the normal distribution function, and exp(-x²/2), which its derivative needs too.
// float: 1 - Φ(|x|) = t·P(t)·exp(-x²/2) with t = 1/(1 + |x|/√8), P of degree 9 fitted at Chebyshev points;
// absolute error below 1.8e-7, relative error below 1.3e-6 down to |x| = 7.
[[gnu::always_inline]] inline float vphi(float x, float& gaussian) {
  gaussian = vexp(-0.5f * x * x);
  const float t = 1.0f / (1.0f + 0.35355339f * std::fabs(x));
  const float u = 2.5714285f * t - 1.5714285f;
  float p = 2.744565336e-06f;
  p = p * u - 1.429322856e-05f;
  p = p * u - 9.069803127e-06f;
  p = p * u + 1.922827505e-04f;
  p = p * u - 1.351787796e-04f;
  p = p * u - 2.397302538e-03f;
  p = p * u + 1.747083617e-03f;
  p = p * u + 4.488674551e-02f;
  p = p * u + 1.586193591e-01f;
  p = p * u + 2.971076369e-01f;
  const float tail = t * p * gaussian;
  return x > 0.0f ? 1.0f - tail : tail;
}
inline double vphi(double x, double& gaussian) {
  gaussian = std::exp(-0.5 * x * x);
  return 0.5 * std::erfc(-x * 0.70710678118654752440);
}

// Sum of n values in sixteen interleaved parts: vectorises without reassociating behind the compiler's
// back, is the same for every call, and errs less than one running sum.
template <typename A, typename F>
inline A sum_over(int64_t n, F&& term) {
  A part[16] = {};
  int64_t i = 0;
  for (; i + 16 <= n; i += 16)
    for (int64_t j = 0; j < 16; ++j) part[j] += term(i + j);
  for (int64_t j = 0; i < n; ++i, ++j) part[j] += term(i);
  for (int64_t width = 8; width > 0; width /= 2)
    for (int64_t j = 0; j < width; ++j) part[j] += part[j + width];
  return part[0];
}

template <typename A>
inline A max_of(const A* x, int64_t n) {
  A part[16];
  for (auto& p : part) p = -std::numeric_limits<A>::infinity();
  int64_t i = 0;
  for (; i + 16 <= n; i += 16)
    for (int64_t j = 0; j < 16; ++j) part[j] = part[j] > x[i + j] ? part[j] : x[i + j];
  for (int64_t j = 0; i < n; ++i, ++j) part[j] = part[j] > x[i] ? part[j] : x[i];
  for (int64_t j = 1; j < 16; ++j) part[0] = part[0] > part[j] ? part[0] : part[j];
  return part[0];
}

// Into how many spans a sum over rows is cut: from the number of rows alone, so that the bits of the
// sum do not depend on the number of threads.
inline int64_t row_parts(int64_t rows) { return std::clamp<int64_t>(rows / 16, 1, 64); }

// Calls f with a value of the tensor's element type.
template <typename F>
inline void dispatch(at::ScalarType type, const char* name, F&& f) {
  switch (type) {
    case at::kFloat:
      return f(float{});
    case at::kDouble:
      return f(double{});
    case at::kBFloat16:
      return f(at::BFloat16{});
    case at::kHalf:
      return f(at::Half{});
    default:
      TORCH_CHECK_NOT_IMPLEMENTED(false, name, ": the C++ kernels do not compute in ", type);
  }
}

}  // namespace fastgpt
