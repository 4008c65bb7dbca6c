// Scaled dot-product attention on the CPU: forward and launchers. The backward is in attention_bwd.h, the launchers for
// packed documents are in attention_varlen.cpp.
//
//   s = scale·q·kᵀ;  s = c·tanh(s/c);  s -= slope·|i + diagonal - j|;  s += attn_mask;  s = -inf outside the window
//   m = max s,  l = log Σ exp(s - m);  p = exp((s - m) - l);  out = (p∘dropout)·v
//
// m and l are kept as two numbers: in their sum, the log-sum-exp, l would be lost beside large scores. m is a rounded
// product, so s is also rounded before m is subtracted. If the compiler contracted product and subtraction, s - m of
// large scores would be a rounding error instead of 0.
//
// One task per (document, head, tile of queries) visits the keys with a running maximum and sum (online softmax,
// arXiv:1805.02867). Only one tile of scores exists at a time. The factors are bfloat16 if the CPU can multiply it
// (factor_t), on the tiles of AMX if it has them (amx.h), otherwise float. Sums are float (double for double).
//
// FLOPs: 4·D per visible (query, key) pair, at the rate of the matrix product. A tile of 64 × 64 × 64 takes 262,144
// multiply-adds (16,384 vector instructions in float, half as many in bfloat16). Its 4,096 exponentials (256 vectors of
// 13 instructions) take a fifth to two fifths of that. Other work is kept small: v is packed once per tile, q once, k
// not at all. Tiles outside the window and tiles that attn_mask hides are skipped, and at the window's edge strips of
// 16. Bytes moved: q, k, v and out once; k and v again for each tile of queries, from the cache.
#include "attention.h"

#include "attention_bwd.h"
#include "attention_mask_grad.h"

namespace fastgpt {
namespace {

// ---- forward ----

// The running maximum and sum of the ROWS queries of a tile.
template <typename A>
struct OnlineSoftmax {
  A row_max[ROWS], row_sum[ROWS], factor[ROWS];  // factor: of out, for the last tile

  void reset() {
    std::fill(row_max, row_max + ROWS, MINUS_INFINITY<A>);
    std::fill(row_sum, row_sum + ROWS, A(0));
  }

  // Adds the scores s of a tile, which `scale` multiplies: updates the maximum and the sum, and writes the factors p of
  // the product with v. dropout_scale may be null. Returns whether a maximum changed, so that out must be rescaled.
  template <typename E>
  bool add(const Tile& t, A scale, const A* s, Unit<E>* p, const A* dropout_scale) {
    bool changed = false;
    for (int64_t r = 0; r < t.m; r += LANES<A>) {
      const auto score = [&](int64_t c) { return rounded<A>(load<A>(s + c * ROWS + r) * scale); };
      Vector<A> tile_max = broadcast(MINUS_INFINITY<A>);
      for (int64_t c = 0; c < t.n; ++c) tile_max = max(score(c), tile_max);
      const Vector<A> old = load<A>(row_max + r), next = max(old, tile_max);
      // For a row that has not seen any key, any finite origin gives exp(-inf) = 0.
      const Vector<A> origin = next == MINUS_INFINITY<A> ? Vector<A>{} : next;
      const Vector<A> rescale = exp(old - origin);
      Vector<A> tile_sum = {};  // summed on its own, so that a row_sum of 2^24 still grows
      for (int64_t c = 0; c < t.n; c += 2) {
        Vector<A> e[2] = {};
        for (int64_t i = 0; i < 2 && c + i < t.n; ++i) {
          e[i] = exp<FOLD<E> == 1>(score(c + i) - origin);
          tile_sum += e[i];
          if (dropout_scale) e[i] *= load<A>(dropout_scale + (c + i) * ROWS + r);
        }
        store_keys<E, A>(p, c, r, e[0], e[1]);
      }
      changed |= any_above<A>(next, old);
      store<A, A>(factor + r, rescale);
      store<A, A>(row_max + r, next);
      store<A, A>(row_sum + r, load<A>(row_sum + r) * rescale + tile_sum);
    }
    return changed;
  }

