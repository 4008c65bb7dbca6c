// Attention, backward. The mathematics of the forward, and its names, are in attention.cu.
//
//   p_ij = exp(s_ij - m_i - l_i);   delta_i = Σ_d out_id dout_id - dlse_i;   dp_ij = dout_i·v_j
//   dv_j = Σ_i p_ij dout_i;   ds_ij = p_ij (dp_ij - delta_i)
//   dk_j = scale Σ_i ds_ij q_i;   dq_i = scale Σ_j ds_ij k_j
//
// With dropout, p_ij in dv and dp_ij are multiplied by the dropout factors. With a softcap, ds_ij is multiplied by its
// derivative.
//
// The preprocess kernel (attention_bwd_preprocess.cuh) computes (m, l, delta) of each row. The main kernel computes dk,
// dv and float32 sums of dq. The postprocess kernel (attention_bwd_postprocess.cuh) turns the sums into dq.
//
// The main kernel takes five products per tile. A block processes COLUMNS columns of a key head and visits the tiles of
// ROWS rows that see them, of each query head of the group. dk and dv stay in registers. p and ds go through shared
// memory, because the products over rows need them transposed. ds k is added to the sums of dq by atomic additions, in
// an order that differs between runs. In deterministic mode there are a few blocks per head. Each has sums of its own,
// to which it adds in a fixed order, and the postprocess kernel adds up the sums.
//
// If a tile has all columns of a row, delta is Σ_j p_ij dp_ij, which is not affected by the rounding of out to 16 bits.
// The kernels with OPTIONS sum it over the warps that share the row, and handle all such launches.
#include "attention_bwd.cuh"
#include "attention_bwd_postprocess.cuh"
#include "attention_bwd_preprocess.cuh"
#include "attention_launch.cuh"

