// Attention, forward: out = dropout(softmax(mask(softcap(scale q kᵀ) - alibi))) v. The scores are never stored.
//
//   s_ij = scale q_i·k_j, capped, masked;   m_i = max_j s_ij;   l_i = log Σ_j exp(s_ij - m_i)
//   out_i = Σ_j exp(s_ij - m_i - l_i) v_j                       0 (with m -inf, l 0) for a row that sees no column
//
// (Vaswani et al., arXiv:1706.03762; tiled as in FlashAttention-2, Dao, arXiv:2307.08691.) Shapes: q (B, H, Lq, D), k
// (B, Hk, Lk, D), v (B, Hk, Lk, DV), out (B, H, Lq, DV), stats (B, H, Lq, 2) float32. stats holds m and l as two
// numbers: in their sum, the log-sum-exp, l would be lost beside large scores.
//
// A block processes ROWS rows of a head, a warp 16 of them. It visits the tiles of COLUMNS columns that its rows see:
// first the full tiles, in a loop without mask arithmetic, then the edge tiles. The next tile of k and v is copied
// while the tensor cores process the current one. The first product leaves the scores in the registers where the second
// product needs its left factor.
//
// exp is computed as exp2, with the scale folded into its argument: (s - max s) u, where u is the deferred scale. It is
// never s u - m, because m is a rounded product. What the rounding of m removed is added to l.
//
// There are three kinds of kernels. Plain ones: bfloat16 and float16, heads of 64 or 128 columns, causal, windowed or
// packed. OPTIONS: attn_mask, softcap, ALiBi, dropout, other sizes (padded with zeros), and tensors that are not
// aligned to 16 bytes. float32: OPTIONS with three tf32 products for each product.
#include "attention_launch.cuh"
#include "tiles.cuh"

