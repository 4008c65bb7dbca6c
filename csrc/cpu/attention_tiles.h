// Code that attention's forward and backward share: SeqlenInfo (where a document begins and how long it is), BlockRange
// (which column blocks a row block visits), the division into tasks, Mask (scores with scale, softcap, ALiBi and
// masks), and the products of a tile.
//
// A tile of ROWS queries × COLUMNS keys is stored transposed: one key per row, so that a vector holds one key and LANES
// queries. The statistics of the softmax, one number per query, are then vectors, and nothing is summed across a
// vector.
#pragma once

#include <cstring>

#include "amx.h"
#include "kernel.h"
#include "philox.h"
#include "vector_math.h"

namespace fastgpt {

constexpr int64_t ROWS = 64, COLUMNS = 64;

template <typename A>
using Buffer = std::vector<A>;

template <typename A>
constexpr A MINUS_INFINITY = -std::numeric_limits<A>::infinity();

// ---- the problem ----

struct Span {
  int64_t begin, end;
  int64_t size() const { return std::max<int64_t>(0, end - begin); }
};

// The first row of a document in a (B, heads, L, D) tensor.
struct RowOffset {
  int64_t batch, row;
};

// Where the rows and columns of a document begin, and their lengths. In a batch each entry is a document.
struct SeqlenInfo {
  int64_t document;  // its number in the call: the batch index of ALiBi, attn_mask and dropout
  RowOffset q_begin, k_begin;
  int64_t Lq, Lk;
};

// One document: its SeqlenInfo, and the sizes and options that all documents of a call share.
struct Problem : SeqlenInfo {
  int64_t heads, kv_heads, D, DV;
  double scale, softcap;
  bool lower_right;
  int64_t left, right;  // columns visible on each side of the diagonal, -1 for all
  Dropout dropout;

  int64_t group() const { return heads / kv_heads; }
  int64_t diagonal() const { return lower_right ? Lk - Lq : 0; }  // row i is on the diagonal at column i + diagonal()
  int64_t row_tiles() const { return (Lq + ROWS - 1) / ROWS; }
  // The columns that any of the rows [first, last) sees, and the rows that see any of the columns [first, last).
  Span columns_of(int64_t first, int64_t last) const {
    return {
        left < 0 ? 0 : std::clamp<int64_t>(first + diagonal() - left, 0, Lk),
        right < 0 ? Lk : std::clamp<int64_t>(last + diagonal() + right, 0, Lk)};
  }
  Span rows_of(int64_t first, int64_t last) const {
    return {
        right < 0 ? 0 : std::clamp<int64_t>(first - diagonal() - right, 0, Lq),
        left < 0 ? Lq : std::clamp<int64_t>(last - diagonal() + left, 0, Lq)};
  }
  // The cost of a head of queries: for each tile the keys that it sees, plus ROWS for packing its queries.
  int64_t cost() const {
    int64_t sum = 0;
    for (int64_t first = 0; first < Lq; first += ROWS)
      sum += ROWS + columns_of(first, std::min(first + ROWS, Lq)).size();
    return sum;
  }
};

using Problems = std::vector<Problem>;

// The column blocks [n_block_min, n_block_max) that the rows [first, last) visit.
struct BlockRange {
  int64_t n_block_min, n_block_max;

  BlockRange(const Problem& p, int64_t first, int64_t last) {
    const Span seen = p.columns_of(first, last);
    n_block_min = seen.begin / COLUMNS;
    n_block_max = (seen.end + COLUMNS - 1) / COLUMNS;
  }
};

// The tasks of all documents in one list, which is divided by cost: the tasks of one document cost about the same,
// those of different documents do not.
class Work {
 public:
  // Adds the tasks of the next document. `cost`: of one of them.
  void add(int64_t tasks, int64_t cost) {
    costs_.push_back(std::max<int64_t>(1, cost));
    starts_.push_back(starts_.back() + tasks * costs_.back());
    if (tasks > 0) longest_ = std::max(longest_, costs_.back());
  }

