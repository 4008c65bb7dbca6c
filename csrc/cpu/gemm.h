// Small matrix products on buffers in the cache: C (m, n) += A (m, k) · B (k, n).
//
// A may be transposed (any two strides); the rows of B and C are contiguous and padded to a multiple
// of `GEMM_N` elements, so that there is no tail to treat. A register tile of GEMM_M × GEMM_N stays in
// vector registers over the whole of k. It starts from zero and C is added last: a caller that adds up many
// products then makes one rounding a product at the size of the sum, instead of k.
#pragma once

#include <cstdint>

namespace fastgpt {

#if defined(__AVX512F__)
constexpr int64_t VECTOR_BYTES = 64, GEMM_M = 8;
#elif defined(__AVX__)
constexpr int64_t VECTOR_BYTES = 32, GEMM_M = 6;
#else
constexpr int64_t VECTOR_BYTES = 16, GEMM_M = 4;
#endif

template <typename A>
constexpr int64_t GEMM_N = 2 * VECTOR_BYTES / static_cast<int64_t>(sizeof(A));

template <typename A>
constexpr int64_t padded(int64_t n) {
  return (n + GEMM_N<A> - 1) / GEMM_N<A> * GEMM_N<A>;
}

template <typename A>
struct VectorOf {
  typedef A type __attribute__((vector_size(VECTOR_BYTES), aligned(sizeof(A)), may_alias));
};

// One register tile of M rows.
template <int64_t M, typename A>
inline void gemm_tile(
    int64_t k, const A* a, int64_t a_row, int64_t a_column, const A* b, int64_t b_row, A* c, int64_t c_row) {
  using Vector = typename VectorOf<A>::type;
  constexpr int64_t W = VECTOR_BYTES / static_cast<int64_t>(sizeof(A));
  Vector c0[M] = {}, c1[M] = {};
  for (int64_t p = 0; p < k; ++p) {
    const Vector b0 = *reinterpret_cast<const Vector*>(b + p * b_row);
    const Vector b1 = *reinterpret_cast<const Vector*>(b + p * b_row + W);
#pragma GCC unroll 8
    for (int64_t i = 0; i < M; ++i) {
      const A scalar = a[i * a_row + p * a_column];
      c0[i] += scalar * b0;
      c1[i] += scalar * b1;
    }
  }
#pragma GCC unroll 8
  for (int64_t i = 0; i < M; ++i) {
    *reinterpret_cast<Vector*>(c + i * c_row) += c0[i];
    *reinterpret_cast<Vector*>(c + i * c_row + W) += c1[i];
  }
}

// a_row and a_column are A's strides: (k, 1) for A as it lies, (1, m) for a transposed one.
template <typename A>
inline void gemm(
    int64_t m,
    int64_t n,
    int64_t k,
    const A* a,
    int64_t a_row,
    int64_t a_column,
    const A* b,
    int64_t b_row,
    A* c,
    int64_t c_row) {
  for (int64_t j = 0; j < n; j += GEMM_N<A>) {
    int64_t i = 0;
    for (; i + GEMM_M <= m; i += GEMM_M)
      gemm_tile<GEMM_M>(k, a + i * a_row, a_row, a_column, b + j, b_row, c + i * c_row + j, c_row);
    for (; i < m; ++i) gemm_tile<1>(k, a + i * a_row, a_row, a_column, b + j, b_row, c + i * c_row + j, c_row);
  }
}

}  // namespace fastgpt
