// Scaled dot-product attention on the CPU, backward.
//
//   delta = Σ dout·out - g_lse;  p = exp(s - lse)
//   dv = (p∘keep)ᵀ·dout;  dp = (dout·vᵀ)∘keep;  ds = p∘(dp - delta)·(1 - (s/c)²)
//   dq = scale·ds·k;  dk = scale·dsᵀ·q
//
// Five products a tile, each tile once. A task owns a (batch, key head) or, where there are few of these, every
// parts-th tile of its queries; it walks the tiles of its queries and for each the keys that they see. dq is
// summed in the tile, dk and dv in float buffers of the task, which are added up in the end: how many parts
// there are follows from the shapes, so that no bit depends on the number of threads.
//
// FLOPs: 10·D a visible pair, at the rate of the matrix product. Beside them a tile has 4,096 exponentials and packs
// what five products need: q and dout in both directions once a tile of queries, k once in all.
#pragma once

#include "attention_tiles.h"

namespace fastgpt {

// Tasks to divide the work into, at least.
constexpr int64_t TASKS = 16;

inline int64_t backward_parts(const Problem& p) {
  const int64_t units = std::max<int64_t>(1, p.batch * p.kv_heads);
  return std::clamp<int64_t>((TASKS + units - 1) / units, 1, std::max<int64_t>(1, p.group() * p.row_tiles()));
}

// delta of m rows, and their lse; a row that saw nothing, or is none, gets an lse of +inf and so p = 0.
template <typename T, typename A>
inline void row_statistics(
    const Problem& p,
    const Tile& t,
    View<const T> grad,
    const A* grad_lse,
    View<const T> out,
    const A* lse,
    A* delta,
    A* top) {
  const int64_t base = (t.b * p.heads + t.h) * p.rows + t.first;
  for (int64_t r = 0; r < ROWS; ++r) {
    delta[r] = 0, top[r] = -NOTHING<A>;
    if (r >= t.m || lse[base + r] == NOTHING<A>) continue;
    const T *g = grad.at(t.b, t.h, t.first + r), *o = out.at(t.b, t.h, t.first + r);
    Vector<A> sum = {};
    over_vectors<A>(0, p.value_size, [&](int64_t d, auto... n) { sum += load<A>(g + d, n...) * load<A>(o + d, n...); });
    delta[r] = lane_sum<A>(sum) - (grad_lse ? grad_lse[base + r] : A(0));
    top[r] = lse[base + r];
  }
}

// From scores s and products dp to the factors: p (for dv) and ds (for dk and, by keys, for dq).
template <typename E, typename A>
inline void gradient_tile(
    const Problem& p,
    const Tile& t,
    A scale,  // of s, where it is not applied yet
    const A* s,
    const A* dp,
    const A* slope,
    const A* keep,
    const A* delta,
    const A* lse,
    Unit<E>* p_queries,
    Unit<E>* ds_queries,
    Unit<E>* ds_keys) {
  for (int64_t r = 0; r < whole_steps<A>(t.m); r += LANES<A>) {
    const Vector<A> row_delta = load<A>(delta + r), row_lse = load<A>(lse + r);
    for (int64_t c = 0; c < t.n; c += 2) {
      Vector<A> ds[2] = {};
      for (int64_t i = 0; i < 2 && c + i < t.n; ++i) {
        const int64_t at = (c + i) * ROWS + r;
        Vector<A> e = exp<FOLD<E> == 1>(load<A>(s + at) * scale - row_lse), d = load<A>(dp + at);
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

// dk and dv of (batch, key head) from the sums of its parts.
template <typename T, typename A>
inline void finish_keys(
    const Problem& p,
    int64_t unit,
    int64_t parts,
    const A* sums,
    int64_t stride,
    int64_t width,
    int64_t value_width,
    View<T> dk,
    View<T> dv) {
  const int64_t b = unit / p.kv_heads, kv = unit % p.kv_heads;
  const auto row = [&](const A* from, int64_t size, T* to) {
    over_vectors<A>(0, size, [&](int64_t d, auto... n) {
      Vector<A> x = load<A>(from + d, n...);
      for (int64_t part = 1; part < parts; ++part) x += load<A>(from + part * stride + d, n...);
      store<T, A>(to + d, x, n...);
    });
  };
  for (int64_t j = 0; j < p.columns; ++j) {
    row(sums + j * width, p.size, dk.at(b, kv, j));
    row(sums + p.columns * width + j * value_width, p.value_size, dv.at(b, kv, j));
  }
}

template <typename T>
void backward(
    const Problem& p,
    View<const T> grad,
    const compute_t<T>* grad_lse,
    View<const T> q,
    View<const T> k,
    View<const T> v,
    View<const T> out,
    const compute_t<T>* lse,
    const Mask<compute_t<T>>& mask,
    const compute_t<T>* alibi,
    View<T> dq,
    View<T> dk,
    View<T> dv) {
  using A = compute_t<T>;
  using E = factor_t<T>;
  using U = Unit<E>;
  constexpr bool FOLDED = FOLD<E> > 1;
  const int64_t tiles = p.row_tiles(), parts = backward_parts(p), groups = p.batch * p.kv_heads;
  const int64_t depth = units<E>(p.size), value_depth = units<E>(p.value_size);
  const int64_t q_width = padded<U>(depth), g_width = padded<U>(value_depth);
  const int64_t width = padded<U>(p.size), value_width = padded<U>(p.value_size);
  const int64_t stride = p.columns * (width + value_width);
  const bool plain = p.softcap <= 0 && !alibi && !mask.seen && !mask.added, drops = p.dropout.active();
  const std::unique_ptr<A[]> shared(parts > 1 ? new A[groups * parts * stride] : nullptr);

  at::parallel_for(0, groups * parts, 1, [&](int64_t begin, int64_t end) {
    Buffer<U> q_rows(ROWS * q_width), qt(q_width * ROWS), g_rows(ROWS * g_width), gt(g_width * ROWS);
    Buffer<U> q_pairs, g_pairs, k_space, v_space, k_pairs;
    Buffer<U> folded(FOLDED ? COLUMNS * ROWS / FOLD<E> * 3 : 0);
    Buffer<A> s(COLUMNS * ROWS), dp(COLUMNS * ROWS), slope(p.softcap > 0 ? COLUMNS * ROWS : 0),
        keep(drops ? COLUMNS * ROWS : 0);
    Buffer<A> dq_tile(ROWS * width), own(parts > 1 ? 0 : stride);
    A delta[ROWS], top[ROWS];
    for (int64_t task = begin; task < end; ++task) {
      const int64_t b = task / parts / p.kv_heads, kv = task / parts % p.kv_heads;
      A* const dks = parts > 1 ? shared.get() + task * stride : own.data();
      A* const dvs = dks + p.columns * width;
      std::fill(dks, dks + stride, A(0));
      const Operand<U> ks = first_factor<E>(k_space, k.at(b, kv, 0), k.row, p.columns, p.size);
      const Operand<U> vs = first_factor<E>(v_space, v.at(b, kv, 0), v.row, p.columns, p.value_size);
      const Operand<U> kp = second_factor<E>(k_pairs, k.at(b, kv, 0), k.row, p.columns, p.size);

      for (int64_t index = task % parts; index < p.group() * tiles; index += parts) {
        const int64_t h = kv * p.group() + index / tiles, first = index % tiles * ROWS;
        Tile t{b, h, first, std::min(ROWS, p.rows - first), 0, 0};
        const T *q_at = q.at(b, h, first), *g_at = grad.at(b, h, first);
        pack_queries<E>(qt.data(), q_rows.data(), q_width, q_at, q.row, t.m, p.size);
        pack_queries<E>(gt.data(), g_rows.data(), g_width, g_at, grad.row, t.m, p.value_size);
        Operand<U> qp{q_rows.data(), q_width}, gp{g_rows.data(), g_width};
        if constexpr (FOLDED) {
          q_pairs.assign(ROWS / 2 * width, 0), g_pairs.assign(ROWS / 2 * value_width, 0);
          pack_pairs(q_pairs.data(), width, q_at, q.row, t.m, p.size);
          pack_pairs(g_pairs.data(), value_width, g_at, grad.row, t.m, p.value_size);
          qp = {q_pairs.data(), width}, gp = {g_pairs.data(), value_width};
        }
        row_statistics(p, t, grad, grad_lse, out, lse, delta, top);
        std::fill(dq_tile.begin(), dq_tile.end(), A(0));

        const Span seen = p.columns_of(first, first + t.m);
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
          gradient_tile<E, A>(
              p,
              t,
              simple ? A(p.scale) : A(1),
              s.data(),
              dp.data(),
              slope.empty() ? nullptr : slope.data(),
              drops ? keep.data() : nullptr,
              delta,
              top,
              ps,
              ds,
              ds_keys);
          add_over_queries<E>(p, t, ps, gp, dvs + t.j * value_width, value_width);
          add_over_queries<E>(p, t, ds, qp, dks + t.j * width, width);
          add_over_keys<E>(p, t, ds_keys, {kp.data + t.j / FOLD<E> * kp.row, kp.row}, dq_tile.data(), width);
        }
        for (int64_t r = 0; r < t.m; ++r) {
          T* to = dq.at(b, h, first + r);
          over_vectors<A>(
              0, p.size, [&](int64_t d, auto... n) { store<T, A>(to + d, load<A>(&dq_tile[r * width + d]), n...); });
        }
      }
      if (parts == 1) finish_keys(p, task, 1, dks, stride, width, value_width, dk, dv);
    }
  });
  if (parts > 1)
    at::parallel_for(0, groups, 1, [&](int64_t begin, int64_t end) {
      for (int64_t group = begin; group < end; ++group)
        finish_keys(p, group, parts, shared.get() + group * parts * stride, stride, width, value_width, dk, dv);
    });
}

}  // namespace fastgpt
