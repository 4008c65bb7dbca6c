// Vectors as wide as the instruction set has them, and the elementary functions on them.
//
// `Vector<A>` is GCC's vector type: + - * / < and ?: act on each of its LANES<A> elements. Loads widen the
// storage type T to the compute type A, stores round back to nearest even. Functions keep the meaning of NaN
// and infinity. Where AVX-512 has an instruction that the compiler does not find by itself, it is named here.
#pragma once

#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace fastgpt {

#if defined(__AVX512F__)
constexpr int64_t VECTOR_BYTES = 64;
#elif defined(__AVX__)
constexpr int64_t VECTOR_BYTES = 32;
#else
constexpr int64_t VECTOR_BYTES = 16;
#endif

template <typename A>
constexpr int64_t LANES = VECTOR_BYTES / static_cast<int64_t>(sizeof(A));

// Aligned like one element: a vector may be read from anywhere in a row. N elements, whatever the width.
template <typename A, int64_t N>
struct VectorOf {
  typedef A type __attribute__((vector_size(N * sizeof(A)), aligned(sizeof(A)), may_alias));
};
template <typename A>
using Vector = typename VectorOf<A, LANES<A>>::type;
using Floats = Vector<float>;
using Doubles = Vector<double>;
using Integers = typename VectorOf<int32_t, LANES<float>>::type;
using Bits = typename VectorOf<uint32_t, LANES<float>>::type;
using Shorts = typename VectorOf<uint16_t, LANES<float>>::type;

template <typename A>
[[gnu::always_inline]] inline Vector<A> broadcast(A x) {
  return Vector<A>{} + x;
}

// x, rounded to A: the compiler does not contract a product that x is with an addition that follows.
template <typename A>
[[gnu::always_inline]] inline Vector<A> rounded(Vector<A> x) {
#if defined(__x86_64__)
  asm("" : "+v"(x));
#else
  asm("" : "+m"(x));
#endif
  return x;
}

// ---- loads and stores ----

// Between words of 16 and of 32 bits; for AVX-512 the compiler would go by way of halves.
[[gnu::always_inline]] inline Bits widened(Shorts x) {
#if defined(__AVX512F__)
  return std::bit_cast<Bits>(_mm512_cvtepu16_epi32(std::bit_cast<__m256i>(x)));
#else
  return __builtin_convertvector(x, Bits);
#endif
}
[[gnu::always_inline]] inline Shorts narrowed(Bits x) {
#if defined(__AVX512F__)
  return std::bit_cast<Shorts>(_mm512_cvtepi32_epi16(std::bit_cast<__m512i>(x)));
#else
  return __builtin_convertvector(x, Shorts);
#endif
}

template <typename A, typename T>
[[gnu::always_inline]] inline Vector<A> load(const T* p) {
  if constexpr (std::is_same_v<A, T>) {
    return *reinterpret_cast<const Vector<A>*>(p);
  } else if constexpr (std::is_same_v<T, at::BFloat16>) {
    return std::bit_cast<Floats>(widened(*reinterpret_cast<const Shorts*>(p)) << 16);
  } else {
#if defined(__AVX512F__)
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
#elif defined(__F16C__)
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#else
    Vector<A> x;
    for (int64_t i = 0; i < LANES<A>; ++i) x[i] = static_cast<A>(p[i]);
    return x;
#endif
  }
}

// bfloat16 of each element, to nearest even; a NaN stays a NaN. The instruction flushes subnormals to 0.
[[gnu::always_inline]] inline Shorts to_bfloat16(Floats x) {
#if defined(__AVX512BF16__)
  return std::bit_cast<Shorts>(_mm512_cvtneps_pbh(x));
#else
  const Bits u = std::bit_cast<Bits>(x);
  const Bits rounded = (u + 0x7FFFu + ((u >> 16) & 1u)) >> 16;
  return narrowed(x == x ? rounded : Bits{} + 0x7FC0u);
#endif
}

