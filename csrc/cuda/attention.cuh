// Device code that attention's kernels share: the problem, SeqlenInfo (where a document begins and how long it is),
// BlockRange (which blocks of the other axis a block visits), Mask (scores with scale, softcap, ALiBi and masks) and
// OnlineSoftmax. The mathematics is in attention.cu and attention_bwd.cu.
#pragma once

#include "../formulas.h"
#include "tensors.cuh"

namespace fastgpt {

constexpr float INFINITE = __builtin_huge_valf();

// ---- the problem ----

struct Strides {
  int64_t batch = 0, head = 0, row = 0;
};

// A (B, heads, L, size) tensor with contiguous rows. Packed documents are a batch in which each entry is the whole
// tensor.
template <typename T>
struct Matrices {
  Global<T> at;
  Strides strides;
  __device__ Global<T> of(int64_t batch, int64_t head, int64_t first_row) const {
    return at + (batch * strides.batch + head * strides.head + first_row * strides.row);
  }
};

// attn_mask: bool, or added in any floating type. At most one pointer is set.
struct AttnMask {
  Global<const uint8_t> flags;
  Global<const float> fp32;
  Global<const bf16> in_bf16;
  Global<const fp16> in_fp16;
  Strides strides;
  int64_t column = 0;  // stride between columns
};

struct Problem {
  int heads, kv_heads, group, Lq, Lk, D, DV;         // group: query heads per key head
  Global<const int64_t> cu_seqlens_q, cu_seqlens_k;  // null if the call is not packed
  bool lower_right;
  int left, right;  // columns visible on each side of the diagonal, -1 for all
  float scale, softcap;
  AttnMask attn_mask;
  Global<const float> alibi_slopes;  // (heads,) or (B, heads)
  int64_t alibi_batch_stride;
  Global<const int64_t> seed;
  uint32_t dropout_threshold;
  float dropout_scale;
  bool aligned;                // rows can be copied by 16 bytes
  bool delta_in_tile = false;  // backward: a tile has all columns of a row, and delta is summed over them
};

// Where the rows and columns of batch entry (or document) b begin, and their lengths. Whatever cu_seqlens holds, the
// result is within the tensors.
struct SeqlenInfo {
  int64_t q_begin = 0, k_begin = 0;
  int Lq, Lk;
  int diagonal;  // row i is on the diagonal at column i + diagonal

  __device__ SeqlenInfo(const Problem& p, int b) : Lq(p.Lq), Lk(p.Lk) {
    if (p.cu_seqlens_q) {
      clamp_document(p.cu_seqlens_q, b, q_begin, Lq);
      clamp_document(p.cu_seqlens_k, b, k_begin, Lk);
    }
    diagonal = p.lower_right ? Lk - Lq : 0;
  }

 private:
  __device__ static void clamp_document(Global<const int64_t> cu_seqlens, int b, int64_t& begin, int& length) {
    const int64_t total = length, first = load(cu_seqlens + b), last = load(cu_seqlens + (b + 1));
    begin = first < 0 ? 0 : first > total ? total : first;
    length = static_cast<int>((last < begin ? begin : last > total ? total : last) - begin);
  }
};

// The blocks of SIZE elements that lines first..last of the other axis visit, on an axis of n elements. Line i sees
// elements i + low .. i + high. In the forward the lines are rows and the blocks are columns; in the backward it is the
// other way round.
//
// The order of the visits: first the full blocks, which every line sees completely and which need no mask, then the
// blocks at the lower edge, then those at the upper edge.
template <int SIZE>
struct BlockRange {
  int full_begin, full_count;    // full blocks: their first element, their number
  int lower_begin, lower_count;  // blocks at the lower edge
  int upper_begin;               // blocks at the upper edge
  int count;                     // of all blocks

  __device__ BlockRange(int first, int last, int n, bool has_low, int low, bool has_high, int high) {
    int begin = 0, end = n, full_end = n / SIZE * SIZE;
    full_begin = 0;
    if (has_low) {
      begin = at_least(0, first + low) / SIZE * SIZE;
      full_begin = (at_least(0, last + low) + SIZE - 1) / SIZE * SIZE;
    }
    if (has_high) {
      end = at_most(n, at_least(0, last + high + 1));
      full_end = at_most(n, at_least(0, first + high + 1)) / SIZE * SIZE;
    }
    upper_begin = at_least(full_begin, full_end);
    full_count = (upper_begin - full_begin) / SIZE;
    lower_begin = begin;
    lower_count = (at_least(0, at_most(full_begin, end) - begin) + SIZE - 1) / SIZE;
    count = full_count + lower_count + (at_least(0, end - upper_begin) + SIZE - 1) / SIZE;
  }
  // Treats full blocks as edge blocks, so that all are masked. The order stays the same.
  __device__ void mask_all() {
    if (lower_count == 0) lower_begin = full_begin;
    lower_count += full_count;
    full_count = 0;
  }
  // The first element of the i-th visited block.
  __device__ int begin_of(int i) const {
    const int edge = i - full_count;
    if (edge < 0) return full_begin + i * SIZE;
    return edge < lower_count ? lower_begin + edge * SIZE : upper_begin + (edge - lower_count) * SIZE;
  }

 private:
  __device__ static int at_least(int bound, int x) { return x > bound ? x : bound; }
  __device__ static int at_most(int bound, int x) { return x < bound ? x : bound; }
};

// ---- the scores of a tile ----
//
// A warp has 16 × 8 N scores. A lane holds s[n][i] of row `row + 8 (i / 2)` and column `column + 8 n + i % 2`.

// Turns products q·k into scores. OPTIONS: softcap, ALiBi, attn_mask or dropout may be set.
template <bool OPTIONS>
struct Mask {
  const Problem& p;
  const SeqlenInfo& seqlens;
  int batch, head;
  float alibi_slope = 0;
  uint64_t seed = 0;

