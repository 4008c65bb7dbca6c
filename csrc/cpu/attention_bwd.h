// Scaled dot-product attention on the CPU, backward.
//
//   delta = Σ dout·out - g_lse = Σ p·dp - g_lse;  p = exp((s - m) - l)
//   dv = (p∘dropout)ᵀ·dout;  dp = (dout·vᵀ)∘dropout;  ds = p∘(dp - delta)·(1 - (s/c)²)
//   dq = scale·ds·k;  dk = scale·dsᵀ·q
//
// Each tile is visited once and takes five products. A task processes a (document, key head). If there are few of
// these, or if one is a large part of all work, several tasks share it, each with every parts-th tile of the queries. A
// task visits its tiles of queries, and for each the keys that they see. It sums dq in the tile, and dk and dv in float
// buffers of its own, which are added up at the end. The number of parts depends only on the shapes, so the bits of the
// result do not depend on the number of threads.
//
// If one tile has all columns of a row, delta is the sum of p·dp. Otherwise it is the sum of dout·out, which uses the
// rounded out.
//
// FLOPs: 10·D per visible pair, at the rate of the matrix product. Besides, a tile takes 4,096 exponentials and packs
// the factors of five products: q and dout, in both directions, once per tile of queries, and k once per task.
#pragma once

#include "attention_tiles.h"

namespace fastgpt {

// The smallest number of tasks, if there are as many tiles of queries.
constexpr int64_t TASKS = 16;

// The cost of a key head of a document: its queries, and its keys once.
inline int64_t backward_cost(const Problem& p) { return p.group() * p.cost() + p.Lk; }

// The number of tasks that share each key head of a document. `total`: the cost of all key heads.
inline int64_t backward_parts(const Problem& p, int64_t total) {
  const int64_t even = (TASKS * backward_cost(p) + total - 1) / std::max<int64_t>(1, total);
  return std::clamp<int64_t>(even, 1, std::max<int64_t>(1, p.group() * p.row_tiles()));
}

// The tasks of all documents. Tasks that share a key head have sums of their own, for `keys` keys in all.
struct BackwardWork {
  Work tasks, shared;                 // shared: the key heads whose sums must be added up
  std::vector<int64_t> parts, first;  // of each document: the tasks per key head, the index of its first sum
  int64_t keys = 0, longest = 0;      // longest: the most keys of a document that is not shared

