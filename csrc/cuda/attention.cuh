// What the attention kernels share: tiles in shared memory, the factors of a product as the matrix unit wants them,
// which tiles are visited, and the scores of a tile. The mathematics is in attention.cu and attention_bwd.cu.
#pragma once

#include "../formulas.h"
#include "tensors.cuh"

namespace fastgpt {

struct Fast {
  __device__ static float exp2(float x) { return exp2_fast(x); }
  __device__ static float rsqrt(float x) { return rsqrt_fast(x); }
};

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
  int heads, group, Lq, Lk, D, DV;
  Global<const int64_t> cu_q, cu_k;  // where documents begin, or nothing
  bool lower_right;
  int left, right;  // columns seen on each side of the diagonal, -1 for all
  float scale, softcap;
  Mask mask;
  Global<const float> slopes;  // (H,) or (B, H)
  int64_t slopes_batch;
  Global<const int64_t> seed;
  uint32_t threshold;
  float keep_scale;
  bool aligned;  // whether rows can be copied by 16 bytes
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

// ---- tiles in shared memory ----
//
// Rows of WIDTH elements, in chunks of 16 bytes. Chunk c of row r stands at c ^ (r mod 8), so that eight rows' chunks
// of one column lie in different banks; shorter rows repeat that over the 128 bytes that all banks are.

template <typename T, int WIDTH>
struct Tile {
  static constexpr int PITCH = WIDTH * sizeof(T), CHUNKS = PITCH / 16, PER_CHUNK = 16 / sizeof(T);
  static constexpr int PERIOD = CHUNKS < 8 ? CHUNKS : 8;
  static_assert(CHUNKS >= 2 && (CHUNKS & (CHUNKS - 1)) == 0);

  __device__ static constexpr uint32_t swizzle(uint32_t row) { return row / (8 / PERIOD) % PERIOD; }
  __device__ static constexpr SharedAddress chunk(uint32_t row, uint32_t c) {
    return row * PITCH + ((c ^ swizzle(row)) << 4);
  }
  __device__ static constexpr SharedAddress element(uint32_t row, uint32_t column) {
    return chunk(row, column / PER_CHUNK) + column % PER_CHUNK * sizeof(T);
  }
  // From an address in a row's first 128 bytes that many bytes to the right, a power of two's multiple that the address
  // has no bits of: an exclusive or within the bytes that the swizzle is about, an addition beyond them.
  __device__ static constexpr SharedAddress right_of(SharedAddress a, int bytes) {
    return (a ^ (bytes & 127)) + (bytes & ~127);
  }
  // From an address in an even row to the same column one row below.
  __device__ static constexpr SharedAddress below(SharedAddress a) {
    return (a ^ ((swizzle(0) ^ swizzle(1)) << 4)) + PITCH;
  }
};

// The same with 16 bytes between rows instead, which put eight rows' chunks into different banks too: more memory, but
// addresses by additions alone.
template <typename T, int WIDTH>
struct Padded {
  static constexpr int PITCH = WIDTH * sizeof(T) + 16;
  __device__ static constexpr SharedAddress chunk(uint32_t row, uint32_t c) { return row * PITCH + c * 16; }
  __device__ static constexpr SharedAddress element(uint32_t row, uint32_t column) {
    return row * PITCH + column * sizeof(T);
  }
  __device__ static constexpr SharedAddress right_of(SharedAddress a, int bytes) { return a + bytes; }
  __device__ static constexpr SharedAddress below(SharedAddress a) { return a + PITCH; }
};

// Copies tiles of ROWS × WIDTH from a matrix in global memory, 16 bytes a thread and pass.
template <typename T, int ROWS, int WIDTH, int THREADS>
class Copier {
  using Shape = Tile<T, WIDTH>;
  static constexpr int STEP = THREADS / Shape::CHUNKS, PASSES = ROWS / STEP;
  static_assert(THREADS % Shape::CHUNKS == 0 && ROWS % STEP == 0);

