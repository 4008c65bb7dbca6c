// Tiles of matrices in shared memory: layouts, copies from global memory, and products on tensor cores.
#pragma once

#include "tensors.cuh"

namespace fastgpt {

// ---- tiles in shared memory ----
//
// A swizzled layout. A row has WIDTH elements in chunks of 16 bytes. Chunk c of row r is stored at position
// c ^ (r mod 8), so the same chunk of eight rows is in different banks. For rows shorter than 128 bytes (all banks) the
// pattern repeats every 128 bytes.

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
  // The address `bytes` to the right of `a`, which is in the first 128 bytes of a row. `a` and `bytes` must have no set
  // bits in common: the offset within the swizzled 128 bytes is an exclusive or, the rest an addition.
  __device__ static constexpr SharedAddress right_of(SharedAddress a, int bytes) {
    return (a ^ (bytes & 127)) + (bytes & ~127);
  }
  // The address one row below `a`, which is in an even row.
  __device__ static constexpr SharedAddress below(SharedAddress a) {
    return (a ^ ((swizzle(0) ^ swizzle(1)) << 4)) + PITCH;
  }
};

// A layout with 16 bytes of padding after each row, which also puts the chunks of eight rows into different banks. It
// takes more memory, but addresses need only additions.
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

// Copies tiles of ROWS × WIDTH from global to shared memory. Eight threads copy 128 bytes of a row, 16 bytes each, and
// then the next 128 bytes. The offset between them is a constant in both memories, so a thread needs one address per
// row.
//
// PITCH_PER_THREAD: each thread has the pitch in a register of its own. Moving to the next row is then one
// multiply-add. For a warp-uniform pitch the compiler emits several shifts and 32-bit additions instead.
template <typename T, int ROWS, int WIDTH, int THREADS, bool PITCH_PER_THREAD = false>
class Copier {
  using Shape = Tile<T, WIDTH>;
  static constexpr int LINES = Shape::CHUNKS / Shape::PERIOD, STEP = THREADS / Shape::PERIOD, PASSES = ROWS / STEP;
  static_assert(THREADS % Shape::PERIOD == 0 && ROWS % STEP == 0 && Shape::swizzle(STEP) == 0);

 public:
  // A matrix with `columns` ≤ WIDTH columns. `stride`: between rows, in elements.
  __device__ Copier(Global<const T> matrix, int64_t stride, int columns)
      : matrix_(matrix),
        stride_(stride),
        columns_(columns),
        pitch_(PITCH_PER_THREAD ? shuffle_xor(static_cast<uint32_t>(stride / Shape::PER_CHUNK), 1) : 0),
        destination_(opaque(Shape::chunk(row(), chunk()))) {}

  // The first element that this thread copies of the tile that starts at row `first`.
  __device__ Global<const T> source(int first) const {
    return opaque(matrix_ + ((first + static_cast<int>(row())) * stride_ + chunk() * Shape::PER_CHUNK));
  }

  // Copies a tile that is completely inside the matrix, with rows aligned to 16 bytes. Moves `piece`, a source(), to
  // the next tile.
  __device__ void copy_full(SharedAddress to, Global<const T>& piece) const {
#pragma unroll
    for (int i = 0; i < PASSES; ++i) {
#pragma unroll
      for (int line = 0; line < LINES; ++line)
        copy_async(destination_ + (to + i * STEP * Shape::PITCH + line * 128), piece + line * 8 * Shape::PER_CHUNK);
      piece = opaque(PITCH_PER_THREAD ? advance(piece, pitch_, STEP * 16) : piece + STEP * stride_);
    }
  }
  // Copies the tile that starts at row `first`. Rows from `rows` on and missing columns are filled with zeros.
  __device__ void copy_partial(SharedAddress to, int first, int rows, bool aligned) const {
    const Global<const T> from = matrix_ + ((first + row()) * stride_ + chunk() * Shape::PER_CHUNK);
#pragma unroll 1
    for (int i = 0; i < PASSES * LINES; ++i) {
      const int pass = i / LINES, right = i % LINES * 8;  // chunks
      const SharedAddress destination = to + Shape::chunk(row() + pass * STEP, chunk() + right);
      const int remaining = first + static_cast<int>(row()) + pass * STEP < rows
                                ? columns_ - static_cast<int>(chunk() + right) * Shape::PER_CHUNK
                                : 0;
      const Global<const T> piece = from + (pass * STEP * stride_ + right * Shape::PER_CHUNK);
      if (aligned) {
        copy_async(destination, remaining > 0 ? piece : matrix_, remaining > 0);
      } else {
        Vector<T, Shape::PER_CHUNK> elements{};
#pragma unroll
        for (int e = 0; e < Shape::PER_CHUNK; ++e)
          if (e < remaining) elements.at[e] = load(piece + e);
        store_shared(destination, elements);
      }
    }
  }

