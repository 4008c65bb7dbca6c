// The host's side of attention, forward and backward: from tensors and options to what the kernels take.
#pragma once

#include <cmath>

#include "attention.cuh"
#include "checks.cuh"

namespace fastgpt {

struct Options {
  OptionalTensor mask, slopes, seed;
  double scale;
  bool lower_right;
  int64_t left, right;
  double softcap, dropout_p;
};

// Packed documents: document n holds rows cu_q[n] .. cu_q[n + 1] of q, and likewise of k and v.
struct Documents {
  Tensor cu_q, cu_k;
  int64_t longest_q, longest_k;
};

// Checks what goes with the heads and rows of q: slopes (H,) or (documents, H), and the seed of the dropout.
inline void check_extras(
    const Checks& check, const char* op, const Tensor& q, const Tensor& k, int64_t documents, const Options& o) {
  const int64_t heads = q.size(1), key_heads = k.size(1);
  STD_TORCH_CHECK(key_heads > 0 && heads % key_heads == 0, op, ": the heads of k must divide those of q");
  if (o.slopes.has_value() && o.slopes->dim() == 1)
    check("alibi_slopes", o.slopes, {heads}, {ScalarType::Float});
  else
    check("alibi_slopes", o.slopes, {documents, heads}, {ScalarType::Float});
  check("seed", o.seed, {1}, {ScalarType::Long}).contiguous("alibi_slopes", o.slopes);
  STD_TORCH_CHECK(o.dropout_p == 0 || o.seed.has_value(), op, ": dropout needs a seed");
}

// Checks q (B, H, Lq, D), k (B, Hk, Lk, D), v (B, Hk, Lk, DV) and the options; a mask is (B, H, Lq, Lk).
inline Checks check_inputs(const char* op, const Tensor& q, const Tensor& k, const Tensor& v, const Options& o) {
  const Checks check(op, "q", q, {ANY, ANY, ANY, ANY});
  const ScalarType dtype = q.scalar_type();
  check("k", k, {q.size(0), ANY, ANY, q.size(3)}, {dtype})("v", v, {q.size(0), k.size(1), k.size(2), ANY}, {dtype});
  check.rows_contiguous("q", q, "k", k, "v", v);
  check(
      "attn_mask",
      o.mask,
      {q.size(0), q.size(1), q.size(2), k.size(2)},
      {ScalarType::Bool, ScalarType::Float, ScalarType::BFloat16, ScalarType::Half});
  check_extras(check, op, q, k, q.size(0), o);
  return check;
}

// Checks q (total_q, H, D), k (total_k, Hk, D), v (total_k, Hk, DV), the bounds of the documents and the options.
inline Checks check_inputs(
    const char* op, const Tensor& q, const Tensor& k, const Tensor& v, const Options& o, const Documents& d) {
  const Checks check(op, "q", q, {ANY, ANY, ANY});
  const ScalarType dtype = q.scalar_type();
  check("k", k, {ANY, ANY, q.size(2)}, {dtype})("v", v, {k.size(0), k.size(1), ANY}, {dtype});
  check.rows_contiguous("q", q, "k", k, "v", v);
  check("cu_seqlens_q", d.cu_q, {ANY}, {ScalarType::Int, ScalarType::Long});
  check("cu_seqlens_k", d.cu_k, {d.cu_q.size(0)}, {ScalarType::Int, ScalarType::Long});
  STD_TORCH_CHECK(d.cu_q.numel() > 0, op, ": cu_seqlens_q must have documents + 1 elements, got none");
  check_extras(check, op, q, k, d.cu_q.size(0) - 1, o);
  return check;
}

// The limit leaves room for the sum of two sizes, and for a step beyond the last tile.
inline int checked_int(int64_t n, const char* what) {
  STD_TORCH_CHECK(n >= 0 && n < int64_t{1} << 30, "fastgpt: attention takes less than 2^30 ", what, ", not ", n);
  return static_cast<int>(n);
}

class Attention {
 public:
  Problem problem{};
  bool packed = false;
  int64_t batches, longest_q, longest_k;

  // q (B, H, Lq, D), k (B, Hk, Lk, D), v (B, Hk, Lk, DV).
  Attention(const Tensor& q, const Tensor& k, const Tensor& v, const Options& o)
      : Attention(q.size(0), q.size(1), k.size(1), q.size(2), k.size(2), q.size(3), v.size(3), o) {}

  // q (total_q, H, D), k (total_k, Hk, D), v (total_k, Hk, DV).
  Attention(const Tensor& q, const Tensor& k, const Tensor& v, const Options& o, const Documents& d)
      : Attention(d.cu_q.size(0) - 1, q.size(1), k.size(1), q.size(0), k.size(0), q.size(2), v.size(2), o) {
    packed = true;
    longest_q = d.longest_q;
    longest_k = d.longest_k;
    cu_q_ = torch::stable::contiguous(torch::stable::to(d.cu_q, ScalarType::Long));
    cu_k_ = torch::stable::contiguous(torch::stable::to(d.cu_k, ScalarType::Long));
    problem.cu_q = global<const int64_t>(cu_q_);
    problem.cu_k = global<const int64_t>(cu_k_);
  }