 public:
  // Of a matrix of `columns` ≤ WIDTH columns; `stride` from row to row in elements.
  __device__ Copier(Global<const T> matrix, int64_t stride, int columns)
      : matrix_(matrix), stride_(stride), columns_(columns) {
    const uint32_t pitch = static_cast<uint32_t>(stride / Shape::PER_CHUNK), first_row = made_anew(row());
#pragma unroll
    for (int i = 0; i < PASSES; ++i) offsets_[i] = (first_row + i * STEP) * pitch;
    place_ = made_anew(Shape::chunk(row(), chunk()));
  }

  // This thread's columns of row `first`, and of the tile behind one. From there the addresses of its pieces take an
  // instruction each, as long as the compiler does not see sums of three terms in them.
  __device__ Global<const T> tile(int first) const {
    return made_anew(matrix_ + (first * stride_ + chunk() * Shape::PER_CHUNK));
  }
  __device__ Global<const T> next(Global<const T> tile) const { return made_anew(tile + ROWS * stride_); }

  // A tile all of whose rows and columns are there, and begin at multiples of 16 bytes.
  __device__ void whole(SharedAddress to, Global<const T> tile) const {
    static_assert((STEP & (STEP - 1)) == 0);  // row() < STEP: the two have no bit of the swizzle in common
#pragma unroll
    for (int i = 0; i < PASSES; ++i)
      copy_async(
          (place_ ^ Shape::swizzle(i * STEP) << 4) + (to + i * STEP * Shape::PITCH), behind(tile, offsets_[i], 16));
  }
  // Rows from `rows` on are zeros, as are columns that the matrix has not.
  __device__ void some(SharedAddress to, int first, int rows, bool aligned) const {
    const Global<const T> from = matrix_ + ((first + row()) * stride_ + chunk() * Shape::PER_CHUNK);
#pragma unroll 1
    for (int i = 0; i < PASSES; ++i) {
      const SharedAddress place = to + Shape::chunk(row() + i * STEP, chunk());
      const int left = first + static_cast<int>(row()) + i * STEP < rows ? columns_ - chunk() * Shape::PER_CHUNK : 0;
      const Global<const T> piece = from + i * STEP * stride_;
      if (aligned) {
        copy_async(place, left > 0 ? piece : matrix_, left > 0);
      } else {
        Vector<T, Shape::PER_CHUNK> some{};
#pragma unroll
        for (int e = 0; e < Shape::PER_CHUNK; ++e)
          if (e < left) some.at[e] = load(piece + e);
        store_shared(place, some);
      }
    }
  }

 private:
  __device__ static uint32_t row() { return static_cast<uint32_t>(thread()) / Shape::CHUNKS; }
  __device__ static uint32_t chunk() { return static_cast<uint32_t>(thread()) % Shape::CHUNKS; }

  Global<const T> matrix_;
  int64_t stride_;
  int columns_;
  uint32_t offsets_[PASSES];  // 16 bytes each
  SharedAddress place_;
};

// Writes the first `rows` rows of a tile to global memory; this is number `index` of so many threads.
template <typename T, int WIDTH>
__device__ inline void write_rows(
    SharedAddress tile, int rows, Global<T> to, int64_t stride, int columns, bool wide, int index, int threads) {
  using Shape = Tile<T, WIDTH>;
#pragma unroll 1
  for (int i = index; i < rows * Shape::CHUNKS; i += threads) {
    const int row = i / Shape::CHUNKS, chunk = i % Shape::CHUNKS, left = columns - chunk * Shape::PER_CHUNK;
    if (left <= 0) continue;
    const auto piece = load_shared<Vector<T, Shape::PER_CHUNK>>(tile + Shape::chunk(row, chunk));
    const Global<T> place = to + (row * stride + chunk * Shape::PER_CHUNK);
    if (wide && left >= Shape::PER_CHUNK) {
      store_vector(place, piece);
    } else {
#pragma unroll
      for (int e = 0; e < Shape::PER_CHUNK; ++e)
        if (e < left) store(place + e, piece.at[e]);
    }
  }
}

// ---- factors ----
//
// A product's left factor is 16×K, its right one K×16. In a warp, lane 4 g + t holds rows g and g + 8 of the left one,
// columns g and g + 8 of the right one, and of every eight along k the two from 2 t on. Which of them is the first
// k and which the fifth (tf32 has only one number a register) is free, as long as both factors agree.
//
// Each factor has two forms, by how it lies in shared memory of layout L: its rows along k, or k along its rows
// ("down"). left(), right() and so on give a lane's part of an address, load_left(...) and so on load from there: a
// number of rows below it and, by L::right_of, of bytes to the right.

template <typename T>
struct Unit {
  static constexpr int K = 16;
  struct Left {
    uint32_t r[4];
  };
  struct Right {
    uint32_t r[4];
  };