 private:
  __device__ static uint32_t row() { return static_cast<uint32_t>(thread()) / Shape::PERIOD; }
  __device__ static uint32_t chunk() { return static_cast<uint32_t>(thread()) % Shape::PERIOD; }

  Global<const T> matrix_;
  int64_t stride_;
  int columns_;
  uint32_t pitch_;  // the stride in units of 16 bytes
  SharedAddress destination_;
};

// Writes the first `rows` rows of a tile to global memory. `index`: of this thread among `threads`.
template <typename T, int WIDTH>
__device__ inline void write_rows(
    SharedAddress tile, int rows, Global<T> to, int64_t stride, int columns, bool wide, int index, int threads) {
  using Shape = Tile<T, WIDTH>;
#pragma unroll 1
  for (int i = index; i < rows * Shape::CHUNKS; i += threads) {
    const int row = i / Shape::CHUNKS, chunk = i % Shape::CHUNKS, remaining = columns - chunk * Shape::PER_CHUNK;
    if (remaining <= 0) continue;
    const auto piece = load_shared<Vector<T, Shape::PER_CHUNK>>(tile + Shape::chunk(row, chunk));
    const Global<T> destination = to + (row * stride + chunk * Shape::PER_CHUNK);
    if (wide && remaining >= Shape::PER_CHUNK) {
      store_vector(destination, piece);
    } else {
#pragma unroll
      for (int e = 0; e < Shape::PER_CHUNK; ++e)
        if (e < remaining) store(destination + e, piece.at[e]);
    }
  }
}

// ---- products on tensor cores ----
//
// The left factor of a product is 16×K, the right one K×16. In a warp, lane 4 g + t holds rows g and g + 8 of the left
// factor and columns g and g + 8 of the right one, and of every eight elements along k those at 2 t and 2 t + 1. The
// order of k within a register pair (tf32 has one number per register) is free, as long as both factors agree.
//
// A factor is stored in shared memory of layout L in one of two ways: k along the rows of the tile, or (transposed) k
// down its columns. left(), right() and their transposed versions give the part of the address that depends on the
// lane. load_left(...) and so on load from that address, moved by a number of rows down and, with L::right_of, bytes
// right.

// mma instructions for 16-bit types.
template <typename T>
struct Mma {
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
  __device__ static SharedAddress left_transposed() {
    return L::chunk(lane() % 8 + lane() / 16 * 8, lane() / 8 % 2);
  }
  // (k, n) at row n, column k.
  template <typename L>
  __device__ static SharedAddress right() {
    return L::chunk(lane() % 8 + lane() / 16 * 8, lane() / 8 % 2);
  }
  // (k, n) at row k, column n.
  template <typename L>
  __device__ static SharedAddress right_transposed() {
    return L::chunk(lane() % 16, lane() / 16);
  }