  explicit BackwardWork(const Problems& documents) {
    int64_t total = 0;
    for (const Problem& p : documents) total += p.kv_heads * backward_cost(p);
    for (const Problem& p : documents) {
      const int64_t n = backward_parts(p, total);
      tasks.add(p.kv_heads * n, backward_cost(p) / n);
      shared.add(n > 1 ? p.kv_heads : 0, n * p.Lk);
      parts.push_back(n), first.push_back(keys);
      if (n > 1)
        keys += p.kv_heads * n * p.Lk;
      else
        longest = std::max(longest, p.Lk);
    }
  }
};

// The saved statistics and delta of the rows of a tile.
template <typename A>
struct RowStatistics {
  A delta[ROWS], row_max[ROWS], log_sum[ROWS];
};

// Reads the statistics of a tile and computes delta. Rows that see no key, and rows past the end, get row_max = +inf
// and so p = 0. delta_in_tile: delta is computed without Σ p·dp, which gradient_tile adds.
template <typename T, typename A>
inline void load_statistics(
    const Problem& p,
    const Tile& t,
    Matrices<const T> grad,
    Matrices<const A> grad_lse,
    Matrices<const T> out,
    Matrices<const A> stats,
    bool delta_in_tile,
    RowStatistics<A>& rows) {
  for (int64_t r = 0; r < ROWS; ++r) {
    rows.delta[r] = 0, rows.row_max[r] = -MINUS_INFINITY<A>, rows.log_sum[r] = 0;
    if (r >= t.m) continue;
    const A* of_row = stats.at(p.q_begin, t.h, t.first + r);
    if (of_row[0] == MINUS_INFINITY<A>) continue;
    const T *g = grad.at(p.q_begin, t.h, t.first + r), *o = out.at(p.q_begin, t.h, t.first + r);
    Vector<A> sum = {};
    if (!delta_in_tile)
      over_vectors<A>(0, p.DV, [&](int64_t d, auto... n) { sum += load<A>(g + d, n...) * load<A>(o + d, n...); });
    rows.delta[r] = lane_sum<A>(sum) - (grad_lse.data ? *grad_lse.at(p.q_begin, t.h, t.first + r) : A(0));
    rows.row_max[r] = of_row[0], rows.log_sum[r] = of_row[1];
  }
}

// Turns scores s and products dp into the factors p (for dv) and ds (for dk, and by keys for dq). `scale`: of s, if it
// is not applied yet. softcap_grad and dropout_scale may be null. DELTA_IN_TILE: the tile has all columns, and Σ p·dp
// over them is added to delta.
template <bool DELTA_IN_TILE, typename E, typename A>
inline void gradient_tile(
    const Problem& p,
    const Tile& t,
    A scale,
    A* s,
    const A* dp,
    const A* softcap_grad,
    const A* dropout_scale,
    const RowStatistics<A>& rows,
    Unit<E>* p_queries,
    Unit<E>* ds_queries,
    Unit<E>* ds_keys) {
  for (int64_t r = 0; r < whole_steps<A>(t.m); r += LANES<A>) {
    Vector<A> delta = load<A>(rows.delta + r);
    const Vector<A> row_max = load<A>(rows.row_max + r), log_sum = load<A>(rows.log_sum + r);
    const auto probability = [&](int64_t at) {
      return exp_difference<FOLD<E> == 1>(rounded<A>(load<A>(s + at) * scale) - row_max, log_sum);
    };
    if constexpr (DELTA_IN_TILE)
      for (int64_t c = 0; c < t.n; ++c) {
        const int64_t at = c * ROWS + r;
        const Vector<A> e = probability(at);
        store<A, A>(s + at, e);
        // Outside the window p = 0, and dp was not computed: it may be an old NaN.
        const Vector<A> term = e * (dropout_scale ? load<A>(dp + at) * load<A>(dropout_scale + at) : load<A>(dp + at));
        delta += e == A(0) ? Vector<A>{} : term;
      }
    for (int64_t c = 0; c < t.n; c += 2) {
      Vector<A> ds[2] = {};
      for (int64_t i = 0; i < 2 && c + i < t.n; ++i) {
        const int64_t at = (c + i) * ROWS + r;
        Vector<A> e = DELTA_IN_TILE ? load<A>(s + at) : probability(at), d = load<A>(dp + at);
        if (dropout_scale) d *= load<A>(dropout_scale + at);
        ds[i] = e * (d - delta) * A(p.scale);
        if (softcap_grad) ds[i] *= load<A>(softcap_grad + at);
        if (dropout_scale) e *= load<A>(dropout_scale + at);
        store_queries<E, A>(p_queries, c + i, r, e);
        if (FOLD<E> > 1) store_queries<E, A>(ds_queries, c + i, r, ds[i]);
      }
      store_keys<E, A>(ds_keys, c, r, ds[0], ds[1]);
    }
  }
}

// Adds up the sums of the parts of a (document, key head) and writes its dk and dv.
template <typename T, typename A>
inline void finish_keys(
    const Problem& p,
    int64_t kv,
    int64_t parts,
    const A* sums,
    int64_t width,
    int64_t value_width,
    Matrices<T> dk,
    Matrices<T> dv) {
  const int64_t stride = p.Lk * (width + value_width);
  const auto row = [&](const A* from, int64_t size, T* to) {
    over_vectors<A>(0, size, [&](int64_t d, auto... n) {
      Vector<A> x = load<A>(from + d, n...);
      for (int64_t part = 1; part < parts; ++part) x += load<A>(from + part * stride + d, n...);
      store<T, A>(to + d, x, n...);
    });
  };
  for (int64_t j = 0; j < p.Lk; ++j) {
    row(sums + j * width, p.D, dk.at(p.k_begin, kv, j));
    row(sums + p.Lk * width + j * value_width, p.DV, dv.at(p.k_begin, kv, j));
  }
}

template <typename T>
void backward(
    const Problems& documents,
    Matrices<const T> grad,
    Matrices<const compute_t<T>> grad_lse,
    Matrices<const T> q,
    Matrices<const T> k,
    Matrices<const T> v,
    Matrices<const T> out,
    Matrices<const compute_t<T>> stats,
    const Mask<compute_t<T>>& mask,
    Matrices<T> dq,
    Matrices<T> dk,
    Matrices<T> dv) {
  using A = compute_t<T>;
  using E = factor_t<T>;
  using U = Unit<E>;
  constexpr bool FOLDED = FOLD<E> > 1;
  const Problem& call = documents.front();
  const int64_t depth = units<E>(call.D), value_depth = units<E>(call.DV);
  const int64_t q_width = padded<U>(depth), g_width = padded<U>(value_depth);
  const int64_t width = padded<U>(call.D), value_width = padded<U>(call.DV), stride = width + value_width;
  const bool plain = mask.is_plain(call), drops = call.dropout.active();
  const BackwardWork work(documents);
  const std::unique_ptr<A[]> shared(work.keys > 0 ? new A[work.keys * stride] : nullptr);

  parallel_for(0, work.tasks.total(), work.tasks.longest(), [&](int64_t begin, int64_t end) {
    const FlushSubnormals flush;
    const TileRegisters registers;
    Buffer<U> q_rows(ROWS * q_width), qt(q_width * ROWS), g_rows(ROWS * g_width), gt(g_width * ROWS);
    Buffer<U> q_pairs, g_pairs, k_space, v_space, k_pairs;
    Buffer<U> folded(FOLDED ? COLUMNS * ROWS / FOLD<E> * 3 : 0);
    Buffer<A> s(COLUMNS * ROWS), dp(COLUMNS * ROWS), softcap_grad(call.softcap > 0 ? COLUMNS * ROWS : 0),
        dropout_scale(drops ? COLUMNS * ROWS : 0);
    Buffer<A> dq_tile(ROWS * width), own(work.longest * stride);
    RowStatistics<A> rows;
    work.tasks.each(begin, end, [&](int64_t document, int64_t task) {
      const Problem& p = documents[document];
      const int64_t tiles = p.row_tiles(), parts = work.parts[document], kv = task / parts;
      A* const dks = parts > 1 ? shared.get() + (work.first[document] + task * p.Lk) * stride : own.data();
      A* const dvs = dks + p.Lk * width;
      std::fill(dks, dks + p.Lk * stride, A(0));
      const Operand<U> ks = first_factor<E>(k_space, k.at(p.k_begin, kv, 0), k.row, p.Lk, p.D);
      const Operand<U> vs = first_factor<E>(v_space, v.at(p.k_begin, kv, 0), v.row, p.Lk, p.DV);
      const Operand<U> kp = second_factor<E>(k_pairs, k.at(p.k_begin, kv, 0), k.row, p.Lk, p.D);

      for (int64_t index = task % parts; index < p.group() * tiles; index += parts) {
        const int64_t h = kv * p.group() + index / tiles, first = index % tiles * ROWS;
        Tile t{h, first, std::min(ROWS, p.Lq - first), 0, 0};
        const T *q_at = q.at(p.q_begin, h, first), *g_at = grad.at(p.q_begin, h, first);
        pack_queries<E>(qt.data(), q_rows.data(), q_width, q_at, q.row, t.m, p.D);
        pack_queries<E>(gt.data(), g_rows.data(), g_width, g_at, grad.row, t.m, p.DV);
        Operand<U> qp{q_rows.data(), q_width}, gp{g_rows.data(), g_width};
        if constexpr (FOLDED) {
          q_pairs.assign(ROWS / 2 * width, 0), g_pairs.assign(ROWS / 2 * value_width, 0);
          pack_pairs(q_pairs.data(), width, q_at, q.row, t.m, p.D);
          pack_pairs(g_pairs.data(), value_width, g_at, grad.row, t.m, p.DV);
          qp = {q_pairs.data(), width}, gp = {g_pairs.data(), value_width};
        }
        const BlockRange blocks(p, first, first + t.m);
        const bool delta_in_tile = blocks.n_block_max <= blocks.n_block_min + 1;
        load_statistics(p, t, grad, grad_lse, out, stats, delta_in_tile, rows);
        std::fill_n(dq_tile.begin(), t.m * width, A(0));
        for (int64_t n = blocks.n_block_min; n < blocks.n_block_max; ++n) {
          t.j = n * COLUMNS;
          t.n = std::min(COLUMNS, p.Lk - t.j);
          const Shown shown = mask.shown(p, t);
          if (shown == Shown::NONE) continue;
          product_of_keys(p, t, depth, {ks.data + t.j * ks.row, ks.row}, Operand<U>{qt.data(), ROWS}, s.data());
          product_of_keys(p, t, value_depth, {vs.data + t.j * vs.row, vs.row}, Operand<U>{gt.data(), ROWS}, dp.data());
          const bool unmasked = plain && shown == Shown::ALL && is_full(p, t);
          A* const softcap = softcap_grad.empty() ? nullptr : softcap_grad.data();
          if (!unmasked) mask.apply(p, t, shown, s.data(), softcap);
          if (drops) dropout_tile(p, t, dropout_scale.data());
          U* const ps = FOLDED ? folded.data() : reinterpret_cast<U*>(s.data());
          U* const ds_keys = FOLDED ? folded.data() + COLUMNS * ROWS / FOLD<E> : reinterpret_cast<U*>(dp.data());
          U* const ds = FOLDED ? folded.data() + COLUMNS * ROWS / FOLD<E> * 2 : ds_keys;
          const A scale = unmasked ? A(p.scale) : A(1);
          const A* const dropout = drops ? dropout_scale.data() : nullptr;
          if (delta_in_tile)
            gradient_tile<true, E, A>(p, t, scale, s.data(), dp.data(), softcap, dropout, rows, ps, ds, ds_keys);
          else
            gradient_tile<false, E, A>(p, t, scale, s.data(), dp.data(), softcap, dropout, rows, ps, ds, ds_keys);
          add_over_queries<E>(p, t, ps, gp, dvs + t.j * value_width, value_width);
          add_over_queries<E>(p, t, ds, qp, dks + t.j * width, width);
          add_over_keys<E>(p, t, ds_keys, {kp.data + t.j / FOLD<E> * kp.row, kp.row, kp.column}, dq_tile.data(), width);
        }
        for (int64_t r = 0; r < t.m; ++r) {
          T* to = dq.at(p.q_begin, h, first + r);
          over_vectors<A>(
              0, p.D, [&](int64_t d, auto... n) { store<T, A>(to + d, load<A>(&dq_tile[r * width + d]), n...); });
        }
      }
      if (parts == 1) finish_keys(p, kv, 1, dks, width, value_width, dk, dv);
    });
  });
  parallel_for(0, work.shared.total(), work.shared.longest(), [&](int64_t begin, int64_t end) {
    work.shared.each(begin, end, [&](int64_t document, int64_t kv) {
      const Problem& p = documents[document];
      const int64_t parts = work.parts[document], first = work.first[document] + kv * parts * p.Lk;
      finish_keys(p, kv, parts, shared.get() + first * stride, width, value_width, dk, dv);
    });
  });
}

}  // namespace fastgpt
