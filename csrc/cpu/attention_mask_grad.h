// Scaled dot-product attention on the CPU, backward: the gradient of attn_mask.
//
//   dmask = Σ p∘(dp - delta), summed over the dimensions along which the mask was broadcast; symbols as in
//   attention_bwd.h
//
// A task has a tile of rows of the mask, and visits every tile of scores that these were added to: those of all
// documents and heads that share them. So a number is written by one task, in an order that depends only on the shapes,
// and nothing is kept beside the result.
//
// FLOPs: 4·D per visible pair: two of the backward's products are computed again. Bytes moved: the result, in the
// compute type, once per (document, head) that shares it; q, dout, k and v as in the forward.
#pragma once

#include "attention_bwd.h"

namespace fastgpt {

// Turns scores s into p∘(dp - delta); 0 where p is, for dp was not computed outside the window. `scale`: of s, if it is
// not applied yet. dropout_scale may be null. DELTA_IN_TILE: as in gradient_tile.
template <bool DELTA_IN_TILE, bool FOLDED, typename A>
inline void score_gradient_tile(
    const Tile& t, A scale, A* s, const A* dp, const A* dropout_scale, const RowStatistics<A>& rows) {
  for (int64_t r = 0; r < whole_steps<A>(t.m); r += LANES<A>) {
    Vector<A> delta = load<A>(rows.delta + r);
    const Vector<A> row_max = load<A>(rows.row_max + r), log_sum = load<A>(rows.log_sum + r);
    const auto probability = [&](int64_t at) {
      return exp_difference<!FOLDED>(rounded<A>(load<A>(s + at) * scale) - row_max, log_sum);
    };
    const auto dropped = [&](int64_t at) {
      return dropout_scale ? load<A>(dp + at) * load<A>(dropout_scale + at) : load<A>(dp + at);
    };
    if constexpr (DELTA_IN_TILE)
      for (int64_t c = 0; c < t.n; ++c) {
        const Vector<A> e = probability(c * ROWS + r);
        store<A, A>(s + c * ROWS + r, e);
        delta += e == A(0) ? Vector<A>{} : e * dropped(c * ROWS + r);
      }
    for (int64_t c = 0; c < t.n; ++c) {
      const int64_t at = c * ROWS + r;
      const Vector<A> e = DELTA_IN_TILE ? load<A>(s + at) : probability(at);
      store<A, A>(s + at, e == A(0) ? Vector<A>{} : e * (dropped(at) - delta));
    }
  }
}

// The gradient of a mask (documents or 1, heads or 1, Lq or 1, Lk or 1), contiguous.
template <typename A>
struct MaskGradient {
  A* data;
  int64_t documents, heads, rows, columns;

