// Attention, backward; the mathematics of the forward, and its names, are in attention.cu.
//
//   p_ij = exp(s_ij - m_i - l_i);   delta_i = Σ_d out_id dout_id - dlse_i;   dp_ij = dout_i·v_j
//   dv_j = Σ_i p_ij dout_i;   ds_ij = p_ij (dp_ij - delta_i)
//   dk_j = scale Σ_i ds_ij q_i;   dq_i = scale Σ_j ds_ij k_j
//
// With dropout p_ij of dv, and dp_ij, are multiplied by the mask; with a softcap ds_ij by its derivative.
//
// One pass, five products a tile: a block takes COLUMNS columns of a key head and walks over the tiles of ROWS rows
// that see them, of each query head of the group. dk and dv stay in registers. p and ds go through shared memory, from
// where the products over rows take them transposed. ds k is a tile's share of dq, which is added to a float32 sum in
// memory by atomic additions, in an order that differs from run to run. Deterministic: a few blocks a head, each with a
// sum of its own to which it adds in one order; the sums are added up at the end.
//
// Where a tile has all columns of a row, delta is Σ_j p_ij dp_ij, which 16 bits do not round as they round out: the
// kernels with options add it up over the warps that share the row, and take all such launches.
//
// Before it a pass over out and dout leaves (m, l, delta) of each row, after it one turns the sums into dq
// (attention_bwd_rows.cuh).
#include "attention_bwd_rows.cuh"
#include "attention_launch.cuh"
#include "tiles.cuh"

