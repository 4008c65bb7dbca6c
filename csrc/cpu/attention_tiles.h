// What both directions of attention share: the problems, how they are cut into tasks, and the scores of a tile.
//
// A tile is COLUMNS keys × ROWS queries and lies transposed: a row of it is one key, so that a vector holds
// one key and LANES queries. The statistics of the softmax, one number a query, are then vectors too, and
// nothing is ever summed across a vector.
#pragma once

#include "gemm.h"
#include "kernel.h"
#include "philox.h"
#include "vector_math.h"

namespace fastgpt {

constexpr int64_t ROWS = 64, COLUMNS = 64;

template <typename A>
using Buffer = std::vector<A>;

template <typename A>
constexpr A NOTHING = -std::numeric_limits<A>::infinity();

struct Span {
  int64_t begin, end;
  int64_t size() const { return std::max<int64_t>(0, end - begin); }
};

// Where the rows of a document begin in a (B, heads, L, D) tensor.
struct Start {
  int64_t entry, row;
};

// Everything about one document but the element types: queries that see its keys and no others. A batch is as many
// documents as it has entries; those of a call differ in the first three lines only.
struct Problem {
  int64_t number;  // among the documents
  Start queries, keys;
  int64_t rows, columns;
  int64_t heads, kv_heads, size, value_size;  // size: of a head
  double scale, softcap;
  bool lower_right;
  int64_t left, right;
  Dropout dropout;

  int64_t group() const { return heads / kv_heads; }
  int64_t offset() const { return lower_right ? columns - rows : 0; }  // of the diagonal
  int64_t row_tiles() const { return (rows + ROWS - 1) / ROWS; }
  // The columns that any of the rows [first, last) sees, and the rows that see any of the columns.
  Span columns_of(int64_t first, int64_t last) const {
    return {
        left < 0 ? 0 : std::clamp<int64_t>(first + offset() - left, 0, columns),
        right < 0 ? columns : std::clamp<int64_t>(last + offset() + right, 0, columns)};
  }
  Span rows_of(int64_t first, int64_t last) const {
    return {
        right < 0 ? 0 : std::clamp<int64_t>(first - offset() - right, 0, rows),
        left < 0 ? rows : std::clamp<int64_t>(last - offset() + left, 0, rows)};
  }
  // What a head of queries costs: the keys that each tile sees, and as much again as packing its queries takes.
  int64_t cost() const {
    int64_t sum = 0;
    for (int64_t first = 0; first < rows; first += ROWS)
      sum += ROWS + columns_of(first, std::min(first + ROWS, rows)).size();
    return sum;
  }
};

using Problems = std::vector<Problem>;

// The tasks of all documents as one list, to be cut by what they cost: those of one document cost about the same,
// those of different documents do not.
class Work {
 public:
  // The tasks of the next document, and what one of them costs.
  void add(int64_t tasks, int64_t cost) {
    costs_.push_back(std::max<int64_t>(1, cost));
    starts_.push_back(starts_.back() + tasks * costs_.back());
    if (tasks > 0) longest_ = std::max(longest_, costs_.back());
  }

  // What all cost, and the longest task: no thread is worth starting for less.
  int64_t total() const { return starts_.back(); }
  int64_t longest() const { return longest_; }

  // Calls f(document, task) for the tasks that begin within [begin, end) of the total.
  template <typename F>
  void each(int64_t begin, int64_t end, F&& f) const {
    const int64_t documents = static_cast<int64_t>(costs_.size());
    int64_t n = std::upper_bound(starts_.begin(), starts_.end(), begin) - starts_.begin() - 1;
    for (; n < documents && starts_[n] < end; ++n) {
      const auto task_at = [&](int64_t x) { return (x - starts_[n] + costs_[n] - 1) / costs_[n]; };
      const int64_t last = task_at(std::min(end, starts_[n + 1]));
      for (int64_t task = task_at(std::max(begin, starts_[n])); task < last; ++task) f(n, task);
    }
  }

 private:
  std::vector<int64_t> starts_{0}, costs_;
  int64_t longest_ = 1;
};

// A (B, heads, L, D) tensor of any strides but the last, or (B, heads, L).
template <typename T>
struct View {
  T* data = nullptr;
  int64_t entry = 0, head = 0, row = 0;

  explicit View(const Tensor& t) {
    if (!t.defined()) return;
    data = const_cast<T*>(t.const_data_ptr<std::remove_const_t<T>>());
    entry = t.stride(0), head = t.stride(1), row = t.stride(2);
  }
  T* at(Start s, int64_t h, int64_t i) const { return data + s.entry * entry + h * head + (s.row + i) * row; }
};

// The mask, of strides that may be 0: bool, or floating in the compute type.
template <typename A>
struct Mask {
  const bool* seen = nullptr;
  const A* added = nullptr;
  int64_t stride[4] = {};