  // The cost of all tasks, and of the longest task. Less work is not worth another thread.
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

// A (B, heads, L, D) tensor with contiguous rows, or a (B, heads, L) tensor.
template <typename T>
struct Matrices {
  T* data = nullptr;
  int64_t batch = 0, head = 0, row = 0;  // strides

  explicit Matrices(const OptionalTensor& t) {
    if (!t) return;
    data = const_cast<T*>(pointer<std::remove_const_t<T>>(t));
    batch = t->stride(0), head = t->stride(1), row = t->stride(2);
  }
  T* at(RowOffset o, int64_t h, int64_t i) const { return data + o.batch * batch + h * head + (o.row + i) * row; }
};

// ---- tiles ----

// Queries [first, first + m) of head h, keys [j, j + n).
struct Tile {
  int64_t h, first, m, j, n;
};

// The products of a tile skip the scores outside the window. They are divided into strips of STRIP keys or queries,
// each with the part of the other side that it sees. The queries are rounded to whole STEPs, so that every score that a
// strip of queries uses was computed by a strip of keys.
constexpr int64_t STRIP = 16;
template <typename A>
constexpr int64_t STEP = std::max(GEMM_N<A>, STRIP);
template <typename A>
inline int64_t whole_steps(int64_t m) {
  return (m + STEP<A> - 1) / STEP<A> * STEP<A>;
}

// The queries of a tile, relative to its first one, that see any of its keys [c, c + strip).
template <typename A>
inline Span queries_of(const Problem& p, const Tile& t, int64_t c, int64_t strip) {
  const Span rows = p.rows_of(t.j + c, std::min(t.j + c + strip, t.j + t.n));
  const int64_t begin = std::clamp<int64_t>(rows.begin - t.first, 0, t.m),
                end = std::clamp<int64_t>(rows.end - t.first, 0, t.m);
  return {begin / STEP<A> * STEP<A>, whole_steps<A>(end)};
}

// The keys of a tile, relative to its first one, that any of its queries [r, r + strip) sees.
inline Span keys_of(const Problem& p, const Tile& t, int64_t r, int64_t strip) {
  const Span columns = p.columns_of(t.first + r, std::min(t.first + r + strip, t.first + t.m));
  return {std::clamp<int64_t>(columns.begin - t.j, 0, t.n) / 2 * 2, std::clamp<int64_t>(columns.end - t.j, 0, t.n)};
}

// Whether every query of the tile sees every key of it.
inline bool is_full(const Problem& p, const Tile& t) {
  return (p.right < 0 || t.j + t.n - 1 <= t.first + p.diagonal() + p.right) &&
         (p.left < 0 || t.j >= t.first + t.m - 1 + p.diagonal() - p.left);
}

// The width of the strips: a full tile is one strip.
inline int64_t strip_of(const Problem& p, const Tile& t) { return is_full(p, t) ? std::max(ROWS, COLUMNS) : STRIP; }

// s (COLUMNS, ROWS) = a (keys, k) · b (k, queries), within the window.
template <typename U, typename A>
inline void product_of_keys(const Problem& p, const Tile& t, int64_t k, Operand<U> a, Operand<U> b, A* s) {
  const int64_t strip = strip_of(p, t);
  for (int64_t c = 0; c < t.n; c += strip) {
    const Span q = queries_of<A>(p, t, c, strip);
    const Operand<U> some{a.data + c * a.row, a.row}, part{b.data + q.begin, b.row};
    product<false>(std::min(strip, t.n - c), q.size(), k, some, part, s + c * ROWS + q.begin, ROWS);
  }
}

// out (queries, width) += aᵀ · b, summed over the keys: a (keys, queries), b (keys, width).
template <typename E, typename A>
inline void add_over_keys(
    const Problem& p, const Tile& t, const Unit<E>* a, Operand<Unit<E>> b, A* out, int64_t width) {
  const int64_t strip = strip_of(p, t);
  for (int64_t r = 0; r < t.m; r += strip) {
    const Span c = keys_of(p, t, r, strip);
    const Operand<Unit<E>> some{a + c.begin / FOLD<E> * ROWS + r, 1, ROWS},
        part{b.data + c.begin / FOLD<E> * b.row, b.row, b.column};
    product<true>(std::min(strip, t.m - r), width, units<E>(c.size()), some, part, out + r * width, width);
  }
}

// out (keys, width) += a · b, summed over the queries: a (keys, queries), b (queries, width).
template <typename E, typename A>
inline void add_over_queries(
    const Problem& p, const Tile& t, const Unit<E>* a, Operand<Unit<E>> b, A* out, int64_t width) {
  const int64_t strip = strip_of(p, t);
  for (int64_t c = 0; c < t.n; c += strip) {
    const Span q = queries_of<A>(p, t, c, strip);
    const int64_t row = ROWS / FOLD<E>;
    const Operand<Unit<E>> some{a + c * row + q.begin / FOLD<E>, row},
        part{b.data + q.begin / FOLD<E> * b.row, b.row, b.column};
    product<true>(std::min(strip, t.n - c), width, q.size() / FOLD<E>, some, part, out + c * width, width);
  }
}

// ---- the scores of a tile ----

enum class Shown { NONE, SOME, ALL };

// Turns products q·kᵀ into scores.
template <typename A>
struct Mask {
  const A* alibi_slopes = nullptr;  // (documents, heads)
  const bool* flags = nullptr;      // attn_mask: bool, or
  const A* added = nullptr;         // added to the scores
  int64_t stride[4] = {};           // of attn_mask; may be 0

