// Scaled dot-product attention on the CPU, backward.
//
//   delta = Σ dout·out - g_lse = Σ p·dp - g_lse;  p = exp((s - m) - l)
//   dv = (p∘keep)ᵀ·dout;  dp = (dout·vᵀ)∘keep;  ds = p∘(dp - delta)·(1 - (s/c)²)
//   dq = scale·ds·k;  dk = scale·dsᵀ·q
//
// Five products a tile, each tile once. A task owns a (document, key head) or, where these are so few or so unlike
// that one would be much of the whole, every parts-th tile of its queries; it walks the tiles of its queries and for
// each the keys that they see. dq is summed in the tile, dk and dv in float buffers of the task, which are added up in
// the end: how many parts there are follows from the shapes, so that no bit depends on the number of threads.
//
// Where one tile has all columns of a row, delta is the sum over p·dp; elsewhere it is the sum over dout·out, whose
// out has been rounded.
//
// FLOPs: 10·D a visible pair, at the rate of the matrix product. Beside them a tile has 4,096 exponentials and packs
// what five products need: q and dout in both directions once a tile of queries, k once in all.
#pragma once

#include "attention_tiles.h"

namespace fastgpt {

// Tasks to divide the work into, at least, where it has as many tiles of queries.
constexpr int64_t TASKS = 16;

// What a key head of a document costs in the backward: its queries, and its keys once.
inline int64_t backward_cost(const Problem& p) { return p.group() * p.cost() + p.columns; }

// How many tasks share each key head of a document, where all key heads together cost `total`.
inline int64_t backward_parts(const Problem& p, int64_t total) {
  const int64_t even = (TASKS * backward_cost(p) + total - 1) / std::max<int64_t>(1, total);
  return std::clamp<int64_t>(even, 1, std::max<int64_t>(1, p.group() * p.row_tiles()));
}

// The tasks of all documents. Where some share a key head, each has sums of its own, `keys` in all.
struct BackwardWork {
  Work tasks, shared;                 // shared: the key heads whose sums remain to be added up
  std::vector<int64_t> parts, first;  // of a document; the place of its first sum
  int64_t keys = 0, longest = 0;      // longest: the keys of a document that is not shared