  explicit Mask(const Tensor& t) {
    if (!t.defined()) return;
    if (t.scalar_type() == at::kBool)
      seen = t.const_data_ptr<bool>();
    else
      added = t.const_data_ptr<A>();
    for (int d = 0; d < 4; ++d) stride[d] = t.stride(d);
  }

  // s (COLUMNS, ROWS): the scores of m queries from row i and n keys from column j.
  void apply(A* s, int64_t b, int64_t h, int64_t i, int64_t m, int64_t j, int64_t n) const {
    const int64_t at = b * stride[0] + h * stride[1] + i * stride[2] + j * stride[3];
    for (int64_t r = 0; r < m; ++r)
      for (int64_t c = 0; c < n; ++c) {
        const int64_t here = at + r * stride[2] + c * stride[3];
        A& score = s[c * ROWS + r];
        if (seen) score = seen[here] ? score : NOTHING<A>;
        if (added) score += added[here];
      }
  }
};

// One tile: queries [first, first + m) of head h, keys [j, j + n).
struct Tile {
  int64_t h, first, m, j, n;
};

// The products of a tile leave out what lies outside the band: strips of STRIP keys or queries, each with
// the part of the other side that it sees. Queries come in whole STEPs, so that every score that a strip of queries
// may use has been computed from a strip of keys.
constexpr int64_t STRIP = 16;
template <typename A>
constexpr int64_t STEP = std::max(GEMM_N<A>, STRIP);
template <typename A>
inline int64_t whole_steps(int64_t m) {
  return (m + STEP<A> - 1) / STEP<A> * STEP<A>;
}

// The queries of a tile (relative to its first) that see one of its keys [c, c + strip).
template <typename A>
inline Span queries_of(const Problem& p, const Tile& t, int64_t c, int64_t strip) {
  const Span rows = p.rows_of(t.j + c, std::min(t.j + c + strip, t.j + t.n));
  const int64_t begin = std::clamp<int64_t>(rows.begin - t.first, 0, t.m),
                end = std::clamp<int64_t>(rows.end - t.first, 0, t.m);
  return {begin / STEP<A> * STEP<A>, whole_steps<A>(end)};
}

// The keys of a tile (relative) that one of its queries [r, r + strip) sees.
inline Span keys_of(const Problem& p, const Tile& t, int64_t r, int64_t strip) {
  const Span columns = p.columns_of(t.first + r, std::min(t.first + r + strip, t.first + t.m));
  return {std::clamp<int64_t>(columns.begin - t.j, 0, t.n) / 2 * 2, std::clamp<int64_t>(columns.end - t.j, 0, t.n)};
}

// Whether all of a tile lies within the band.
inline bool is_whole(const Problem& p, const Tile& t) {
  return (p.right < 0 || t.j + t.n - 1 <= t.first + p.offset() + p.right) &&
         (p.left < 0 || t.j >= t.first + t.m - 1 + p.offset() - p.left);
}

// How wide strips are: all of a tile that lies within the band.
inline int64_t strip_of(const Problem& p, const Tile& t) { return is_whole(p, t) ? std::max(ROWS, COLUMNS) : STRIP; }

// s (COLUMNS, ROWS) = a (keys, k) · b (k, queries) where the band lets them see each other.
template <typename U, typename A>
inline void product_of_keys(const Problem& p, const Tile& t, int64_t k, Operand<U> a, Operand<U> b, A* s) {
  const int64_t strip = strip_of(p, t);
  for (int64_t c = 0; c < t.n; c += strip) {
    const Span q = queries_of<A>(p, t, c, strip);
    const Operand<U> some{a.data + c * a.row, a.row}, part{b.data + q.begin, b.row};
    gemm<false>(std::min(strip, t.n - c), q.size(), k, some, part, s + c * ROWS + q.begin, ROWS);
  }
}

// out (queries, width) += aᵀ · b over the keys: a (keys, queries), b (keys, width).
template <typename E, typename A>
inline void add_over_keys(
    const Problem& p, const Tile& t, const Unit<E>* a, Operand<Unit<E>> b, A* out, int64_t width) {
  const int64_t strip = strip_of(p, t);
  for (int64_t r = 0; r < t.m; r += strip) {
    const Span c = keys_of(p, t, r, strip);
    const Operand<Unit<E>> some{a + c.begin / FOLD<E> * ROWS + r, 1, ROWS},
        part{b.data + c.begin / FOLD<E> * b.row, b.row, b.column};
    gemm<true>(std::min(strip, t.m - r), width, units<E>(c.size()), some, part, out + r * width, width);
  }
}

// out (keys, width) += a · b over the queries: a (keys, queries), b (queries, width).
template <typename E, typename A>
inline void add_over_queries(
    const Problem& p, const Tile& t, const Unit<E>* a, Operand<Unit<E>> b, A* out, int64_t width) {
  const int64_t strip = strip_of(p, t);
  for (int64_t c = 0; c < t.n; c += strip) {
    const Span q = queries_of<A>(p, t, c, strip);
    const int64_t row = ROWS / FOLD<E>;
    const Operand<Unit<E>> some{a + c * row + q.begin / FOLD<E>, row},
        part{b.data + q.begin / FOLD<E> * b.row, b.row, b.column};
    gemm<true>(std::min(strip, t.n - c), width, q.size() / FOLD<E>, some, part, out + c * width, width);
  }
}

// From q·kᵀ to the scores where the band, a mask, ALiBi or a softcap have a say; `scale` is applied. With a
// softcap the slope of tanh goes to `slope`.
template <typename A>
inline void score_tile(const Problem& p, const Tile& t, const Mask<A>& mask, const A* alibi, A* s, A* slope) {
  const A scale = A(p.scale), cap = A(p.softcap);
  for (int64_t c = 0; c < t.n; ++c) {
    A* row = s + c * ROWS;
    const int64_t below = t.j + c - p.offset() - t.first;  // the query on the diagonal, relative to the tile
    for (int64_t r = 0; r < ROWS; r += LANES<A>) {
      Vector<A> x = load<A>(row + r) * scale;
      if (cap > A(0)) {
        const Vector<A> y = tanh(x / cap);
        x = cap * y;
        if (slope) store<A, A>(slope + c * ROWS + r, A(1) - y * y);
      }
      if (alibi) {
        const Vector<A> distance = lane_indices<A>() + A(r - below);
        x -= alibi[p.number * p.heads + t.h] * (distance < A(0) ? -distance : distance);
      }
      store<A, A>(row + r, x);
    }
  }
  if (mask.seen || mask.added) mask.apply(s, p.number, t.h, t.first, t.m, t.j, t.n);
  if (is_whole(p, t)) return;
  for (int64_t c = 0; c < t.n; ++c) {
    const int64_t below = t.j + c - p.offset() - t.first;
    A* row = s + c * ROWS;
    if (p.right >= 0) std::fill(row, row + std::clamp<int64_t>(below - p.right, 0, ROWS), NOTHING<A>);
    if (p.left >= 0) std::fill(row + std::clamp<int64_t>(below + p.left + 1, 0, ROWS), row + ROWS, NOTHING<A>);
  }
}

// Multipliers of dropout of a tile, (COLUMNS, ROWS).
template <typename A>
inline void keep_tile(const Problem& p, const Tile& t, A* keep) {
  A row[COLUMNS];
  for (int64_t r = 0; r < t.m; ++r) {
    p.dropout.row(row, p.number, t.h, t.first + r, t.j, t.n);
    for (int64_t c = 0; c < t.n; ++c) keep[c * ROWS + r] = row[c];
  }
}

// bfloat16 of a factor in the upper half of each lane: nearest, ties away from zero.
[[gnu::always_inline]] inline Bits nearest_half(Floats x) { return std::bit_cast<Bits>(x) + 0x8000u; }

// Two keys of a tile as units of a product over keys: two rows, or one of bfloat16 side by side.
template <typename E, typename A>
[[gnu::always_inline]] inline void store_keys(Unit<E>* out, int64_t c, int64_t r, Vector<A> even, Vector<A> odd) {
  if constexpr (FOLD<E> == 1) {
    store<A, A>(out + c * ROWS + r, even);
    store<A, A>(out + (c + 1) * ROWS + r, odd);
  } else {
    *reinterpret_cast<Bits*>(out + c / 2 * ROWS + r) = (nearest_half(even) >> 16) | (nearest_half(odd) & 0xFFFF0000u);
  }
}

// One key of a tile as units of a product over queries.
template <typename E, typename A>
[[gnu::always_inline]] inline void store_queries(Unit<E>* out, int64_t c, int64_t r, Vector<A> x) {
  E* row = reinterpret_cast<E*>(out) + c * ROWS + r;
  if constexpr (FOLD<E> == 1)
    store<A, A>(row, x);
  else
    *reinterpret_cast<Shorts*>(row) = narrowed(nearest_half(x) >> 16);
}

// n <= ROWS rows of queries as the second factor of a product over the size of a head, (units, ROWS); they
// are packed into `rows` (ROWS, width) on the way. In whole STEPs, zero beyond n.
template <typename E, typename T>
inline void pack_queries(
    Unit<E>* out, Unit<E>* rows, int64_t width, const T* in, int64_t stride, int64_t n, int64_t size) {
  pack_rows<E>(rows, width, in, stride, n, size);
  const int64_t whole = whole_steps<compute_t<E>>(n);
  std::fill(rows + n * width, rows + whole * width, Unit<E>(0));
  transpose(out, ROWS, rows, width, whole, units<E>(size));
}

}  // namespace fastgpt
