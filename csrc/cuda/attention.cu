// Attention, forward: out = dropout(softmax(mask(softcap(scale q kᵀ) - alibi))) v, the scores never stored.
//
//   s_ij = scale q_i·k_j, capped, masked;   m_i = max_j s_ij;   l_i = log Σ_j exp(s_ij - m_i)
//   out_i = Σ_j exp(s_ij - m_i - l_i) v_j                       0 (m -inf, l 0) for a row that sees nothing
//
// (Vaswani et al., arXiv:1706.03762; tiled as in FlashAttention-2, Dao, arXiv:2307.08691.) Shapes: q (B, H, Lq, D), k
// (B, Hk, Lk, D), v (B, Hk, Lk, DV), out (B, H, Lq, DV), stats (B, H, Lq, 2) float32, m and l: two numbers, because in
// their sum, the log-sum-exp, l would be lost beside large scores.
//
// A block takes ROWS rows of a head, a warp 16 of them, and walks over the tiles of COLUMNS columns that its rows see:
// first those that all rows see whole, whose loop has no mask arithmetic, then the others. The next tile of k and v is
// copied while the matrix units work on this one. Scores become probabilities in the registers where the first product
// leaves them, which is where the second one wants its left factor. exp is exp2 with the scale folded into its
// argument: (s - max s) u with the scale or 1 for u, and never s u - m, in which m is a rounded product. What rounding
// leaves of m is in l.
//
// Three kinds of kernel: plain ones for bfloat16 and float16, of 64 or 128 columns a head, causal or windowed or
// packed; with OPTIONS for masks, softcap, slopes, dropout, other sizes (padded with zeros) and whatever does not begin
// at multiples of 16 bytes; and that for float32 in three products of tf32.
#include "attention_launch.cuh"
#include "tiles.cuh"

namespace fastgpt {
namespace {

// Warps that share rows, each with a part of the columns of out: as many of float32 as 256 have no room in one.
template <typename T, int HEAD>
constexpr int PARTS = sizeof(T) == 4 && HEAD == 256 ? 2 : 1;
template <typename T, int HEAD, int ROWS>
constexpr int THREADS_OF = ROWS / 16 * PARTS<T, HEAD> * WARP;

// Rows and columns of a tile. The largest that compile without spills and, with options, fit into 99 KiB.
template <typename T, int HEAD, bool OPTIONS>
struct Sizes {
  static constexpr bool SPLIT = sizeof(T) == 4;
  static constexpr int ROWS = SPLIT ? (HEAD == 256 ? 32 : 64) : HEAD == 256 ? 64 : 128;
  static constexpr int COLUMNS = SPLIT ? (HEAD == 64 ? 32 : 16) : HEAD == 256 ? 32 : OPTIONS ? 64 : 128;
};

template <typename T, int HEAD, int ROWS, int COLUMNS>
struct Shared {
  static constexpr int ROW = HEAD * sizeof(T), K = ROWS * ROW, V = K + COLUMNS * ROW, STAGE = 2 * COLUMNS * ROW;
  static constexpr int BYTES = K + 2 * STAGE;
};

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
  using U = Unit<T>;
  using S = Shared<T, HEAD, ROWS, COLUMNS>;
  using Wide = Tile<T, HEAD>;
  constexpr int THREADS = THREADS_OF<T, HEAD, ROWS>, OWN = HEAD / PARTS<T, HEAD>, STEPS = HEAD / U::K, PITCH = S::ROW,
                N = COLUMNS / 8;
  // Addresses of factors are kept for all tiles, or made anew for each, where registers are short.
  constexpr bool KEPT = !OPTIONS && HEAD <= 128;
  constexpr bool Q_IN_REGISTERS = !OPTIONS && HEAD == 64;
  constexpr bool SPLIT = sizeof(T) == 4;  // whose products leave no registers for the loads of a second step

  // The longest first: under a causal mask the last rows see most.
  const int tile = row_tiles - 1 - block_x() % row_tiles, of_head = block_x() / row_tiles;
  const int head = of_head % p.heads, batch = of_head / p.heads, key_head = head / p.group;
  const Place place(p, batch);
  const int first = tile * ROWS;
  if (first >= place.Lq) return;

  const Copier<T, ROWS, HEAD, THREADS> q(qs.of(batch, head, place.first_row), qs.strides.row, p.D);
  const Copier<T, COLUMNS, HEAD, THREADS, true> k(ks.of(batch, key_head, place.first_column), ks.strides.row, p.D);
  const Copier<T, COLUMNS, HEAD, THREADS, true> v(vs.of(batch, key_head, place.first_column), vs.strides.row, p.DV);
  const SharedAddress memory = shared_memory();
  const bool aligned = !OPTIONS || p.aligned;

