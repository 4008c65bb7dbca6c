// Small matrix products on buffers in the cache: C (m, n) (+)= A (m, k) · B (k, n), C in the compute type.
//
// A and B consist of units. A unit is one float or double, or with AVX512_BF16 a pair of bfloat16 that are neighbours
// along k and are multiplied and added by one instruction (vdpbf16ps). A has any two strides (in units), so it may be
// transposed. The rows of B and C are contiguous and padded to a multiple of GEMM_N units, so there is no tail.
//
// A register tile of GEMM_M × GEMM_N stays in vector registers over all of k. A step takes 16 multiply-adds, 8
// broadcasts and 2 loads. The tile starts from zero, and C is added last. A caller that accumulates many products then
// rounds once per product at the magnitude of the sum, instead of k times.
//
// `pack_rows`, `pack_pairs` and `transpose` convert rows of a tensor into these layouts.
#pragma once

#include "kernel.h"
#include "vector.h"

namespace fastgpt {

#if defined(__AVX512F__)
constexpr int64_t GEMM_M = 8;
#elif defined(__AVX__)
constexpr int64_t GEMM_M = 6;
#else
constexpr int64_t GEMM_M = 4;
#endif

// The element type of the factors for tensors of T.
template <typename T>
struct FactorOf {
#if defined(__AVX512BF16__)
  using type = std::conditional_t<std::is_same_v<T, BFloat16>, BFloat16, compute_t<T>>;
#else
  using type = compute_t<T>;
#endif
};
template <typename T>
using factor_t = typename FactorOf<T>::type;

// Elements in a unit, and the type that holds one.
template <typename E>
constexpr int64_t FOLD = std::is_same_v<E, BFloat16> ? 2 : 1;
template <typename E>
using Unit = std::conditional_t<std::is_same_v<E, BFloat16>, uint32_t, E>;

template <typename U>
constexpr int64_t GEMM_N = 2 * LANES<U>;
template <typename U>
constexpr int64_t padded(int64_t n) {
  return (n + GEMM_N<U> - 1) / GEMM_N<U> * GEMM_N<U>;
}
template <typename E>
constexpr int64_t units(int64_t n) {
  return (n + FOLD<E> - 1) / FOLD<E>;
}

// A matrix of units. `row` and `column` are the strides between rows and between columns. A bfloat16 pair may be at any
// even address. A second factor may be stored in panels of GEMM_N columns: each row of a panel has GEMM_N contiguous
// units, so a product reads it in order. `column` is then the length of the columns of a panel.
template <typename U>
struct Operand {
  const U* data;
  int64_t row, column = 1;
};

template <typename U>
[[gnu::always_inline]] inline U unit_at(const U* p) {
  U u;
  std::memcpy(&u, p, sizeof(U));
  return u;
}

template <typename A>
[[gnu::always_inline]] inline Vector<A> multiply_add(Vector<A> c, A a, Vector<A> b) {
  return c + a * b;
}
#if defined(__AVX512BF16__)
[[gnu::always_inline]] inline Floats multiply_add(Floats c, uint32_t a, Bits b) {
  return _mm512_dpbf16_ps(
      c, std::bit_cast<__m512bh>(_mm512_set1_epi32(static_cast<int>(a))), std::bit_cast<__m512bh>(b));
}
#endif

// One register tile of M rows.
template <int64_t M, bool ADD, typename U, typename A>
inline void gemm_tile(
    int64_t k, const U* a, int64_t a_row, int64_t a_column, const U* b, int64_t b_row, A* c, int64_t c_row) {
  constexpr int64_t W = LANES<A>;
  Vector<A> c0[M] = {}, c1[M] = {};
  if (ADD)
    for (int64_t i = 0; i < M; ++i) {  // C may not be in the cache
      __builtin_prefetch(c + i * c_row, 1);
      __builtin_prefetch(c + i * c_row + W, 1);
    }
  for (int64_t p = 0; p < k; ++p) {
    const Vector<U> b0 = *reinterpret_cast<const Vector<U>*>(b + p * b_row);
    const Vector<U> b1 = *reinterpret_cast<const Vector<U>*>(b + p * b_row + W);
#pragma GCC unroll 8
    for (int64_t i = 0; i < M; ++i) {
      const U unit = unit_at(a + i * a_row + p * a_column);
      c0[i] = multiply_add(c0[i], unit, b0);
      c1[i] = multiply_add(c1[i], unit, b1);
    }
  }
#pragma GCC unroll 8
  for (int64_t i = 0; i < M; ++i) {
    A* row = c + i * c_row;
    store<A, A>(row, ADD ? load<A>(row) + c0[i] : c0[i]);
    store<A, A>(row + W, ADD ? load<A>(row + W) + c1[i] : c1[i]);
  }
}

// Computes M rows of C. PREFETCH: also prefetches the next M rows of A, a few per tile.
template <int64_t M, bool ADD, bool PREFETCH, typename U, typename A>
inline void gemm_rows(int64_t n, int64_t k, Operand<U> a, Operand<U> b, A* c, int64_t c_row) {
  constexpr int64_t LINE = 64 / static_cast<int64_t>(sizeof(U));
  for (int64_t j = 0; j < n; j += GEMM_N<U>) {
    if (PREFETCH)
      for (int64_t p = 0; p < k; p += LINE) __builtin_prefetch(a.data + (M + j / GEMM_N<U> % M) * a.row + p);
    gemm_tile<M, ADD>(k, a.data, a.row, a.column, b.data + j * b.column, b.row, c + j, c_row);
  }
}

// C += A·B with ADD, otherwise C = A·B. n is rounded up to whole register tiles.
template <bool ADD, typename U, typename A>
inline void gemm(int64_t m, int64_t n, int64_t k, Operand<U> a, Operand<U> b, A* c, int64_t c_row) {
  const auto from = [&](int64_t i) { return Operand<U>{a.data + i * a.row, a.row, a.column}; };
  const bool prefetch = a.column == 1 && k > 64;
  int64_t i = 0;
  for (; i + GEMM_M <= m; i += GEMM_M)
    prefetch ? gemm_rows<GEMM_M, ADD, true>(n, k, from(i), b, c + i * c_row, c_row)
             : gemm_rows<GEMM_M, ADD, false>(n, k, from(i), b, c + i * c_row, c_row);
  for (; i + 2 <= m; i += 2) gemm_rows<2, ADD, false>(n, k, from(i), b, c + i * c_row, c_row);
  for (; i < m; ++i) gemm_rows<1, ADD, false>(n, k, from(i), b, c + i * c_row, c_row);
}

// ---- operands ----

// Packs n rows of `size` elements as rows of E, padded with zeros: out (n, width units).
template <typename E, typename T>
inline void pack_rows(Unit<E>* out, int64_t width, const T* in, int64_t stride, int64_t n, int64_t size) {
  if (width == 0) return;  // memcpy and memset must not be given a null pointer, even for 0 bytes
  for (int64_t i = 0; i < n; ++i) {
    E* row = reinterpret_cast<E*>(out + i * width);
    if constexpr (std::is_same_v<E, T>)
      std::memcpy(static_cast<void*>(row), in + i * stride, size * sizeof(E));
    else
      over_vectors<E>(0, size, [&](int64_t j, auto... left) {
        store<E, E>(row + j, load<E>(in + i * stride + j, left...), left...);
      });
    std::memset(static_cast<void*>(row + size), 0, (width * FOLD<E> - size) * sizeof(E));
  }
}

// Packs n rows along k, two neighbouring rows per unit: out (units(n), width).
inline void pack_pairs(uint32_t* out, int64_t width, const BFloat16* in, int64_t stride, int64_t n, int64_t size) {
  if (width == 0) return;
  const auto* rows = reinterpret_cast<const uint16_t*>(in);
  for (int64_t i = 0; i < n; i += 2) {
    const uint16_t *first = rows + i * stride, *second = first + stride;
    uint32_t* to = out + i / 2 * width;
    int64_t j = 0;
    const auto words = [](const uint16_t* p) { return widened(*reinterpret_cast<const Shorts*>(p)); };
    for (; i + 1 < n && j + LANES<float> <= size; j += LANES<float>)
      *reinterpret_cast<Bits*>(to + j) = words(first + j) | words(second + j) << 16;
    for (; j < size; ++j) to[j] = first[j] | (i + 1 < n ? static_cast<uint32_t>(second[j]) << 16 : 0);
    std::memset(to + size, 0, (width - size) * sizeof(uint32_t));
  }
}

// n rows as the first factor of a product over `size`. They are used in place if their type is E and they consist of
// whole units. Otherwise they are packed into `space`.
template <typename E, typename T>
inline Operand<Unit<E>> first_factor(
    std::vector<Unit<E>>& space, const T* rows, int64_t stride, int64_t n, int64_t size) {
  if constexpr (std::is_same_v<E, T>)
    if (size % FOLD<E> == 0 && stride % FOLD<E> == 0) return {reinterpret_cast<const Unit<E>*>(rows), stride / FOLD<E>};
  const int64_t width = units<E>(size);
  space.resize(n * width);
  pack_rows<E>(space.data(), width, rows, stride, n, size);
  return {space.data(), width};
}

// n rows as the second factor of a product over n. They are used in place if possible, otherwise packed into panels.
template <typename E, typename T>
inline Operand<Unit<E>> second_factor(
    std::vector<Unit<E>>& space, const T* rows, int64_t stride, int64_t n, int64_t size) {
  using U = Unit<E>;
  constexpr int64_t W = LANES<U>;
  const int64_t depth = units<E>(n), width = padded<U>(size);
  if constexpr (std::is_same_v<E, T> && FOLD<E> == 1)
    if (size == width) return {rows, stride};
  space.resize(depth * width);
  for (int64_t i = 0; i < n; i += FOLD<E>) {
    const T *first = rows + i * stride, *second = i + 1 < n ? first + stride : nullptr;
    U* const to = space.data() + i / FOLD<E> * GEMM_N<U>;
    const auto pack = [&](int64_t j, auto... left) {
      Vector<U> x;
      if constexpr (FOLD<E> > 1) {
        x = std::bit_cast<Bits>(load<float>(first + j, left...)) >> 16;
        if (second) x |= std::bit_cast<Bits>(load<float>(second + j, left...));
      } else {
        x = load<E>(first + j, left...);
      }
      *reinterpret_cast<Vector<U>*>(to + j / GEMM_N<U> * GEMM_N<U> * depth + j % GEMM_N<U>) = x;
    };
    int64_t j = 0;
    for (; j + W <= size; j += W) pack(j);
    for (; j < width; j += W) pack(j, std::max<int64_t>(0, size - j));
  }
  return {space.data(), GEMM_N<U>, depth};
}

// Transposes a square of LANES × LANES units in registers. Step s exchanges blocks of s × s.
template <typename U>
inline void transpose_square(U* out, int64_t to, const U* in, int64_t from) {
  constexpr int64_t W = LANES<U>;
  using Index = typename VectorOf<std::conditional_t<sizeof(U) == 4, int32_t, int64_t>, W>::type;
  Vector<U> r[W];
#pragma GCC unroll 16
  for (int64_t i = 0; i < W; ++i) r[i] = *reinterpret_cast<const Vector<U>*>(in + i * from);
#pragma GCC unroll 4
  for (int64_t s = 1; s < W; s *= 2) {
    Index upper, lower;
#pragma GCC unroll 16
    for (int64_t l = 0; l < W; ++l) {
      upper[l] = l & s ? W + l - s : l;
      lower[l] = l & s ? W + l : l + s;
    }
#pragma GCC unroll 16
    for (int64_t i = 0; i < W; ++i)
      if (!(i & s)) {
        const Vector<U> a = r[i], b = r[i + s];
        r[i] = __builtin_shuffle(a, b, upper);
        r[i + s] = __builtin_shuffle(a, b, lower);
      }
  }
#pragma GCC unroll 16
  for (int64_t i = 0; i < W; ++i) *reinterpret_cast<Vector<U>*>(out + i * to) = r[i];
}

// Transposes packed rows: (rows, columns) units to (columns, rows). Both are rounded up to whole squares.
template <typename U>
inline void transpose(U* out, int64_t to, const U* in, int64_t from, int64_t rows, int64_t columns) {
  for (int64_t i = 0; i < rows; i += LANES<U>)
    for (int64_t j = 0; j < columns; j += LANES<U>) transpose_square(out + j * to + i, to, in + i * from + j, from);
}

}  // namespace fastgpt
