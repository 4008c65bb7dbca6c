// Attention's backward, the steps of its main kernel for one tile of scores: p and ds, dv, dq, dk. The mathematics is
// in attention_bwd.cu.
#pragma once

#include "attention.cuh"
#include "tiles.cuh"

namespace fastgpt {

// ---- constants ----

// Rows and columns of a tile: the largest that compile without spills beside the COLUMNS · HEAD / 8 sums of dk and dv
// of a warp. SMALL: the largest that also fit into 99 KiB. float32 with 256 columns has no such tile.
template <typename T, int HEAD, bool OPTIONS, bool SMALL = false>
struct Sizes {
  static constexpr bool SPLIT = sizeof(T) == 4;
  static constexpr int ROWS = SPLIT || HEAD == 256 || SMALL ? 32 : 64;
  static constexpr int COLUMNS = SPLIT + SMALL + HEAD / 256 >= 2 ? 32 : HEAD <= 128 && !OPTIONS ? 128 : 64;
};
// Warps of a block, and stages of the copies of q and dout.
template <int COLUMNS>
constexpr int WARPS = COLUMNS == 32 ? 4 : 8;
template <int COLUMNS>
constexpr int STAGES = COLUMNS == 32 ? 1 : 2;

// The shared memory of a block: k, v, the stages of q and dout, p, ds.
template <typename T, int HEAD, int ROWS, int COLUMNS>
struct Shared {
  static constexpr int ROW = HEAD * sizeof(T), SCORES = ROWS * Padded<T, COLUMNS>::PITCH;
  static constexpr int K = 0, V = COLUMNS * ROW, Q = 2 * COLUMNS * ROW, GRAD = Q + ROWS * ROW, STAGE = 2 * ROWS * ROW;
  static constexpr int P = Q + STAGES<COLUMNS> * STAGE, DS = P + SCORES, BYTES = DS + SCORES;
};

// ---- the parts of a warp ----

// Where a warp works: it computes 16 rows and COLUMNS / ACROSS columns of the scores, 16 columns and HEAD / PARTS of a
// row of dk and dv, and 16 rows and HEAD / ACROSS of a row of dq. Each address has a part that depends on the lane,
// which all tiles of one kind share, and a part that depends on the warp.
template <typename T, int HEAD, int ROWS, int COLUMNS, bool OPTIONS>
struct BackwardWarp {
  using U = Mma<T>;
  using S = Shared<T, HEAD, ROWS, COLUMNS>;
  using Wide = Tile<T, HEAD>;
  using Square = Padded<T, COLUMNS>;  // p and ds
  static constexpr int PITCH = S::ROW, BYTES = sizeof(T);
  static constexpr int ACROSS = WARPS<COLUMNS> * 16 / ROWS, N = COLUMNS / ACROSS / 8;
  static constexpr int PARTS = WARPS<COLUMNS> * 16 / COLUMNS, OWN = HEAD / PARTS, OWN_Q = HEAD / ACROSS;
  static constexpr bool NARROW = COLUMNS == 32;  // the most sums beside the fewest scores
  // Steps of a product whose loads are in flight together, and columns of dq that are computed together.
  static constexpr int AT_ONCE = NARROW ? 1 : OPTIONS ? 2 : 16, DQ_AT_ONCE = NARROW ? 2 : OWN_Q / 8;
  // Many scores beside many sums do not fit into registers: such tiles are processed in two halves.
  static constexpr int HALVES = HEAD == 128 && N == 8 ? 2 : 1, M = N / HALVES;
  static_assert(N % 2 == 0 && OWN % 16 == 0 && OWN_Q % 16 == 0);
  // Whether the parts of dk and dv, and of dq, are aligned to the swizzle pattern.
  static constexpr bool ALIGNED_KV = OWN * BYTES % 128 == 0, ALIGNED_Q = OWN_Q * BYTES % 128 == 0;