  template <typename L>
  __device__ static Left load_left(SharedAddress a) {
    Left f;
    load_matrices(f.r, a);
    return f;
  }
  template <typename L>
  __device__ static Left load_left_transposed(SharedAddress a) {
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
  __device__ static Right load_right_transposed(SharedAddress a) {
    Right f;
    load_matrices_transposed(f.r, a);
    return f;
  }

  // The left factor number `step` along k, from accumulators.
  template <int N>
  __device__ static Left left_of(const float (&s)[N][4], int step) {
    const auto &x = s[2 * step], &y = s[2 * step + 1];
    return {{pack<T>(x[0], x[1]), pack<T>(x[2], x[3]), pack<T>(y[0], y[1]), pack<T>(y[2], y[3])}};
  }
  // Stores the two neighbours of a row that a lane holds.
  __device__ static void store_pair(SharedAddress a, float x, float y) { store_shared(a, pack<T>(x, y)); }

  // c (16×16, as two halves) += a b.
  __device__ static void multiply(float (&c0)[4], float (&c1)[4], const Left& a, const Right& b) {
    multiply_add<T>(c0, a.r, b.r[0], b.r[1]);
    multiply_add<T>(c1, a.r, b.r[2], b.r[3]);
  }
};

// mma instructions for float32. A float32 is split into a sum of two tf32 numbers. Of the four products of two such
// sums three are computed, with an error of about 2^-22 per product. Tensor cores truncate when they add, which biases
// long sums towards zero. Therefore a tensor core adds only the eight products of a step. The steps are added by
// ordinary additions, which round to nearest.
template <>
struct Mma<float> {
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
  __device__ static SharedAddress left_transposed() {
    return L::element(lane() % 4 * 2, lane() / 4);
  }
  template <typename L>
  __device__ static SharedAddress right() {
    return left<L>();
  }
  template <typename L>
  __device__ static SharedAddress right_transposed() {
    return left_transposed<L>();
  }

  // A pair in each of two rows, eight rows apart.
  template <typename L>
  __device__ static Left load_left(SharedAddress a) {
    const auto x = load_shared<Vector<float, 2>>(a), y = load_shared<Vector<float, 2>>(a + 8 * L::PITCH);
    return {{x.at[0], y.at[0], x.at[1], y.at[1]}};
  }
  // Two neighbouring rows in each of two columns, eight columns apart.
  template <typename L>
  __device__ static Left load_left_transposed(SharedAddress a) {
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
  __device__ static Right load_right_transposed(SharedAddress a) {
    const Left f = load_left_transposed<L>(a);
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
      float step[4] = {};
      multiply_add_tf32(step, low, upper.high, lower.high);
      multiply_add_tf32(step, high, upper.low, lower.low);
      multiply_add_tf32(step, high, upper.high, lower.high);
#pragma unroll
      for (int i = 0; i < 4; ++i) c[i] += step[i];
    };
    half(c0, right[0], right[1]);
    half(c1, right[2], right[3]);
  }
};

// c (16 × 8 N) += left right. left(step) and right(step, n) return the factors at step `step` along k and column block
// n of c. The loads of AT_ONCE steps are in flight together.
template <typename U, int STEPS, int AT_ONCE, int N, typename Left, typename Right>
__device__ inline void add_product(float (&c)[N][4], Left&& left, Right&& right) {
#pragma unroll(AT_ONCE)
  for (int step = 0; step < STEPS; ++step) {
    const auto a = left(step);
#pragma unroll
    for (int n = 0; n < N; n += 2) U::multiply(c[n], c[n + 1], a, right(step, n));
  }
}

// Functions for add_product that load factors from shared memory. `lane` and `warp` are the parts of the address.
template <typename U, typename L>
__device__ inline auto left_at(SharedAddress lane, SharedAddress warp) {
  return [=](int step) { return U::template load_left<L>(L::right_of(lane, step * 32) + warp); };
}
template <typename U, typename L>
__device__ inline auto left_transposed_at(SharedAddress lane, SharedAddress warp) {
  return [=](int step) { return U::template load_left_transposed<L>(lane + (warp + step * U::K * L::PITCH)); };
}
template <typename U, typename L>
__device__ inline auto right_at(SharedAddress lane, SharedAddress warp) {
  return [=](int step, int n) {
    return U::template load_right<L>(L::right_of(lane, step * 32) + (warp + n * 8 * L::PITCH));
  };
}
template <typename U, typename L>
__device__ inline auto right_transposed_at(SharedAddress lane, SharedAddress warp) {
  constexpr int BYTES = 16 / U::K * 2;  // of an element
  return [=](int step, int n) {
    return U::template load_right_transposed<L>(L::right_of(lane, n * 8 * BYTES) + (warp + step * U::K * L::PITCH));
  };
}

}  // namespace fastgpt