  explicit BackwardWork(const Problems& documents) {
    int64_t total = 0;
    for (const Problem& p : documents) total += p.kv_heads * backward_cost(p);
    for (const Problem& p : documents) {
      const int64_t n = backward_parts(p, total);
      tasks.add(p.kv_heads * n, backward_cost(p) / n);
      shared.add(n > 1 ? p.kv_heads : 0, n * p.columns);
      parts.push_back(n), first.push_back(keys);
      if (n > 1)
        keys += p.kv_heads * n * p.columns;
      else
        longest = std::max(longest, p.columns);
    }
  }
};

// delta of m rows, and their m and l; a row that saw nothing, or is none, gets an m of +inf and so p = 0. ONE: delta
// lacks Σ p·dp.
template <typename T, typename A>
inline void row_statistics(
    const Problem& p,
    const Tile& t,
    View<const T> grad,
    View<const A> grad_lse,
    View<const T> out,
    View<const A> stats,
    bool one,
    A* delta,
    A* top,
    A* log_sum) {
  for (int64_t r = 0; r < ROWS; ++r) {
    delta[r] = 0, top[r] = -NOTHING<A>, log_sum[r] = 0;
    if (r >= t.m) continue;
    const A* of_row = stats.at(p.queries, t.h, t.first + r);
    if (of_row[0] == NOTHING<A>) continue;
    const T *g = grad.at(p.queries, t.h, t.first + r), *o = out.at(p.queries, t.h, t.first + r);
    Vector<A> sum = {};
    if (!one)
      over_vectors<A>(
          0, p.value_size, [&](int64_t d, auto... n) { sum += load<A>(g + d, n...) * load<A>(o + d, n...); });
    delta[r] = lane_sum<A>(sum) - (grad_lse.data ? *grad_lse.at(p.queries, t.h, t.first + r) : A(0));
    top[r] = of_row[0], log_sum[r] = of_row[1];
  }
}

// From scores s and products dp to the factors: p (for dv) and ds (for dk and, by keys, for dq). ONE: the tile has all
// columns, and delta lacks its sum over them.
template <bool ONE, typename E, typename A>
inline void gradient_tile(
    const Problem& p,
    const Tile& t,
    A scale,  // of s, where it is not applied yet
    A* s,
    const A* dp,
    const A* slope,
    const A* keep,
    const A* delta,
    const A* top,
    const A* log_sum,
    Unit<E>* p_queries,
    Unit<E>* ds_queries,
    Unit<E>* ds_keys) {
  for (int64_t r = 0; r < whole_steps<A>(t.m); r += LANES<A>) {
    Vector<A> row_delta = load<A>(delta + r);
    const Vector<A> row_top = load<A>(top + r), row_log_sum = load<A>(log_sum + r);
    const auto probability = [&](int64_t at) {
      return exp_difference<FOLD<E> == 1>(rounded<A>(load<A>(s + at) * scale) - row_top, row_log_sum);
    };
    if constexpr (ONE)
      for (int64_t c = 0; c < t.n; ++c) {
        const int64_t at = c * ROWS + r;
        const Vector<A> e = probability(at);
        store<A, A>(s + at, e);
        // What lies outside of the band has p = 0 and a dp that was not computed: it may be another row's NaN.
        const Vector<A> term = e * (keep ? load<A>(dp + at) * load<A>(keep + at) : load<A>(dp + at));
        row_delta += e == A(0) ? Vector<A>{} : term;
      }
    for (int64_t c = 0; c < t.n; c += 2) {
      Vector<A> ds[2] = {};
      for (int64_t i = 0; i < 2 && c + i < t.n; ++i) {
        const int64_t at = (c + i) * ROWS + r;
        Vector<A> e = ONE ? load<A>(s + at) : probability(at), d = load<A>(dp + at);
        if (keep) d *= load<A>(keep + at);
        ds[i] = e * (d - row_delta) * A(p.scale);
        if (slope) ds[i] *= load<A>(slope + at);
        if (keep) e *= load<A>(keep + at);
        store_queries<E, A>(p_queries, c + i, r, e);
        if (FOLD<E> > 1) store_queries<E, A>(ds_queries, c + i, r, ds[i]);
      }
      store_keys<E, A>(ds_keys, c, r, ds[0], ds[1]);
    }
  }
}

// dk and dv of (document, key head) from the sums of its parts.
template <typename T, typename A>
inline void finish_keys(
    const Problem& p,
    int64_t kv,
    int64_t parts,
    const A* sums,
    int64_t width,
    int64_t value_width,
    View<T> dk,
    View<T> dv) {
  const int64_t stride = p.columns * (width + value_width);
  const auto row = [&](const A* from, int64_t size, T* to) {
    over_vectors<A>(0, size, [&](int64_t d, auto... n) {
      Vector<A> x = load<A>(from + d, n...);
      for (int64_t part = 1; part < parts; ++part) x += load<A>(from + part * stride + d, n...);
      store<T, A>(to + d, x, n...);
    });
  };
  for (int64_t j = 0; j < p.columns; ++j) {
    row(sums + j * width, p.size, dk.at(p.keys, kv, j));
    row(sums + p.columns * width + j * value_width, p.value_size, dv.at(p.keys, kv, j));
  }
}

template <typename T>
void backward(
    const Problems& documents,
    View<const T> grad,
    View<const compute_t<T>> grad_lse,
    View<const T> q,
    View<const T> k,
    View<const T> v,
    View<const T> out,
    View<const compute_t<T>> stats,
    const Mask<compute_t<T>>& mask,
    const compute_t<T>* alibi,
    View<T> dq,
    View<T> dk,
    View<T> dv) {
  using A = compute_t<T>;
  using E = factor_t<T>;
  using U = Unit<E>;
  constexpr bool FOLDED = FOLD<E> > 1;
  const Problem& call = documents.front();
  const int64_t depth = units<E>(call.size), value_depth = units<E>(call.value_size);
  const int64_t q_width = padded<U>(depth), g_width = padded<U>(value_depth);
  const int64_t width = padded<U>(call.size), value_width = padded<U>(call.value_size), stride = width + value_width;
  const bool plain = call.softcap <= 0 && !alibi && !mask.seen && !mask.added, drops = call.dropout.active();
  const BackwardWork work(documents);
  const std::unique_ptr<A[]> shared(work.keys > 0 ? new A[work.keys * stride] : nullptr);

  at::parallel_for(0, work.tasks.total(), work.tasks.longest(), [&](int64_t begin, int64_t end) {
    Buffer<U> q_rows(ROWS * q_width), qt(q_width * ROWS), g_rows(ROWS * g_width), gt(g_width * ROWS);
    Buffer<U> q_pairs, g_pairs, k_space, v_space, k_pairs;
    Buffer<U> folded(FOLDED ? COLUMNS * ROWS / FOLD<E> * 3 : 0);
    Buffer<A> s(COLUMNS * ROWS), dp(COLUMNS * ROWS), slope(call.softcap > 0 ? COLUMNS * ROWS : 0),
        keep(drops ? COLUMNS * ROWS : 0);
    Buffer<A> dq_tile(ROWS * width), own(work.longest * stride);
    A delta[ROWS], top[ROWS], log_sum[ROWS];
    work.tasks.each(begin, end, [&](int64_t document, int64_t task) {
      const Problem& p = documents[document];
      const int64_t tiles = p.row_tiles(), parts = work.parts[document], kv = task / parts;
      A* const dks = parts > 1 ? shared.get() + (work.first[document] + task * p.columns) * stride : own.data();
      A* const dvs = dks + p.columns * width;
      std::fill(dks, dks + p.columns * stride, A(0));
      const Operand<U> ks = first_factor<E>(k_space, k.at(p.keys, kv, 0), k.row, p.columns, p.size);
      const Operand<U> vs = first_factor<E>(v_space, v.at(p.keys, kv, 0), v.row, p.columns, p.value_size);
      const Operand<U> kp = second_factor<E>(k_pairs, k.at(p.keys, kv, 0), k.row, p.columns, p.size);

      for (int64_t index = task % parts; index < p.group() * tiles; index += parts) {
        const int64_t h = kv * p.group() + index / tiles, first = index % tiles * ROWS;
        Tile t{h, first, std::min(ROWS, p.rows - first), 0, 0};
        const T *q_at = q.at(p.queries, h, first), *g_at = grad.at(p.queries, h, first);
        pack_queries<E>(qt.data(), q_rows.data(), q_width, q_at, q.row, t.m, p.size);
        pack_queries<E>(gt.data(), g_rows.data(), g_width, g_at, grad.row, t.m, p.value_size);
        Operand<U> qp{q_rows.data(), q_width}, gp{g_rows.data(), g_width};
        if constexpr (FOLDED) {
          q_pairs.assign(ROWS / 2 * width, 0), g_pairs.assign(ROWS / 2 * value_width, 0);
          pack_pairs(q_pairs.data(), width, q_at, q.row, t.m, p.size);
          pack_pairs(g_pairs.data(), value_width, g_at, grad.row, t.m, p.value_size);
          qp = {q_pairs.data(), width}, gp = {g_pairs.data(), value_width};
        }
        const Span seen = p.columns_of(first, first + t.m);
        const bool one = seen.end <= seen.begin / COLUMNS * COLUMNS + COLUMNS;
        row_statistics(p, t, grad, grad_lse, out, stats, one, delta, top, log_sum);
        std::fill_n(dq_tile.begin(), t.m * width, A(0));
        for (t.j = seen.begin / COLUMNS * COLUMNS; t.j < seen.end; t.j += COLUMNS) {
          t.n = std::min(COLUMNS, p.columns - t.j);
          product_of_keys(p, t, depth, {ks.data + t.j * ks.row, ks.row}, Operand<U>{qt.data(), ROWS}, s.data());
          product_of_keys(p, t, value_depth, {vs.data + t.j * vs.row, vs.row}, Operand<U>{gt.data(), ROWS}, dp.data());
          const bool simple = plain && is_whole(p, t);
          if (!simple) score_tile(p, t, mask, alibi, s.data(), slope.empty() ? nullptr : slope.data());
          if (drops) keep_tile(p, t, keep.data());
          U* const ps = FOLDED ? folded.data() : reinterpret_cast<U*>(s.data());
          U* const ds_keys = FOLDED ? folded.data() + COLUMNS * ROWS / FOLD<E> : reinterpret_cast<U*>(dp.data());
          U* const ds = FOLDED ? folded.data() + COLUMNS * ROWS / FOLD<E> * 2 : ds_keys;
          const auto turn = [&](auto alone) {
            gradient_tile<alone.value, E, A>(
                p,
                t,
                simple ? A(p.scale) : A(1),
                s.data(),
                dp.data(),
                slope.empty() ? nullptr : slope.data(),
                drops ? keep.data() : nullptr,
                delta,
                top,
                log_sum,
                ps,
                ds,
                ds_keys);
          };
          one ? turn(std::true_type{}) : turn(std::false_type{});
          add_over_queries<E>(p, t, ps, gp, dvs + t.j * value_width, value_width);
          add_over_queries<E>(p, t, ds, qp, dks + t.j * width, width);
          add_over_keys<E>(p, t, ds_keys, {kp.data + t.j / FOLD<E> * kp.row, kp.row, kp.column}, dq_tile.data(), width);
        }
        for (int64_t r = 0; r < t.m; ++r) {
          T* to = dq.at(p.queries, h, first + r);
          over_vectors<A>(
              0, p.size, [&](int64_t d, auto... n) { store<T, A>(to + d, load<A>(&dq_tile[r * width + d]), n...); });
        }
      }
      if (parts == 1) finish_keys(p, kv, 1, dks, width, value_width, dk, dv);
    });
  });
  at::parallel_for(0, work.shared.total(), work.shared.longest(), [&](int64_t begin, int64_t end) {
    work.shared.each(begin, end, [&](int64_t document, int64_t kv) {
      const Problem& p = documents[document];
      const int64_t parts = work.parts[document], first = work.first[document] + kv * parts * p.columns;
      finish_keys(p, kv, parts, shared.get() + first * stride, width, value_width, dk, dv);
    });
  });
}

}  // namespace fastgpt
