// What the attention kernels share: what a launch is about, which tiles are visited, and the scores of a tile. The
// mathematics is in attention.cu and attention_bwd.cu.
#pragma once

#include "../formulas.h"
#include "tensors.cuh"

namespace fastgpt {

constexpr float INFINITE = __builtin_huge_valf();

// ---- what a launch is about ----

struct Strides {
  int64_t batch = 0, head = 0, row = 0;
};

// A (B, heads, L, size) tensor, rows contiguous. Packed documents are a batch of which every entry is all of the
// memory.
template <typename T>
struct Matrices {
  Global<T> at;
  Strides strides;
  __device__ Global<T> of(int64_t batch, int64_t head, int64_t first_row) const {
    return at + (batch * strides.batch + head * strides.head + first_row * strides.row);
  }
};

// Of scores: bool or added, of any floating type; at most one is there.
struct Mask {
  Global<const uint8_t> flags;
  Global<const float> fp32;
  Global<const bf16> in_bf16;
  Global<const fp16> in_fp16;
  Strides strides;
  int64_t column = 0;
};

struct Problem {
  int heads, key_heads, group, Lq, Lk, D, DV;  // group: query heads of a key head
  Global<const int64_t> cu_q, cu_k;            // where documents begin, or nothing
  bool lower_right;
  int left, right;  // columns seen on each side of the diagonal, -1 for all
  float scale, softcap;
  Mask mask;
  Global<const float> slopes;  // (H,) or (B, H)
  int64_t slopes_batch;
  Global<const int64_t> seed;
  uint32_t threshold;
  float keep_scale;
  bool aligned;             // whether rows can be copied by 16 bytes
  bool short_rows = false;  // backward: a tile has all columns of a row, over which delta is summed
};

// Where batch entry b begins and how long it is. Whatever documents' bounds say, it lies within the tensors.
struct Place {
  int64_t first_row = 0, first_column = 0;
  int Lq, Lk, offset;

  __device__ Place(const Problem& p, int b) : Lq(p.Lq), Lk(p.Lk) {
    if (p.cu_q) {
      document(p.cu_q, b, first_row, Lq);
      document(p.cu_k, b, first_column, Lk);
    }
    offset = p.lower_right ? Lk - Lq : 0;
  }

 private:
  __device__ static void document(Global<const int64_t> cu, int b, int64_t& begin, int& length) {
    const int64_t total = length, first = load(cu + b), last = load(cu + (b + 1));
    begin = first < 0 ? 0 : first > total ? total : first;
    length = static_cast<int>((last < begin ? begin : last > total ? total : last) - begin);
  }
};

// The tiles of SIZE along an axis of n that lines first..last of the other see; line i sees i + low .. i + high. Those
// that every line sees whole come first, and take no mask; then the edges before and behind them.
template <int SIZE>
struct Visited {
  int full, full_count, before, before_count, behind, count;

  __device__ Visited(int first, int last, int n, bool has_low, int low, bool has_high, int high) {
    int begin = 0, end = n, full_end = n / SIZE * SIZE;
    full = 0;
    if (has_low) {
      begin = least(0, first + low) / SIZE * SIZE;
      full = (least(0, last + low) + SIZE - 1) / SIZE * SIZE;
    }
    if (has_high) {
      end = most(n, least(0, last + high + 1));
      full_end = most(n, least(0, first + high + 1)) / SIZE * SIZE;
    }
    behind = least(full, full_end);
    full_count = (behind - full) / SIZE;
    before = begin;
    before_count = (least(0, most(full, end) - begin) + SIZE - 1) / SIZE;
    count = full_count + before_count + (least(0, end - behind) + SIZE - 1) / SIZE;
  }
  // Gives up the loop without masks, in the same order of tiles.
  __device__ void all_edges() {
    if (before_count == 0) before = full;
    before_count += full_count;
    full_count = 0;
  }
  // Where the i-th visited tile begins.
  __device__ int start(int i) const {
    const int edge = i - full_count;
    if (edge < 0) return full + i * SIZE;
    return edge < before_count ? before + edge * SIZE : behind + (edge - before_count) * SIZE;
  }

 private:
  __device__ static int least(int bound, int x) { return x > bound ? x : bound; }
  __device__ static int most(int bound, int x) { return x < bound ? x : bound; }
};

// ---- the scores of a tile ----
//
// A lane holds of a warp's 16 × 8 N scores s[n][i] those of rows row + 8 (i / 2) and columns column + 8 n + i % 2.

template <bool OPTIONS>
struct Scores {
  const Problem& p;
  const Place& place;
  int batch, head;
  float slope = 0;
  uint64_t seed = 0;

  __device__ Scores(const Problem& problem, const Place& where, int b, int h)
      : p(problem), place(where), batch(b), head(h) {
    if constexpr (OPTIONS) {
      if (p.slopes) slope = load(p.slopes + (b * p.slopes_batch + h));
      if (p.seed) seed = static_cast<uint64_t>(load(p.seed));
    }
  }

  // What `shape` leaves has to be multiplied by this, which is positive.
  __device__ float unit() const { return OPTIONS ? 1.0f : p.scale; }

  // Products to scores, -inf where nothing is seen. EDGE: of a tile that not every row sees whole.
  template <bool EDGE, int N>
  __device__ void shape(float (&s)[N][4], int row, int column) const {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int y = row + 8 * (i / 2), centre = y + place.offset;
      const int low = p.left < 0 ? 0 : centre - p.left,
                high = p.right < 0 || centre + p.right >= place.Lk ? place.Lk - 1 : centre + p.right;
#pragma unroll
      for (int n = 0; n < N; ++n) {
        const int x = column + 8 * n + i % 2;
        if constexpr (OPTIONS) s[n][i] = with_options(s[n][i], y, x);
        if constexpr (EDGE) s[n][i] = x >= low && x <= high ? s[n][i] : -INFINITE;
      }
    }
  }

  // The derivative of the softcap at a product.
  __device__ float bend(float product) const {
    const float t = tanh_of<Fast>(product * (p.scale / p.softcap));
    return 1.0f - t * t;
  }

  // What a probability is multiplied by, for the neighbours in columns column and column + 1, of which the first is
  // even.
  __device__ Vector<float, 2> kept(int row, int column) const {
    const Words words = philox(seed, static_cast<uint32_t>(column) / 4, row, head, batch);
    const bool upper = column % 4 != 0;
    const uint32_t first = upper ? words.at[2] : words.at[0], second = upper ? words.at[3] : words.at[1];
    return {{first >= p.threshold ? p.keep_scale : 0.0f, second >= p.threshold ? p.keep_scale : 0.0f}};
  }

 private:
  __device__ float with_options(float product, int y, int x) const {
    // Rounded here and not contracted with a subtraction of the maximum, which is a rounded product too.
    float s = p.softcap > 0.0f ? multiply_rounded(tanh_of<Fast>(product * (p.scale / p.softcap)), p.softcap)
                               : multiply_rounded(product, p.scale);
    if (p.slopes) s -= slope * fabsf(static_cast<float>(y + place.offset - x));
    if (y >= place.Lq || x >= place.Lk) return s;
    const Mask& m = p.mask;
    const int64_t at = batch * m.strides.batch + head * m.strides.head + y * m.strides.row + x * m.column;
    if (m.flags) return load(m.flags + at) ? s : -INFINITE;
    if (m.fp32) return s + load(m.fp32 + at);
    if (m.in_bf16) return s + to_float(load(m.in_bf16 + at));
    if (m.in_fp16) return s + to_float(load(m.in_fp16 + at));
    return s;
  }
};

}  // namespace fastgpt