template <typename T, typename A>
[[gnu::always_inline]] inline void store(T* p, Vector<A> x) {
  if constexpr (std::is_same_v<A, T>) {
    *reinterpret_cast<Vector<A>*>(p) = x;
  } else if constexpr (std::is_same_v<T, at::BFloat16>) {
    *reinterpret_cast<Shorts*>(p) = to_bfloat16(x);
  } else {
#if defined(__AVX512F__)
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(x, 0));
#elif defined(__F16C__)
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(x, 0));
#else
    for (int64_t i = 0; i < LANES<A>; ++i) p[i] = static_cast<T>(x[i]);
#endif
  }
}

// The first n < LANES elements; what lies beyond them in memory is not touched. `load` gives 0 there.
template <typename A, typename T>
inline Vector<A> load(const T* p, int64_t n) {
  T some[LANES<A>] = {};
  std::memcpy(static_cast<void*>(some), p, n * sizeof(T));
  return load<A>(some);
}

template <typename T, typename A>
inline void store(T* p, Vector<A> x, int64_t n) {
  T some[LANES<A>];
  store<T, A>(some, x);
  std::memcpy(static_cast<void*>(p), some, n * sizeof(T));
}

// Whether a result of so many elements of T is written past the caches: it would not be found there again, and
// a line that is written whole need not be read first.
template <typename T>
inline bool streams(int64_t numel) {
#if defined(__AVX512F__)
  return numel * static_cast<int64_t>(sizeof(T)) >= int64_t{16} << 20;
#else
  return numel < 0;
#endif
}

// Elements from p to the next address where a line may be streamed.
template <typename T>
inline int64_t to_whole_line(const T* p) {
  return static_cast<int64_t>((64 - reinterpret_cast<uintptr_t>(p) % 64) % 64 / sizeof(T));
}

#if defined(__AVX512F__)
// Two vectors of 16-bit results, which make a line.
[[gnu::always_inline]] inline __m512i rounded_line(Floats a, Floats b, at::BFloat16) {
#if defined(__AVX512BF16__)
  return std::bit_cast<__m512i>(_mm512_cvtne2ps_pbh(b, a));
#else
  const auto low = std::bit_cast<__m256i>(to_bfloat16(a)), high = std::bit_cast<__m256i>(to_bfloat16(b));
  return _mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1);
#endif
}
[[gnu::always_inline]] inline __m512i rounded_line(Floats a, Floats b, at::Half) {
  return _mm512_inserti64x4(_mm512_castsi256_si512(_mm512_cvtps_ph(a, 0)), _mm512_cvtps_ph(b, 0), 1);
}

// A line past the caches; `end_stream` follows before others read it.
template <bool STREAM, typename L>
[[gnu::always_inline]] inline void put_line(void* p, L line) {
  if constexpr (STREAM)
    _mm512_stream_si512(static_cast<__m512i*>(p), std::bit_cast<__m512i>(line));
  else
    _mm512_storeu_si512(p, std::bit_cast<__m512i>(line));
}
#endif

inline void end_stream() {
#if defined(__AVX512F__)
  _mm_sfence();
#endif
}

// Calls f(i) for the whole vectors of [begin, end), and f(i, n) for the n elements that may be left.
template <typename A, typename F>
[[gnu::always_inline]] inline void over_vectors(int64_t begin, int64_t end, F&& f) {
  int64_t i = begin;
  for (; i + LANES<A> <= end; i += LANES<A>) f(i);
  if (i < end) f(i, end - i);
}

// out[i] = f(i) over the vectors of [begin, end), f(i, n) for the n elements that may be left. STREAM: past the
// caches; out + begin is then where a line begins.
template <bool STREAM, typename A, typename T, typename F>
[[gnu::always_inline]] inline void fill(T* out, int64_t begin, int64_t end, F&& f) {
  constexpr int64_t W = LANES<A>;
  int64_t i = begin;
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 2)
    for (; i + 2 * W <= end; i += 2 * W) put_line<STREAM>(out + i, rounded_line(f(i), f(i + W), T{}));
  else
    for (; i + W <= end; i += W) put_line<STREAM>(out + i, f(i));
