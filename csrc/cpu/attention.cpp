// Scaled dot-product attention on the CPU, forward and launchers; the backward is in attention_bwd.h, the launchers
// for packed documents in attention_varlen.cpp.
//
//   s = scale·q·kᵀ;  s = c·tanh(s/c);  s -= slope·|i + offset - j|;  s += mask;  s = -inf outside the band
//   m = max s,  l = log Σ exp(s - m);  p = exp((s - m) - l);  out = (p∘keep)·v
//
// m and l are two numbers: in their sum, the log-sum-exp, l would be lost beside large scores. m is a rounded product,
// and so s is rounded before it is subtracted: where the compiler contracts the two, a large s - m is a rounding error.
//
// One task per (document, head, tile of queries) walks the keys with a running maximum and sum (online softmax,
// arXiv:1805.02867); the scores of a tile are never stored beyond it. bfloat16 is multiplied as such where the
// CPU can (factor_t), everything else in float; sums are float (double for double).
//
// FLOPs: 4·D a visible (query, key) pair, at the rate of the matrix product; a tile of 64 × 64 × 64 is 262,144
// multiply-adds (16,384 vector instructions in float, half of that in bfloat16), beside which its 4,096
// exponentials (256 vectors, 13 instructions each) are a fifth to two fifths, so all that remains is
// kept small: v is packed once a tile, k not at all, q once. Tiles outside the band are skipped, and
// within a tile on its edge strips of 16. Bytes: q, k, v, out once, k and v again a tile of queries, from the cache.
#include "attention.h"

#include "attention_bwd.h"