namespace fastgpt {
namespace {

// Rows and columns of a tile: the largest that compile without spills, beside the COLUMNS · HEAD / 8 sums of dk and dv
// that a warp has. SMALL: the largest that fit into 99 KiB as well; float32 of 256 columns has none.
template <typename T, int HEAD, bool OPTIONS, bool SMALL = false>
struct Sizes {
  static constexpr bool SPLIT = sizeof(T) == 4;
  static constexpr int ROWS = SPLIT || HEAD == 256 || SMALL ? 32 : 64;
  static constexpr int COLUMNS = SPLIT + SMALL + HEAD / 256 >= 2 ? 32 : HEAD <= 128 && !OPTIONS ? 128 : 64;
};
// Warps of a block, and stages of the tiles' copies.
template <int COLUMNS>
constexpr int WARPS = COLUMNS == 32 ? 4 : 8;
template <int COLUMNS>
constexpr int STAGES = COLUMNS == 32 ? 1 : 2;

template <typename T, int HEAD, int ROWS, int COLUMNS>
struct Shared {
  static constexpr int ROW = HEAD * sizeof(T), SCORES = ROWS * Padded<T, COLUMNS>::PITCH;
  static constexpr int K = 0, V = COLUMNS * ROW, Q = 2 * COLUMNS * ROW, GRAD = Q + ROWS * ROW, STAGE = 2 * ROWS * ROW;
  static constexpr int P = Q + STAGES<COLUMNS> * STAGE, DS = P + SCORES, BYTES = DS + SCORES;
};

// ---- the pass ----

template <typename T, int HEAD, int ROWS, int COLUMNS, bool OPTIONS>
__global__ void __launch_bounds__(WARPS<COLUMNS>* WARP, 1) attention_bwd_kernel(
    const Problem p,
    const Matrices<const T> qs,
    const Matrices<const T> ks,
    const Matrices<const T> vs,
    const Matrices<const T> grads,
    const Matrices<T> dks,
    const Matrices<T> dvs,
    const Matrices<const Vector<float, 4>> by_row,
    const Matrices<float> sums,  // of dq, in rows of HEAD
    const int64_t sum_of_block,
    const int blocks) {  // a key head
  using U = Unit<T>;
  using S = Shared<T, HEAD, ROWS, COLUMNS>;
  using Wide = Tile<T, HEAD>;
  using Square = Padded<T, COLUMNS>;  // of p and ds
  constexpr int THREADS = WARPS<COLUMNS> * WARP, PITCH = S::ROW, BYTES = sizeof(T);
  // Warps cut the scores by 16 rows and COLUMNS / ACROSS columns, dk and dv by 16 columns and HEAD / PARTS of a row, dq
  // by 16 rows and HEAD / ACROSS.
  constexpr int ACROSS = WARPS<COLUMNS> * 16 / ROWS, N = COLUMNS / ACROSS / 8, PARTS = WARPS<COLUMNS> * 16 / COLUMNS;
  constexpr int OWN = HEAD / PARTS, OWN_Q = HEAD / ACROSS;
  constexpr bool NARROW = COLUMNS == 32;                  // the most sums beside the fewest scores
  constexpr int AT_ONCE = NARROW ? 1 : OPTIONS ? 2 : 16;  // steps of a product, whose loads are on their way together
  constexpr int DQ_AT_ONCE = NARROW ? 2 : OWN_Q / 8;
  // Of the many scores beside many sums, one half after the other.
  constexpr int HALVES = HEAD == 128 && N == 8 ? 2 : 1;
  static_assert(N % 2 == 0 && OWN % 16 == 0 && OWN_Q % 16 == 0);

  const SharedAddress memory = shared_memory();
  const bool aligned = !OPTIONS || p.aligned;

  // This warp's part of the scores, dk, dv and dq. Addresses: a lane's part, common to tiles of a kind, and a warp's.
  const int me = same_in_warp(warp());
  const int y_warp = me / ACROSS * 16, x_warp = me % ACROSS * (COLUMNS / ACROSS);
  const int y = y_warp + lane() / 4, x = x_warp + lane() % 4 * 2;
  const int own_column = me / PARTS * 16, own_head = me % PARTS * OWN, q_head = me % ACROSS * OWN_Q;
  const SharedAddress left_lane = made_anew(U::template left<Wide>()),
                      right_lane = made_anew(U::template right<Wide>());
  const bool same = sizeof(T) == 2;  // the two forms of 16-bit factors are one
  const SharedAddress down_lane = same ? left_lane : made_anew(U::template right_down<Wide>()),
                      ds_first = memory + S::DS + y_warp * Square::PITCH + U::template left<Square>();
  const SharedAddress p_lane = memory + S::P + Square::element(y, x);
  const SharedAddress p_down_lane =
      memory + S::P + Square::right_of(U::template left_down<Square>(), own_column * BYTES);
  // The warp's parts of dk, dv and dq begin where the swizzle does, or not.
  constexpr bool LINES = OWN * BYTES % 128 == 0, LINES_Q = OWN_Q * BYTES % 128 == 0;
  const SharedAddress grad_down_lane = LINES ? down_lane : Wide::right_of(down_lane, own_head * BYTES);
  const SharedAddress k_down_lane = LINES_Q ? down_lane : Wide::right_of(down_lane, q_head * BYTES);
  const SharedAddress k_down_base = memory + S::K + (LINES_Q ? q_head * BYTES : 0);
  const auto arrive = [] {
    wait_copies<0>();
    sync_block();
  };
  // Deterministic launches have fewer blocks than tiles.
#pragma unroll 1
  for (int first = block_x() % blocks * COLUMNS;; first += blocks * COLUMNS) {
    // Registers are short: what a part of the work needs of the place in memory is computed there.
    const int of_head = made_anew(static_cast<uint32_t>(block_x())) / blocks;
    const int batch = of_head / p.key_heads, key_head = of_head % p.key_heads;
    const Place place(p, batch);
    if (first >= place.Lk) return;
    const Copier<T, COLUMNS, HEAD, THREADS> k(ks.of(batch, key_head, place.first_column), ks.strides.row, p.D);
    const Copier<T, COLUMNS, HEAD, THREADS> v(vs.of(batch, key_head, place.first_column), vs.strides.row, p.DV);
    k.some(memory + S::K, first, place.Lk, aligned);
    v.some(memory + S::V, first, place.Lk, aligned);
    const int last = (first + COLUMNS < place.Lk ? first + COLUMNS : place.Lk) - 1;
    Visited<ROWS> tiles(
        first, last, place.Lq, p.right >= 0, -place.offset - p.right, p.left >= 0, p.left - place.offset);
    // A column past the end is seen by no row: where all scores are far below zero, exp(0 - lse) would be infinite.
    if (first + COLUMNS > place.Lk) tiles.all_edges();
    float dk[OWN / 8][4] = {}, dv[OWN / 8][4] = {};

#pragma unroll 1
    for (int member = 0; member < p.group; ++member) {
      const int block = made_anew(static_cast<uint32_t>(block_x())), b = block / blocks / p.key_heads;
      const int head = block / blocks % p.key_heads * p.group + member;
      const Place place(p, b);
      // A pitch each is two registers too many beside the sums of 128.
      using RowCopier = Copier<T, ROWS, HEAD, THREADS, HEAD <= 64>;
      const RowCopier q(qs.of(b, head, place.first_row), qs.strides.row, p.D);
      const RowCopier grad(grads.of(b, head, place.first_row), grads.strides.row, p.DV);
      const auto of_rows = made_anew(by_row.of(b, head, place.first_row + y));
      const auto dq =
          made_anew(sums.of(b, head, place.first_row + y) + (block % blocks * sum_of_block + q_head + lane() % 4 * 2));
      const Scores<OPTIONS> scores(p, place, b, head);
      const float unit = scores.unit();

      // One tile, which has landed; `start` is its first row.
      const auto work = [&](auto edge, SharedAddress stage, int start) {
        // The loop without masks keeps its addresses in registers; others have none to spare.
        const auto kept = [&](SharedAddress a) { return OPTIONS || edge ? made_anew(a) : a; };
        Vector<float, 4> row[2];  // m, l and delta
        const Global<const Vector<float, 4>> rows = behind(of_rows, start, sizeof(Vector<float, 4>));
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          row[h] = {{INFINITE, 0.0f, 0.0f, 0.0f}};
          if (!edge || start + y + 8 * h < place.Lq) row[h] = load(rows + 8 * h);
        }
        const SharedAddress left = kept(left_lane), right = kept(right_lane), p_at = kept(p_lane);
        const SharedAddress q_warp = memory + (stage + S::Q + y_warp * PITCH);
        const SharedAddress k_warp = memory + (S::K + x_warp * PITCH);
#pragma unroll
        for (int part = 0; part < N; part += N / HALVES) {
          constexpr int M = N / HALVES, STEPS = HEAD / U::K;
          float s[M][4] = {}, dp[M][4] = {};
          add_product<U, STEPS, AT_ONCE>(
              s, left_at<U, Wide>(left, q_warp), right_at<U, Wide>(right, k_warp + part * 8 * PITCH));
          float bent[OPTIONS ? M : 1][4];
          if constexpr (OPTIONS)
            if (p.softcap > 0.0f) {
#pragma unroll
              for (int n = 0; n < M; ++n)
#pragma unroll
                for (int i = 0; i < 4; ++i) bent[n][i] = scores.bend(s[n][i]);
            }
          scores.template shape<edge>(s, start + y, first + x + part * 8);
#pragma unroll
          for (int n = 0; n < M; ++n)
#pragma unroll
            for (int i = 0; i < 4; ++i) {
              const float high = row[i / 2].at[0], low = row[i / 2].at[1];
              s[n][i] = exp2_fast(fmaf(fmaf(s[n][i], unit, -high), static_cast<float>(LOG2E), -low));
            }

          add_product<U, STEPS, AT_ONCE>(
              dp,
              left_at<U, Wide>(left, q_warp + S::GRAD - S::Q),
              right_at<U, Wide>(right, k_warp + S::V - S::K + part * 8 * PITCH));
          if constexpr (OPTIONS)
            if (p.short_rows) {
              static_assert(HALVES == 1);
              add_to_delta<ACROSS>(row, s, dp, scores, start + y, first + x, y, me % ACROSS, memory + S::P);
            }
#pragma unroll
          for (int n = 0; n < M; ++n)
#pragma unroll
            for (int h = 0; h < 2; ++h) {
              float probability[2] = {s[n][2 * h], s[n][2 * h + 1]};
              if constexpr (OPTIONS)
                if (p.seed) {
                  const auto keep = scores.kept(start + y + 8 * h, first + x + 8 * (part + n));
#pragma unroll
                  for (int i = 0; i < 2; ++i) probability[i] *= keep.at[i], dp[n][2 * h + i] *= keep.at[i];
                }
              float ds[2];
#pragma unroll
              for (int i = 0; i < 2; ++i) {
                ds[i] = s[n][2 * h + i] * (dp[n][2 * h + i] - row[h].at[2]);
                if constexpr (OPTIONS)
                  if (p.softcap > 0.0f) ds[i] *= bent[n][2 * h + i];
              }
              const SharedAddress at = Square::right_of(p_at, (part + n) * 8 * BYTES) + h * 8 * Square::PITCH;
              U::store_pair(at, probability[0], probability[1]);
              U::store_pair(at + (S::DS - S::P), ds[0], ds[1]);
            }
        }
        sync_block();

        const SharedAddress down = kept(grad_down_lane), p_down = kept(p_down_lane),
                            q_stage = memory + (stage + S::Q + (LINES ? own_head * BYTES : 0));
        add_product<U, ROWS / U::K, AT_ONCE>(
            dv, left_down_at<U, Square>(p_down, 0), right_down_at<U, Wide>(down, q_stage + S::GRAD - S::Q));
        const Global<float> to = behind(dq, start, HEAD * sizeof(float));
        const SharedAddress ds = kept(ds_first), k_down = kept(k_down_lane);
#pragma unroll
        for (int begin = 0; begin < OWN_Q / 8; begin += DQ_AT_ONCE) {
          float part[DQ_AT_ONCE][4] = {};
          add_product<U, COLUMNS / U::K, AT_ONCE>(part, left_at<U, Square>(ds, 0), [&](int step, int d) {
            return right_down_at<U, Wide>(k_down, k_down_base)(step, begin + d);
          });
#pragma unroll
          for (int h = 0; h < 2; ++h)
            if (!edge || start + y + 8 * h < place.Lq) {
#pragma unroll
              for (int d = 0; d < DQ_AT_ONCE; ++d)
                atomic_add_pair(to + (h * 8 * HEAD + (begin + d) * 8), part[d][2 * h], part[d][2 * h + 1]);
            }
        }
        add_product<U, ROWS / U::K, AT_ONCE>(
            dk, left_down_at<U, Square>(p_down, S::DS - S::P), right_down_at<U, Wide>(down, q_stage));
      };

      const auto fetch = [&](int i) {
        const SharedAddress stage = memory + i % STAGES<COLUMNS> * S::STAGE;
        q.some(stage + S::Q, tiles.start(i), place.Lq, aligned);
        grad.some(stage + S::GRAD, tiles.start(i), place.Lq, aligned);
      };
      if (tiles.count > 0) fetch(0);
      commit_copies();
      arrive();
      int i = 0;
      if constexpr (!OPTIONS) {
        const int full_count = same_in_warp(tiles.full_count);
        int start = same_in_warp(tiles.full);
        Global<const T> next_q = q.tile(start + ROWS), next_grad = grad.tile(start + ROWS);
#pragma unroll 1
        for (; i + 1 < full_count; ++i) {
          const SharedAddress stage = i % 2 * S::STAGE, other = memory + (i + 1) % 2 * S::STAGE;
          q.whole(other + S::Q, next_q);
          grad.whole(other + S::GRAD, next_grad);
          commit_copies();
          work(std::false_type{}, stage, start);
          arrive();
          start += ROWS;
        }
      }
#pragma unroll 1
      for (; i < tiles.count; ++i) {
        constexpr bool AHEAD = STAGES<COLUMNS> > 1;
        if (AHEAD && i + 1 < tiles.count) fetch(i + 1);
        commit_copies();
        work(std::true_type{}, i % STAGES<COLUMNS> * S::STAGE, tiles.start(i));
        arrive();
        if (!AHEAD && i + 1 < tiles.count) {
          fetch(i + 1);
          commit_copies();
          arrive();
        }
      }
    }

    // dk and dv, through the shared memory where k and v were.
    const int index = made_anew(static_cast<uint32_t>(thread())),
              of = made_anew(static_cast<uint32_t>(block_x())) / blocks;
    const SharedAddress own = memory + Wide::element(own_column + index % WARP / 4, own_head + index % 4 * 2);
#pragma unroll
    for (int d = 0; d < OWN / 8; ++d)
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const SharedAddress at = own + h * 8 * PITCH;
        U::store_pair(Wide::right_of(at, d * 8 * BYTES) + S::K, dk[d][2 * h] * p.scale, dk[d][2 * h + 1] * p.scale);
        U::store_pair(Wide::right_of(at, d * 8 * BYTES) + S::V, dv[d][2 * h], dv[d][2 * h + 1]);
      }
    sync_block();
    const Place here(p, of / p.key_heads);
    const int rows = here.Lk - first < COLUMNS ? here.Lk - first : COLUMNS;
    const int64_t row = here.first_column + first;
    write_rows<T, HEAD>(
        memory + S::K,
        rows,
        dks.of(of / p.key_heads, of % p.key_heads, row),
        dks.strides.row,
        p.D,
        aligned,
        index,
        THREADS);
    write_rows<T, HEAD>(
        memory + S::V,
        rows,
        dvs.of(of / p.key_heads, of % p.key_heads, row),
        dvs.strides.row,
        p.DV,
        aligned,
        index,
        THREADS);
    sync_block();
  }
}

