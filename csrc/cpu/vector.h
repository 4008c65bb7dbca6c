// SIMD vectors of the width of the instruction set: loads, stores, reductions and comparisons. The elementary functions
// are in vector_math.h.
//
// `Vector<A>` is a vector type of GCC and clang: + - * / < and ?: act on each of its LANES<A> elements. A load widens
// the storage type T to the compute type A. A store rounds to nearest even. Intrinsics are used where the compiler does
// not find the AVX-512 instruction.
#pragma once

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>
#include <utility>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace fastgpt {

using torch::headeronly::BFloat16;
using torch::headeronly::Half;

#if defined(__AVX512F__)
constexpr int64_t VECTOR_BYTES = 64;
#elif defined(__AVX__)
constexpr int64_t VECTOR_BYTES = 32;
#else
constexpr int64_t VECTOR_BYTES = 16;
#endif

template <typename A>
constexpr int64_t LANES = VECTOR_BYTES / static_cast<int64_t>(sizeof(A));

// A vector of N elements, aligned like one element: it may be read from anywhere in a row.
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

// std::bit_cast takes a reference, to which clang gives the alignment of a whole vector.
template <typename To, typename From>
[[gnu::always_inline]] inline To bit_cast(From x) {
  return __builtin_bit_cast(To, x);
}

template <typename A>
[[gnu::always_inline]] inline Vector<A> broadcast(A x) {
  return Vector<A>{} + x;
}

// x, rounded to A. The compiler does not contract the product in x with a following addition.
template <typename A>
[[gnu::always_inline]] inline Vector<A> rounded(Vector<A> x) {
#if defined(__x86_64__)
  asm("" : "+v"(x));
#else
  asm("" : "+m"(x));
#endif
  return x;
}

// While it lives, results of this thread that are subnormal (below 1.2e-38 in float) are 0. Where probabilities are
// computed such numbers come from scores that are far below the largest; the processor takes some hundred cycles for
// each, here and in every product that it is a factor of.
class FlushSubnormals {
 public:
#if defined(__x86_64__)
  FlushSubnormals() : before_(_mm_getcsr()) { _mm_setcsr(before_ | _MM_FLUSH_ZERO_ON); }
  ~FlushSubnormals() { _mm_setcsr(before_); }
#else
  FlushSubnormals() {}
#endif
  FlushSubnormals(const FlushSubnormals&) = delete;
  FlushSubnormals& operator=(const FlushSubnormals&) = delete;

 private:
  unsigned before_ = 0;
};

// Two results of one function. (std::pair takes references, to which clang gives the alignment of a whole vector.)
template <typename A>
struct Two {
  Vector<A> first, second;
};

// ---- loads and stores ----

// Converts between 16-bit and 32-bit words. For AVX-512 the compiler would split the vector into halves.
[[gnu::always_inline]] inline Bits widened(Shorts x) {
#if defined(__AVX512F__)
  return bit_cast<Bits>(_mm512_cvtepu16_epi32(bit_cast<__m256i>(x)));
#else
  return __builtin_convertvector(x, Bits);
#endif
}
[[gnu::always_inline]] inline Shorts narrowed(Bits x) {
#if defined(__AVX512F__)
  return bit_cast<Shorts>(_mm512_cvtepi32_epi16(bit_cast<__m512i>(x)));
#else
  return __builtin_convertvector(x, Shorts);
#endif
}

