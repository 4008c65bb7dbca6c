// Host code of attention, forward and backward: from tensors and options to the arguments of the kernels.
#pragma once

#include <cmath>

#include "attention.cuh"
#include "checks.cuh"

namespace fastgpt {

struct Options {
  OptionalTensor attn_mask, alibi_slopes, seed;
  double scale;
  bool lower_right;
  int64_t left, right;
  double softcap, dropout_p;
};

// Packed documents: document n is rows cu_seqlens_q[n] .. cu_seqlens_q[n + 1] of q, and likewise of k and v.
struct PackedSeqlens {
  Tensor cu_seqlens_q, cu_seqlens_k;
  int64_t max_seqlen_q, max_seqlen_k;
};

// Checks alibi_slopes (H,) or (batches, H), the seed of the dropout, and the numbers of heads.
inline void check_slopes_and_seed(
    const Checks& check, const char* op, const Tensor& q, const Tensor& k, int64_t batches, const Options& o) {
  const int64_t heads = q.size(1), kv_heads = k.size(1);
  STD_TORCH_CHECK(
      kv_heads > 0 && heads % kv_heads == 0,
      op,
      ": the heads of k must divide those of q, got ",
      kv_heads,
      " and ",
      heads);
  if (o.alibi_slopes.has_value() && o.alibi_slopes->dim() == 1)
    check("alibi_slopes", o.alibi_slopes, {heads}, {ScalarType::Float});
  else
    check("alibi_slopes", o.alibi_slopes, {batches, heads}, {ScalarType::Float});
  check("seed", o.seed, {1}, {ScalarType::Long}).contiguous("alibi_slopes", o.alibi_slopes);
  STD_TORCH_CHECK(o.dropout_p == 0 || o.seed.has_value(), op, ": dropout needs a seed; pass a tensor of one int64");
}

// Checks q (B, H, Lq, D), k (B, Hk, Lk, D), v (B, Hk, Lk, DV), attn_mask (B or 1, H or 1, Lq or 1, Lk or 1) and
// the other options.
inline Checks check_inputs(const char* op, const Tensor& q, const Tensor& k, const Tensor& v, const Options& o) {
  const Checks check(op, "q", q, {ANY, ANY, ANY, ANY});
  const ScalarType dtype = q.scalar_type();
  check("k", k, {q.size(0), ANY, ANY, q.size(3)}, {dtype})("v", v, {q.size(0), k.size(1), k.size(2), ANY}, {dtype});
  check.rows_contiguous("q", q, "k", k, "v", v);
  const bool broadcast = o.attn_mask.has_value() && o.attn_mask->dim() == 4;
  const auto size = [&](int d, int64_t n) { return broadcast && o.attn_mask->size(d) == 1 ? 1 : n; };
  check(
      "attn_mask",
      o.attn_mask,
      {size(0, q.size(0)), size(1, q.size(1)), size(2, q.size(2)), size(3, k.size(2))},
      {ScalarType::Bool, ScalarType::Float, ScalarType::BFloat16, ScalarType::Half});
  check_slopes_and_seed(check, op, q, k, q.size(0), o);
  return check;
}

// Checks q (total_q, H, D), k (total_k, Hk, D), v (total_k, Hk, DV), cu_seqlens and the options.
inline Checks check_inputs(
    const char* op, const Tensor& q, const Tensor& k, const Tensor& v, const Options& o, const PackedSeqlens& d) {
  const Checks check(op, "q", q, {ANY, ANY, ANY});
  const ScalarType dtype = q.scalar_type();
  check("k", k, {ANY, ANY, q.size(2)}, {dtype})("v", v, {k.size(0), k.size(1), ANY}, {dtype});
  check.rows_contiguous("q", q, "k", k, "v", v);
  check("cu_seqlens_q", d.cu_seqlens_q, {ANY}, {ScalarType::Int, ScalarType::Long});
  check("cu_seqlens_k", d.cu_seqlens_k, {d.cu_seqlens_q.size(0)}, {ScalarType::Int, ScalarType::Long});
  STD_TORCH_CHECK(d.cu_seqlens_q.numel() > 0, op, ": cu_seqlens_q must have documents + 1 elements, got none");
  check_slopes_and_seed(check, op, q, k, d.cu_seqlens_q.size(0) - 1, o);
  return check;
}

// The limit is low enough that the sum of two sizes, and a step past the last tile, do not overflow.
inline int checked_int(int64_t n, const char* what) {
  STD_TORCH_CHECK(n >= 0 && n < int64_t{1} << 30, "fastgpt: attention supports less than 2^30 ", what, ", got ", n);
  return static_cast<int>(n);
}

class Attention {
 public:
  Problem problem{};
  bool packed = false;
  int64_t batches, max_seqlen_q, max_seqlen_k;