namespace fastgpt {
namespace {

// ---- the main kernel ----

template <typename T, int HEAD, int ROWS, int COLUMNS, bool OPTIONS>
__global__ void __launch_bounds__(WARPS<COLUMNS>* WARP, 1) attention_bwd_kernel(
    const Problem p,
    const Matrices<const T> qs,
    const Matrices<const T> ks,
    const Matrices<const T> vs,
    const Matrices<const T> grads,
    const Matrices<T> dks,
    const Matrices<T> dvs,
    const Matrices<const Vector<float, 4>> row_stats,
    const Matrices<float> sums,  // of dq, in rows of HEAD
    const int64_t sum_stride,    // between the sums of two blocks; 0 if they share one
    const int blocks) {          // per key head
  using W = BackwardWarp<T, HEAD, ROWS, COLUMNS, OPTIONS>;
  using U = typename W::U;
  using S = typename W::S;
  using Wide = typename W::Wide;
  constexpr int THREADS = WARPS<COLUMNS> * WARP, BYTES = sizeof(T);
  const W w;
  const SharedAddress memory = w.memory;
  const bool aligned = !OPTIONS || p.aligned;
  const auto wait_for_tile = [] {
    wait_copies<0>();
    sync_block();
  };
  // Deterministic launches have fewer blocks than tiles.
#pragma unroll 1
  for (int first = block_x() % blocks * COLUMNS;; first += blocks * COLUMNS) {
    // Registers are scarce: SeqlenInfo and head numbers are computed where they are needed, and not kept.
    const int matrix = opaque(static_cast<uint32_t>(block_x())) / blocks;
    const int batch = matrix / p.kv_heads, kv_head = matrix % p.kv_heads;
    const SeqlenInfo seqlens(p, batch);
    if (first >= seqlens.Lk) return;
    const Copier<T, COLUMNS, HEAD, THREADS> k(ks.of(batch, kv_head, seqlens.k_begin), ks.strides.row, p.D);
    const Copier<T, COLUMNS, HEAD, THREADS> v(vs.of(batch, kv_head, seqlens.k_begin), vs.strides.row, p.DV);
    k.copy_partial(memory + S::K, first, seqlens.Lk, aligned);
    v.copy_partial(memory + S::V, first, seqlens.Lk, aligned);
    const int last = (first + COLUMNS < seqlens.Lk ? first + COLUMNS : seqlens.Lk) - 1;
    BlockRange<ROWS> row_blocks(
        first, last, seqlens.Lq, p.right >= 0, -seqlens.diagonal - p.right, p.left >= 0, p.left - seqlens.diagonal);
    // Columns past the end must be masked: if all scores are far below zero, exp(0 - lse) would be infinite there.
    if (first + COLUMNS > seqlens.Lk) row_blocks.mask_all();
    float dk[W::OWN / 8][4] = {}, dv[W::OWN / 8][4] = {};

#pragma unroll 1
    for (int member = 0; member < p.group; ++member) {
      const int block = opaque(static_cast<uint32_t>(block_x())), b = block / blocks / p.kv_heads;
      const int head = block / blocks % p.kv_heads * p.group + member;
      const SeqlenInfo seqlens(p, b);
      // A pitch for each of q and dout takes two registers, too many beside the sums of heads of 128.
      using RowCopier = Copier<T, ROWS, HEAD, THREADS, HEAD <= 64>;
      const RowCopier q(qs.of(b, head, seqlens.q_begin), qs.strides.row, p.D);
      const RowCopier grad(grads.of(b, head, seqlens.q_begin), grads.strides.row, p.DV);
      const auto stats_of_lane = opaque(row_stats.of(b, head, seqlens.q_begin + w.y));
      const auto dq =
          opaque(sums.of(b, head, seqlens.q_begin + w.y) + (block % blocks * sum_stride + w.q_head + lane() % 4 * 2));
      const Mask<OPTIONS> mask(p, seqlens, b, head);
      const float scale = mask.deferred_scale();

      // Processes a tile whose copy is complete. `start`: its first row.
      const auto process_tile = [&](auto edge, SharedAddress stage, int start) {
        Vector<float, 4> stats[2];
        const auto rows = advance(stats_of_lane, start, sizeof(Vector<float, 4>));
        w.template load_row_stats<edge>(stats, rows, start, seqlens.Lq);
        const SharedAddress left = W::template lane_address<edge>(w.left_lane),
                            right = W::template lane_address<edge>(w.right_lane),
                            p_lane = W::template lane_address<edge>(w.p_address);
        const SharedAddress q_warp = memory + (stage + S::Q + w.y_warp * W::PITCH);
        const SharedAddress k_warp = memory + (S::K + w.x_warp * W::PITCH);
        const int row = start + w.y, column = first + w.x;
#pragma unroll
        for (int part = 0; part < W::N; part += W::M) {
          const SharedAddress k_part = k_warp + part * 8 * W::PITCH;
          float s[W::M][4] = {}, dp[W::M][4] = {}, softcap_grad[OPTIONS ? W::M : 1][4];
          w.template probabilities<edge>(
              s, softcap_grad, stats, mask, scale, left, q_warp, right, k_part, row, column + part * 8);
          add_product<U, HEAD / U::K, W::AT_ONCE>(  // dp = dout vᵀ
              dp, left_at<U, Wide>(left, q_warp + S::GRAD - S::Q), right_at<U, Wide>(right, k_part + S::V - S::K));
          if constexpr (OPTIONS)
            if (p.delta_in_tile) {
              static_assert(W::HALVES == 1);
              w.add_to_delta(stats, s, dp, mask, row, column);
            }
          w.store_p_and_ds(s, dp, softcap_grad, stats, mask, p_lane, part, row, column);
        }
        sync_block();

        const SharedAddress grad_lane = W::template lane_address<edge>(w.grad_transposed_address),
                            p_transposed = W::template lane_address<edge>(w.p_transposed_address),
                            q_stage = memory + (stage + S::Q + (W::ALIGNED_KV ? w.own_head * BYTES : 0));
        W::add_over_rows(dv, p_transposed, 0, grad_lane, q_stage + S::GRAD - S::Q);  // dv += pᵀ dout
        const Global<float> dq_rows = advance(dq, start, HEAD * sizeof(float));
        const SharedAddress ds_lane = W::template lane_address<edge>(w.ds_address),
                            k_lane = W::template lane_address<edge>(w.k_transposed_address);
        w.template add_to_dq<edge>(dq_rows, ds_lane, k_lane, start, seqlens.Lq);
        W::add_over_rows(dk, p_transposed, S::DS - S::P, grad_lane, q_stage);  // dk += dsᵀ q
      };

      const auto copy_tile = [&](int i) {
        const SharedAddress stage = memory + i % STAGES<COLUMNS> * S::STAGE;
        q.copy_partial(stage + S::Q, row_blocks.begin_of(i), seqlens.Lq, aligned);
        grad.copy_partial(stage + S::GRAD, row_blocks.begin_of(i), seqlens.Lq, aligned);
      };
      if (row_blocks.count > 0) copy_tile(0);
      commit_copies();
      wait_for_tile();
      int i = 0;
      if constexpr (!OPTIONS) {
        const int full_count = warp_uniform(row_blocks.full_count);
        int start = warp_uniform(row_blocks.full_begin);
        Global<const T> next_q = q.source(start + ROWS), next_grad = grad.source(start + ROWS);
#pragma unroll 1
        for (; i + 1 < full_count; ++i) {
          const SharedAddress stage = i % 2 * S::STAGE, other = memory + (i + 1) % 2 * S::STAGE;
          q.copy_full(other + S::Q, next_q);
          grad.copy_full(other + S::GRAD, next_grad);
          commit_copies();
          process_tile(std::false_type{}, stage, start);
          wait_for_tile();
          start += ROWS;
        }
      }
#pragma unroll 1
      for (; i < row_blocks.count; ++i) {
        constexpr bool COPY_AHEAD = STAGES<COLUMNS> > 1;
        if (COPY_AHEAD && i + 1 < row_blocks.count) copy_tile(i + 1);
        commit_copies();
        process_tile(std::true_type{}, i % STAGES<COLUMNS> * S::STAGE, row_blocks.begin_of(i));
        wait_for_tile();
        if (!COPY_AHEAD && i + 1 < row_blocks.count) {
          copy_tile(i + 1);
          commit_copies();
          wait_for_tile();
        }
      }
    }

    // Writes dk and dv through the shared memory of k and v.
    const int index = opaque(static_cast<uint32_t>(thread())), of = opaque(static_cast<uint32_t>(block_x())) / blocks;
    const SharedAddress own = memory + Wide::element(w.own_column + index % WARP / 4, w.own_head + index % 4 * 2);
#pragma unroll
    for (int d = 0; d < W::OWN / 8; ++d)
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const SharedAddress at = own + h * 8 * W::PITCH;
        U::store_pair(Wide::right_of(at, d * 8 * BYTES) + S::K, dk[d][2 * h] * p.scale, dk[d][2 * h + 1] * p.scale);
        U::store_pair(Wide::right_of(at, d * 8 * BYTES) + S::V, dv[d][2 * h], dv[d][2 * h + 1]);
      }
    sync_block();
    const SeqlenInfo here(p, of / p.kv_heads);
    const int rows = here.Lk - first < COLUMNS ? here.Lk - first : COLUMNS;
    const int64_t row = here.k_begin + first;
    const auto write = [&](SharedAddress tile, const Matrices<T>& to, int columns) {
      const Global<T> matrix = to.of(of / p.kv_heads, of % p.kv_heads, row);
      write_rows<T, HEAD>(tile, rows, matrix, to.strides.row, columns, aligned, index, THREADS);
    };
    write(memory + S::K, dks, p.D);
    write(memory + S::V, dvs, p.DV);
    sync_block();
  }
}

// ---- launchers ----

template <typename T, int HEAD, bool OPTIONS, bool SMALL>
void launch_bwd(Attention a, const Gradients& g, const Tensor& q, const Tensor& k, const Tensor& v) {
  using Z = Sizes<T, HEAD, OPTIONS, SMALL>;
  using S = Shared<T, HEAD, Z::ROWS, Z::COLUMNS>;
  Problem& p = a.problem;
  p.delta_in_tile = p.delta_in_tile && a.max_seqlen_k <= Z::COLUMNS;
  const Device device = device_of(q);
  check_shared_memory(device, "attention_bwd", S::BYTES);
  // Packed documents share their tensors, so preprocess and postprocess run once for all of them.
  const int64_t whole = a.packed ? 1 : a.batches, rows = whole * p.heads * p.Lq;
  const int64_t kv_heads = p.kv_heads, tiles = cdiv(a.max_seqlen_k, Z::COLUMNS);
  const int64_t few = std::max<int64_t>(2 * device.multiprocessors() / std::max<int64_t>(a.batches * kv_heads, 1), 1);
  const int64_t blocks = g.deterministic ? std::min(tiles, few) : tiles;
  const Tensor row_stats = empty(q, {rows, 4}, ScalarType::Float);
  const Tensor sums = zeros(q, {g.deterministic ? blocks : 1, rows, HEAD}, ScalarType::Float);
  const int64_t per_head = p.Lq, per_batch = a.packed ? 0 : p.heads * p.Lq;
  const Launch per_row{.x = cdiv(rows, ROW_KERNEL_THREADS / WARP), .threads = ROW_KERNEL_THREADS};

  if (rows > 0) launch_preprocess<T>(a, g, device, per_row, rows, row_stats);
  if (blocks * kv_heads * a.batches > 0)
    launch<attention_bwd_kernel<T, HEAD, Z::ROWS, Z::COLUMNS, OPTIONS>>(
        device,
        "attention_bwd",
        {.x = blocks * kv_heads * a.batches, .threads = WARPS<Z::COLUMNS> * WARP, .shared = S::BYTES},
        p,
        a.matrices<const T>(q),
        a.matrices<const T>(k),
        a.matrices<const T>(v),
        a.matrices<const T>(g.grad_out),
        a.matrices<T>(g.dk),
        a.matrices<T>(g.dv),
        Matrices<const Vector<float, 4>>{vectors_of_four(row_stats), {per_batch, per_head, 1}},
        Matrices<float>{global<float>(sums), {per_batch * HEAD, per_head * HEAD, HEAD}},
        g.deterministic ? rows * HEAD : int64_t{0},
        static_cast<int>(blocks));
  if (rows > 0) launch_postprocess<T>(a, g, device, per_row, rows, sums);
}

// dout with contiguous rows, which an expanded scalar, as from out.sum(), does not have.
Tensor rows_contiguous(const Tensor& grad) {
  return grad.stride(-1) == 1 || grad.numel() == 0 ? grad : torch::stable::contiguous(grad);
}

void backward(Attention a, Gradients g, const Tensor& q, const Tensor& k, const Tensor& v) {
  g.grad_out = rows_contiguous(g.grad_out);
  // Selects the kernels with OPTIONS. launch_bwd compares with the columns of its own tile.
  a.problem.delta_in_tile = q.element_size() == 2 && a.max_seqlen_k <= Sizes<bf16, 64, true>::COLUMNS;
  with_kernel(a, q, {q, k, v, g.grad_out, g.dk, g.dv}, [&](auto element, auto head, auto options) {
    using T = decltype(element);
    using Z = Sizes<T, head, options>;
    constexpr int BYTES = Shared<T, head, Z::ROWS, Z::COLUMNS>::BYTES;
    constexpr bool HAS_SMALL = options && BYTES > 99 * 1024 && (sizeof(T) == 2 || head < 256);
    const bool small = HAS_SMALL && device_of(q).shared_bytes() < BYTES;
    choose(small, [&](auto yes) { launch_bwd<T, head, options, yes && HAS_SMALL>(a, g, q, k, v); });
  });
}

std::tuple<Tensor, Tensor, Tensor, Tensor> attention_bwd(
    const Tensor& grad_out,
    const OptionalTensor& grad_lse,
    const Tensor& q,
    const Tensor& k,
    const Tensor& v,
    const Tensor& out,
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
    bool deterministic) {
  STD_TORCH_CHECK(!mask_grad, "attention_bwd_cuda does not compute the gradient of attn_mask; use the backend triton");
  const Options options{attn_mask, alibi_slopes, seed, scale, lower_right, left, right, softcap, dropout_p};
  const Checks check = check_inputs("attention_bwd_cuda", q, k, v, options);
  const int64_t batch = q.size(0), heads = q.size(1), rows = q.size(2), columns = v.size(3);
  const auto like = [](const Tensor& x) { return head_major(x, x.size(1), x.size(2), x.size(3)); };
  const Gradients g{grad_out, out, stats, like(q), like(k), like(v), grad_lse, deterministic};
  g.check({batch, heads, rows, columns}, {batch, heads, rows}, {batch, heads, rows, 2}, check);
  backward(Attention(q, k, v, options), g, q, k, v);
  return {g.dq, g.dk, g.dv, empty(q, {0}, q.scalar_type())};
}

std::tuple<Tensor, Tensor, Tensor> attention_varlen_bwd(
    const Tensor& grad_out,
    const OptionalTensor& grad_lse,
    const Tensor& q,
    const Tensor& k,
    const Tensor& v,
    const Tensor& out,
    const Tensor& stats,
    const Tensor& cu_seqlens_q,
    const Tensor& cu_seqlens_k,
    const OptionalTensor& alibi_slopes,
    const OptionalTensor& seed,
    int64_t max_seqlen_q,
    int64_t max_seqlen_k,
    double scale,
    bool lower_right,
    int64_t left,
    int64_t right,
    double softcap,
    double dropout_p,
    bool deterministic) {
  const Options options{std::nullopt, alibi_slopes, seed, scale, lower_right, left, right, softcap, dropout_p};
  const PackedSeqlens packed{cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k};
  const Checks check = check_inputs("attention_varlen_bwd_cuda", q, k, v, options, packed);
  const int64_t rows = q.size(0), heads = q.size(1), columns = v.size(2);
  const auto like = [](const Tensor& x) { return zeros(x, {x.size(0), x.size(1), x.size(2)}, x.scalar_type()); };
  const Gradients g{grad_out, out, stats, like(q), like(k), like(v), grad_lse, deterministic};
  g.check({rows, heads, columns}, {heads, rows}, {heads, rows, 2}, check);
  backward(Attention(q, k, v, options, packed), g, q, k, v);
  return {g.dq, g.dk, g.dv};
}

STABLE_TORCH_LIBRARY_IMPL(fastgpt, FASTGPT_DISPATCH_KEY, m) {
  m.impl("attention_bwd_cuda", TORCH_BOX(&attention_bwd));
  m.impl("attention_varlen_bwd_cuda", TORCH_BOX(&attention_varlen_bwd));
}

}  // namespace
}  // namespace fastgpt