#endif
  over_vectors<A>(i, end, [&](int64_t j, auto... n) { store<T, A>(out + j, f(j, n...), n...); });
}

// ---- reductions and comparisons ----

// The larger of each pair; the second where one is NaN.
[[gnu::always_inline]] inline Floats max(Floats a, Floats b) {
#if defined(__AVX512F__)
  return _mm512_max_ps(a, b);
#else
  return a > b ? a : b;
#endif
}
[[gnu::always_inline]] inline Doubles max(Doubles a, Doubles b) { return a > b ? a : b; }

// The smaller of each pair; the second where one is NaN.
[[gnu::always_inline]] inline Floats min(Floats a, Floats b) {
#if defined(__AVX512F__)
  return _mm512_min_ps(a, b);
#else
  return a < b ? a : b;
#endif
}

template <typename A>
[[gnu::always_inline]] inline A lane_max(Vector<A> x) {
  A top = x[0];
  for (int64_t i = 1; i < LANES<A>; ++i) top = x[i] > top ? x[i] : top;
  return top;
}

// Pairwise, in an order that is always the same.
template <typename A>
[[gnu::always_inline]] inline A lane_sum(Vector<A> x) {
#if defined(__AVX512F__)
  if constexpr (std::is_same_v<A, float>) return _mm512_reduce_add_ps(x);  // in the same order
#endif
  for (int64_t width = LANES<A> / 2; width > 0; width /= 2)
    for (int64_t i = 0; i < width; ++i) x[i] += x[i + width];
  return x[0];
}

// Whether a > b in any lane.
template <typename A>
[[gnu::always_inline]] inline bool any_above(Vector<A> a, Vector<A> b) {
#if defined(__AVX512F__)
  if constexpr (std::is_same_v<A, float>) return _mm512_cmp_ps_mask(a, b, _CMP_GT_OQ) != 0;
#endif
  const auto above = a > b;
  bool found = false;
  for (int64_t i = 0; i < LANES<A>; ++i) found |= above[i] != 0;
  return found;
}

// 0, 1, 2, …
template <typename A>
[[gnu::always_inline]] inline Vector<A> lane_numbers() {
  Vector<A> x;
  for (int64_t i = 0; i < LANES<A>; ++i) x[i] = static_cast<A>(i);
  return x;
}

// x in the first n lanes, `fill` beyond; without n, x.
template <typename A>
[[gnu::always_inline]] inline Vector<A> first(Vector<A> x, A fill, int64_t n) {
  return lane_numbers<A>() < static_cast<A>(n) ? x : broadcast(fill);
}
template <typename A>
[[gnu::always_inline]] inline Vector<A> first(Vector<A> x, A) {
  return x;
}

// The sum of f(i), or f(i, n) for the last, over the vectors of a row; in an order that is always the same.
template <typename A, typename F>
[[gnu::always_inline]] inline A sum_of(int64_t size, F&& f) {
  constexpr int64_t W = LANES<A>;
  Vector<A> a = {}, b = {}, c = {}, d = {};
  int64_t i = 0;
  for (; i + 4 * W <= size; i += 4 * W) a += f(i), b += f(i + W), c += f(i + 2 * W), d += f(i + 3 * W);
  over_vectors<A>(i, size, [&](int64_t j, auto... n) { a += f(j, n...); });
  return lane_sum<A>((a + b) + (c + d));
}