// ---- launchers ----

template <typename T, int HEAD, bool OPTIONS, bool SMALL>
void launch_bwd(Attention a, const Gradients& g, const Tensor& q, const Tensor& k, const Tensor& v) {
  using Z = Sizes<T, HEAD, OPTIONS, SMALL>;
  using S = Shared<T, HEAD, Z::ROWS, Z::COLUMNS>;
  Problem& p = a.problem;
  p.short_rows = p.short_rows && a.longest_k <= Z::COLUMNS;
  const Device device = device_of(q);
  check_shared_memory(device, "attention_bwd", S::BYTES);
  // Packed documents lie in one memory: what is done to every row is done once.
  const int64_t whole = a.packed ? 1 : a.batches, rows = whole * p.heads * p.Lq;
  const int64_t key_heads = p.key_heads, tiles = cdiv(a.longest_k, Z::COLUMNS);
  const int64_t few = std::max<int64_t>(2 * device.multiprocessors() / std::max<int64_t>(a.batches * key_heads, 1), 1);
  const int64_t blocks = g.deterministic ? std::min(tiles, few) : tiles;
  const Tensor by_row = empty(q, {rows, 4}, ScalarType::Float);
  const Tensor sums = zeros(q, {g.deterministic ? blocks : 1, rows, HEAD}, ScalarType::Float);
  const int64_t per_head = p.Lq, per_batch = a.packed ? 0 : p.heads * p.Lq;
  const Launch pass{.x = cdiv(rows, PASS_THREADS / WARP), .threads = PASS_THREADS};

  if (rows > 0) launch_rows<T>(a, g, device, pass, rows, by_row);
  if (blocks * key_heads * a.batches > 0)
    launch<attention_bwd_kernel<T, HEAD, Z::ROWS, Z::COLUMNS, OPTIONS>>(
        device,
        "attention_bwd",
        {.x = blocks * key_heads * a.batches, .threads = WARPS<Z::COLUMNS> * WARP, .shared = S::BYTES},
        p,
        a.matrices<const T>(q),
        a.matrices<const T>(k),
        a.matrices<const T>(v),
        a.matrices<const T>(g.grad_out),
        a.matrices<T>(g.dk),
        a.matrices<T>(g.dv),
        Matrices<const Vector<float, 4>>{vectors_of_four(by_row), {per_batch, per_head, 1}},
        Matrices<float>{global<float>(sums), {per_batch * HEAD, per_head * HEAD, HEAD}},
        g.deterministic ? rows * HEAD : int64_t{0},
        static_cast<int>(blocks));
  if (rows > 0)
    launch<attention_bwd_dq_kernel<T>>(
        device,
        "attention_bwd_dq",
        pass,
        global<const float>(sums),
        a.matrices<T>(g.dq),
        rows,
        p.heads,
        int64_t{p.Lq},
        p.D,
        HEAD,
        rows * HEAD,
        static_cast<int>(g.deterministic ? blocks : 1),
        p.scale);
}