  // attn_mask: bool, or floating in the compute type.
  Mask(const OptionalTensor& attn_mask, const OptionalTensor& slopes) : alibi_slopes(pointer<A>(slopes)) {
    if (!attn_mask) return;
    if (attn_mask->scalar_type() == ScalarType::Bool)
      flags = pointer<bool>(attn_mask);
    else
      added = pointer<A>(attn_mask);
    for (int d = 0; d < 4; ++d) stride[d] = attn_mask->stride(d);
  }

  // Whether the scores of a full tile that attn_mask leaves alone are only scale · q·k. The caller then applies the
  // scale instead of `apply`.
  bool is_plain(const Problem& p) const { return p.softcap <= 0 && !alibi_slopes; }

  // What attn_mask does to a tile: it hides every score, or leaves every score alone, or neither. This reads a number a
  // score, where the products of the tile take 4·D operations, and a hidden tile is skipped.
  Shown shown(const Problem& p, const Tile& t) const {
    if (flags) return shown(flags, true, false, p, t);
    if (added) return shown(added, A(0), MINUS_INFINITY<A>, p, t);
    return Shown::ALL;
  }

  // Turns products s (COLUMNS, ROWS) into scores, the scale included; -inf where the query does not see the key.
  // `shown`: of the tile. softcap_grad, if not null: the derivative of the softcap.
  void apply(const Problem& p, const Tile& t, Shown shown, A* s, A* softcap_grad) const {
    const A scale = A(p.scale), cap = A(p.softcap);
    for (int64_t c = 0; c < t.n; ++c) {
      A* row = s + c * ROWS;
      const int64_t below = t.j + c - p.diagonal() - t.first;  // the query on the diagonal, relative to the tile
      for (int64_t r = 0; r < ROWS; r += LANES<A>) {
        Vector<A> x = load<A>(row + r) * scale;
        if (cap > A(0)) {
          const Vector<A> y = tanh(x / cap);
          x = cap * y;
          if (softcap_grad) store<A, A>(softcap_grad + c * ROWS + r, A(1) - y * y);
        }
        if (alibi_slopes) {
          const Vector<A> distance = lane_indices<A>() + A(r - below);
          x -= alibi_slopes[p.document * p.heads + t.h] * (distance < A(0) ? -distance : distance);
        }
        store<A, A>(row + r, x);
      }
    }
    if (shown != Shown::ALL) apply_attn_mask(p, t, s);
    if (is_full(p, t)) return;
    for (int64_t c = 0; c < t.n; ++c) {
      const int64_t below = t.j + c - p.diagonal() - t.first;
      A* row = s + c * ROWS;
      if (p.right >= 0) std::fill(row, row + std::clamp<int64_t>(below - p.right, 0, ROWS), MINUS_INFINITY<A>);
      if (p.left >= 0) std::fill(row + std::clamp<int64_t>(below + p.left + 1, 0, ROWS), row + ROWS, MINUS_INFINITY<A>);
    }
  }