  // (m, k) at row m, column k.
  template <typename L>
  __device__ static SharedAddress left() {
    return L::chunk(lane() % 16, lane() / 16);
  }
  // (m, k) at row k, column m.
  template <typename L>
  __device__ static SharedAddress left_down() {
    return L::chunk(lane() % 8 + lane() / 16 * 8, lane() / 8 % 2);
  }
  // (k, n) at row n, column k.
  template <typename L>
  __device__ static SharedAddress right() {
    return L::chunk(lane() % 8 + lane() / 16 * 8, lane() / 8 % 2);
  }
  // (k, n) at row k, column n.
  template <typename L>
  __device__ static SharedAddress right_down() {
    return L::chunk(lane() % 16, lane() / 16);
  }

  template <typename L>
  __device__ static Left load_left(SharedAddress a) {
    Left f;
    load_matrices(f.r, a);
    return f;
  }
  template <typename L>
  __device__ static Left load_left_down(SharedAddress a) {
    Left f;
    load_matrices_transposed(f.r, a);
    return f;
  }
  template <typename L>
  __device__ static Right load_right(SharedAddress a) {
    Right f;
    load_matrices(f.r, a);
    return f;
  }
  template <typename L>
  __device__ static Right load_right_down(SharedAddress a) {
    Right f;
    load_matrices_transposed(f.r, a);
    return f;
  }

  // Left factor number `step` along k, of sums of products.
  template <int N>
  __device__ static Left left_of(const float (&s)[N][4], int step) {
    const auto &x = s[2 * step], &y = s[2 * step + 1];
    return {{pack<T>(x[0], x[1]), pack<T>(x[2], x[3]), pack<T>(y[0], y[1]), pack<T>(y[2], y[3])}};
  }
  // The two neighbours that a lane has of a row, to where they belong in a tile.
  __device__ static void store_pair(SharedAddress a, float x, float y) { store_shared(a, pack<T>(x, y)); }

  // c (16×16, in halves) += left right.
  __device__ static void multiply(float (&c0)[4], float (&c1)[4], const Left& a, const Right& b) {
    multiply_add<T>(c0, a.r, b.r[0], b.r[1]);
    multiply_add<T>(c1, a.r, b.r[2], b.r[3]);
  }
};

// float32 is a sum of two tf32 numbers; of their four products three are taken, which leaves an error of about 2^-22.
template <>
struct Unit<float> {
  static constexpr int K = 8;
  struct Split {
    uint32_t high, low;
    __device__ static Split of(float x) {
      const uint32_t bits = bits_of(x);
      if ((bits & 0x7F800000u) == 0x7F800000u) return {bits, 0};
      const uint32_t high = (bits + 0x1000u) & 0xFFFFE000u;
      return {high, bits_of(x - float_of(high))};
    }
  };
  struct Left {
    float r[4];
  };
  struct Right {
    float r[4];
  };

  template <typename L>
  __device__ static SharedAddress left() {
    return L::element(lane() / 4, lane() % 4 * 2);
  }
  template <typename L>
  __device__ static SharedAddress left_down() {
    return L::element(lane() % 4 * 2, lane() / 4);
  }
  template <typename L>
  __device__ static SharedAddress right() {
    return left<L>();
  }
  template <typename L>
  __device__ static SharedAddress right_down() {
    return left_down<L>();
  }

