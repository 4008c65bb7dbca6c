// Tiles of matrices in shared memory, how they get there, and the factors of products as the matrix units want them.
#pragma once

#include "tensors.cuh"

namespace fastgpt {

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

// Copies tiles of ROWS × WIDTH from a matrix in global memory. Eight threads take 128 bytes of a row, a chunk of 16
// each, and after these the row's next 128: a constant away in both memories, so that one address serves a thread's
// whole row.
//
// From row to row an address takes one multiply-add of the pitch, if that is in a register of each thread (OWN_PITCH):
// of what is the same for all of them the compiler makes shifts and additions by halves.
template <typename T, int ROWS, int WIDTH, int THREADS, bool OWN_PITCH = false>
class Copier {
  using Shape = Tile<T, WIDTH>;
  static constexpr int LINES = Shape::CHUNKS / Shape::PERIOD, STEP = THREADS / Shape::PERIOD, PASSES = ROWS / STEP;
  static_assert(THREADS % Shape::PERIOD == 0 && ROWS % STEP == 0 && Shape::swizzle(STEP) == 0);

 public:
  // Of a matrix of `columns` ≤ WIDTH columns; `stride` from row to row in elements.
  __device__ Copier(Global<const T> matrix, int64_t stride, int columns)
      : matrix_(matrix),
        stride_(stride),
        columns_(columns),
        pitch_(OWN_PITCH ? shuffle_xor(static_cast<uint32_t>(stride / Shape::PER_CHUNK), 1) : 0),
        place_(made_anew(Shape::chunk(row(), chunk()))) {}

  // This thread's piece of the tile whose first row that is.
  __device__ Global<const T> tile(int first) const {
    return made_anew(matrix_ + ((first + static_cast<int>(row())) * stride_ + chunk() * Shape::PER_CHUNK));
  }

  // A tile all of whose rows and columns are there, and begin at multiples of 16 bytes; this thread's piece of it
  // becomes that of the tile behind.
  __device__ void whole(SharedAddress to, Global<const T>& piece) const {
#pragma unroll
    for (int i = 0; i < PASSES; ++i) {
#pragma unroll
      for (int line = 0; line < LINES; ++line)
        copy_async(place_ + (to + i * STEP * Shape::PITCH + line * 128), piece + line * 8 * Shape::PER_CHUNK);
      piece = made_anew(OWN_PITCH ? behind(piece, pitch_, STEP * 16) : piece + STEP * stride_);
    }
  }
  // Rows from `rows` on are zeros, as are columns that the matrix has not.
  __device__ void some(SharedAddress to, int first, int rows, bool aligned) const {
    const Global<const T> from = matrix_ + ((first + row()) * stride_ + chunk() * Shape::PER_CHUNK);
#pragma unroll 1
    for (int i = 0; i < PASSES * LINES; ++i) {
      const int pass = i / LINES, right = i % LINES * 8;  // chunks
      const SharedAddress place = to + Shape::chunk(row() + pass * STEP, chunk() + right);
      const int left = first + static_cast<int>(row()) + pass * STEP < rows
                           ? columns_ - static_cast<int>(chunk() + right) * Shape::PER_CHUNK
                           : 0;
      const Global<const T> piece = from + (pass * STEP * stride_ + right * Shape::PER_CHUNK);
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
  __device__ static uint32_t row() { return static_cast<uint32_t>(thread()) / Shape::PERIOD; }
  __device__ static uint32_t chunk() { return static_cast<uint32_t>(thread()) % Shape::PERIOD; }

  Global<const T> matrix_;
  int64_t stride_;
  int columns_;
  uint32_t pitch_;  // the stride in 16 bytes
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

// float32 is a sum of two tf32 numbers; of their four products three are taken, which leaves an error of about 2^-22 a
// product. Tensor cores truncate when they add: over long sums that is an error of its own, always towards zero. So
// they add up the eight products of a step only, and ordinary additions, which round to nearest, the steps.
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

// c (16 × 8 N) += left right, whose factors number `step` along k and n along the columns of c are left(step) and
// right(step, n); AT_ONCE steps have their loads on the way together.
template <typename U, int STEPS, int AT_ONCE, int N, typename Left, typename Right>
__device__ inline void add_product(float (&c)[N][4], Left&& left, Right&& right) {
#pragma unroll(AT_ONCE)
  for (int step = 0; step < STEPS; ++step) {
    const auto a = left(step);
#pragma unroll
    for (int n = 0; n < N; n += 2) U::multiply(c[n], c[n + 1], a, right(step, n));
  }
}

// Factors in shared memory, from a lane's part of the address and the warp's.
template <typename U, typename L>
__device__ inline auto left_at(SharedAddress lane, SharedAddress warp) {
  return [=](int step) { return U::template load_left<L>(L::right_of(lane, step * 32) + warp); };
}
template <typename U, typename L>
__device__ inline auto left_down_at(SharedAddress lane, SharedAddress warp) {
  return [=](int step) { return U::template load_left_down<L>(lane + (warp + step * U::K * L::PITCH)); };
}
template <typename U, typename L>
__device__ inline auto right_at(SharedAddress lane, SharedAddress warp) {
  return [=](int step, int n) {
    return U::template load_right<L>(L::right_of(lane, step * 32) + (warp + n * 8 * L::PITCH));
  };
}
template <typename U, typename L>
__device__ inline auto right_down_at(SharedAddress lane, SharedAddress warp) {
  constexpr int BYTES = 16 / U::K * 2;  // of an element
  return [=](int step, int n) {
    return U::template load_right_down<L>(L::right_of(lane, n * 8 * BYTES) + (warp + step * U::K * L::PITCH));
  };
}

}  // namespace fastgpt