 private:
  int64_t begin_of(const Problem& p, const Tile& t) const {
    return p.document * stride[0] + t.h * stride[1] + t.first * stride[2] + t.j * stride[3];
  }

  template <typename M>
  Shown shown(const M* mask, M visible, M hidden, const Problem& p, const Tile& t) const {
    mask += begin_of(p, t);
    const M all = mask[0];
    if (all != visible && all != hidden) return Shown::SOME;
    for (int64_t r = 0; r < (stride[2] == 0 ? 1 : t.m); ++r) {
      const M* row = mask + r * stride[2];
      bool same = row[0] == all;
      if (stride[3] == 1)  // as its neighbors, each number is as the first
        same &= std::memcmp(row, row + 1, (t.n - 1) * sizeof(M)) == 0;
      else
        for (int64_t c = 1; c < t.n; ++c) same &= row[c * stride[3]] == all;
      if (!same) return Shown::SOME;
    }
    return all == visible ? Shown::ALL : Shown::NONE;
  }

  void apply_attn_mask(const Problem& p, const Tile& t, A* s) const {
    const int64_t begin = begin_of(p, t);
    for (int64_t r = 0; r < t.m; ++r)
      for (int64_t c = 0; c < t.n; ++c) {
        const int64_t at = begin + r * stride[2] + c * stride[3];
        A& score = s[c * ROWS + r];
        if (flags) score = flags[at] ? score : MINUS_INFINITY<A>;
        if (added) score += added[at];
      }
  }
};

// Writes the dropout factors of a tile to dropout_scale (COLUMNS, ROWS).
template <typename A>
inline void dropout_tile(const Problem& p, const Tile& t, A* dropout_scale) {
  p.dropout.tile(dropout_scale, ROWS, p.document, t.h, t.first, t.m, t.j, t.n);
}

// ---- factors of the products ----

// bfloat16 of a factor in the upper half of each lane, rounded to nearest, ties away from zero.
[[gnu::always_inline]] inline Bits nearest_half(Floats x) { return bit_cast<Bits>(x) + 0x8000u; }

// Stores two keys of a tile as units of a product over keys: as two rows, or in bfloat16 as one row of pairs.
template <typename E, typename A>
[[gnu::always_inline]] inline void store_keys(Unit<E>* out, int64_t c, int64_t r, Vector<A> even, Vector<A> odd) {
  if constexpr (FOLD<E> == 1) {
    store<A, A>(out + c * ROWS + r, even);
    store<A, A>(out + (c + 1) * ROWS + r, odd);
  } else {
    *reinterpret_cast<Bits*>(out + c / 2 * ROWS + r) = (nearest_half(even) >> 16) | (nearest_half(odd) & 0xFFFF0000u);
  }
}

// Stores one key of a tile as units of a product over queries.
template <typename E, typename A>
[[gnu::always_inline]] inline void store_queries(Unit<E>* out, int64_t c, int64_t r, Vector<A> x) {
  E* row = reinterpret_cast<E*>(out) + c * ROWS + r;
  if constexpr (FOLD<E> == 1)
    store<A, A>(row, x);
  else
    *reinterpret_cast<Shorts*>(row) = narrowed(nearest_half(x) >> 16);
}

// Packs n <= ROWS rows of queries as the second factor of a product over the size of a head: out (units, ROWS), in
// whole STEPs, zero beyond n. `rows` (ROWS, width) receives the packed rows.
template <typename E, typename T>
inline void pack_queries(
    Unit<E>* out, Unit<E>* rows, int64_t width, const T* in, int64_t stride, int64_t n, int64_t size) {
  pack_rows<E>(rows, width, in, stride, n, size);
  const int64_t whole = whole_steps<compute_t<E>>(n);
  std::fill(rows + n * width, rows + whole * width, Unit<E>(0));
  transpose(out, ROWS, rows, width, whole, units<E>(size));
}

}  // namespace fastgpt