  // q (B, H, Lq, D), k (B, Hk, Lk, D), v (B, Hk, Lk, DV).
  Attention(const Tensor& q, const Tensor& k, const Tensor& v, const Options& o)
      : Attention(q.size(0), q.size(1), k.size(1), q.size(2), k.size(2), q.size(3), v.size(3), o) {}

  // q (total_q, H, D), k (total_k, Hk, D), v (total_k, Hk, DV).
  Attention(const Tensor& q, const Tensor& k, const Tensor& v, const Options& o, const PackedSeqlens& d)
      : Attention(d.cu_seqlens_q.size(0) - 1, q.size(1), k.size(1), q.size(0), k.size(0), q.size(2), v.size(2), o) {
    packed = true;
    max_seqlen_q = d.max_seqlen_q;
    max_seqlen_k = d.max_seqlen_k;
    cu_seqlens_q_ = torch::stable::contiguous(torch::stable::to(d.cu_seqlens_q, ScalarType::Long));
    cu_seqlens_k_ = torch::stable::contiguous(torch::stable::to(d.cu_seqlens_k, ScalarType::Long));
    problem.cu_seqlens_q = global<const int64_t>(cu_seqlens_q_);
    problem.cu_seqlens_k = global<const int64_t>(cu_seqlens_k_);
  }

  // q, k, v or a tensor of the same layout.
  template <typename T>
  Matrices<T> matrices(const Tensor& x) const {
    const Strides packed_strides{0, x.stride(1), x.stride(0)};
    return {global<T>(x), packed ? packed_strides : Strides{x.stride(0), x.stride(1), x.stride(2)}};
  }

  // Whether the kernels without OPTIONS support the problem: only a causal mask or a window, sizes without padding,
  // aligned rows.
  bool is_plain(const Tensor& q) const {
    const Problem& p = problem;
    const bool padded = p.D != p.DV || (p.D != 64 && p.D != 128);
    // GPUs with 99 KiB of shared memory need the smaller tiles of the OPTIONS kernels for heads of 128.
    const bool fits = p.D == 64 || device_of(q).shared_bytes() > 99 * 1024;
    return q.element_size() == 2 && p.aligned && !padded && fits && p.scale > 0 && p.softcap == 0 && !p.seed &&
           !p.alibi_slopes && !masked_;
  }

  // Sets problem.aligned: whether all rows of these tensors begin at multiples of 16 bytes.
  void set_aligned(std::initializer_list<Tensor> tensors) {
    problem.aligned = true;
    for (const Tensor& x : tensors) {
      bool whole = aligned(x) && x.size(-1) * static_cast<int64_t>(x.element_size()) % 16 == 0;
      for (int64_t d = 0; d + 1 < x.dim(); ++d)
        whole &= x.size(d) <= 1 || x.stride(d) * static_cast<int64_t>(x.element_size()) % 16 == 0;
      problem.aligned &= whole;
    }
  }

