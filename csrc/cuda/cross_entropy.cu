// Softmax cross-entropy over rows of logits: forward, backward, and both in one kernel. The formulas are in
// cross_entropy.cuh.
//
// Shapes: logits (N, V) with any row stride, target (N,) int64, weight (V,) float32, loss (N,) float32, statistics
// (N, 2) float32. Bytes moved: forward one read of the logits, backward one read and one write. p is recomputed. A
// block processes a row, 16 bytes per thread at a time. Each thread has its own running maximum and sum. They are
// merged at the end of the row.
//
// cross_entropy_with_grad computes the loss and the gradient of the sum of the losses with one read and one write: the
// row stays in shared memory until its statistics are complete. A row that is too long for one block (V = 50257 in
// float32) is split over the blocks of a cluster, which read each other's statistics. A row that is too long for a
// cluster is read twice.
#include "checks.cuh"
#include "cross_entropy.cuh"

namespace fastgpt {
namespace {

// Loads of a thread that are in flight at once. With 1024 threads per multiprocessor that is 64 and 32 KiB, with 2048
// twice as much.
constexpr int FWD_VECTORS = 4, BWD_VECTORS = 2;
constexpr int STAGES = 4;  // of copying a row to shared memory; a stage is processed while the next ones are copied

// Elements in a vector: 16 bytes, or one element if logits and gradient are aligned differently.
template <typename T, bool WIDE>
constexpr int WIDTH = WIDE ? 16 / sizeof(T) : 1;

__device__ inline void store_softmax(Global<float> statistics, const RunningSoftmax<float>& softmax) {
  store(statistics, softmax.row_max);
  store(statistics + 1, softmax.row_sum);
}

// ---- forward ----

template <typename T, bool OPTIONS>
__global__ void __launch_bounds__(MAX_THREADS) cross_entropy_fwd_kernel(
    Global<const T> logits,
    LossTensors tensors,
    Global<float> loss,
    Global<float> statistics,
    int64_t stride,
    int columns,
    LossOptions options) {
  const int64_t n = block_x();
  const auto x_of = [&](const auto& v) { return values<OPTIONS>(v, options); };
  const Global<const T> row = logits + n * stride;
  const bool smoothing = OPTIONS && options.label_smoothing != 0.0f;
  const float rate = rate_of<OPTIONS>(options);
  const int64_t y = load(tensors.target + n);  // in flight while the row is read
  Statistics mine;
  over_row<FWD_VECTORS>(row, Row<WIDTH<T, true>>(row, columns), [&](int j, const auto& v) {
    const auto x = x_of(v);
    mine.add(x, rate);
    if (smoothing) mine.add_weighted(x, j, tensors);
  });
  const Target target(y, columns, tensors, options);
  if (thread() == 0 && target.y >= 0) mine.x_target = x_of(load_vector<1>(row + target.y)).at[0];
  const Statistics all = merge_row(mine, shared_memory(), 1, rate);
  if (thread() != 0) return;
  store(loss + n, loss_of<OPTIONS>(all, target, columns, tensors, options));
  store_softmax(statistics + 2 * n, all.softmax);
}

// ---- backward ----

// dlogits may be the logits, because a thread overwrites only what it has read. A missing grad_loss counts as 1.
template <typename T, bool OPTIONS, bool WIDE>
__global__ void __launch_bounds__(MAX_THREADS) cross_entropy_bwd_kernel(
    Global<const float> grad_loss,
    Global<const float> grad_lse,
    Global<const T> logits,
    LossTensors tensors,
    Global<const float> statistics,
    Global<T> dlogits,
    int64_t stride,
    int64_t stride_d,
    int columns,
    LossOptions options) {
  const int64_t n = block_x();
  const Target target(load(tensors.target + n), columns, tensors, options);
  const float grad = grad_loss ? load(grad_loss + n) : 1.0f;
  const float row_max = load(statistics + 2 * n), row_sum = load(statistics + (2 * n + 1));
  const float of_lse = grad_lse ? load(grad_lse + n) : 0.0f;
  const Gradient g = Gradient::of<OPTIONS>(
      target, row_max, row_sum, grad, of_lse, static_cast<bool>(grad_lse), columns, tensors, options);
  const Global<const T> row = logits + n * stride;
  const Global<T> row_d = dlogits + n * stride_d;
  over_row<BWD_VECTORS>(row, Row<WIDTH<T, WIDE>>(row, columns), [&](int j, const auto& v) {
    store_vector(row_d + j, g.at<OPTIONS, T>(values<OPTIONS>(v, options), j, tensors, options));
  });
}

// ---- forward and backward in one kernel ----

// A block processes the vectors [first, first + count) of a row. The first block also has the edges, in registers.
// Shared memory: the statistics of the warps, then the vectors.
template <typename T, bool OPTIONS>
__global__ void __launch_bounds__(MAX_THREADS) cross_entropy_with_grad_kernel(
    Global<T> logits,
    LossTensors tensors,
    Global<float> loss,
    Global<float> statistics,
    int64_t stride,
    int columns,
    LossOptions options,
    int blocks) {
  constexpr int N = WIDTH<T, true>;
  const int64_t n = block_x() / blocks;
  const int rank = blocks > 1 ? cluster_rank() : 0, step = threads();
  const Global<T> row = logits + n * stride;
  const Row<N> r(row, columns);
  const int part = (r.vectors + blocks - 1) / blocks, first = part * rank < r.vectors ? part * rank : r.vectors;
  const int count = r.vectors - first < part ? r.vectors - first : part;
  const SharedAddress slots = shared_memory(), cached_row = slots + SLOTS;
  const bool has_edge = rank == 0 && thread() < r.edges;
  Vector<T, 1> edge{};
  if (has_edge) edge = load_vector<1>(row + r.edge(thread()));

  // The vectors of a stage, for the block. A thread reads only vectors that it copied, so no barrier is needed.
  const int stage_vectors = ((count + step - 1) / step + STAGES - 1) / STAGES * step;
  const auto over_stage = [&](int stage, auto&& f) {
    const int end = (stage + 1) * stage_vectors < count ? (stage + 1) * stage_vectors : count;
    for (int i = stage * stage_vectors + thread(); i < end; i += step) f(i, cached_row + 16 * i);
  };
  for (int stage = 0; stage < STAGES; ++stage) {
    over_stage(stage, [&](int i, SharedAddress to) { copy_async(to, row + r.vector(first + i)); });
    commit_copies();
  }
  const Target target(load(tensors.target + n), columns, tensors, options);
  const float rate = rate_of<OPTIONS>(options);
  Statistics mine;
  const auto accumulate = [&](int j, const auto& v) {
    constexpr int COUNT = sizeof(v) / sizeof(T);
    const auto x = values<OPTIONS>(v, options);
    mine.add(x, rate);
    if (static_cast<unsigned>(target.y - j) < static_cast<unsigned>(COUNT)) {
#pragma unroll
      for (int k = 0; k < COUNT; ++k) mine.x_target += k == target.y - j ? x.at[k] : 0.0f;
    }
  };
  const auto accumulate_stage = [&](auto later) {
    wait_copies<later>();
    over_stage(STAGES - 1 - later, [&](int i, SharedAddress at) {
      accumulate(r.vector(first + i), load_shared<Vector<T, N>>(at));
    });
  };
  static_assert(STAGES == 4);
  accumulate_stage(std::integral_constant<int, 3>{});
  accumulate_stage(std::integral_constant<int, 2>{});
  accumulate_stage(std::integral_constant<int, 1>{});
  accumulate_stage(std::integral_constant<int, 0>{});
  if (has_edge) accumulate(r.edge(thread()), edge);
  Statistics all = merge_row(mine, slots, blocks, rate);

  const Gradient g = Gradient::of<OPTIONS>(
      target, all.softmax.row_max, all.softmax.row_sum, 1.0f, 0.0f, false, columns, tensors, options);
  const bool smoothing = OPTIONS && options.label_smoothing != 0.0f;
  Statistics smoothing_sum{{all.softmax.row_max}};  // computed with the final maximum
  const auto write_gradient = [&](int j, const auto& v) {
    const auto x = values<OPTIONS>(v, options);
    if (smoothing) smoothing_sum.add_weighted(x, j, tensors);
    store_vector(row + j, g.at<OPTIONS, T>(x, j, tensors, options));
  };
#pragma unroll 2
  for (int i = thread(); i < count; i += step)
    write_gradient(r.vector(first + i), load_shared<Vector<T, N>>(cached_row + 16 * i));
  if (has_edge) write_gradient(r.edge(thread()), edge);
  if (smoothing) {
    sync_row(blocks);  // all threads have read the slots
    all.weighted = merge_row(smoothing_sum, slots, blocks, rate).weighted;
  }
  if (rank == 0 && thread() == 0) {
    store(loss + n, loss_of<OPTIONS>(all, target, columns, tensors, options));
    store_softmax(statistics + 2 * n, all.softmax);
  }
  if (blocks > 1) sync_cluster();  // before the shared memory of a block is released
}

// ---- launchers ----

// The arguments of a call, checked and converted for the kernels.
struct Call {
  Checks check;
  LossTensors tensors;
  LossOptions options;
  OptionalTensor weight_sum;  // `tensors` points to its memory
  int64_t rows;
  int columns;
  Launch shape;  // one block per row

