// Attention over packed documents on the CPU: launchers of the kernels in attention.cpp.
//
// Each document is a Problem with offsets in the packed tensors. The tiles of all documents are one list of tasks. Rows
// past the last document form a document without keys, and keys past it a document without queries. Their outputs and
// gradients are therefore zeros.
#include "attention.h"

namespace fastgpt {
namespace {

// (total, heads, D) as a batch with one entry, (1, heads, total, D).
Tensor as_batch(const Tensor& t) {
  return as_strided(t, {1, t.size(1), t.size(0), t.size(2)}, {0, t.stride(1), t.stride(0), t.stride(2)});
}

// (heads, total) or (heads, total, 2) as a batch with one entry.
Tensor one_batch(const Tensor& t) {
  std::vector<int64_t> sizes{1}, strides{0};
  sizes.insert(sizes.end(), t.sizes().begin(), t.sizes().end());
  strides.insert(strides.end(), t.strides().begin(), t.strides().end());
  return as_strided(t, sizes, strides);
}

// The elements of cu_seqlens, checked, followed by the end of the tensor.
std::vector<int64_t> bounds(const char* name, const Tensor& cu_seqlens, int64_t total) {
  const Tensor starts = contiguous(cu_seqlens, ScalarType::Long);
  const int64_t* first = starts.const_data_ptr<int64_t>();
  std::vector<int64_t> found(first, first + starts.numel());
  if (found.front() != 0 || found.back() > total || !std::is_sorted(found.begin(), found.end()))
    raise<std::invalid_argument>(name, " must ascend from 0 to at most ", total, ", got ", listed(found));
  found.push_back(total);
  return found;
}

Problems packed_documents(
    const Tensor& q, const Tensor& k, const Tensor& cu_seqlens_q, const Tensor& cu_seqlens_k, Problem p) {
  const std::vector<int64_t> q_starts = bounds("cu_seqlens_q", cu_seqlens_q, q.size(2));
  const std::vector<int64_t> k_starts = bounds("cu_seqlens_k", cu_seqlens_k, k.size(2));
  Problems documents;
  const auto add = [&](int64_t n, int64_t rows, int64_t columns) {
    p.document = n, p.q_begin = {0, q_starts[n]}, p.k_begin = {0, k_starts[n]}, p.Lq = rows, p.Lk = columns;
    documents.push_back(p);
  };
  const int64_t rest = static_cast<int64_t>(q_starts.size()) - 2;  // the index of the remaining rows and keys
  for (int64_t n = 0; n < rest; ++n) add(n, q_starts[n + 1] - q_starts[n], k_starts[n + 1] - k_starts[n]);
  add(rest, q.size(2) - q_starts[rest], 0);
  add(rest, 0, k.size(2) - k_starts[rest]);
  return documents;
}

// Checks q (total_q, H, D), k (total_k, Hk, D), v (total_k, Hk, DV), cu_seqlens (documents + 1,) and the options.
Checks check_inputs(
    const char* op,
    const Tensor& q,
    const Tensor& k,
    const Tensor& v,
    const Tensor& cu_seqlens_q,
    const Tensor& cu_seqlens_k,
    const OptionalTensor& slopes,
    const OptionalTensor& seed,
    double dropout_p) {
  const Checks check(op, "q", q, {ANY, ANY, ANY});
  check("k", k, {ANY, ANY, q.size(2)}, q.scalar_type())("v", v, {k.size(0), k.size(1), ANY}, q.scalar_type());
  check("cu_seqlens_q", cu_seqlens_q, {ANY}, {ScalarType::Int, ScalarType::Long});
  check("cu_seqlens_k", cu_seqlens_k, cu_seqlens_q.sizes(), {ScalarType::Int, ScalarType::Long});
  require(cu_seqlens_q.numel() > 0, op, ": cu_seqlens_q must have documents + 1 elements, got none");
  check_slopes_and_seed(check, q, slopes, cu_seqlens_q.size(0) - 1, seed, dropout_p);
  return check;
}

std::tuple<Tensor, Tensor> attention_varlen_fwd(
    const Tensor& q_,
    const Tensor& k_,
    const Tensor& v_,
    const Tensor& cu_seqlens_q,
    const Tensor& cu_seqlens_k,
    const OptionalTensor& alibi_slopes,
    const OptionalTensor& seed,
    int64_t /*max_seqlen_q*/,
    int64_t /*max_seqlen_k*/,
    double scale,
    bool lower_right,
    int64_t left,
    int64_t right,
    double softcap,
    double dropout_p) {
  check_inputs("attention_varlen_fwd_cpp", q_, k_, v_, cu_seqlens_q, cu_seqlens_k, alibi_slopes, seed, dropout_p);
  const Tensor q = rows_contiguous(as_batch(q_)), k = rows_contiguous(as_batch(k_)), v = rows_contiguous(as_batch(v_));
  const Problem p = common_problem(q, k, v, seed, scale, lower_right, left, right, softcap, dropout_p);
  const Problems documents = packed_documents(q, k, cu_seqlens_q, cu_seqlens_k, p);
  const auto acc = accumulator(q.scalar_type());
  Tensor out = empty({q.size(2), p.heads, p.DV}, q.scalar_type());
  Tensor stats = empty({p.heads, q.size(2), 2}, acc);
  const OptionalTensor slopes = prepare_slopes(alibi_slopes, cu_seqlens_q.size(0) - 1, p.heads);
  forward_documents(documents, q, k, v, {}, slopes, as_batch(out), one_batch(stats));
  return {out, stats};
}

std::tuple<Tensor, Tensor, Tensor> attention_varlen_bwd(
    const Tensor& grad_,
    const OptionalTensor& grad_lse_,
    const Tensor& q_,
    const Tensor& k_,
    const Tensor& v_,
    const Tensor& out_,
    const Tensor& stats_,
    const Tensor& cu_seqlens_q,
    const Tensor& cu_seqlens_k,
    const OptionalTensor& alibi_slopes,
    const OptionalTensor& seed,
    int64_t /*max_seqlen_q*/,
    int64_t /*max_seqlen_k*/,
    double scale,
    bool lower_right,
    int64_t left,
    int64_t right,
    double softcap,
    double dropout_p,
    bool /*deterministic: always*/) {
  const Checks check =
      check_inputs("attention_varlen_bwd_cpp", q_, k_, v_, cu_seqlens_q, cu_seqlens_k, alibi_slopes, seed, dropout_p);
  const int64_t rows = q_.size(0), heads = q_.size(1), DV = v_.size(2);
  const auto type = q_.scalar_type(), acc = accumulator(type);
  check("grad_out", grad_, {rows, heads, DV}, type)("out", out_, {rows, heads, DV}, type);
  check("grad_lse", grad_lse_, {heads, rows}, acc)("stats", stats_, {heads, rows, 2}, acc);
  const Tensor q = rows_contiguous(as_batch(q_)), k = rows_contiguous(as_batch(k_)), v = rows_contiguous(as_batch(v_));
  const Tensor grad = rows_contiguous(as_batch(grad_)), out = rows_contiguous(as_batch(out_));
  const Problem p = common_problem(q, k, v, seed, scale, lower_right, left, right, softcap, dropout_p);
  const Problems documents = packed_documents(q, k, cu_seqlens_q, cu_seqlens_k, p);
  const OptionalTensor grad_lse = grad_lse_ ? OptionalTensor(one_batch(*grad_lse_)) : grad_lse_;
  const OptionalTensor slopes = prepare_slopes(alibi_slopes, cu_seqlens_q.size(0) - 1, p.heads);
  Tensor dq = empty(q_.sizes(), type);
  Tensor dk = empty(k_.sizes(), type);
  Tensor dv = empty(v_.sizes(), type);
  const Tensor stats = one_batch(contiguous(stats_));
  backward_documents(
      documents, grad, grad_lse, q, k, v, out, stats, {}, slopes, as_batch(dq), as_batch(dk), as_batch(dv));
  return {dq, dk, dv};
}

STABLE_TORCH_LIBRARY_IMPL(fastgpt, CPU, m) {
  m.impl("attention_varlen_fwd_cpp", TORCH_BOX(&attention_varlen_fwd));
  m.impl("attention_varlen_bwd_cpp", TORCH_BOX(&attention_varlen_bwd));
}

}  // namespace
}  // namespace fastgpt