namespace fastgpt {
namespace {

// ---- constants ----

// Warps that share rows, each with a part of the columns of out: 256 columns of float32 do not fit into one warp.
template <typename T, int HEAD>
constexpr int PARTS = sizeof(T) == 4 && HEAD == 256 ? 2 : 1;
template <typename T, int HEAD, int ROWS>
constexpr int THREADS_OF = ROWS / 16 * PARTS<T, HEAD> * WARP;

// Rows and columns of a tile: the largest that compile without spills and, with OPTIONS, fit into 99 KiB.
template <typename T, int HEAD, bool OPTIONS>
struct Sizes {
  static constexpr bool SPLIT = sizeof(T) == 4;
  static constexpr int ROWS = SPLIT ? (HEAD == 256 ? 32 : 64) : HEAD == 256 ? 64 : 128;
  static constexpr int COLUMNS = SPLIT ? (HEAD == 64 ? 32 : 16) : HEAD == 256 ? 32 : OPTIONS ? 64 : 128;
};

// The shared memory of a block: q, then two stages of k and v.
template <typename T, int HEAD, int ROWS, int COLUMNS>
struct Shared {
  static constexpr int ROW = HEAD * sizeof(T), K = ROWS * ROW, V = K + COLUMNS * ROW, STAGE = 2 * COLUMNS * ROW;
  static constexpr int BYTES = K + 2 * STAGE;
};

// ---- forward ----

template <typename T, int HEAD, int ROWS, int COLUMNS, bool OPTIONS>
__global__ void __launch_bounds__(THREADS_OF<T, HEAD, ROWS>, 1) attention_fwd_kernel(
    const Problem p,
    const Matrices<const T> qs,
    const Matrices<const T> ks,
    const Matrices<const T> vs,
    const Matrices<T> outs,
    const Global<float> stats,
    const int64_t stats_batch,
    const int64_t stats_head,
    const int row_tiles) {
  using U = Mma<T>;
  using S = Shared<T, HEAD, ROWS, COLUMNS>;
  using Wide = Tile<T, HEAD>;
  constexpr int THREADS = THREADS_OF<T, HEAD, ROWS>, OWN = HEAD / PARTS<T, HEAD>, STEPS = HEAD / U::K, PITCH = S::ROW,
                N = COLUMNS / 8;
  // The addresses of factors stay in registers for all tiles, or are computed for each tile if registers are scarce.
  constexpr bool ADDRESSES_IN_REGISTERS = !OPTIONS && HEAD <= 128;
  constexpr bool Q_IN_REGISTERS = !OPTIONS && HEAD == 64;
  constexpr bool SPLIT = sizeof(T) == 4;  // the products leave no registers for the loads of a second step

  // The longest tiles first: under a causal mask the last rows see most columns.
  const int tile = row_tiles - 1 - block_x() % row_tiles, matrix = block_x() / row_tiles;
  const int head = matrix % p.heads, batch = matrix / p.heads, kv_head = head / p.group;
  const SeqlenInfo seqlens(p, batch);
  const int first = tile * ROWS;
  if (first >= seqlens.Lq) return;

  const Copier<T, ROWS, HEAD, THREADS> q(qs.of(batch, head, seqlens.q_begin), qs.strides.row, p.D);
  const Copier<T, COLUMNS, HEAD, THREADS, true> k(ks.of(batch, kv_head, seqlens.k_begin), ks.strides.row, p.D);
  const Copier<T, COLUMNS, HEAD, THREADS, true> v(vs.of(batch, kv_head, seqlens.k_begin), vs.strides.row, p.DV);
  const SharedAddress memory = shared_memory();
  const bool aligned = !OPTIONS || p.aligned;

  const int last = (first + ROWS < seqlens.Lq ? first + ROWS : seqlens.Lq) - 1;
  const BlockRange<COLUMNS> blocks(
      first, last, seqlens.Lk, p.left >= 0, seqlens.diagonal - p.left, p.right >= 0, seqlens.diagonal + p.right);

  q.copy_partial(memory, first, seqlens.Lq, aligned);
  const auto copy_tile = [&](int i) {
    const SharedAddress stage = memory + i % 2 * S::STAGE;
    k.copy_partial(stage + S::K, blocks.begin_of(i), seqlens.Lk, aligned);
    v.copy_partial(stage + S::V, blocks.begin_of(i), seqlens.Lk, aligned);
  };
  if (blocks.count > 0) copy_tile(0);
  commit_copies();

  // The rows of this warp, and its columns of out.
  const int warp_index = warp_uniform(warp());
  const int warp_row = warp_index / PARTS<T, HEAD> * 16, warp_column = warp_index % PARTS<T, HEAD> * OWN;
  const int row = warp_row + lane() / 4, column = lane() % 4 * 2;
  const Mask<OPTIONS> mask(p, seqlens, batch, head);
  const float scale = mask.deferred_scale(), scale_log2 = scale * static_cast<float>(LOG2E);
  float out[OWN / 8][4] = {};
  OnlineSoftmax softmax;
  const SharedAddress q_address = opaque(U::template left<Wide>()), k_address = opaque(U::template right<Wide>());
  const SharedAddress v_address =
      opaque(Wide::right_of(U::template right_transposed<Wide>(), warp_column * static_cast<int>(sizeof(T))));
  const SharedAddress q_warp = memory + warp_row * PITCH;
  typename U::Left q_registers[Q_IN_REGISTERS ? STEPS : 1];

  // Processes a tile whose copy is complete. `start`: its first column, which only masks need.
  const auto process_tile = [&](auto edge, SharedAddress stage, int start) {
    const auto lane_address = [](SharedAddress a) { return ADDRESSES_IN_REGISTERS ? a : opaque(a); };
    const SharedAddress q_lane = lane_address(q_address), k_lane = lane_address(k_address),
                        v_lane = lane_address(v_address);
    float s[N][4] = {};
    const auto q_factor = [&](int step) {
      if constexpr (Q_IN_REGISTERS)
        return q_registers[step];
      else
        return left_at<U, Wide>(q_lane, q_warp)(step);
    };
    add_product<U, STEPS, SPLIT ? 1 : STEPS>(s, q_factor, right_at<U, Wide>(k_lane, memory + stage + S::K));
    mask.template apply<edge>(s, first + row, start + column);
    softmax.template add<edge || OPTIONS>(s, out, scale_log2);
    if constexpr (OPTIONS)
      if (p.seed) {
#pragma unroll
        for (int n = 0; n < N; ++n)
#pragma unroll
          for (int h = 0; h < 2; ++h) {
            const auto factors = mask.dropout_scale(first + row + 8 * h, start + column + 8 * n);
            s[n][2 * h] *= factors.at[0], s[n][2 * h + 1] *= factors.at[1];
          }
      }
    add_product<U, COLUMNS / U::K, COLUMNS / U::K>(
        out,
        [&](int step) { return U::left_of(s, step); },
        right_transposed_at<U, Wide>(v_lane, memory + stage + S::V));
  };

  int i = 0;
  const auto wait_for_tile = [&] {
    wait_copies<0>();
    sync_block();
  };
  wait_for_tile();
  if constexpr (Q_IN_REGISTERS)
#pragma unroll
    for (int step = 0; step < STEPS; ++step)
      q_registers[step] = U::template load_left<Wide>(Wide::right_of(q_address, step * 32) + q_warp);
  // All full tiles but the last, because the tile after it may be an edge tile.
  if constexpr (!OPTIONS) {
    Global<const T> next_k = k.source(blocks.full_begin + COLUMNS), next_v = v.source(blocks.full_begin + COLUMNS);
#pragma unroll 1
    for (; i + 1 < blocks.full_count; ++i) {
      const SharedAddress stage = i % 2 * S::STAGE, other = memory + (i + 1) % 2 * S::STAGE;
      k.copy_full(other + S::K, next_k);
      v.copy_full(other + S::V, next_v);
      commit_copies();
      process_tile(std::false_type{}, stage, 0);
      wait_for_tile();
    }
  }
#pragma unroll 1
  for (; i < blocks.count; ++i) {
    if (i + 1 < blocks.count) copy_tile(i + 1);
    commit_copies();
    if (sizeof(T) == 2 && i < blocks.full_count)
      process_tile(std::false_type{}, i % 2 * S::STAGE, blocks.begin_of(i));
    else
      process_tile(std::true_type{}, i % 2 * S::STAGE, blocks.begin_of(i));
    wait_for_tile();
  }

  // Divides out by the sums and writes m and l.
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    softmax.merge_lanes(h);
    const float row_max = softmax.row_max[h], row_sum = softmax.row_sum[h];
    const int y = first + row + 8 * h;
    OnlineSoftmax::rescale(out, h, row_sum > 0.0f || row_sum != row_sum ? 1.0f / row_sum : 0.0f);  // NaN stays NaN
    if (lane() % 4 == 0 && warp_column == 0 && y < seqlens.Lq) {
      const Global<float> of_row = stats + (batch * stats_batch + head * stats_head + 2 * (seqlens.q_begin + y));
      const bool is_empty = row_sum == 0.0f;
      const float m = multiply_rounded(row_max, scale);
      store(of_row, is_empty ? -INFINITE : m);
      store(of_row + 1, is_empty ? 0.0f : fmaf(row_max, scale, -m) + logf(row_sum));
    }
  }
  // Writes out through the shared memory of q.
  const SharedAddress out_lane = memory + Wide::element(row, warp_column + column);
#pragma unroll
  for (int d = 0; d < OWN / 8; ++d)
#pragma unroll
    for (int h = 0; h < 2; ++h)
      U::store_pair(
          Wide::right_of(out_lane, d * 8 * static_cast<int>(sizeof(T))) + h * 8 * PITCH,
          out[d][2 * h],
          out[d][2 * h + 1]);
  sync_block();
  write_rows<T, HEAD>(
      memory,
      last - first + 1,
      outs.of(batch, head, seqlens.q_begin + first),
      outs.strides.row,
      p.DV,
      aligned,
      thread(),
      THREADS);
}

// ---- launchers ----

template <typename T, int HEAD, bool OPTIONS>
void launch_fwd(
    const Attention& a, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& out, const Tensor& stats) {
  using Z = Sizes<T, HEAD, OPTIONS>;
  using S = Shared<T, HEAD, Z::ROWS, Z::COLUMNS>;
  const int64_t row_tiles = cdiv(a.max_seqlen_q, Z::ROWS);
  const Device device = device_of(q);
  check_shared_memory(device, "attention_fwd", S::BYTES);
  launch<attention_fwd_kernel<T, HEAD, Z::ROWS, Z::COLUMNS, OPTIONS>>(
      device,
      "attention_fwd",
      {.x = row_tiles * a.batches * a.problem.heads, .threads = THREADS_OF<T, HEAD, Z::ROWS>, .shared = S::BYTES},
      a.problem,
      a.matrices<const T>(q),
      a.matrices<const T>(k),
      a.matrices<const T>(v),
      a.matrices<T>(out),
      global<float>(stats),
      a.packed ? int64_t{0} : stats.stride(0),
      stats.stride(a.packed ? 0 : 1),
      static_cast<int>(row_tiles));
}

void forward(Attention a, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& out, const Tensor& stats) {
  if (a.max_seqlen_q == 0 || a.batches == 0 || a.problem.heads == 0) return;
  with_kernel(a, q, {q, k, v, out}, [&](auto element, auto head, auto options) {
    launch_fwd<decltype(element), head, options>(a, q, k, v, out, stats);
  });
}

std::tuple<Tensor, Tensor> attention_fwd(
    const Tensor& q,
    const Tensor& k,
    const Tensor& v,
    const OptionalTensor& attn_mask,
    const OptionalTensor& alibi_slopes,
    const OptionalTensor& seed,
    double scale,
    bool lower_right,
    int64_t left,
    int64_t right,
    double softcap,
    double dropout_p) {
  const Options options{attn_mask, alibi_slopes, seed, scale, lower_right, left, right, softcap, dropout_p};
  check_inputs("attention_fwd_cuda", q, k, v, options);
  Tensor out = head_major(q, q.size(1), q.size(2), v.size(3));
  Tensor stats = empty(q, {q.size(0), q.size(1), q.size(2), 2}, ScalarType::Float);
  forward(Attention(q, k, v, options), q, k, v, out, stats);
  return {out, stats};
}

std::tuple<Tensor, Tensor> attention_varlen_fwd(
    const Tensor& q,
    const Tensor& k,
    const Tensor& v,
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
    double dropout_p) {
  const Options options{std::nullopt, alibi_slopes, seed, scale, lower_right, left, right, softcap, dropout_p};
  const PackedSeqlens packed{cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k};
  check_inputs("attention_varlen_fwd_cuda", q, k, v, options, packed);
  // Rows past the last document are 0, with the stats of an empty row.
  Tensor out = zeros(q, {q.size(0), q.size(1), v.size(2)}, q.scalar_type());
  Tensor stats = zeros(q, {q.size(1), q.size(0), 2}, ScalarType::Float);
  Tensor maxima = torch::stable::select(stats, 2, 0);
  torch::stable::fill_(maxima, -INFINITE);
  forward(Attention(q, k, v, options, packed), q, k, v, out, stats);
  return {out, stats};
}

STABLE_TORCH_LIBRARY_IMPL(fastgpt, FASTGPT_DISPATCH_KEY, m) {
  m.impl("attention_fwd_cuda", TORCH_BOX(&attention_fwd));
  m.impl("attention_varlen_fwd_cuda", TORCH_BOX(&attention_varlen_fwd));
}

}  // namespace
}  // namespace fastgpt