  // Two rows of pairs, eight rows apart.
  template <typename L>
  __device__ static Left load_left(SharedAddress a) {
    const auto x = load_shared<Vector<float, 2>>(a), y = load_shared<Vector<float, 2>>(a + 8 * L::PITCH);
    return {{x.at[0], y.at[0], x.at[1], y.at[1]}};
  }
  // Two columns, eight apart, of two neighbouring rows.
  template <typename L>
  __device__ static Left load_left_down(SharedAddress a) {
    const SharedAddress below = L::below(a);
    return {
        {load_shared<float>(a),
         load_shared<float>(L::right_of(a, 32)),
         load_shared<float>(below),
         load_shared<float>(L::right_of(below, 32))}};
  }
  template <typename L>
  __device__ static Right load_right(SharedAddress a) {
    const Left f = load_left<L>(a);
    return {{f.r[0], f.r[2], f.r[1], f.r[3]}};
  }
  template <typename L>
  __device__ static Right load_right_down(SharedAddress a) {
    const Left f = load_left_down<L>(a);
    return {{f.r[0], f.r[2], f.r[1], f.r[3]}};
  }

  template <int N>
  __device__ static Left left_of(const float (&s)[N][4], int step) {
    const auto& x = s[step];
    return {{x[0], x[2], x[1], x[3]}};
  }
  __device__ static void store_pair(SharedAddress a, float x, float y) { store_shared(a, Vector<float, 2>{{x, y}}); }

  __device__ static void multiply(float (&c0)[4], float (&c1)[4], const Left& a, const Right& b) {
    uint32_t high[4], low[4];
    Split right[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const Split s = Split::of(a.r[i]);
      high[i] = s.high, low[i] = s.low;
      right[i] = Split::of(b.r[i]);
    }
    const auto half = [&](float (&c)[4], const Split& upper, const Split& lower) {
      multiply_add_tf32(c, low, upper.high, lower.high);
      multiply_add_tf32(c, high, upper.low, lower.low);
      multiply_add_tf32(c, high, upper.high, lower.high);
    };
    half(c0, right[0], right[1]);
    half(c1, right[2], right[3]);
  }
};

// ---- the scores of a tile ----
//
// A lane holds of a warp's 16 × 8 N scores s[n][i] those of rows row + 8 (i / 2) and columns column + 8 n + i % 2.

template <bool OPTIONS>
struct Scores {
  const Problem& p;
  const Place& place;
  int batch, head;
  float slope = 0;  // in units of log 2
  uint64_t seed = 0;

  __device__ Scores(const Problem& problem, const Place& where, int b, int h)
      : p(problem), place(where), batch(b), head(h) {
    if constexpr (OPTIONS) {
      if (p.slopes) slope = load(p.slopes + (b * p.slopes_batch + h)) * static_cast<float>(LOG2E);
      if (p.seed) seed = static_cast<uint64_t>(load(p.seed));
    }
  }

  // What `shape` leaves has to be multiplied by this to be in units of log 2: without options a sum of the exponent's.
  __device__ float unit() const { return OPTIONS ? 1.0f : p.scale * static_cast<float>(LOG2E); }

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
    constexpr float UNIT = static_cast<float>(LOG2E);
    float s = p.softcap > 0.0f ? tanh_of<Fast>(product * (p.scale / p.softcap)) * (p.softcap * UNIT)
                               : product * (p.scale * UNIT);
    if (p.slopes) s -= slope * fabsf(static_cast<float>(y + place.offset - x));
    if (y >= place.Lq || x >= place.Lk) return s;
    const Mask& m = p.mask;
    const int64_t at = batch * m.strides.batch + head * m.strides.head + y * m.strides.row + x * m.column;
    if (m.flags) return load(m.flags + at) ? s : -INFINITE;
    if (m.fp32) return s + load(m.fp32 + at) * UNIT;
    if (m.in_bf16) return s + to_float(load(m.in_bf16 + at)) * UNIT;
    if (m.in_fp16) return s + to_float(load(m.in_fp16 + at)) * UNIT;
    return s;
  }
};

}  // namespace fastgpt