  // Adds a tile, transposed, for the mask of a document and head.
  void add(int64_t document, int64_t head, const Tile& t, const A* ds) const {
    A* const matrix = data + (document * heads + head) * rows * columns;
    for (int64_t r = 0; r < t.m; ++r) {
      A* const row = matrix + (rows == 1 ? 0 : (t.first + r) * columns);
      const A* const from = ds + r * COLUMNS;
      if (columns == 1)
        for (int64_t c = 0; c < t.n; ++c) row[0] += from[c];
      else
        over_vectors<A>(0, t.n, [&](int64_t c, auto... n) {
          store<A, A>(row + t.j + c, load<A>(row + t.j + c, n...) + load<A>(from + c, n...), n...);
        });
    }
  }
};

template <typename T>
void mask_backward(
    const Problems& documents,
    Matrices<const T> grad,
    Matrices<const compute_t<T>> grad_lse,
    Matrices<const T> q,
    Matrices<const T> k,
    Matrices<const T> v,
    Matrices<const T> out,
    Matrices<const compute_t<T>> stats,
    const Mask<compute_t<T>>& mask,
    const MaskGradient<compute_t<T>>& dmask) {
  using A = compute_t<T>;
  using E = factor_t<T>;
  using U = Unit<E>;
  const Problem& call = documents.front();
  const int64_t depth = units<E>(call.D), value_depth = units<E>(call.DV);
  const int64_t width = padded<U>(depth), value_width = padded<U>(value_depth);
  const bool plain = mask.is_plain(call), drops = call.dropout.active();
  const int64_t row_tiles = call.row_tiles(), tiles = dmask.rows == 1 ? 1 : row_tiles;

  parallel_for(0, dmask.documents * dmask.heads * tiles, 1, [&](int64_t begin, int64_t end) {
    const FlushSubnormals flush;
    const TileRegisters registers;
    Buffer<U> rows(ROWS * std::max(width, value_width)), qt(width * ROWS), gt(value_width * ROWS), k_space, v_space;
    Buffer<A> s(COLUMNS * ROWS), dp(COLUMNS * ROWS), dropout_scale(drops ? COLUMNS * ROWS : 0);
    RowStatistics<A> statistics;

    const auto add_rows = [&](const Problem& p, int64_t h, int64_t tile) {
      const int64_t kv = h / p.group(), first = tile * ROWS, m = std::min(ROWS, p.Lq - first);
      pack_queries<E>(qt.data(), rows.data(), width, q.at(p.q_begin, h, first), q.row, m, p.D);
      pack_queries<E>(gt.data(), rows.data(), value_width, grad.at(p.q_begin, h, first), grad.row, m, p.DV);
      const BlockRange blocks(p, first, first + m);
      const bool delta_in_tile = blocks.n_block_max <= blocks.n_block_min + 1;
      load_statistics(p, Tile{h, first, m, 0, 0}, grad, grad_lse, out, stats, delta_in_tile, statistics);
      for (int64_t n = blocks.n_block_min; n < blocks.n_block_max; ++n) {
        const int64_t j = n * COLUMNS;
        const Tile t{h, first, m, j, std::min(COLUMNS, p.Lk - j)};
        const Shown shown = mask.shown(p, t);
        if (shown == Shown::NONE) continue;
        const Operand<U> ks = first_factor<E>(k_space, k.at(p.k_begin, kv, j), k.row, t.n, p.D);
        const Operand<U> vs = first_factor<E>(v_space, v.at(p.k_begin, kv, j), v.row, t.n, p.DV);
        product_of_keys(p, t, depth, ks, Operand<U>{qt.data(), ROWS}, s.data());
        product_of_keys(p, t, value_depth, vs, Operand<U>{gt.data(), ROWS}, dp.data());
        const bool unmasked = plain && shown == Shown::ALL && is_full(p, t);
        if (!unmasked) mask.apply(p, t, shown, s.data(), nullptr);
        if (drops) dropout_tile(p, t, dropout_scale.data());
        const A scale = unmasked ? A(p.scale) : A(1);
        const A* const dropout = drops ? dropout_scale.data() : nullptr;
        if (delta_in_tile)
          score_gradient_tile<true, (FOLD<E> > 1)>(t, scale, s.data(), dp.data(), dropout, statistics);
        else
          score_gradient_tile<false, (FOLD<E> > 1)>(t, scale, s.data(), dp.data(), dropout, statistics);
        transpose(dp.data(), COLUMNS, s.data(), ROWS, t.n, t.m);
        dmask.add(dmask.documents == 1 ? 0 : p.document, dmask.heads == 1 ? 0 : h, t, dp.data());
      }
    };

    for (int64_t task = begin; task < end; ++task) {
      const int64_t document = task / tiles / dmask.heads, head = task / tiles % dmask.heads, tile = task % tiles;
      const int64_t owned = dmask.rows == 1 ? 1 : std::min(ROWS, dmask.rows - tile * ROWS);
      std::fill_n(
          dmask.data + ((document * dmask.heads + head) * dmask.rows + tile * ROWS) * dmask.columns,
          owned * dmask.columns,
          A(0));
      for (const Problem& p : documents) {
        if (dmask.documents > 1 && p.document != document) continue;
        for (int64_t h = dmask.heads == 1 ? 0 : head; h < (dmask.heads == 1 ? p.heads : head + 1); ++h)
          for (int64_t i = tile; i < (dmask.rows == 1 ? row_tiles : tile + 1); ++i) add_rows(p, h, i);
      }
    }
  });
}

}  // namespace fastgpt