  // A tensor of q's, k's or v's kind.
  template <typename T>
  Matrices<T> matrices(const Tensor& x) const {
    const Strides packed_strides{0, x.stride(1), x.stride(0)};
    return {global<T>(x), packed ? packed_strides : Strides{x.stride(0), x.stride(1), x.stride(2)}};
  }

  // Whether the kernels without options serve: nothing but a band, sizes without padding, whole lines of memory.
  bool is_plain(const Tensor& q) const {
    const Problem& p = problem;
    const bool padded = p.D != p.DV || (p.D != 64 && p.D != 128);
    // Where there are but 99 KiB of shared memory, 128 columns have the smaller tiles of the options.
    const bool fits = p.D == 64 || device_of(q).shared_bytes() > 99 * 1024;
    return q.element_size() == 2 && p.aligned && !padded && fits && p.scale > 0 && p.softcap == 0 && !p.seed &&
           !p.slopes && !masked_;
  }

  // Looks whether all rows of these tensors begin at multiples of 16 bytes.
  void align(std::initializer_list<Tensor> tensors) {
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
      int64_t batch, int64_t heads, int64_t key_heads, int64_t Lq, int64_t Lk, int64_t D, int64_t DV, const Options& o)
      : batches(batch), longest_q(Lq), longest_k(Lk), options_(o) {
    Problem& p = problem;
    p.heads = checked_int(heads, "heads");
    p.key_heads = checked_int(key_heads, "heads");
    p.group = checked_int(heads / key_heads, "heads");
    p.Lq = checked_int(Lq, "rows");
    p.Lk = checked_int(Lk, "columns");
    p.D = checked_int(D, "columns a head");
    p.DV = checked_int(DV, "columns a head");
    p.lower_right = o.lower_right;
    // A wider window than there are rows and columns sees them all.
    const int64_t all = Lq + Lk;
    p.left = o.left < 0 || o.left > all ? -1 : static_cast<int>(o.left);
    p.right = o.right < 0 || o.right > all ? -1 : static_cast<int>(o.right);
    p.scale = static_cast<float>(o.scale);
    p.softcap = static_cast<float>(o.softcap);
    if (o.mask.has_value()) {
      const Tensor& m = *o.mask;
      masked_ = true;
      p.mask.strides = {m.stride(0), m.stride(1), m.stride(2)};
      p.mask.column = m.stride(3);
      switch (m.scalar_type()) {
        case ScalarType::Bool:
          p.mask.flags = global<const uint8_t>(m);
          break;
        case ScalarType::Float:
          p.mask.fp32 = global<const float>(m);
          break;
        case ScalarType::BFloat16:
          p.mask.in_bf16 = global<const bf16>(m);
          break;
        case ScalarType::Half:
          p.mask.in_fp16 = global<const fp16>(m);
          break;
        default:
          STD_TORCH_CHECK(false, "fastgpt: attention takes masks of bool, float32, bfloat16 and float16");
      }
    }
    if (o.slopes.has_value()) {
      p.slopes = global<const float>(o.slopes);
      p.slopes_batch = o.slopes->dim() == 2 ? o.slopes->stride(0) : 0;
    }
    if (o.seed.has_value() && o.dropout_p > 0) {
      p.seed = global<const int64_t>(o.seed);
      p.threshold = dropout_threshold(o.dropout_p);
      p.keep_scale = static_cast<float>(dropout_scale(o.dropout_p));
    }
  }

  bool masked_ = false;
  Tensor cu_q_, cu_k_;
  Options options_;  // keeps the tensors alive
};

// An empty (B, heads, L, size) tensor that lies in memory as (B, L, heads, size), as the layers around want it.
inline Tensor head_major(const Tensor& like, int64_t heads, int64_t length, int64_t size) {
  return torch::stable::transpose(empty(like, {like.size(0), length, heads, size}, like.scalar_type()), 1, 2);
}

inline void check_shared_memory(const Device& device, const char* kernel, int bytes) {
  STD_TORCH_CHECK(
      bytes <= device.shared_bytes(),
      "fastgpt: ",
      kernel,
      " takes ",
      bytes,
      " bytes of shared memory a block for this head_dim and this GPU has ",
      device.shared_bytes(),
      "; use_backend(\"triton\") serves it");
}

// Calls f with the compile-time arguments of the kernel for these tensors: element type, columns of a head (padded),
// whether with options.
template <typename F>
void with_kernel(Attention& a, const Tensor& q, std::initializer_list<Tensor> tensors, F&& f) {
  a.align(tensors);
  const bool plain = a.is_plain(q) && !a.problem.short_rows;
  const int size = std::max(a.problem.D, a.problem.DV);
  STD_TORCH_CHECK(size <= 256, "fastgpt: attention goes up to a head_dim of 256, not ", size);
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
