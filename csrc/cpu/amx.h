// Products of bfloat16 on the tiles of AMX: C (m, n) (+)= A (m, k) · B (k, n), with the operands of gemm.h.
//
// A tile holds 16 rows of 64 bytes: 16 units of A or B, or 16 floats of C. One instruction multiplies a tile of A by
// one of B and adds 16·16·32 products to a tile of C, in 16 cycles. Blocks of 2 × 2 tiles of C stay in registers over
// all of k, and take four loads for four products. What is left of m or k beside whole tiles goes to gemm.h.
//
// Sums begin with C, not with zero as in gemm.h. Subnormal numbers count as 0, as they do in AVX512_BF16.
#pragma once

#include "gemm.h"

#if defined(__AMX_BF16__)
#include <immintrin.h>
#endif

namespace fastgpt {

#if defined(__AMX_BF16__)

// The tile registers, which every thread configures for itself and must release.
class TileRegisters {
 public:
  TileRegisters() {
    struct alignas(64) Configuration {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t bytes_per_row[16] = {64, 64, 64, 64, 64, 64, 64, 64};
      uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    };
    static constexpr Configuration CONFIGURATION;
    _tile_loadconfig(&CONFIGURATION);
  }
  ~TileRegisters() { _tile_release(); }
  TileRegisters(const TileRegisters&) = delete;
  TileRegisters& operator=(const TileRegisters&) = delete;
};

constexpr int64_t TILE = 16;        // rows of a tile, units of a row
constexpr int64_t TRANSPOSED = 32;  // the largest k of a first factor whose rows are not contiguous

// 16 rows of C, or 32 with TWO, for 32 columns. Strides in bytes.
template <bool ADD, bool TWO>
inline void tile_block(
    int64_t k, const uint32_t* a, int64_t a_row, const uint32_t* b, int64_t b_row, float* c, int64_t c_row) {
  const auto* const lower_a = reinterpret_cast<const char*>(a) + TILE * a_row;
  auto* const lower_c = reinterpret_cast<char*>(c) + TILE * c_row;
  if constexpr (ADD) {
    _tile_loadd(0, c, c_row);
    _tile_loadd(1, c + TILE, c_row);
    if constexpr (TWO) {
      _tile_loadd(2, lower_c, c_row);
      _tile_loadd(3, lower_c + TILE * sizeof(float), c_row);
    }
  } else {
    _tile_zero(0);
    _tile_zero(1);
    if constexpr (TWO) {
      _tile_zero(2);
      _tile_zero(3);
    }
  }
  for (int64_t p = 0; p < k; p += TILE) {
    const auto* const rows = reinterpret_cast<const char*>(b) + p * b_row;
    _tile_loadd(4, a + p, a_row);
    _tile_loadd(6, rows, b_row);
    _tile_loadd(7, rows + TILE * sizeof(uint32_t), b_row);
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    if constexpr (TWO) {
      _tile_loadd(5, lower_a + p * sizeof(uint32_t), a_row);
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
    }
  }
  _tile_stored(0, c, c_row);
  _tile_stored(1, c + TILE, c_row);
  if constexpr (TWO) {
    _tile_stored(2, lower_c, c_row);
    _tile_stored(3, lower_c + TILE * sizeof(float), c_row);
  }
}

// The compiler does not know which memory the instructions above read and write.
inline void compiler_barrier() { asm volatile("" ::: "memory"); }

// As gemm, for a thread with TileRegisters. `a` has contiguous rows, or contiguous columns and k <= TRANSPOSED.
template <bool ADD>
inline void gemm_on_tiles(
    int64_t m, int64_t n, int64_t k, Operand<uint32_t> a, Operand<uint32_t> b, float* c, int64_t c_row) {
  const int64_t whole_m = m / TILE * TILE, whole_k = k / TILE * TILE;
  const bool transposed = a.column != 1;
  if (whole_m == 0 || whole_k == 0) return gemm<ADD>(m, n, k, a, b, c, c_row);
  constexpr int64_t BYTES = sizeof(uint32_t);
  alignas(64) uint32_t space[2 * TILE * TRANSPOSED];
  for (int64_t i = 0; i < whole_m; i += 2 * TILE) {
    const bool two = i + TILE < whole_m;
    const uint32_t* rows = a.data + i * a.row;
    int64_t row = a.row;
    if (transposed) {
      for (int64_t r = 0; r < (two ? 2 * TILE : TILE); r += TILE)
        for (int64_t p = 0; p < whole_k; p += TILE)
          transpose_square(space + r * TRANSPOSED + p, TRANSPOSED, rows + r + p * a.column, a.column);
      rows = space, row = TRANSPOSED;
    }
    compiler_barrier();
    for (int64_t j = 0; j < n; j += GEMM_N<uint32_t>) {
      const uint32_t* const panel = b.data + j * b.column;
      float* const to = c + i * c_row + j;
      if (two)
        tile_block<ADD, true>(whole_k, rows, row * BYTES, panel, b.row * BYTES, to, c_row * BYTES);
      else
        tile_block<ADD, false>(whole_k, rows, row * BYTES, panel, b.row * BYTES, to, c_row * BYTES);
    }
    compiler_barrier();
  }
  if (whole_k < k)
    gemm<true>(
        whole_m,
        n,
        k - whole_k,
        Operand<uint32_t>{a.data + whole_k * a.column, a.row, a.column},
        Operand<uint32_t>{b.data + whole_k * b.row, b.row, b.column},
        c,
        c_row);
  if (whole_m < m)
    gemm<ADD>(
        m - whole_m, n, k, Operand<uint32_t>{a.data + whole_m * a.row, a.row, a.column}, b, c + whole_m * c_row, c_row);
}

#else

struct TileRegisters {
  TileRegisters() {}  // so that a variable of it counts as used
};

#endif

// C += A·B with ADD, otherwise C = A·B; on the tiles of AMX, where the variant has them and the factors are bfloat16.
// The thread has TileRegisters.
template <bool ADD, typename U, typename A>
inline void product(int64_t m, int64_t n, int64_t k, Operand<U> a, Operand<U> b, A* c, int64_t c_row) {
#if defined(__AMX_BF16__)
  if constexpr (std::is_same_v<U, uint32_t>) return gemm_on_tiles<ADD>(m, n, k, a, b, c, c_row);
#endif
  gemm<ADD>(m, n, k, a, b, c, c_row);
}

}  // namespace fastgpt