namespace fastgpt {
namespace {

// ---- forward ----

// The softmax of a tile in its columns of queries: scores s to factors p, statistics brought up to date.
// Returns whether out must be rescaled, by `rescale`.
template <typename E, typename A>
bool softmax_tile(const Tile& t, A scale, const A* s, Unit<E>* p, const A* keep, A* top, A* sum, A* rescale) {
  bool moved = false;
  for (int64_t r = 0; r < t.m; r += LANES<A>) {
    const auto score = [&](int64_t c) { return rounded<A>(load<A>(s + c * ROWS + r) * scale); };
    Vector<A> tile_top = broadcast(NOTHING<A>);
    for (int64_t c = 0; c < t.n; ++c) tile_top = max(score(c), tile_top);
    const Vector<A> old = load<A>(top + r), now = max(old, tile_top);
    // Where nothing was seen yet, any finite origin makes exp(-inf) = 0 of the scores.
    const Vector<A> origin = now == NOTHING<A> ? Vector<A>{} : now;
    const Vector<A> factor = exp(old - origin);
    Vector<A> total = {};  // of the tile, so that a sum of 2^24 grows by more than one at a time
    for (int64_t c = 0; c < t.n; c += 2) {
      Vector<A> e[2] = {};
      for (int64_t i = 0; i < 2 && c + i < t.n; ++i) {
        e[i] = exp<FOLD<E> == 1>(score(c + i) - origin);
        total += e[i];
        if (keep) e[i] *= load<A>(keep + (c + i) * ROWS + r);
      }
      store_keys<E, A>(p, c, r, e[0], e[1]);
    }
    moved |= any_above<A>(now, old);
    store<A, A>(rescale + r, factor);
    store<A, A>(top + r, now);
    store<A, A>(sum + r, load<A>(sum + r) * factor + total);
  }
  return moved;
}

template <typename T>
void forward(
    const Problems& documents,
    View<const T> q,
    View<const T> k,
    View<const T> v,
    const Mask<compute_t<T>>& mask,
    const compute_t<T>* alibi,
    View<T> out,
    View<compute_t<T>> stats) {
  using A = compute_t<T>;
  using E = factor_t<T>;
  using U = Unit<E>;
  const Problem& call = documents.front();
  const int64_t depth = units<E>(call.size), width = padded<U>(depth), value_width = padded<U>(call.value_size);
  const bool plain = call.softcap <= 0 && !alibi && !mask.seen && !mask.added, drops = call.dropout.active();
  Work work;
  for (const Problem& p : documents) work.add(p.heads * p.row_tiles(), p.cost() / std::max<int64_t>(1, p.row_tiles()));

  at::parallel_for(0, work.total(), work.longest(), [&](int64_t begin, int64_t end) {
    Buffer<U> rows(ROWS * width), qt(width * ROWS), k_space, v_space, factors(FOLD<E> > 1 ? COLUMNS / 2 * ROWS : 0);
    Buffer<A> s(COLUMNS * ROWS), o(ROWS * value_width), keep(drops ? COLUMNS * ROWS : 0);
    A top[ROWS], sum[ROWS], rescale[ROWS];
    work.each(begin, end, [&](int64_t document, int64_t task) {
      const Problem& p = documents[document];
      // Light and heavy tiles of a causal triangle in turns, so that any stretch of tasks is as long as another.
      const int64_t tiles = p.row_tiles(), turn = task % tiles, tile = turn % 2 ? tiles - 1 - turn / 2 : turn / 2;
      const int64_t h = task / tiles, kv = h / p.group(), first = tile * ROWS, m = std::min(ROWS, p.rows - first);
      pack_queries<E>(qt.data(), rows.data(), width, q.at(p.queries, h, first), q.row, m, p.size);
      std::fill_n(o.begin(), m * value_width, A(0));
      std::fill(top, top + ROWS, NOTHING<A>);
      std::fill(sum, sum + ROWS, A(0));

      const Span seen = p.columns_of(first, first + m);
      for (int64_t j = seen.begin / COLUMNS * COLUMNS; j < seen.end; j += COLUMNS) {
        const Tile t{h, first, m, j, std::min(COLUMNS, p.columns - j)};
        const Operand<U> ks = first_factor<E>(k_space, k.at(p.keys, kv, j), k.row, t.n, p.size);
        product_of_keys(p, t, depth, ks, Operand<U>{qt.data(), ROWS}, s.data());
        const bool simple = plain && is_whole(p, t);
        if (!simple) score_tile(p, t, mask, alibi, s.data(), static_cast<A*>(nullptr));
        if (drops) keep_tile(p, t, keep.data());
        U* const ps = FOLD<E> > 1 ? factors.data() : reinterpret_cast<U*>(s.data());
        const A scale = simple ? A(p.scale) : A(1);
        if (softmax_tile<E>(t, scale, s.data(), ps, drops ? keep.data() : nullptr, top, sum, rescale))
          for (int64_t r = 0; r < m; ++r)
            for (A* x = o.data() + r * value_width; x < o.data() + (r + 1) * value_width; x += LANES<A>)
              store<A, A>(x, load<A>(x) * rescale[r]);
        const Operand<U> vs = second_factor<E>(v_space, v.at(p.keys, kv, j), v.row, t.n, p.value_size);
        add_over_keys<E>(p, t, ps, vs, o.data(), value_width);
      }

      for (int64_t r = 0; r < m; ++r) {
        const bool nothing = sum[r] == A(0);
        const A inverse = nothing ? A(0) : A(1) / sum[r];
        T* to = out.at(p.queries, h, first + r);
        over_vectors<A>(0, p.value_size, [&](int64_t d, auto... n) {
          const Vector<A> x = load<A>(&o[r * value_width + d]) * inverse;
          store<T, A>(to + d, nothing ? Vector<A>{} : x, n...);
        });
        A* const of_row = stats.at(p.queries, h, first + r);
        of_row[0] = nothing ? NOTHING<A> : top[r];
        of_row[1] = nothing ? A(0) : std::log(sum[r]);
      }
    });
  });
}

// ---- launchers ----

// An empty (B, heads, L, D) laid out as (B, L, heads, D).
Tensor head_major(const Tensor& like, int64_t batch, int64_t heads, int64_t length, int64_t size) {
  return at::empty({batch, length, heads, size}, like.options()).transpose(1, 2);
}

// A floating mask in the compute type, converted before it is broadcast.
Tensor prepare_mask(const OptionalTensor& mask, at::ScalarType acc) {
  if (!mask || mask->scalar_type() == at::kBool || mask->scalar_type() == acc) return mask.value_or(Tensor());
  Tensor least = *mask;
  for (int64_t d = 0; d < least.dim(); ++d)
    if (least.stride(d) == 0 && least.size(d) > 1) least = least.narrow(d, 0, 1);
  return least.to(acc).expand(mask->sizes());
}

// Every entry of the batch is a document.
Problems entries(const Tensor& q, const Tensor& k, Problem p) {
  Problems documents;
  p.rows = q.size(2), p.columns = k.size(2);
  for (int64_t b = 0; b < q.size(0); ++b) {
    p.number = b, p.queries = p.keys = {b, 0};
    documents.push_back(p);
  }
  return documents;
}

// q (B, H, Lq, D), k (B, Hk, Lk, D), v (B, Hk, Lk, Dv), attn_mask (B, H, Lq, Lk).
Checks check_inputs(
    const char* op,
    const Tensor& q,
    const Tensor& k,
    const Tensor& v,
    const OptionalTensor& mask,
    const OptionalTensor& slopes,
    const OptionalTensor& seed,
    double dropout_p) {
  const Checks check(op, "q", q, {ANY, ANY, ANY, ANY});
  const auto type = q.scalar_type();
  check("k", k, {q.size(0), ANY, ANY, q.size(3)}, type)("v", v, {q.size(0), k.size(1), k.size(2), ANY}, type);
  check(
      "attn_mask",
      mask,
      {q.size(0), q.size(1), q.size(2), k.size(2)},
      {at::kBool, at::kFloat, at::kBFloat16, at::kHalf, at::kDouble});
  check_extras(check, q, slopes, q.size(0), seed, dropout_p);
  return check;
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
  check_inputs("attention_fwd_cpp", q_, k_, v_, attn_mask, alibi_slopes, seed, dropout_p);
  const Tensor q = rows_contiguous(q_), k = rows_contiguous(k_), v = rows_contiguous(v_);
  const Problem p = describe(q, k, v, seed, scale, lower_right, left, right, softcap, dropout_p);
  const auto acc = accumulator(q.scalar_type());
  Tensor out = head_major(q, q.size(0), p.heads, q.size(2), p.value_size);
  Tensor stats = at::empty({q.size(0), p.heads, q.size(2), 2}, q.options().dtype(acc));
  const Tensor slopes = prepare_slopes(alibi_slopes, q.size(0), p.heads, acc);
  attend(entries(q, k, p), q, k, v, prepare_mask(attn_mask, acc), slopes, out, stats);
  return {out, stats};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> attention_bwd(
    const Tensor& grad_,
    const OptionalTensor& grad_lse_,
    const Tensor& q_,
    const Tensor& k_,
    const Tensor& v_,
    const Tensor& out_,
    const Tensor& stats,
    const OptionalTensor& attn_mask,
    const OptionalTensor& alibi_slopes,
    const OptionalTensor& seed,
    double scale,
    bool lower_right,
    int64_t left,
    int64_t right,
    double softcap,
    double dropout_p,
    bool mask_grad,
    bool /*deterministic: always*/) {
  TORCH_CHECK_NOT_IMPLEMENTED(!mask_grad, "attention_bwd_cpp does not compute the gradient of attn_mask");
  const Checks check = check_inputs("attention_bwd_cpp", q_, k_, v_, attn_mask, alibi_slopes, seed, dropout_p);
  const int64_t batch = q_.size(0), heads = q_.size(1), rows = q_.size(2), value_size = v_.size(3);
  const auto type = q_.scalar_type(), acc = accumulator(type);
  check("grad_out", grad_, {batch, heads, rows, value_size}, type)("out", out_, {batch, heads, rows, value_size}, type);
  check("grad_lse", grad_lse_, {batch, heads, rows}, acc)("stats", stats, {batch, heads, rows, 2}, acc);
  const Tensor q = rows_contiguous(q_), k = rows_contiguous(k_), v = rows_contiguous(v_);
  const Tensor grad = rows_contiguous(grad_), out = rows_contiguous(out_);
  const Problem p = describe(q, k, v, seed, scale, lower_right, left, right, softcap, dropout_p);
  const Tensor grad_lse = grad_lse_ ? grad_lse_->to(acc) : Tensor();
  Tensor dq = head_major(q, q.size(0), p.heads, q.size(2), p.size);
  Tensor dk = head_major(k, q.size(0), p.kv_heads, k.size(2), p.size);
  Tensor dv = head_major(v, q.size(0), p.kv_heads, k.size(2), p.value_size);
  const Tensor mask = prepare_mask(attn_mask, acc), slopes = prepare_slopes(alibi_slopes, q.size(0), p.heads, acc);
  attend_backward(entries(q, k, p), grad, grad_lse, q, k, v, out, stats.to(acc).contiguous(), mask, slopes, dq, dk, dv);
  return {dq, dk, dv, at::empty({0}, q.options())};
}

TORCH_LIBRARY_IMPL(fastgpt, CPU, m) {
  m.impl("attention_fwd_cpp", &attention_fwd);
  m.impl("attention_bwd_cpp", &attention_bwd);
}

}  // namespace

// ---- what attention_varlen.cpp shares ----

Tensor rows_contiguous(const Tensor& t) { return t.size(3) <= 1 || t.stride(3) == 1 ? t : t.contiguous(); }

Tensor prepare_slopes(const OptionalTensor& slopes, int64_t documents, int64_t heads, at::ScalarType acc) {
  return slopes ? slopes->to(acc).expand({documents, heads}).contiguous() : Tensor();
}

void check_extras(
    const Checks& check,
    const Tensor& q,
    const OptionalTensor& slopes,
    int64_t documents,
    const OptionalTensor& seed,
    double dropout_p) {
  const auto acc = accumulator(q.scalar_type());
  if (slopes && slopes->dim() == 1)
    check("alibi_slopes", slopes, {q.size(1)}, acc);
  else
    check("alibi_slopes", slopes, {documents, q.size(1)}, acc);
  check("seed", seed, {1}, at::kLong);
  TORCH_CHECK(dropout_p == 0 || seed, "attention: dropout needs a seed");
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
  p.heads = q.size(1), p.kv_heads = k.size(1), p.size = q.size(3), p.value_size = v.size(3);
  TORCH_CHECK(p.kv_heads > 0 && p.heads % p.kv_heads == 0, "attention: the heads of k must divide those of q");
  p.scale = scale, p.softcap = softcap, p.lower_right = lower_right, p.left = left, p.right = right;
  if (dropout_p > 0) p.dropout = {static_cast<uint64_t>(seed->const_data_ptr<int64_t>()[0]), dropout_p};
  return p;
}

void attend(
    const Problems& documents,
    const Tensor& q,
    const Tensor& k,
    const Tensor& v,
    const Tensor& mask,
    const Tensor& slopes,
    const Tensor& out,
    const Tensor& stats) {
  if (documents.empty()) return;
  dispatch(q.scalar_type(), "attention", [&](auto element) {
    using T = decltype(element);
    using A = compute_t<T>;
    forward<T>(
        documents,
        View<const T>(q),
        View<const T>(k),
        View<const T>(v),
        Mask<A>(mask),
        slopes.defined() ? slopes.const_data_ptr<A>() : nullptr,
        View<T>(out),
        View<A>(stats));
  });
}

void attend_backward(
    const Problems& documents,
    const Tensor& grad,
    const Tensor& grad_lse,
    const Tensor& q,
    const Tensor& k,
    const Tensor& v,
    const Tensor& out,
    const Tensor& stats,
    const Tensor& mask,
    const Tensor& slopes,
    const Tensor& dq,
    const Tensor& dk,
    const Tensor& dv) {
  if (documents.empty()) return;
  dispatch(q.scalar_type(), "attention", [&](auto element) {
    using T = decltype(element);
    using A = compute_t<T>;
    backward<T>(
        documents,
        View<const T>(grad),
        View<const A>(grad_lse),
        View<const T>(q),
        View<const T>(k),
        View<const T>(v),
        View<const T>(out),
        View<const A>(stats),
        Mask<A>(mask),
        slopes.defined() ? slopes.const_data_ptr<A>() : nullptr,
        View<T>(dq),
        View<T>(dk),
        View<T>(dv));
  });
}

}  // namespace fastgpt