  Call(
      const char* op,
      const Tensor& logits,
      const Tensor& target,
      const OptionalTensor& weight,
      int64_t ignore_index,
      double label_smoothing,
      double z_loss,
      double softcap,
      double logit_scale)
      : check(op, "logits", logits, {ANY, ANY}),
        options{
            ignore_index,
            static_cast<float>(label_smoothing),
            static_cast<float>(z_loss),
            static_cast<float>(softcap),
            static_cast<float>(logit_scale)},
        rows(logits.size(0)) {
    check("target", target, {rows}, {ScalarType::Long})("weight", weight, {logits.size(1)}, {ScalarType::Float});
    check.rows_contiguous("logits", logits).contiguous("target", target, "weight", weight);
    STD_TORCH_CHECK(logits.size(1) < (int64_t{1} << 31) - 4096, "fastgpt: cross_entropy: too many classes for 32 bits");
    columns = static_cast<int>(logits.size(1));
    if (weight.has_value() && label_smoothing != 0) weight_sum = sum_rows(*weight);
    tensors = {global<const int64_t>(target), global<const float>(weight), global<const float>(weight_sum)};
    shape = {.x = rows, .threads = threads_for(cdiv(columns, 16 / logits.element_size())), .shared = SLOTS};
  }
  bool has_options() const {
    return options.label_smoothing != 0.0f || options.softcap != 0.0f || options.logit_scale != 1.0f;
  }