// table[index mod 16] in each lane.
[[gnu::always_inline]] inline Floats lookup(const float (&table)[16], Integers index) {
#if defined(__AVX512F__)
  return _mm512_permutexvar_ps(std::bit_cast<__m512i>(index), _mm512_load_ps(table));
#elif defined(__AVX2__)
  const auto i = std::bit_cast<__m256i>(index);
  const __m256 low = _mm256_permutevar8x32_ps(_mm256_load_ps(table), i);
  const __m256 high = _mm256_permutevar8x32_ps(_mm256_load_ps(table + 8), i);
  return _mm256_blendv_ps(low, high, _mm256_castsi256_ps(_mm256_slli_epi32(i, 28)));  // by the sign: bit 3
#else
  Floats x;
  for (int64_t l = 0; l < LANES<float>; ++l) x[l] = table[index[l] & 15];
  return x;
#endif
}

// ---- elementary functions ----

// a·b + c, rounded once where the CPU can. Written a * b + c, it is contracted in some of the places that it is inlined
// in and not in others, and results of the same formula differ by a rounding.
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
// 2^t = 2^floor(t)·2^r with r in [0, 1), relative error below 7e-6; both instructions know what to do with infinity.
[[gnu::always_inline]] inline Floats coarse_exp2(Floats t) {
  constexpr float TERMS[] = {1.34267012e-2f, 5.22424358e-2f, 2.41280232e-1f, 6.93044839e-1f, 1.0f};
  const Floats r = _mm512_reduce_ps(t, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
  return _mm512_scalef_ps(polynomial(r, TERMS), t);
}
#endif

// exp(x) = 2^k·exp(r) with k = round(x/ln 2), |r| ≤ ln 2 / 2. FINE: a polynomial of degree 6, relative error
// below 1.5e-7; else of degree 4, below 7e-6, for results that are rounded to 16 bits. A result that would be
// subnormal may be flushed to 0; inf above 88.73.
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
  const Floats shifted = clamped * LOG2_E + 12582912.0f;  // 1.5·2^23: rounds to an integer in the low bits
  const Floats k = shifted - 12582912.0f;
#endif
  // ln 2 in two parts, the first exact in few bits.
  const Floats r = clamped - k * 0.693359375f + k * 2.12194440e-4f;
  Floats p;
  if constexpr (FINE)
    p = polynomial(r, FINE_TERMS);
  else
    p = polynomial(r, TERMS);
#if defined(__AVX512F__)
  return _mm512_scalef_ps(p, k);
#else
  // 2^k in two factors, since k can be 128.
  const Integers n = std::bit_cast<Integers>(shifted) - 0x4B400000;
  const Floats half = std::bit_cast<Floats>(((n >> 1) + 127) << 23);
  const Floats rest = std::bit_cast<Floats>((n - (n >> 1) + 127) << 23);
  const Floats y = x < low ? Floats{} : p * half * rest;
  return x > high ? Floats{} + std::numeric_limits<float>::infinity() : y;
#endif
}
template <bool FINE = true>
[[gnu::always_inline]] inline Doubles exp(Doubles x) {
  return each(x, [](double y) { return std::exp(y); });
}

// exp(a - b), where b is small and the same for many a: on AVX-512 the coarse exponential takes no more than exp(a).
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

// tanh: an odd polynomial below 0.625, else 1 - 2/(exp(2|x|) + 1); relative error below 3e-7.
[[gnu::always_inline]] inline Floats tanh(Floats x) {
  constexpr float TERMS[] = {-5.66477535e-3f, 2.05956800e-2f, -5.37226793e-2f, 1.33311502e-1f, -3.33332616e-1f};
  const Bits sign = std::bit_cast<Bits>(x) & 0x80000000u;
  const Floats a = std::bit_cast<Floats>(std::bit_cast<Bits>(x) ^ sign), s = a * a;
  const Floats small = polynomial(s, TERMS) * s * a + a;
  const Floats large = 1.0f - 2.0f / (exp(2.0f * a) + 1.0f);
  const Floats y = a >= 0.625f ? large : small;
  return std::bit_cast<Floats>(std::bit_cast<Bits>(y) | sign);
}
[[gnu::always_inline]] inline Doubles tanh(Doubles x) {
  return each(x, [](double y) { return std::tanh(y); });
}

}  // namespace fastgpt