  const SharedAddress memory;
  const int warp_index;
  const int y_warp, x_warp;        // the first row and column of the warp's scores
  const int y, x;                  // the first row and column of the lane's scores
  const int own_column;            // the first column of the warp's part of dk and dv
  const int own_head, q_head;      // the first element of the warp's part of a row of dk and dv, and of dq
  const SharedAddress left_lane;   // q and dout as left factors
  const SharedAddress right_lane;  // k and v as right factors
  const SharedAddress transposed_lane;
  const SharedAddress ds_address, p_address;    // ds as a left factor; where to store p
  const SharedAddress p_transposed_address;     // p and ds as left factors, transposed
  const SharedAddress grad_transposed_address;  // dout and q as right factors, transposed
  const SharedAddress k_transposed_address;     // k as a right factor, transposed
  const SharedAddress k_transposed_warp;        // and the part of its address that depends on the warp

  __device__ BackwardWarp()
      : memory(shared_memory()),
        warp_index(warp_uniform(warp())),
        y_warp(warp_index / ACROSS * 16),
        x_warp(warp_index % ACROSS * (COLUMNS / ACROSS)),
        y(y_warp + lane() / 4),
        x(x_warp + lane() % 4 * 2),
        own_column(warp_index / PARTS * 16),
        own_head(warp_index % PARTS * OWN),
        q_head(warp_index % ACROSS * OWN_Q),
        left_lane(opaque(U::template left<Wide>())),
        right_lane(opaque(U::template right<Wide>())),
        // For 16-bit types it equals left_lane, which saves a register.
        transposed_lane(sizeof(T) == 2 ? left_lane : opaque(U::template right_transposed<Wide>())),
        ds_address(memory + S::DS + y_warp * Square::PITCH + U::template left<Square>()),
        p_address(memory + S::P + Square::element(y, x)),
        p_transposed_address(
            memory + S::P + Square::right_of(U::template left_transposed<Square>(), own_column * BYTES)),
        grad_transposed_address(ALIGNED_KV ? transposed_lane : Wide::right_of(transposed_lane, own_head * BYTES)),
        k_transposed_address(ALIGNED_Q ? transposed_lane : Wide::right_of(transposed_lane, q_head * BYTES)),
        k_transposed_warp(memory + S::K + (ALIGNED_Q ? q_head * BYTES : 0)) {}

  // An address that depends on the lane. The loop without masks keeps it in a register, other loops compute it each
  // time.
  template <bool EDGE>
  __device__ static SharedAddress lane_address(SharedAddress a) {
    return OPTIONS || EDGE ? opaque(a) : a;
  }

  // Loads m, l and delta of the two rows of the lane. Missing rows get p = exp(s - inf) = 0.
  template <bool EDGE>
  __device__ void load_row_stats(
      Vector<float, 4> (&stats)[2], Global<const Vector<float, 4>> row_stats, int start, int Lq) const {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      stats[h] = {{INFINITE, 0.0f, 0.0f, 0.0f}};
      if (!EDGE || start + y + 8 * h < Lq) stats[h] = load(row_stats + 8 * h);
    }
  }

  // s = p: the probabilities of M · 8 columns, without dropout. softcap_grad: its derivative, if there is a softcap.
  template <bool EDGE>
  __device__ void probabilities(
      float (&s)[M][4],
      float (&softcap_grad)[OPTIONS ? M : 1][4],
      const Vector<float, 4> (&stats)[2],
      const Mask<OPTIONS>& mask,
      float scale,
      SharedAddress left,
      SharedAddress q_warp,
      SharedAddress right,
      SharedAddress k_warp,
      int row,
      int column) const {
    add_product<U, HEAD / U::K, AT_ONCE>(s, left_at<U, Wide>(left, q_warp), right_at<U, Wide>(right, k_warp));
    if constexpr (OPTIONS)
      if (mask.p.softcap > 0.0f) {
#pragma unroll
        for (int n = 0; n < M; ++n)
#pragma unroll
          for (int i = 0; i < 4; ++i) softcap_grad[n][i] = mask.softcap_grad(s[n][i]);
      }
    mask.template apply<EDGE>(s, row, column);
#pragma unroll
    for (int n = 0; n < M; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float m = stats[i / 2].at[0], l = stats[i / 2].at[1];
        s[n][i] = exp2_fast(fmaf(fmaf(s[n][i], scale, -m), static_cast<float>(LOG2E), -l));
      }
  }