  // Whole warps, at most one thread per vector.
  static int threads_for(int64_t vectors) {
    return static_cast<int>(std::clamp<int64_t>(cdiv(vectors, WARP) * WARP, WARP, MAX_THREADS));
  }
};

std::tuple<Tensor, Tensor> forward(const Tensor& logits, const Call& call) {
  Tensor loss = empty(logits, {call.rows}, ScalarType::Float);
  Tensor statistics = empty(logits, {call.rows, 2}, ScalarType::Float);
  if (call.rows)
    dispatch(logits.scalar_type(), "cross_entropy", [&](auto element) {
      choose(call.has_options(), [&](auto has_options) {
        using T = decltype(element);
        launch<cross_entropy_fwd_kernel<T, has_options>>(
            device_of(logits),
            "cross_entropy_fwd",
            call.shape,
            global<const T>(logits),
            call.tensors,
            global<float>(loss),
            global<float>(statistics),
            logits.stride(0),
            call.columns,
            call.options);
      });
    });
  return {loss, statistics};
}

void check_no_overlap(const Tensor& logits) {
  STD_TORCH_CHECK(
      logits.size(0) <= 1 || logits.stride(0) >= logits.size(1),
      "fastgpt: the rows of logits must not overlap, because cross_entropy writes them; pass a copy");
}

void backward(
    const OptionalTensor& grad_loss,
    const OptionalTensor& grad_lse,
    const Tensor& logits,
    const Tensor& statistics,
    const Tensor& dlogits,
    const Call& call) {
  const int64_t rows = call.rows;
  call.check("grad_loss", grad_loss, {rows}, {ScalarType::Float})("grad_lse", grad_lse, {rows}, {ScalarType::Float})(
      "statistics", statistics, {rows, 2}, {ScalarType::Float});
  call.check.contiguous("grad_loss", grad_loss, "grad_lse", grad_lse, "statistics", statistics);
  check_no_overlap(dlogits);
  if (logits.numel() == 0) return;
  // Whether the rows of logits and gradient have the same alignment, so that both have the same vectors.
  const auto misalignment = [](const Tensor& x) { return reinterpret_cast<uintptr_t>(x.data_ptr()) % 16; };
  const int64_t difference = (logits.stride(0) - dlogits.stride(0)) * static_cast<int64_t>(logits.element_size());
  const bool same_vectors = misalignment(logits) == misalignment(dlogits) && (call.rows == 1 || difference % 16 == 0);
  dispatch(logits.scalar_type(), "cross_entropy", [&](auto element) {
    choose(call.has_options(), [&](auto has_options) {
      choose(same_vectors, [&](auto wide) {
        using T = decltype(element);
        launch<cross_entropy_bwd_kernel<T, has_options, wide>>(
            device_of(logits),
            "cross_entropy_bwd",
            call.shape,
            global<const float>(grad_loss),
            global<const float>(grad_lse),
            global<const T>(logits),
            call.tensors,
            global<const float>(statistics),
            global<T>(dlogits),
            logits.stride(0),
            dlogits.stride(0),
            call.columns,
            call.options);
      });
    });
  });
}

// Vectors of a row in the shared memory of each of its blocks.
int64_t vectors_per_block(int64_t row_bytes, int64_t blocks) { return cdiv(cdiv(row_bytes, 16), blocks); }

// The number of blocks that share a row, or 0 if a row does not fit into a cluster. Two blocks should fit into a
// multiprocessor, so that one copies while the other computes. A block then has half of the shared memory, minus what
// the system reserves.
int64_t blocks_for(const Device& device, int64_t row_bytes, int64_t block_bytes) {
  constexpr int RESERVED = 1024;
  const int64_t all = device.shared_bytes() - SLOTS, half = (device.shared_bytes() - RESERVED) / 2 - SLOTS;
  const int64_t few = block_bytes > 0 ? std::min(block_bytes, all) : half, most = device.has_clusters() ? 8 : 1;
  for (int64_t blocks = 1; blocks <= most; blocks *= 2)
    if (16 * vectors_per_block(row_bytes, blocks) <= few) return blocks;
  return block_bytes <= 0 && 16 * vectors_per_block(row_bytes, most) <= all ? most : 0;
}

std::tuple<Tensor, Tensor> cross_entropy_fwd(
    const Tensor& logits,
    const Tensor& target,
    const OptionalTensor& weight,
    int64_t ignore_index,
    double label_smoothing,
    double z_loss,
    double softcap,
    double logit_scale) {
  return forward(
      logits,
      Call(
          "cross_entropy_fwd_cuda",
          logits,
          target,
          weight,
          ignore_index,
          label_smoothing,
          z_loss,
          softcap,
          logit_scale));
}

Tensor cross_entropy_bwd(
    const Tensor& grad_loss,
    const OptionalTensor& grad_lse,
    const Tensor& logits,
    const Tensor& target,
    const Tensor& statistics,
    const OptionalTensor& weight,
    int64_t ignore_index,
    double label_smoothing,
    double z_loss,
    double softcap,
    double logit_scale) {
  const Call call(
      "cross_entropy_bwd_cuda", logits, target, weight, ignore_index, label_smoothing, z_loss, softcap, logit_scale);
  Tensor dlogits = empty(logits, {logits.size(0), logits.size(1)}, logits.scalar_type());
  backward(grad_loss, grad_lse, logits, statistics, dlogits, call);
  return dlogits;
}

void cross_entropy_bwd_inplace(
    const Tensor& grad_loss,
    const OptionalTensor& grad_lse,
    const Tensor& logits,
    const Tensor& target,
    const Tensor& statistics,
    const OptionalTensor& weight,
    int64_t ignore_index,
    double label_smoothing,
    double z_loss,
    double softcap,
    double logit_scale) {
  const Call call(
      "cross_entropy_bwd_inplace_cuda",
      logits,
      target,
      weight,
      ignore_index,
      label_smoothing,
      z_loss,
      softcap,
      logit_scale);
  backward(grad_loss, grad_lse, logits, statistics, logits, call);
}

std::tuple<Tensor, Tensor> cross_entropy_with_grad_inplace(
    const Tensor& logits,
    const Tensor& target,
    const OptionalTensor& weight,
    int64_t ignore_index,
    double label_smoothing,
    double z_loss,
    double softcap,
    double logit_scale,
    int64_t block_bytes) {
  const Call call(
      "cross_entropy_with_grad_inplace_cuda",
      logits,
      target,
      weight,
      ignore_index,
      label_smoothing,
      z_loss,
      softcap,
      logit_scale);
  check_no_overlap(logits);
  const Device device = device_of(logits);
  const int64_t row_bytes = call.columns * logits.element_size();
  const int blocks = static_cast<int>(blocks_for(device, row_bytes, block_bytes));
  if (call.rows == 0 || blocks == 0) {
    const auto [loss, statistics] = forward(logits, call);
    backward({}, {}, logits, statistics, logits, call);
    return {loss, statistics};
  }
  Tensor loss = empty(logits, {call.rows}, ScalarType::Float);
  Tensor statistics = empty(logits, {call.rows, 2}, ScalarType::Float);
  const int64_t vectors = vectors_per_block(row_bytes, blocks);
  Launch shape{.x = call.rows * blocks, .threads = Call::threads_for(vectors), .cluster = blocks};
  shape.shared = static_cast<int>(SLOTS + 16 * vectors);
  dispatch(logits.scalar_type(), "cross_entropy", [&](auto element) {
    choose(call.has_options(), [&](auto has_options) {
      using T = decltype(element);
      launch<cross_entropy_with_grad_kernel<T, has_options>>(
          device,
          "cross_entropy_with_grad",
          shape,
          global<T>(logits),
          call.tensors,
          global<float>(loss),
          global<float>(statistics),
          logits.stride(0),
          call.columns,
          call.options,
          blocks);
    });
  });
  return {loss, statistics};
}

STABLE_TORCH_LIBRARY_IMPL(fastgpt, FASTGPT_DISPATCH_KEY, m) {
  m.impl("cross_entropy_fwd_cuda", TORCH_BOX(&cross_entropy_fwd));
  m.impl("cross_entropy_bwd_cuda", TORCH_BOX(&cross_entropy_bwd));
  m.impl("cross_entropy_bwd_inplace_cuda", TORCH_BOX(&cross_entropy_bwd_inplace));
  m.impl("cross_entropy_with_grad_inplace_cuda", TORCH_BOX(&cross_entropy_with_grad_inplace));
}

}  // namespace
}  // namespace fastgpt
