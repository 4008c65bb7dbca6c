// Scaled dot-product attention on the CPU, forward and launchers; the backward is in attention_bwd.h.
//
//   s = scale·q·kᵀ;  s = c·tanh(s/c);  s -= slope·|i + offset - j|;  s += mask;  s = -inf outside the band
//   p = exp(s - lse);  out = (p∘keep)·v
//
// One task per (batch, head, tile of queries) walks the keys with a running maximum and sum (online softmax,
// arXiv:1805.02867); the scores of a tile are never stored beyond it. bfloat16 is multiplied as such where the
// CPU can (factor_t), everything else in float; sums are float (double for double).
//
// FLOPs: 4·D a visible (query, key) pair, at the rate of the matrix product; a tile of 64 × 64 × 64 is 262,144
// multiply-adds (16,384 vector instructions in float, half of that in bfloat16), beside which its 4,096
// exponentials (256 vectors, 13 instructions each) are a fifth to two fifths, so all that remains is
// kept small: v is packed once a tile, k not at all, q once. Tiles outside the band are skipped, and
// within a tile on its edge strips of 16. Bytes: q, k, v, out once, k and v again a tile of queries, from the cache.
#include "attention_bwd.h"
#include "attention_tiles.h"

namespace fastgpt {
namespace {

// ---- forward ----

// The softmax of a tile in its columns of queries: scores s to factors p, statistics brought up to date.
// Returns whether out must be rescaled, by `rescale`.
template <typename E, typename A>
bool softmax_tile(const Tile& t, A scale, const A* s, Unit<E>* p, const A* keep, A* top, A* sum, A* rescale) {
  bool moved = false;
  for (int64_t r = 0; r < t.m; r += LANES<A>) {
    Vector<A> tile_top = broadcast(NOTHING<A>);
    for (int64_t c = 0; c < t.n; ++c) tile_top = max(load<A>(s + c * ROWS + r) * scale, tile_top);
    const Vector<A> old = load<A>(top + r), now = max(old, tile_top);
    // Where nothing was seen yet, any finite origin makes exp(-inf) = 0 of the scores.
    const Vector<A> origin = now == NOTHING<A> ? Vector<A>{} : now;
    const Vector<A> factor = exp(old - origin);
    Vector<A> total = load<A>(sum + r) * factor;
    for (int64_t c = 0; c < t.n; c += 2) {
      Vector<A> e[2] = {};
      for (int64_t i = 0; i < 2 && c + i < t.n; ++i) {
        e[i] = exp<FOLD<E> == 1>(load<A>(s + (c + i) * ROWS + r) * scale - origin);
        total += e[i];
        if (keep) e[i] *= load<A>(keep + (c + i) * ROWS + r);
      }
      store_keys<E, A>(p, c, r, e[0], e[1]);
    }
    moved |= any_above<A>(now, old);
    store<A, A>(rescale + r, factor);
    store<A, A>(top + r, now);
    store<A, A>(sum + r, total);
  }
  return moved;
}

template <typename T>
void forward(
    const Problem& p,
    View<const T> q,
    View<const T> k,
    View<const T> v,
    const Mask<compute_t<T>>& mask,
    const compute_t<T>* alibi,
    View<T> out,
    compute_t<T>* lse) {
  using A = compute_t<T>;
  using E = factor_t<T>;
  using U = Unit<E>;
  const int64_t tiles = p.row_tiles(), depth = units<E>(p.size), width = padded<U>(depth);
  const int64_t value_width = padded<U>(p.value_size);
  const bool plain = p.softcap <= 0 && !alibi && !mask.seen && !mask.added, drops = p.dropout.active();
  at::parallel_for(0, p.batch * p.heads * tiles, 1, [&](int64_t begin, int64_t end) {
    Buffer<U> rows(ROWS * width), qt(width * ROWS), k_space, v_space, factors(FOLD<E> > 1 ? COLUMNS / 2 * ROWS : 0);
    Buffer<A> s(COLUMNS * ROWS), o(ROWS * value_width), keep(drops ? COLUMNS * ROWS : 0);
    A top[ROWS], sum[ROWS], rescale[ROWS];
    for (int64_t task = begin; task < end; ++task) {
      // Light and heavy tiles of a causal triangle in turns, so that any stretch of tasks is as long as another.
      const int64_t turn = task % tiles, tile = turn % 2 ? tiles - 1 - turn / 2 : turn / 2;
      const int64_t b = task / (p.heads * tiles), h = task / tiles % p.heads, first = tile * ROWS;
      const int64_t m = std::min(ROWS, p.rows - first), kv = h / p.group();
      pack_queries<E>(qt.data(), rows.data(), width, q.at(b, h, first), q.row, m, p.size);
      std::fill(o.begin(), o.end(), A(0));
      std::fill(top, top + ROWS, NOTHING<A>);
      std::fill(sum, sum + ROWS, A(0));

      const Span seen = p.columns_of(first, first + m);
      for (int64_t j = seen.begin / COLUMNS * COLUMNS; j < seen.end; j += COLUMNS) {
        const Tile t{b, h, first, m, j, std::min(COLUMNS, p.columns - j)};
        const Operand<U> ks = first_factor<E>(k_space, k.at(b, kv, j), k.row, t.n, p.size);
        product_of_keys(p, t, depth, ks, Operand<U>{qt.data(), ROWS}, s.data());
        const bool simple = plain && is_whole(p, t);
        if (!simple) score_tile(p, t, mask, alibi, s.data(), static_cast<A*>(nullptr));
        if (drops) keep_tile(p, t, keep.data());
        U* const ps = FOLD<E> > 1 ? factors.data() : reinterpret_cast<U*>(s.data());
        const A scale = simple ? A(p.scale) : A(1);
        if (softmax_tile<E>(t, scale, s.data(), ps, drops ? keep.data() : nullptr, top, sum, rescale))
          for (int64_t r = 0; r < m; ++r)
            for (A* x = &o[r * value_width]; x < &o[r * value_width] + value_width; x += LANES<A>)
              store<A, A>(x, load<A>(x) * rescale[r]);
        const Operand<U> vs = second_factor<E>(v_space, v.at(b, kv, j), v.row, t.n, p.value_size);
        add_over_keys<E>(p, t, ps, vs, o.data(), value_width);
      }

      for (int64_t r = 0; r < m; ++r) {
        const bool nothing = sum[r] == A(0);
        const A inverse = nothing ? A(0) : A(1) / sum[r];
        T* to = out.at(b, h, first + r);
        over_vectors<A>(0, p.value_size, [&](int64_t d, auto... n) {
          const Vector<A> x = load<A>(&o[r * value_width + d]) * inverse;
          store<T, A>(to + d, nothing ? Vector<A>{} : x, n...);
        });
        lse[(b * p.heads + h) * p.rows + first + r] = nothing ? NOTHING<A> : top[r] + std::log(sum[r]);
      }
    }
  });
}

// ---- launchers ----

// An empty (B, heads, L, D) laid out as (B, L, heads, D).
Tensor head_major(const Tensor& like, int64_t batch, int64_t heads, int64_t length, int64_t size) {
  return at::empty({batch, length, heads, size}, like.options()).transpose(1, 2);
}

Tensor rows_contiguous(const Tensor& t) { return t.size(3) <= 1 || t.stride(3) == 1 ? t : t.contiguous(); }

// A floating mask in the compute type, converted before it is broadcast.
Tensor prepare_mask(const OptionalTensor& mask, at::ScalarType acc) {
  if (!mask || mask->scalar_type() == at::kBool || mask->scalar_type() == acc) return mask.value_or(Tensor());
  Tensor least = *mask;
  for (int64_t d = 0; d < least.dim(); ++d)
    if (least.stride(d) == 0 && least.size(d) > 1) least = least.narrow(d, 0, 1);
  return least.to(acc).expand(mask->sizes());
}

Tensor prepare_slopes(const OptionalTensor& slopes, const Problem& p, at::ScalarType acc) {
  return slopes ? slopes->to(acc).expand({p.batch, p.heads}).contiguous() : Tensor();
}

Problem describe(
    const Tensor& q,
    const Tensor& k,
    const Tensor& v,
    const OptionalTensor& seed,
    double scale,
    bool lower_right,
    int64_t left,
    int64_t right,
    double softcap,
    double dropout_p) {
  Problem p{};
  p.batch = q.size(0), p.heads = q.size(1), p.kv_heads = k.size(1);
  p.rows = q.size(2), p.columns = k.size(2), p.size = q.size(3), p.value_size = v.size(3);
  TORCH_CHECK(p.kv_heads > 0 && p.heads % p.kv_heads == 0, "attention: the heads of k must divide those of q");
  TORCH_CHECK(
      k.size(0) == p.batch && v.size(0) == p.batch && v.size(1) == p.kv_heads && v.size(2) == p.columns &&
          k.size(3) == p.size && k.scalar_type() == q.scalar_type() && v.scalar_type() == q.scalar_type(),
      "attention: q, k and v do not match");
  p.scale = scale, p.softcap = softcap, p.left = left, p.right = right;
  p.offset = lower_right ? p.columns - p.rows : 0;
  TORCH_CHECK(dropout_p == 0 || seed, "attention: dropout needs a seed");
  if (dropout_p > 0) p.dropout = {static_cast<uint64_t>(seed->const_data_ptr<int64_t>()[0]), dropout_p};
  return p;
}

std::tuple<Tensor, Tensor> attention_fwd(
    const Tensor& q_,
    const Tensor& k_,
    const Tensor& v_,
    const OptionalTensor& attn_mask,
    const OptionalTensor& alibi_slopes,
    const OptionalTensor& seed,
    double scale,
    bool lower_right,
    int64_t left,
    int64_t right,
    double softcap,
    double dropout_p) {
  const Tensor q = rows_contiguous(q_), k = rows_contiguous(k_), v = rows_contiguous(v_);
  const Problem p = describe(q, k, v, seed, scale, lower_right, left, right, softcap, dropout_p);
  const auto acc = accumulator(q.scalar_type());
  const Tensor mask = prepare_mask(attn_mask, acc), slopes = prepare_slopes(alibi_slopes, p, acc);
  Tensor out = head_major(q, p.batch, p.heads, p.rows, p.value_size);
  Tensor lse = at::empty({p.batch, p.heads, p.rows}, q.options().dtype(acc));
  dispatch(q.scalar_type(), "attention", [&](auto element) {
    using T = decltype(element);
    using A = compute_t<T>;
    forward<T>(
        p,
        View<const T>(q),
        View<const T>(k),
        View<const T>(v),
        Mask<A>(mask),
        slopes.defined() ? slopes.const_data_ptr<A>() : nullptr,
        View<T>(out),
        lse.mutable_data_ptr<A>());
  });
  return {out, lse};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> attention_bwd(
    const Tensor& grad_,
    const OptionalTensor& grad_lse_,
    const Tensor& q_,
    const Tensor& k_,
    const Tensor& v_,
    const Tensor& out_,
    const Tensor& lse_,
    const OptionalTensor& attn_mask,
    const OptionalTensor& alibi_slopes,
    const OptionalTensor& seed,
    double scale,
    bool lower_right,
    int64_t left,
    int64_t right,
    double softcap,
    double dropout_p,
    bool mask_grad) {
  TORCH_CHECK_NOT_IMPLEMENTED(!mask_grad, "attention_bwd_cpp does not compute the gradient of attn_mask");
  const Tensor q = rows_contiguous(q_), k = rows_contiguous(k_), v = rows_contiguous(v_);
  const Tensor grad = rows_contiguous(grad_), out = rows_contiguous(out_), lse = lse_.contiguous();
  const Problem p = describe(q, k, v, seed, scale, lower_right, left, right, softcap, dropout_p);
  const auto acc = accumulator(q.scalar_type());
  const Tensor mask = prepare_mask(attn_mask, acc), slopes = prepare_slopes(alibi_slopes, p, acc);
  const Tensor grad_lse = grad_lse_ ? grad_lse_->to(acc).contiguous() : Tensor();
  Tensor dq = head_major(q, p.batch, p.heads, p.rows, p.size);
  Tensor dk = head_major(k, p.batch, p.kv_heads, p.columns, p.size);
  Tensor dv = head_major(v, p.batch, p.kv_heads, p.columns, p.value_size);
  dispatch(q.scalar_type(), "attention", [&](auto element) {
    using T = decltype(element);
    using A = compute_t<T>;
    backward<T>(
        p,
        View<const T>(grad),
        grad_lse.defined() ? grad_lse.const_data_ptr<A>() : nullptr,
        View<const T>(q),
        View<const T>(k),
        View<const T>(v),
        View<const T>(out),
        lse.const_data_ptr<A>(),
        Mask<A>(mask),
        slopes.defined() ? slopes.const_data_ptr<A>() : nullptr,
        View<T>(dq),
        View<T>(dk),
        View<T>(dv));
  });
  return {dq, dk, dv, at::empty({0}, q.options())};
}

TORCH_LIBRARY_IMPL(fastgpt, CPU, m) {
  m.impl("attention_fwd_cpp", &attention_fwd);
  m.impl("attention_bwd_cpp", &attention_bwd);
}

}  // namespace
}  // namespace fastgpt