 private:
  Attention(
      int64_t batch, int64_t heads, int64_t kv_heads, int64_t Lq, int64_t Lk, int64_t D, int64_t DV, const Options& o)
      : batches(batch), max_seqlen_q(Lq), max_seqlen_k(Lk), options_(o) {
    Problem& p = problem;
    p.heads = checked_int(heads, "heads");
    p.kv_heads = checked_int(kv_heads, "heads");
    p.group = checked_int(heads / kv_heads, "heads");
    p.Lq = checked_int(Lq, "rows");
    p.Lk = checked_int(Lk, "columns");
    p.D = checked_int(D, "columns per head");
    p.DV = checked_int(DV, "columns per head");
    p.lower_right = o.lower_right;
    // A window wider than all rows and columns is no window.
    const int64_t all = Lq + Lk;
    p.left = o.left < 0 || o.left > all ? -1 : static_cast<int>(o.left);
    p.right = o.right < 0 || o.right > all ? -1 : static_cast<int>(o.right);
    p.scale = static_cast<float>(o.scale);
    p.softcap = static_cast<float>(o.softcap);
    if (o.attn_mask.has_value()) {
      const Tensor& m = *o.attn_mask;
      masked_ = true;
      const auto stride = [&](int d) { return m.size(d) == 1 ? 0 : m.stride(d); };
      p.attn_mask.strides = {stride(0), stride(1), stride(2)};
      p.attn_mask.column = stride(3);
      switch (m.scalar_type()) {
        case ScalarType::Bool:
          p.attn_mask.flags = global<const uint8_t>(m);
          break;
        case ScalarType::Float:
          p.attn_mask.fp32 = global<const float>(m);
          break;
        case ScalarType::BFloat16:
          p.attn_mask.in_bf16 = global<const bf16>(m);
          break;
        case ScalarType::Half:
          p.attn_mask.in_fp16 = global<const fp16>(m);
          break;
        default:
          STD_TORCH_CHECK(
              false, "fastgpt: attention supports an attn_mask of bool, float32, bfloat16 or float16; convert it");
      }
    }
    if (o.alibi_slopes.has_value()) {
      p.alibi_slopes = global<const float>(o.alibi_slopes);
      p.alibi_batch_stride = o.alibi_slopes->dim() == 2 ? o.alibi_slopes->stride(0) : 0;
    }
    if (o.seed.has_value() && o.dropout_p > 0) {
      p.seed = global<const int64_t>(o.seed);
      p.dropout_threshold = dropout_threshold(o.dropout_p);
      p.dropout_scale = static_cast<float>(dropout_scale(o.dropout_p));
    }
  }

  bool masked_ = false;
  Tensor cu_seqlens_q_, cu_seqlens_k_;
  Options options_;  // keeps the tensors alive
};

// An empty (B, heads, L, size) tensor with the memory layout (B, L, heads, size), which the surrounding layers use.
inline Tensor head_major(const Tensor& like, int64_t heads, int64_t length, int64_t size) {
  return torch::stable::transpose(empty(like, {like.size(0), length, heads, size}, like.scalar_type()), 1, 2);
}

inline void check_shared_memory(const Device& device, const char* kernel, int bytes) {
  STD_TORCH_CHECK(
      bytes <= device.shared_bytes(),
      "fastgpt: ",
      kernel,
      " needs ",
      bytes,
      " bytes of shared memory a block for this head_dim, and this GPU has ",
      device.shared_bytes(),
      "; use fastgpt.use_backend(\"triton\")");
}

// Calls f with the compile-time arguments of the kernel for these tensors: element type, columns of a head (padded),
// OPTIONS.
template <typename F>
void with_kernel(Attention& a, const Tensor& q, std::initializer_list<Tensor> tensors, F&& f) {
  a.set_aligned(tensors);
  const bool plain = a.is_plain(q) && !a.problem.delta_in_tile;
  const int size = std::max(a.problem.D, a.problem.DV);
  STD_TORCH_CHECK(size <= 256, "fastgpt: attention supports a head_dim of at most 256, got ", size);
  dispatch(q.scalar_type(), "attention", [&](auto element) {
    const auto of_size = [&](auto head) {
      if constexpr (sizeof(element) == 4 || head == 256)
        f(element, head, std::true_type{});
      else
        choose(!plain, [&](auto options) { f(element, head, options); });
    };
    if (size <= 64)
      of_size(std::integral_constant<int, 64>{});
    else if (size <= 128)
      of_size(std::integral_constant<int, 128>{});
    else
      of_size(std::integral_constant<int, 256>{});
  });
}

}  // namespace fastgpt
