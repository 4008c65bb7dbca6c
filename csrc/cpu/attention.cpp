// Scaled dot-product attention on the CPU, tile by tile; the scores are never stored.
//
//   s = scale·q·kᵀ;  s = c·tanh(s/c);  s -= slope·|i + offset - j|;  s += mask;  s = -inf outside the band
//   p = exp(s - lse);  out = (p∘keep)·v
//   backward, with delta = Σ dout·out - g_lse:
//     dv = (p∘keep)ᵀ·dout;  dp = (dout·vᵀ)∘keep;  ds = p∘(dp - delta)·(1 - (s/c)²)
//     dq = scale·ds·k;  dk = scale·dsᵀ·q
//
// A tile is ROWS queries × COLUMNS keys. Forward: one task per (batch, head, tile of queries) walks the
// keys with a running maximum and sum (online softmax, arXiv:1805.02867). Backward: one task per
// (batch, key head) walks the keys and, for each tile of them, the queries that see it: five products
// a tile, dq summed in a buffer of the task, so that no bit depends on the number of threads.
// Tiles outside the band are skipped. Everything is computed in float (double for double).
#include <ATen/core/LegacyTypeDispatch.h>

#include "gemm.h"
#include "kernel.h"
#include "philox.h"

namespace fastgpt {
namespace {

constexpr int64_t ROWS = 64, COLUMNS = 64;

template <typename A>
using Buffer = std::vector<A>;

// Everything about a call but the element types.
struct Problem {
  int64_t batch, heads, kv_heads, rows, columns, size, value_size;  // size: of a head
  double scale, softcap;
  int64_t left, right, offset;
  Dropout dropout;

  int64_t group() const { return heads / kv_heads; }
  // The columns that the rows [first, last) see: [begin, end).
  int64_t begin_column(int64_t first) const { return left < 0 ? 0 : std::max<int64_t>(0, first + offset - left); }
  int64_t end_column(int64_t last) const {
    return right < 0 ? columns : std::clamp<int64_t>(last + offset + right, 0, columns);
  }
};

// A (B, heads, L, D) tensor of any strides but the last.
template <typename T>
struct View {
  T* data;
  int64_t batch, head, row;

  explicit View(const Tensor& t)
      : data(const_cast<T*>(t.const_data_ptr<std::remove_const_t<T>>())),
        batch(t.stride(0)),
        head(t.stride(1)),
        row(t.stride(2)) {}
  T* at(int64_t b, int64_t h, int64_t i) const { return data + b * batch + h * head + i * row; }
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