  // Adds Σ_j p_ij dp_ij over all columns of the tile to delta (at[2]) of the two rows of the lane, across the warps
  // that share the rows. It uses the memory of p, which is free at this point.
  __device__ void add_to_delta(
      Vector<float, 4> (&stats)[2],
      const float (&s)[M][4],
      const float (&dp)[M][4],
      const Mask<true>& mask,
      int row,
      int column) const {
    const SharedAddress slots = memory + S::P;
    const int sharing = warp_index % ACROSS;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      float sum = 0;
#pragma unroll
      for (int n = 0; n < M; ++n) {
        Vector<float, 2> factors{{1.0f, 1.0f}};
        if (mask.p.seed) factors = mask.dropout_scale(row + 8 * h, column + 8 * n);
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const float p = s[n][2 * h + i];  // if it is 0, dp may be a NaN that the mask hides
          sum += p == 0.0f ? 0.0f : p * dp[n][2 * h + i] * factors.at[i];
        }
      }
      sum += shuffle_xor(sum, 1);
      sum += shuffle_xor(sum, 2);
      if (lane() % 4 == 0) store_shared(slots + 4 * ((y + 8 * h) * ACROSS + sharing), sum);
    }
    sync_block();
#pragma unroll
    for (int h = 0; h < 2; ++h)
      for (int w = 0; w < ACROSS; ++w) stats[h].at[2] += load_shared<float>(slots + 4 * ((y + 8 * h) * ACROSS + w));
    sync_block();
  }

  // Stores p (with dropout) and ds = p (dp - delta) in shared memory. `part`: the first column, in units of 8.
  __device__ void store_p_and_ds(
      float (&s)[M][4],
      float (&dp)[M][4],
      const float (&softcap_grad)[OPTIONS ? M : 1][4],
      const Vector<float, 4> (&stats)[2],
      const Mask<OPTIONS>& mask,
      SharedAddress to,
      int part,
      int row,
      int column) const {
#pragma unroll
    for (int n = 0; n < M; ++n)
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        float probability[2] = {s[n][2 * h], s[n][2 * h + 1]};
        if constexpr (OPTIONS)
          if (mask.p.seed) {
            const auto factors = mask.dropout_scale(row + 8 * h, column + 8 * (part + n));
#pragma unroll
            for (int i = 0; i < 2; ++i) probability[i] *= factors.at[i], dp[n][2 * h + i] *= factors.at[i];
          }
        float ds[2];
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          ds[i] = s[n][2 * h + i] * (dp[n][2 * h + i] - stats[h].at[2]);
          if constexpr (OPTIONS)
            if (mask.p.softcap > 0.0f) ds[i] *= softcap_grad[n][2 * h + i];
        }
        const SharedAddress at = Square::right_of(to, (part + n) * 8 * BYTES) + h * 8 * Square::PITCH;
        U::store_pair(at, probability[0], probability[1]);
        U::store_pair(at + (S::DS - S::P), ds[0], ds[1]);
      }
  }

  // dv += pᵀ dout, or dk += dsᵀ q.
  __device__ static void add_over_rows(
      float (&sums)[OWN / 8][4],
      SharedAddress left,
      SharedAddress left_warp,
      SharedAddress right,
      SharedAddress right_warp) {
    add_product<U, ROWS / U::K, AT_ONCE>(
        sums, left_transposed_at<U, Square>(left, left_warp), right_transposed_at<U, Wide>(right, right_warp));
  }

  // dq += ds k, by atomic additions to the float32 sums. `start`: the first row of the tile.
  template <bool EDGE>
  __device__ void add_to_dq(Global<float> dq, SharedAddress ds, SharedAddress k, int start, int Lq) const {
#pragma unroll
    for (int begin = 0; begin < OWN_Q / 8; begin += DQ_AT_ONCE) {
      float part[DQ_AT_ONCE][4] = {};
      add_product<U, COLUMNS / U::K, AT_ONCE>(part, left_at<U, Square>(ds, 0), [&](int step, int d) {
        return right_transposed_at<U, Wide>(k, k_transposed_warp)(step, begin + d);
      });
#pragma unroll
      for (int h = 0; h < 2; ++h)
        if (!EDGE || start + y + 8 * h < Lq) {
#pragma unroll
          for (int d = 0; d < DQ_AT_ONCE; ++d)
            atomic_add_pair(dq + (h * 8 * HEAD + (begin + d) * 8), part[d][2 * h], part[d][2 * h + 1]);
        }
    }
  }
};

}  // namespace fastgpt