  const int last = (first + ROWS < place.Lq ? first + ROWS : place.Lq) - 1;
  const Visited<COLUMNS> tiles(
      first, last, place.Lk, p.left >= 0, place.offset - p.left, p.right >= 0, place.offset + p.right);

  q.some(memory, first, place.Lq, aligned);
  const auto fetch = [&](int i) {
    const SharedAddress stage = memory + i % 2 * S::STAGE;
    k.some(stage + S::K, tiles.start(i), place.Lk, aligned);
    v.some(stage + S::V, tiles.start(i), place.Lk, aligned);
  };
  if (tiles.count > 0) fetch(0);
  commit_copies();

  const int me = same_in_warp(warp());
  const int of_rows = me / PARTS<T, HEAD> * 16, of_columns = me % PARTS<T, HEAD> * OWN;
  const int row = of_rows + lane() / 4, column = lane() % 4 * 2;
  const Scores<OPTIONS> scores(p, place, batch, head);
  const float unit = scores.unit(), unit_2 = unit * static_cast<float>(LOG2E);
  float out[OWN / 8][4] = {}, top[2] = {-INFINITE, -INFINITE}, sum[2] = {};
  const SharedAddress q_first = made_anew(U::template left<Wide>()), k_first = made_anew(U::template right<Wide>());
  const SharedAddress v_first =
      made_anew(Wide::right_of(U::template right_down<Wide>(), of_columns * static_cast<int>(sizeof(T))));
  const SharedAddress q_base = memory + of_rows * PITCH;
  typename U::Left q_kept[Q_IN_REGISTERS ? STEPS : 1];

  // One tile, which has landed; `start` is its first column, for those who ask.
  const auto work = [&](auto edge, SharedAddress stage, int start) {
    const auto kept = [](SharedAddress a) { return KEPT ? a : made_anew(a); };
    const SharedAddress q_lane = kept(q_first), k_lane = kept(k_first), v_lane = kept(v_first);
    float s[N][4] = {};
    const auto q_factor = [&](int step) {
      if constexpr (Q_IN_REGISTERS)
        return q_kept[step];
      else
        return left_at<U, Wide>(q_lane, q_base)(step);
    };
    add_product<U, STEPS, SPLIT ? 1 : STEPS>(s, q_factor, right_at<U, Wide>(k_lane, memory + stage + S::K));
    scores.template shape<edge>(s, first + row, start + column);

    // The maximum grows, what was summed so far shrinks.
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      float next = top[h];
#pragma unroll
      for (int n = 0; n < N; ++n) next = fmaxf(next, fmaxf(s[n][2 * h], s[n][2 * h + 1]));
      next = fmaxf(next, shuffle_xor(next, 1));
      next = fmaxf(next, shuffle_xor(next, 2));
      // A row that has seen nothing yet: -inf - 0 instead of -inf - -inf.
      const float origin = (edge || OPTIONS) && next == -INFINITE ? 0.0f : next;
      const float factor = exp2_fast((top[h] - origin) * unit_2);
      top[h] = next;
      float part = 0;
#pragma unroll
      for (int n = 0; n < N; ++n)
#pragma unroll
        for (int i = 2 * h; i < 2 * h + 2; ++i) {
          s[n][i] = exp2_fast((s[n][i] - origin) * unit_2);
          part += s[n][i];
        }
      sum[h] = sum[h] * factor + part;
#pragma unroll
      for (int d = 0; d < OWN / 8; ++d) out[d][2 * h] *= factor, out[d][2 * h + 1] *= factor;
    }
    if constexpr (OPTIONS)
      if (p.seed) {
#pragma unroll
        for (int n = 0; n < N; ++n)
#pragma unroll
          for (int h = 0; h < 2; ++h) {
            const auto keep = scores.kept(first + row + 8 * h, start + column + 8 * n);
            s[n][2 * h] *= keep.at[0], s[n][2 * h + 1] *= keep.at[1];
          }
      }

    add_product<U, COLUMNS / U::K, COLUMNS / U::K>(
        out, [&](int step) { return U::left_of(s, step); }, right_down_at<U, Wide>(v_lane, memory + stage + S::V));
  };