  __device__ Mask(const Problem& problem, const SeqlenInfo& info, int b, int h)
      : p(problem), seqlens(info), batch(b), head(h) {
    if constexpr (OPTIONS) {
      if (p.alibi_slopes) alibi_slope = load(p.alibi_slopes + (b * p.alibi_batch_stride + h));
      if (p.seed) seed = static_cast<uint64_t>(load(p.seed));
    }
  }

  // The factor, which is positive, that `apply` leaves to the caller.
  __device__ float deferred_scale() const { return OPTIONS ? 1.0f : p.scale; }

  // Turns products into scores; -inf where the row does not see the column. EDGE: some row does not see the whole tile.
  template <bool EDGE, int N>
  __device__ void apply(float (&s)[N][4], int row, int column) const {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int y = row + 8 * (i / 2), centre = y + seqlens.diagonal;
      const int low = p.left < 0 ? 0 : centre - p.left,
                high = p.right < 0 || centre + p.right >= seqlens.Lk ? seqlens.Lk - 1 : centre + p.right;
#pragma unroll
      for (int n = 0; n < N; ++n) {
        const int x = column + 8 * n + i % 2;
        if constexpr (OPTIONS) s[n][i] = with_options(s[n][i], y, x);
        if constexpr (EDGE) s[n][i] = x >= low && x <= high ? s[n][i] : -INFINITE;
      }
    }
  }

  // The derivative of the softcap at a product.
  __device__ float softcap_grad(float product) const {
    const float t = tanh_of<Fast>(product * (p.scale / p.softcap));
    return 1.0f - t * t;
  }

  // The dropout factors of the probabilities in columns `column` (which is even) and `column` + 1.
  __device__ Vector<float, 2> dropout_scale(int row, int column) const {
    const Words words = philox(seed, static_cast<uint32_t>(column) / 4, row, head, batch);
    const bool upper = column % 4 != 0;
    const uint32_t first = upper ? words.at[2] : words.at[0], second = upper ? words.at[3] : words.at[1];
    return {
        {first >= p.dropout_threshold ? p.dropout_scale : 0.0f,
         second >= p.dropout_threshold ? p.dropout_scale : 0.0f}};
  }

 private:
  __device__ float with_options(float product, int y, int x) const {
    // The product is rounded and not contracted with the later subtraction of the maximum, which is a rounded product.
    float s = p.softcap > 0.0f ? multiply_rounded(tanh_of<Fast>(product * (p.scale / p.softcap)), p.softcap)
                               : multiply_rounded(product, p.scale);
    if (p.alibi_slopes) s -= alibi_slope * fabsf(static_cast<float>(y + seqlens.diagonal - x));
    if (y >= seqlens.Lq || x >= seqlens.Lk) return s;
    const AttnMask& m = p.attn_mask;
    const int64_t at = batch * m.strides.batch + head * m.strides.head + y * m.strides.row + x * m.column;
    if (m.flags) return load(m.flags + at) ? s : -INFINITE;
    if (m.fp32) return s + load(m.fp32 + at);
    if (m.in_bf16) return s + to_float(load(m.in_bf16 + at));
    if (m.in_fp16) return s + to_float(load(m.in_fp16 + at));
    return s;
  }
};

// ---- the softmax of a row ----

// The running maximum and sum of the two rows of a lane (h = 0, 1), over scores before their deferred scale. The
// maximum is that of the row, the sum is over the columns of this lane until merge_lanes.
struct OnlineSoftmax {
  float row_max[2] = {-INFINITE, -INFINITE}, row_sum[2] = {};

  // Adds a tile: raises the maximum, replaces the scores s by exp(s - row_max), and rescales row_sum and out.
  // scale_log2: the deferred scale times log2(e). MAY_BE_EMPTY: a row may not have seen any column yet.
  template <bool MAY_BE_EMPTY, int N, int M>
  __device__ void add(float (&s)[N][4], float (&out)[M][4], float scale_log2) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      float next = row_max[h];
#pragma unroll
      for (int n = 0; n < N; ++n) next = fmaxf(next, fmaxf(s[n][2 * h], s[n][2 * h + 1]));
      next = fmaxf(next, shuffle_xor(next, 1));
      next = fmaxf(next, shuffle_xor(next, 2));
      // For an empty row: -inf - 0 instead of -inf - -inf.
      const float origin = MAY_BE_EMPTY && next == -INFINITE ? 0.0f : next;
      const float factor = exp2_fast((row_max[h] - origin) * scale_log2);
      row_max[h] = next;
      float tile_sum = 0;
#pragma unroll
      for (int n = 0; n < N; ++n)
#pragma unroll
        for (int i = 2 * h; i < 2 * h + 2; ++i) {
          s[n][i] = exp2_fast((s[n][i] - origin) * scale_log2);
          tile_sum += s[n][i];
        }
      row_sum[h] = row_sum[h] * factor + tile_sum;
      rescale(out, h, factor);
    }
  }

  // Sums row h over its four lanes.
  __device__ void merge_lanes(int h) {
    row_sum[h] += shuffle_xor(row_sum[h], 1);
    row_sum[h] += shuffle_xor(row_sum[h], 2);
  }

  // Multiplies row h of out by a factor.
  template <int M>
  __device__ static void rescale(float (&out)[M][4], int h, float factor) {
#pragma unroll
    for (int d = 0; d < M; ++d) out[d][2 * h] *= factor, out[d][2 * h + 1] *= factor;
  }
};

}  // namespace fastgpt