  void apply(A* s, int64_t b, int64_t h, int64_t i, int64_t j, int64_t n) const {
    const int64_t at = b * stride[0] + h * stride[1] + i * stride[2] + j * stride[3];
    if (seen)
      for (int64_t c = 0; c < n; ++c) s[c] = seen[at + c * stride[3]] ? s[c] : -std::numeric_limits<A>::infinity();
    if (added)
      for (int64_t c = 0; c < n; ++c) s[c] += added[at + c * stride[3]];
  }
};

// From q·kᵀ to the scores of n columns of one row. With a softcap, the slope of tanh goes to `slope`.
template <typename A>
void score_row(
    const Problem& p,
    const Mask<A>& mask,
    const A* alibi,  // slopes (B, H) or null
    A* s,
    A* slope,
    int64_t b,
    int64_t h,
    int64_t i,
    int64_t j,
    int64_t n) {
  for (int64_t c = 0; c < n; ++c) s[c] *= A(p.scale);
  if (p.softcap > 0) {
    const A cap = A(p.softcap);
    for (int64_t c = 0; c < n; ++c) {
      const A t = vtanh(s[c] / cap);
      s[c] = cap * t;
      if (slope) slope[c] = A(1) - t * t;
    }
  }
  const int64_t diagonal = i + p.offset;
  if (alibi) {
    const A m = alibi[b * p.heads + h];
    for (int64_t c = 0; c < n; ++c) s[c] -= m * std::fabs(A(diagonal - j - c));
  }
  mask.apply(s, b, h, i, j, n);
  if (p.left >= 0)
    for (int64_t c = 0; c < std::min(n, diagonal - p.left - j); ++c) s[c] = -std::numeric_limits<A>::infinity();
  if (p.right >= 0)
    for (int64_t c = std::max<int64_t>(0, diagonal + p.right + 1 - j); c < n; ++c)
      s[c] = -std::numeric_limits<A>::infinity();
}

// rows of T into a buffer (n, width) of A, zero beyond `size`.
template <typename A, typename T>
void load_rows(A* out, int64_t width, const T* in, int64_t stride, int64_t n, int64_t size) {
  for (int64_t i = 0; i < n; ++i) {
    load(out + i * width, in + i * stride, size);
    std::fill(out + i * width + size, out + (i + 1) * width, A(0));
  }
}

// The transpose of a buffer (n, from_width) into (size, to_width), zero beyond n.
template <typename A>
void transpose(A* out, int64_t to_width, const A* in, int64_t from_width, int64_t n, int64_t size) {
  for (int64_t d = 0; d < size; ++d) {
    for (int64_t i = 0; i < n; ++i) out[d * to_width + i] = in[i * from_width + d];
    std::fill(out + d * to_width + n, out + (d + 1) * to_width, A(0));
  }
}

// ---- forward ----

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
  constexpr A NOTHING = -std::numeric_limits<A>::infinity();
  const int64_t tiles = (p.rows + ROWS - 1) / ROWS;
  const int64_t width = padded<A>(p.size), value_width = padded<A>(p.value_size), columns = padded<A>(COLUMNS);
  at::parallel_for(0, p.batch * p.heads * tiles, 1, [&](int64_t begin, int64_t end) {
    Buffer<A> qs(ROWS * width), ks(COLUMNS * width), kt(p.size * columns), vs(COLUMNS * value_width);
    Buffer<A> s(ROWS * columns), o(ROWS * value_width), keep(COLUMNS);
    A top[ROWS], sum[ROWS];
    for (int64_t task = begin; task < end; ++task) {
      const int64_t b = task / (p.heads * tiles), h = task / tiles % p.heads, first = task % tiles * ROWS;
      const int64_t m = std::min(ROWS, p.rows - first), kv = h / p.group();
      load_rows(qs.data(), width, q.at(b, h, first), q.row, m, p.size);
      std::fill(o.begin(), o.end(), A(0));
      std::fill(top, top + ROWS, NOTHING);
      std::fill(sum, sum + ROWS, A(0));

      const int64_t last_column = p.end_column(first + m);
      for (int64_t j = p.begin_column(first) / COLUMNS * COLUMNS; j < last_column; j += COLUMNS) {
        const int64_t n = std::min(COLUMNS, p.columns - j);
        load_rows(ks.data(), width, k.at(b, kv, j), k.row, n, p.size);
        transpose(kt.data(), columns, ks.data(), width, n, p.size);
        load_rows(vs.data(), value_width, v.at(b, kv, j), v.row, n, p.value_size);
        std::fill(s.begin(), s.end(), A(0));
        gemm(m, columns, p.size, qs.data(), width, int64_t{1}, kt.data(), columns, s.data(), columns);
        for (int64_t i = 0; i < m; ++i) {
          A* row = s.data() + i * columns;
          score_row(p, mask, alibi, row, static_cast<A*>(nullptr), b, h, first + i, j, n);
          const A tile_top = max_of(row, n), new_top = tile_top > top[i] ? tile_top : top[i];
          if (new_top == NOTHING) {
            // Nothing seen yet; a NaN among the scores must still come through.
            for (int64_t c = 0; c < n; ++c) row[c] = row[c] != row[c] ? row[c] : A(0);
            sum[i] += sum_over<A>(n, [&](int64_t c) { return row[c]; });
            continue;
          }
          const A rescale = vexp(top[i] - new_top);
          for (int64_t c = 0; c < n; ++c) row[c] = vexp(row[c] - new_top);
          sum[i] = sum[i] * rescale + sum_over<A>(n, [&](int64_t c) { return row[c]; });
          top[i] = new_top;
          if (rescale != A(1))
            for (int64_t d = 0; d < value_width; ++d) o[i * value_width + d] *= rescale;
          if (p.dropout.active()) {
            p.dropout.row(keep.data(), b, h, first + i, j, n);
            for (int64_t c = 0; c < n; ++c) row[c] *= keep[c];
          }
        }
        gemm(m, value_width, n, s.data(), columns, int64_t{1}, vs.data(), value_width, o.data(), value_width);
      }

      for (int64_t i = 0; i < m; ++i) {
        const bool nothing = sum[i] == A(0);
        const A inverse = nothing ? A(0) : A(1) / sum[i];
        A* row = o.data() + i * value_width;
        for (int64_t d = 0; d < p.value_size; ++d) row[d] = nothing ? A(0) : row[d] * inverse;
        store(out.at(b, h, first + i), row, p.value_size);
        lse[(b * p.heads + h) * p.rows + first + i] = nothing ? NOTHING : top[i] + std::log(sum[i]);
      }
    }
  });
}

// ---- backward ----

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
  const int64_t width = padded<A>(p.size), value_width = padded<A>(p.value_size), columns = padded<A>(COLUMNS);
  at::parallel_for(0, p.batch * p.kv_heads, 1, [&](int64_t begin, int64_t end) {
    Buffer<A> qs(ROWS * width), gs(ROWS * value_width), os(value_width);
    Buffer<A> ks(COLUMNS * width), kt(p.size * columns), vs(COLUMNS * value_width), vt(p.value_size * columns);
    Buffer<A> s(ROWS * columns), dp(ROWS * columns), slope(p.softcap > 0 ? COLUMNS : 0), keep(COLUMNS);
    Buffer<A> dks(COLUMNS * width), dvs(COLUMNS * value_width);
    Buffer<A> dqs(p.group() * p.rows * width), delta(p.group() * p.rows);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t b = task / p.kv_heads, kv = task % p.kv_heads;
      std::fill(dqs.begin(), dqs.end(), A(0));
      for (int64_t g = 0; g < p.group(); ++g) {
        const int64_t h = kv * p.group() + g;
        for (int64_t i = 0; i < p.rows; ++i) {
          load(gs.data(), grad.at(b, h, i), p.value_size);
          load(os.data(), out.at(b, h, i), p.value_size);
          delta[g * p.rows + i] = sum_over<A>(p.value_size, [&](int64_t d) { return gs[d] * os[d]; }) -
                                  (grad_lse ? grad_lse[(b * p.heads + h) * p.rows + i] : A(0));
        }
      }

      for (int64_t j = 0; j < p.columns; j += COLUMNS) {
        const int64_t n = std::min(COLUMNS, p.columns - j);
        load_rows(ks.data(), width, k.at(b, kv, j), k.row, n, p.size);
        transpose(kt.data(), columns, ks.data(), width, n, p.size);
        load_rows(vs.data(), value_width, v.at(b, kv, j), v.row, n, p.value_size);
        transpose(vt.data(), columns, vs.data(), value_width, n, p.value_size);
        std::fill(dks.begin(), dks.end(), A(0));
        std::fill(dvs.begin(), dvs.end(), A(0));

        for (int64_t g = 0; g < p.group(); ++g) {
          const int64_t h = kv * p.group() + g;
          for (int64_t first = 0; first < p.rows; first += ROWS) {
            const int64_t m = std::min(ROWS, p.rows - first);
            if (p.end_column(first + m) <= j || p.begin_column(first) >= j + n) continue;
            load_rows(qs.data(), width, q.at(b, h, first), q.row, m, p.size);
            load_rows(gs.data(), value_width, grad.at(b, h, first), grad.row, m, p.value_size);
            std::fill(s.begin(), s.end(), A(0));
            std::fill(dp.begin(), dp.end(), A(0));
            gemm(m, columns, p.size, qs.data(), width, int64_t{1}, kt.data(), columns, s.data(), columns);
            gemm(m, columns, p.value_size, gs.data(), value_width, int64_t{1}, vt.data(), columns, dp.data(), columns);
            for (int64_t i = 0; i < m; ++i) {
              A *row = s.data() + i * columns, *drow = dp.data() + i * columns;
              const A row_lse = lse[(b * p.heads + h) * p.rows + first + i], d = delta[g * p.rows + first + i];
              score_row(p, mask, alibi, row, p.softcap > 0 ? slope.data() : nullptr, b, h, first + i, j, n);
              if (row_lse == -std::numeric_limits<A>::infinity()) {
                std::fill(row, row + n, A(0));
                std::fill(drow, drow + n, A(0));
                continue;
              }
              for (int64_t c = 0; c < n; ++c) row[c] = vexp(row[c] - row_lse);
              if (p.dropout.active()) {
                p.dropout.row(keep.data(), b, h, first + i, j, n);
                for (int64_t c = 0; c < n; ++c) drow[c] *= keep[c];
              }
              for (int64_t c = 0; c < n; ++c) drow[c] = row[c] * (drow[c] - d) * A(p.scale);
              if (p.softcap > 0)
                for (int64_t c = 0; c < n; ++c) drow[c] *= slope[c];
              if (p.dropout.active())
                for (int64_t c = 0; c < n; ++c) row[c] *= keep[c];
            }
            gemm(n, value_width, m, s.data(), int64_t{1}, columns, gs.data(), value_width, dvs.data(), value_width);
            gemm(n, width, m, dp.data(), int64_t{1}, columns, qs.data(), width, dks.data(), width);
            A* dq_tile = dqs.data() + (g * p.rows + first) * width;
            gemm(m, width, n, dp.data(), columns, int64_t{1}, ks.data(), width, dq_tile, width);
          }
        }
        for (int64_t i = 0; i < n; ++i) {
          store(dk.at(b, kv, j + i), dks.data() + i * width, p.size);
          store(dv.at(b, kv, j + i), dvs.data() + i * value_width, p.value_size);
        }
      }
      for (int64_t g = 0; g < p.group(); ++g)
        for (int64_t i = 0; i < p.rows; ++i)
          store(dq.at(b, kv * p.group() + g, i), dqs.data() + (g * p.rows + i) * width, p.size);
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