  // Multiplies the first m rows of out (ROWS, width) by the factors of the last tile.
  void rescale(A* out, int64_t m, int64_t width) const {
    for (int64_t r = 0; r < m; ++r)
      for (A* x = out + r * width; x < out + (r + 1) * width; x += LANES<A>) store<A, A>(x, load<A>(x) * factor[r]);
  }
};

template <typename T>
void forward(
    const Problems& documents,
    Matrices<const T> q,
    Matrices<const T> k,
    Matrices<const T> v,
    const Mask<compute_t<T>>& mask,
    Matrices<T> out,
    Matrices<compute_t<T>> stats) {
  using A = compute_t<T>;
  using E = factor_t<T>;
  using U = Unit<E>;
  const Problem& call = documents.front();
  const int64_t depth = units<E>(call.D), width = padded<U>(depth), value_width = padded<U>(call.DV);
  const bool plain = mask.is_plain(call), drops = call.dropout.active();
  Work work;
  for (const Problem& p : documents) work.add(p.heads * p.row_tiles(), p.cost() / std::max<int64_t>(1, p.row_tiles()));

  parallel_for(0, work.total(), work.longest(), [&](int64_t begin, int64_t end) {
    const FlushSubnormals flush;
    const TileRegisters registers;
    Buffer<U> rows(ROWS * width), qt(width * ROWS), k_space, v_space, factors(FOLD<E> > 1 ? COLUMNS / 2 * ROWS : 0);
    Buffer<A> s(COLUMNS * ROWS), o(ROWS * value_width), dropout_scale(drops ? COLUMNS * ROWS : 0);
    OnlineSoftmax<A> softmax;
    work.each(begin, end, [&](int64_t document, int64_t task) {
      const Problem& p = documents[document];
      // Alternates the short and the long tiles of a causal triangle, so that every range of tasks costs about the
      // same.
      const int64_t tiles = p.row_tiles(), turn = task % tiles, tile = turn % 2 ? tiles - 1 - turn / 2 : turn / 2;
      const int64_t h = task / tiles, kv = h / p.group(), first = tile * ROWS, m = std::min(ROWS, p.Lq - first);
      pack_queries<E>(qt.data(), rows.data(), width, q.at(p.q_begin, h, first), q.row, m, p.D);
      std::fill_n(o.begin(), m * value_width, A(0));
      softmax.reset();

      const BlockRange blocks(p, first, first + m);
      for (int64_t n = blocks.n_block_min; n < blocks.n_block_max; ++n) {
        const int64_t j = n * COLUMNS;
        const Tile t{h, first, m, j, std::min(COLUMNS, p.Lk - j)};
        const Shown shown = mask.shown(p, t);
        if (shown == Shown::NONE) continue;
        const Operand<U> ks = first_factor<E>(k_space, k.at(p.k_begin, kv, j), k.row, t.n, p.D);
        product_of_keys(p, t, depth, ks, Operand<U>{qt.data(), ROWS}, s.data());
        const bool unmasked = plain && shown == Shown::ALL && is_full(p, t);
        if (!unmasked) mask.apply(p, t, shown, s.data(), nullptr);
        if (drops) dropout_tile(p, t, dropout_scale.data());
        U* const ps = FOLD<E> > 1 ? factors.data() : reinterpret_cast<U*>(s.data());
        const A scale = unmasked ? A(p.scale) : A(1);
        if (softmax.template add<E>(t, scale, s.data(), ps, drops ? dropout_scale.data() : nullptr))
          softmax.rescale(o.data(), m, value_width);
        const Operand<U> vs = second_factor<E>(v_space, v.at(p.k_begin, kv, j), v.row, t.n, p.DV);
        add_over_keys<E>(p, t, ps, vs, o.data(), value_width);
      }

      for (int64_t r = 0; r < m; ++r) {
        const A row_max = softmax.row_max[r], row_sum = softmax.row_sum[r];
        const bool is_empty = row_sum == A(0);
        const A inverse = is_empty ? A(0) : A(1) / row_sum;
        T* to = out.at(p.q_begin, h, first + r);
        over_vectors<A>(0, p.DV, [&](int64_t d, auto... n) {
          const Vector<A> x = load<A>(&o[r * value_width + d]) * inverse;
          store<T, A>(to + d, is_empty ? Vector<A>{} : x, n...);
        });
        A* const of_row = stats.at(p.q_begin, h, first + r);
        of_row[0] = is_empty ? MINUS_INFINITY<A> : row_max;
        of_row[1] = is_empty ? A(0) : std::log(row_sum);
      }
    });
  });
}

// ---- launchers ----

// An empty (B, heads, L, size) tensor with the memory layout (B, L, heads, size).
Tensor head_major(ScalarType type, int64_t batch, int64_t heads, int64_t length, int64_t size) {
  const auto step = [](int64_t n) { return std::max<int64_t>(n, 1); };
  const int64_t head = step(size), row = head * step(heads), entry = row * step(length);
  return empty_strided({batch, heads, length, size}, {entry, head, row, 1}, type);
}

// Broadcasts a mask (B or 1, H or 1, Lq or 1, Lk or 1) to (B, H, Lq, Lk). A floating mask is converted to the compute
// type before, while it is small.
OptionalTensor prepare_mask(const OptionalTensor& mask, const Tensor& q, const Tensor& k, ScalarType acc) {
  if (!mask) return mask;
  std::array<int64_t, 4> smallest, strides, sizes{q.size(0), q.size(1), q.size(2), k.size(2)};
  for (size_t d = 0; d < 4; ++d)
    smallest[d] = mask->stride(d) == 0 ? std::min<int64_t>(mask->size(d), 1) : mask->size(d);
  Tensor small = as_strided(*mask, smallest, mask->strides());
  if (mask->scalar_type() != ScalarType::Bool && mask->scalar_type() != acc) small = to(small, acc);
  for (int64_t d = 0; d < 4; ++d) strides[d] = smallest[d] == 1 ? 0 : small.stride(d);
  return as_strided(small, sizes, strides);
}

// The documents of a batch: each entry is one.
Problems batch_documents(const Tensor& q, const Tensor& k, Problem p) {
  Problems documents;
  p.Lq = q.size(2), p.Lk = k.size(2);
  for (int64_t b = 0; b < q.size(0); ++b) {
    p.document = b, p.q_begin = p.k_begin = {b, 0};
    documents.push_back(p);
  }
  return documents;
}

// Checks q (B, H, Lq, D), k (B, Hk, Lk, D), v (B, Hk, Lk, DV), attn_mask (B or 1, H or 1, Lq or 1, Lk or 1) and the
// other options.
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
  std::array<int64_t, 4> sizes{q.size(0), q.size(1), q.size(2), k.size(2)};
  if (mask && mask->dim() == 4)
    for (int64_t d = 0; d < 4; ++d) sizes[d] = mask->size(d) == 1 ? 1 : sizes[d];
  check(
      "attn_mask",
      mask,
      sizes,
      {ScalarType::Bool, ScalarType::Float, ScalarType::BFloat16, ScalarType::Half, ScalarType::Double});
  check_slopes_and_seed(check, q, slopes, q.size(0), seed, dropout_p);
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
  const Problem p = common_problem(q, k, v, seed, scale, lower_right, left, right, softcap, dropout_p);
  const auto acc = accumulator(q.scalar_type());
  Tensor out = head_major(q.scalar_type(), q.size(0), p.heads, q.size(2), p.DV);
  Tensor stats = empty({q.size(0), p.heads, q.size(2), 2}, acc);
  const OptionalTensor slopes = prepare_slopes(alibi_slopes, q.size(0), p.heads);
  forward_documents(batch_documents(q, k, p), q, k, v, prepare_mask(attn_mask, q, k, acc), slopes, out, stats);
  return {out, stats};
}

// The gradient of a mask of these sizes, in the compute type. `mask`: expanded.
Tensor mask_gradient(
    const Problems& documents,
    const Tensor& grad,
    const OptionalTensor& grad_lse,
    const Tensor& q,
    const Tensor& k,
    const Tensor& v,
    const Tensor& out,
    const Tensor& stats,
    const Tensor& mask,
    const OptionalTensor& slopes,
    Sizes sizes) {
  if (documents.empty()) return zeros(sizes, stats.scalar_type());
  Tensor dmask = empty(sizes, stats.scalar_type());
  dispatch(q.scalar_type(), "attention", [&](auto element) {
    using T = decltype(element);
    using A = compute_t<T>;
    mask_backward<T>(
        documents,
        Matrices<const T>(grad),
        Matrices<const A>(grad_lse),
        Matrices<const T>(q),
        Matrices<const T>(k),
        Matrices<const T>(v),
        Matrices<const T>(out),
        Matrices<const A>(stats),
        Mask<A>(mask, slopes),
        MaskGradient<A>{dmask.mutable_data_ptr<A>(), sizes[0], sizes[1], sizes[2], sizes[3]});
  });
  return dmask;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> attention_bwd(
    const Tensor& grad_,
    const OptionalTensor& grad_lse,
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
  const Checks check = check_inputs("attention_bwd_cpp", q_, k_, v_, attn_mask, alibi_slopes, seed, dropout_p);
  const int64_t batch = q_.size(0), heads = q_.size(1), rows = q_.size(2), DV = v_.size(3);
  const auto type = q_.scalar_type(), acc = accumulator(type);
  check("grad_out", grad_, {batch, heads, rows, DV}, type)("out", out_, {batch, heads, rows, DV}, type);
  check("grad_lse", grad_lse, {batch, heads, rows}, acc)("stats", stats, {batch, heads, rows, 2}, acc);
  const Tensor q = rows_contiguous(q_), k = rows_contiguous(k_), v = rows_contiguous(v_);
  const Tensor grad = rows_contiguous(grad_), out = rows_contiguous(out_);
  const Problem p = common_problem(q, k, v, seed, scale, lower_right, left, right, softcap, dropout_p);
  Tensor dq = head_major(type, q.size(0), p.heads, q.size(2), p.D);
  Tensor dk = head_major(type, q.size(0), p.kv_heads, k.size(2), p.D);
  Tensor dv = head_major(type, q.size(0), p.kv_heads, k.size(2), p.DV);
  const OptionalTensor mask = prepare_mask(attn_mask, q, k, acc);
  const OptionalTensor slopes = prepare_slopes(alibi_slopes, q.size(0), p.heads);
  const Problems documents = batch_documents(q, k, p);
  const Tensor row_stats = contiguous(stats);
  backward_documents(documents, grad, grad_lse, q, k, v, out, row_stats, mask, slopes, dq, dk, dv);
  if (!mask_grad) return {dq, dk, dv, empty({0}, type)};
  require(
      attn_mask && attn_mask->scalar_type() != ScalarType::Bool,
      "attention_bwd_cpp: mask_grad needs a floating attn_mask");
  const Tensor dmask =
      mask_gradient(documents, grad, grad_lse, q, k, v, out, row_stats, *mask, slopes, attn_mask->sizes());
  return {dq, dk, dv, to(dmask, attn_mask->scalar_type())};
}

STABLE_TORCH_LIBRARY_IMPL(fastgpt, CPU, m) {
  m.impl("attention_fwd_cpp", TORCH_BOX(&attention_fwd));
  m.impl("attention_bwd_cpp", TORCH_BOX(&attention_bwd));
}

}  // namespace

// ---- functions of attention.h ----

Tensor rows_contiguous(const Tensor& t) { return t.size(3) <= 1 || t.stride(3) == 1 ? t : contiguous(t); }

OptionalTensor prepare_slopes(const OptionalTensor& slopes, int64_t documents, int64_t heads) {
  if (!slopes) return {};
  const int64_t step = slopes->dim() == 1 ? 0 : slopes->stride(0);
  return contiguous(as_strided(*slopes, {documents, heads}, {step, slopes->stride(-1)}));
}

void check_slopes_and_seed(
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
  check("seed", seed, {1}, ScalarType::Long);
  require(dropout_p == 0 || seed, "attention: dropout needs a seed; pass a tensor of one int64");
}

Problem common_problem(
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
  p.heads = q.size(1), p.kv_heads = k.size(1), p.D = q.size(3), p.DV = v.size(3);
  require(
      p.kv_heads > 0 && p.heads % p.kv_heads == 0,
      "attention: the heads of k must divide those of q, got ",
      p.kv_heads,
      " and ",
      p.heads);
  p.scale = scale, p.softcap = softcap, p.lower_right = lower_right, p.left = left, p.right = right;
  if (dropout_p > 0) p.dropout = {static_cast<uint64_t>(seed->const_data_ptr<int64_t>()[0]), dropout_p};
  return p;
}

void forward_documents(
    const Problems& documents,
    const Tensor& q,
    const Tensor& k,
    const Tensor& v,
    const OptionalTensor& mask,
    const OptionalTensor& slopes,
    const Tensor& out,
    const Tensor& stats) {
  if (documents.empty()) return;
  dispatch(q.scalar_type(), "attention", [&](auto element) {
    using T = decltype(element);
    using A = compute_t<T>;
    forward<T>(
        documents,
        Matrices<const T>(q),
        Matrices<const T>(k),
        Matrices<const T>(v),
        Mask<A>(mask, slopes),
        Matrices<T>(out),
        Matrices<A>(stats));
  });
}

void backward_documents(
    const Problems& documents,
    const Tensor& grad,
    const OptionalTensor& grad_lse,
    const Tensor& q,
    const Tensor& k,
    const Tensor& v,
    const Tensor& out,
    const Tensor& stats,
    const OptionalTensor& mask,
    const OptionalTensor& slopes,
    const Tensor& dq,
    const Tensor& dk,
    const Tensor& dv) {
  if (documents.empty()) return;
  dispatch(q.scalar_type(), "attention", [&](auto element) {
    using T = decltype(element);
    using A = compute_t<T>;
    backward<T>(
        documents,
        Matrices<const T>(grad),
        Matrices<const A>(grad_lse),
        Matrices<const T>(q),
        Matrices<const T>(k),
        Matrices<const T>(v),
        Matrices<const T>(out),
        Matrices<const A>(stats),
        Mask<A>(mask, slopes),
        Matrices<T>(dq),
        Matrices<T>(dk),
        Matrices<T>(dv));
  });
}

}  // namespace fastgpt