template <typename A, typename T>
[[gnu::always_inline]] inline Vector<A> load(const T* p) {
  if constexpr (std::is_same_v<A, T>) {
    return *reinterpret_cast<const Vector<A>*>(p);
  } else if constexpr (std::is_same_v<T, BFloat16>) {
    return bit_cast<Floats>(widened(*reinterpret_cast<const Shorts*>(p)) << 16);
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

// Rounds each element to bfloat16, to nearest even. NaN stays NaN. The instruction flushes subnormals to 0.
[[gnu::always_inline]] inline Shorts to_bfloat16(Floats x) {
#if defined(__AVX512BF16__)
  return bit_cast<Shorts>(_mm512_cvtneps_pbh(x));
#else
  const Bits u = bit_cast<Bits>(x);
  const Bits rounded = (u + 0x7FFFu + ((u >> 16) & 1u)) >> 16;
  return narrowed(x == x ? rounded : Bits{} + 0x7FC0u);
#endif
}

template <typename T, typename A>
[[gnu::always_inline]] inline void store(T* p, Vector<A> x) {
  if constexpr (std::is_same_v<A, T>) {
    *reinterpret_cast<Vector<A>*>(p) = x;
  } else if constexpr (std::is_same_v<T, BFloat16>) {
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

// Load and store only the first n < LANES elements. `load` fills the other lanes with 0.
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

// Whether a result of `numel` elements of T is written with streaming (non-temporal) stores. Such a result would not
// stay in the cache, and a streaming store of a whole line does not read the line first.
template <typename T>
inline bool is_streamed(int64_t numel) {
#if defined(__AVX512F__)
  return numel * static_cast<int64_t>(sizeof(T)) >= int64_t{16} << 20;
#else
  return numel < 0;
#endif
}

// Elements from p to the next cache line.
template <typename T>
inline int64_t to_next_line(const T* p) {
  return static_cast<int64_t>((64 - reinterpret_cast<uintptr_t>(p) % 64) % 64 / sizeof(T));
}

#if defined(__AVX512F__)
// Rounds two vectors to 16 bits, which fill a cache line.
[[gnu::always_inline]] inline __m512i rounded_line(Floats a, Floats b, BFloat16) {
#if defined(__AVX512BF16__)
  return bit_cast<__m512i>(_mm512_cvtne2ps_pbh(b, a));
#else
  const auto low = bit_cast<__m256i>(to_bfloat16(a)), high = bit_cast<__m256i>(to_bfloat16(b));
  return _mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1);
#endif
}
[[gnu::always_inline]] inline __m512i rounded_line(Floats a, Floats b, Half) {
  return _mm512_inserti64x4(_mm512_castsi256_si512(_mm512_cvtps_ph(a, 0)), _mm512_cvtps_ph(b, 0), 1);
}

// Stores a cache line. A streaming store needs `end_streaming` before other threads read the line.
template <bool STREAMING, typename L>
[[gnu::always_inline]] inline void store_line(void* p, L line) {
  if constexpr (STREAMING)
    _mm512_stream_si512(static_cast<__m512i*>(p), bit_cast<__m512i>(line));
  else
    _mm512_storeu_si512(p, bit_cast<__m512i>(line));
}
#endif

inline void end_streaming() {
#if defined(__AVX512F__)
  _mm_sfence();
#endif
}

// Calls f(i) for each full vector of [begin, end), and f(i, n) for the n remaining elements, if any.
template <typename A, typename F>
[[gnu::always_inline]] inline void over_vectors(int64_t begin, int64_t end, F&& f) {
  int64_t i = begin;
  for (; i + LANES<A> <= end; i += LANES<A>) f(i);
  if (i < end) f(i, end - i);
}

// out[i] = f(i) for each full vector of [begin, end), f(i, n) for the n remaining elements. STREAMING: with streaming
// stores; out + begin must then be the start of a cache line.
template <bool STREAMING, typename A, typename T, typename F>
[[gnu::always_inline]] inline void fill(T* out, int64_t begin, int64_t end, F&& f) {
  constexpr int64_t W = LANES<A>;
  int64_t i = begin;
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 2)
    for (; i + 2 * W <= end; i += 2 * W) store_line<STREAMING>(out + i, rounded_line(f(i), f(i + W), T{}));
  else
    for (; i + W <= end; i += W) store_line<STREAMING>(out + i, f(i));
#endif
  over_vectors<A>(i, end, [&](int64_t j, auto... n) { store<T, A>(out + j, f(j, n...), n...); });
}

// The same for two results: first[i], second[i] = f(i), a pair of vectors.
template <bool STREAMING, typename A, typename T, typename F>
[[gnu::always_inline]] inline void fill_two(T* first, T* second, int64_t begin, int64_t end, F&& f) {
  constexpr int64_t W = LANES<A>;
  int64_t i = begin;
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 2)
    for (; i + 2 * W <= end; i += 2 * W) {
      const auto left = f(i), right = f(i + W);
      store_line<STREAMING>(first + i, rounded_line(left.first, right.first, T{}));
      store_line<STREAMING>(second + i, rounded_line(left.second, right.second, T{}));
    }
  else
    for (; i + W <= end; i += W) {
      const auto both = f(i);
      store_line<STREAMING>(first + i, both.first);
      store_line<STREAMING>(second + i, both.second);
    }
#endif
  over_vectors<A>(i, end, [&](int64_t j, auto... n) {
    const auto both = f(j, n...);
    store<T, A>(first + j, both.first, n...);
    store<T, A>(second + j, both.second, n...);
  });
}

// ---- reductions and comparisons ----

// The larger of each pair; b if one is NaN.
[[gnu::always_inline]] inline Floats max(Floats a, Floats b) {
#if defined(__AVX512F__)
  return _mm512_max_ps(a, b);
#else
  return a > b ? a : b;
#endif
}
[[gnu::always_inline]] inline Doubles max(Doubles a, Doubles b) { return a > b ? a : b; }

// The smaller of each pair; b if one is NaN.
[[gnu::always_inline]] inline Floats min(Floats a, Floats b) {
#if defined(__AVX512F__)
  return _mm512_min_ps(a, b);
#else
  return a < b ? a : b;
#endif
}

template <typename A>
[[gnu::always_inline]] inline A lane_max(Vector<A> x) {
  A largest = x[0];
  for (int64_t i = 1; i < LANES<A>; ++i) largest = x[i] > largest ? x[i] : largest;
  return largest;
}

// A pairwise sum in a fixed order.
template <typename A>
[[gnu::always_inline]] inline A lane_sum(Vector<A> x) {
#if defined(__AVX512F__)
  if constexpr (std::is_same_v<A, float>) return _mm512_reduce_add_ps(x);  // the same order
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
[[gnu::always_inline]] inline Vector<A> lane_indices() {
  Vector<A> x;
  for (int64_t i = 0; i < LANES<A>; ++i) x[i] = static_cast<A>(i);
  return x;
}

// x in the first n lanes, `fill` in the others. Without n, x.
template <typename A>
[[gnu::always_inline]] inline Vector<A> first(Vector<A> x, A fill, int64_t n) {
  return lane_indices<A>() < static_cast<A>(n) ? x : broadcast(fill);
}
template <typename A>
[[gnu::always_inline]] inline Vector<A> first(Vector<A> x, A) {
  return x;
}

// The sum of f(i), or f(i, n) for the last vector, over the vectors of a row, in a fixed order.
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
  return _mm512_permutexvar_ps(bit_cast<__m512i>(index), _mm512_load_ps(table));
#elif defined(__AVX2__)
  const auto i = bit_cast<__m256i>(index);
  const __m256 low = _mm256_permutevar8x32_ps(_mm256_load_ps(table), i);
  const __m256 high = _mm256_permutevar8x32_ps(_mm256_load_ps(table + 8), i);
  // Bit 3 of the index, shifted into the sign bit, selects the half of the table.
  return _mm256_blendv_ps(low, high, _mm256_castsi256_ps(_mm256_slli_epi32(i, 28)));
#else
  Floats x;
  for (int64_t l = 0; l < LANES<float>; ++l) x[l] = table[index[l] & 15];
  return x;
#endif
}

}  // namespace fastgpt