// dout with contiguous rows: an expanded scalar, as out.sum() makes, has none.
Tensor whole_lines(const Tensor& grad) {
  return grad.stride(-1) == 1 || grad.numel() == 0 ? grad : torch::stable::contiguous(grad);
}

void backward(Attention a, Gradients g, const Tensor& q, const Tensor& k, const Tensor& v) {
  g.grad_out = whole_lines(g.grad_out);
  a.problem.short_rows = q.element_size() == 2 && a.longest_k <= Sizes<bf16, 64, true>::COLUMNS;  // OPTIONS, then
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
    const OptionalTensor& mask,
    const OptionalTensor& slopes,
    const OptionalTensor& seed,
    double scale,
    bool lower_right,
    int64_t left,
    int64_t right,
    double softcap,
    double dropout_p,
    bool mask_grad,
    bool deterministic) {
  const Options options{mask, slopes, seed, scale, lower_right, left, right, softcap, dropout_p};
  const Checks check = check_inputs("attention_bwd_cuda", q, k, v, options);
  const int64_t batch = q.size(0), heads = q.size(1), rows = q.size(2), columns = v.size(3);
  const auto like = [](const Tensor& x) { return head_major(x, x.size(1), x.size(2), x.size(3)); };
  const Gradients g{grad_out, out, stats, like(q), like(k), like(v), grad_lse, deterministic};
  g.check({batch, heads, rows, columns}, {batch, heads, rows}, {batch, heads, rows, 2}, check);
  backward(Attention(q, k, v, options), g, q, k, v);
  return {g.dq, g.dk, g.dv, empty(q, {0}, q.scalar_type())};  // a mask that wants a gradient was refused before
}