  int i = 0;
  const auto arrive = [&] {
    wait_copies<0>();
    sync_block();
  };
  arrive();
  if constexpr (Q_IN_REGISTERS)
#pragma unroll
    for (int step = 0; step < STEPS; ++step)
      q_kept[step] = U::template load_left<Wide>(Wide::right_of(q_first, step * 32) + q_base);
  // All full tiles but the last, whose successor may be an edge.
  if constexpr (!OPTIONS) {
    Global<const T> next_k = k.tile(tiles.full + COLUMNS), next_v = v.tile(tiles.full + COLUMNS);
#pragma unroll 1
    for (; i + 1 < tiles.full_count; ++i) {
      const SharedAddress stage = i % 2 * S::STAGE, other = memory + (i + 1) % 2 * S::STAGE;
      k.whole(other + S::K, next_k);
      v.whole(other + S::V, next_v);
      commit_copies();
      work(std::false_type{}, stage, 0);
      arrive();
    }
  }
#pragma unroll 1
  for (; i < tiles.count; ++i) {
    if (i + 1 < tiles.count) fetch(i + 1);
    commit_copies();
    if (sizeof(T) == 2 && i < tiles.full_count)
      work(std::false_type{}, i % 2 * S::STAGE, tiles.start(i));
    else
      work(std::true_type{}, i % 2 * S::STAGE, tiles.start(i));
    arrive();
  }

#pragma unroll
  for (int h = 0; h < 2; ++h) {
    sum[h] += shuffle_xor(sum[h], 1);
    sum[h] += shuffle_xor(sum[h], 2);
    const int y = first + row + 8 * h;
    const float scale = sum[h] > 0.0f || sum[h] != sum[h] ? 1.0f / sum[h] : 0.0f;  // NaN stays
#pragma unroll
    for (int d = 0; d < OWN / 8; ++d) out[d][2 * h] *= scale, out[d][2 * h + 1] *= scale;
    if (lane() % 4 == 0 && of_columns == 0 && y < place.Lq) {
      const Global<float> of_row = stats + (batch * stats_batch + head * stats_head + 2 * (place.first_row + y));
      const bool none = sum[h] == 0.0f;
      const float high = multiply_rounded(top[h], unit);
      store(of_row, none ? -INFINITE : high);
      store(of_row + 1, none ? 0.0f : fmaf(top[h], unit, -high) + logf(sum[h]));
    }
  }
  // Through the shared memory where q was.
  const SharedAddress own = memory + Wide::element(row, of_columns + column);
#pragma unroll
  for (int d = 0; d < OWN / 8; ++d)
#pragma unroll
    for (int h = 0; h < 2; ++h)
      U::store_pair(
          Wide::right_of(own, d * 8 * static_cast<int>(sizeof(T))) + h * 8 * PITCH, out[d][2 * h], out[d][2 * h + 1]);
  sync_block();
  write_rows<T, HEAD>(
      memory,
      last - first + 1,
      outs.of(batch, head, place.first_row + first),
      outs.strides.row,
      p.DV,
      aligned,
      thread(),
      THREADS);
}

template <typename T, int HEAD, bool OPTIONS>
void launch_fwd(
    const Attention& a, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& out, const Tensor& stats) {
  using Z = Sizes<T, HEAD, OPTIONS>;
  using S = Shared<T, HEAD, Z::ROWS, Z::COLUMNS>;
  const int64_t row_tiles = cdiv(a.longest_q, Z::ROWS);
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
  if (a.longest_q == 0 || a.batches == 0 || a.problem.heads == 0) return;
  with_kernel(a, q, {q, k, v, out}, [&](auto element, auto head, auto options) {
    launch_fwd<decltype(element), head, options>(a, q, k, v, out, stats);
  });
}

std::tuple<Tensor, Tensor> attention_fwd(
    const Tensor& q,
    const Tensor& k,
    const Tensor& v,
    const OptionalTensor& mask,
    const OptionalTensor& slopes,
    const OptionalTensor& seed,
    double scale,
    bool lower_right,
    int64_t left,
    int64_t right,
    double softcap,
    double dropout_p) {
  const Options options{mask, slopes, seed, scale, lower_right, left, right, softcap, dropout_p};
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
    const Tensor& cu_q,
    const Tensor& cu_k,
    const OptionalTensor& slopes,
    const OptionalTensor& seed,
    int64_t longest_q,
    int64_t longest_k,
    double scale,
    bool lower_right,
    int64_t left,
    int64_t right,
    double softcap,
    double dropout_p) {
  const Options options{std::nullopt, slopes, seed, scale, lower_right, left, right, softcap, dropout_p};
  const Documents documents{cu_q, cu_k, longest_q, longest_k};
  check_inputs("attention_varlen_fwd_cuda", q, k, v, options, documents);
  // What lies past the last document is 0, and sees nothing.
  Tensor out = zeros(q, {q.size(0), q.size(1), v.size(2)}, q.scalar_type());
  Tensor stats = zeros(q, {q.size(1), q.size(0), 2}, ScalarType::Float);
  Tensor maxima = torch::stable::select(stats, 2, 0);
  torch::stable::fill_(maxima, -INFINITE);
  forward(Attention(q, k, v, options, documents), q, k, v, out, stats);
  return {out, stats};
}

STABLE_TORCH_LIBRARY_IMPL(fastgpt, FASTGPT_DISPATCH_KEY, m) {
  m.impl("attention_fwd_cuda", TORCH_BOX(&attention_fwd));
  m.impl("attention_varlen_fwd_cuda", TORCH_BOX(&attention_varlen_fwd));
}

}  // namespace
}  // namespace fastgpt