std::tuple<Tensor, Tensor, Tensor> attention_varlen_bwd(
    const Tensor& grad_out,
    const OptionalTensor& grad_lse,
    const Tensor& q,
    const Tensor& k,
    const Tensor& v,
    const Tensor& out,
    const Tensor& stats,
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
    double dropout_p,
    bool deterministic) {
  const Options options{std::nullopt, slopes, seed, scale, lower_right, left, right, softcap, dropout_p};
  const Documents documents{cu_q, cu_k, longest_q, longest_k};
  const Checks check = check_inputs("attention_varlen_bwd_cuda", q, k, v, options, documents);
  const int64_t rows = q.size(0), heads = q.size(1), columns = v.size(2);
  const auto like = [](const Tensor& x) { return zeros(x, {x.size(0), x.size(1), x.size(2)}, x.scalar_type()); };
  const Gradients g{grad_out, out, stats, like(q), like(k), like(v), grad_lse, deterministic};
  g.check({rows, heads, columns}, {heads, rows}, {heads, rows, 2}, check);
  backward(Attention(q, k, v, options, documents), g, q, k, v);
  return {g.dq, g.dk, g.dv};
}

STABLE_TORCH_LIBRARY_IMPL(fastgpt, FASTGPT_DISPATCH_KEY, m) {
  m.impl("attention_bwd_cuda", TORCH_BOX(&attention_bwd));
  m.impl("attention_varlen_bwd_cuda", TORCH_BOX(&attention_varlen_bwd));
}

}  // namespace
}  // namespace fastgpt
