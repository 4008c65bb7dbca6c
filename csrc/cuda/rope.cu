// Rotary position embedding of queries and keys; the backward is the same kernel with -sin.
//
//   (x_i, x_j) → (x_i cos_p - x_j sin_p, x_j cos_p + x_i sin_p) for pair p of the first R channels; others are copied
//   pair p: the channels p and p + R/2, or 2p and 2p + 1 (INTERLEAVED)
//
// Shapes: q (B, H, T, D) and k (B, Hk, T, D), of any strides but the last; cos and sin (T, R/2) or (B, T, R/2); results
// (B, T, heads, D). The arithmetic is float32. Elements moved: one read and one write for each of q and k. A thread has
// N pairs, two vectors of 16 bytes, or N copied channels. The heads of a position are in one block, and the threads of
// the first of them bring cos and sin into the cache of the multiprocessor.
#include "checks.cuh"
#include "elementwise.cuh"
#include "tensors.cuh"

namespace fastgpt {
namespace {

// q or k and its result.
template <typename T>
struct Heads {
  Global<const T> from;
  Global<T> to;
  int64_t batch_stride, head_stride, row_stride;
};

// cos or sin; batch_stride is 0 if all entries of the batch share it.
template <typename A>
struct Angles {
  Global<const A> at;
  int64_t batch_stride, row_stride;
};

struct Sizes {
  int positions, length, q_heads, k_heads, size, pairs;
};

// N neighbours as float32, by vectors of at most 16 bytes.
template <int N, typename A>
__device__ inline Vector<float, N> load_angles(Global<const A> p) {
  constexpr int W = N * sizeof(A) > 16 ? 16 / sizeof(A) : N;
  Vector<float, N> found;
#pragma unroll
  for (int i = 0; i < N; i += W) {
    const auto some = load_vector<W>(p + i);
#pragma unroll
    for (int j = 0; j < W; ++j) found.at[i + j] = to_float(some.at[j]);
  }
  return found;
}

template <typename T, typename A, bool INTERLEAVED, bool WIDE>
__global__ void __launch_bounds__(THREADS)
    rope_fwd_kernel(Heads<T> q, Heads<T> k, Angles<A> cos, Angles<A> sin, float sign, Sizes s, int block_positions) {
  constexpr int N = WIDTH<T, WIDE>;
  const int turned = s.pairs / N, of_head = turned + (s.size - 2 * s.pairs) / N;
  const int of_position = (s.q_heads + s.k_heads) * of_head;
  for (int i = thread(); i < block_positions * of_position; i += THREADS) {
    const int64_t position = int64_t{block_x()} * block_positions + i / of_position;
    if (position >= s.positions) break;
    const int b = static_cast<int>(position) / s.length, t = static_cast<int>(position) % s.length;
    const int which = i % of_position / of_head, unit = i % of_position % of_head;
    const bool is_q = which < s.q_heads;
    const int head = is_q ? which : which - s.q_heads, heads = is_q ? s.q_heads : s.k_heads;
    const Heads<T>& x = is_q ? q : k;
    const auto from = x.from + (b * x.batch_stride + head * x.head_stride + t * x.row_stride);
    const auto to = x.to + (position * heads + head) * s.size;
    if (unit >= turned) {
      const int channel = 2 * s.pairs + (unit - turned) * N;
      store_vector(to + channel, load_vector<N>(from + channel));
      continue;
    }
    const int pair = unit * N, first = INTERLEAVED ? 2 * pair : pair, second = INTERLEAVED ? first + N : pair + s.pairs;
    Vector<T, N> low = load_vector<N>(from + first), high = load_vector<N>(from + second);
    const auto c = load_angles<N>(cos.at + (b * cos.batch_stride + t * cos.row_stride + pair));
    const auto angle_sin = load_angles<N>(sin.at + (b * sin.batch_stride + t * sin.row_stride + pair));
#pragma unroll
    for (int j = 0; j < N; ++j) {
      // Interleaved, the pairs lie one after the other in low, then in high.
      constexpr int STEP = INTERLEAVED ? 2 : 1;
      T& a = INTERLEAVED && 2 * j >= N ? high.at[(STEP * j) % N] : low.at[(STEP * j) % N];
      T& b = !INTERLEAVED ? high.at[j] : 2 * j + 1 >= N ? high.at[(2 * j + 1) % N] : low.at[(2 * j + 1) % N];
      const float u = to_float(a), v = to_float(b), y = sign * angle_sin.at[j];
      a = from_float<T>(u * c.at[j] - v * y);
      b = from_float<T>(v * c.at[j] + u * y);
    }
    store_vector(to + first, low);
    store_vector(to + second, high);
  }
}

// ---- launchers ----

template <typename T>
Heads<T> heads_of(const Tensor& x, const Tensor& result) {
  return {global<const T>(x), global<T>(result), x.stride(0), x.stride(1), x.stride(2)};
}

template <typename A>
Angles<A> angles_of(const Tensor& x) {
  return {global<const A>(x), x.dim() == 3 ? x.stride(0) : 0, x.stride(x.dim() - 2)};
}

// Whether every row of x begins at a multiple of 16 bytes.
bool aligned_rows(const Tensor& x, int64_t itemsize) {
  bool is_aligned = aligned(x);
  for (int64_t d = 0; d + 1 < x.dim(); ++d) is_aligned &= x.stride(d) * itemsize % 16 == 0;
  return is_aligned;
}

// names: of the op, of q and of k.
std::tuple<Tensor, Tensor> rotate(
    const char* const (&names)[3],
    const Tensor& q,
    const Tensor& k,
    const Tensor& cos_,
    const Tensor& sin_,
    bool interleaved,
    float sign) {
  const Checks check(names[0], names[1], q, {ANY, ANY, ANY, ANY});
  const int64_t batch = q.size(0), heads = q.size(1), length = q.size(2), size = q.size(3), kv_heads = k.size(1);
  check(names[2], k, {batch, ANY, length, size}, {q.scalar_type()});
  if (cos_.dim() == 2)
    check("cos", cos_, {length, ANY}, FLOATS_OR_DOUBLE)("sin", sin_, {length, cos_.size(1)}, {cos_.scalar_type()});
  else
    check("cos", cos_, {batch, length, ANY}, FLOATS_OR_DOUBLE)(
        "sin", sin_, {batch, length, cos_.size(-1)}, {cos_.scalar_type()});
  check.rows_contiguous(names[1], q, names[2], k, "cos", cos_, "sin", sin_);
  const int64_t pairs = cos_.size(-1), positions = batch * length;
  STD_TORCH_CHECK(2 * pairs <= size, names[0], ": cos rotates ", 2 * pairs, " channels of ", size);
  constexpr int64_t MOST = (int64_t{1} << 31) - THREADS;
  STD_TORCH_CHECK(
      positions <= MOST && (heads + kv_heads) * size <= MOST, names[0], ": the tensors are too large; split the batch");

  const Tensor q_result = torch::stable::transpose(empty(q, {batch, length, heads, size}, q.scalar_type()), 1, 2);
  const Tensor k_result = torch::stable::transpose(empty(q, {batch, length, kv_heads, size}, q.scalar_type()), 1, 2);
  if (positions * (heads + kv_heads) * size == 0) return {q_result, k_result};
  // Angles of another type than float32 and that of q become float32.
  const bool keep = cos_.scalar_type() == q.scalar_type();
  const Tensor cos = keep ? cos_ : torch::stable::to(cos_, ScalarType::Float);
  const Tensor sin = keep ? sin_ : torch::stable::to(sin_, ScalarType::Float);
  const auto run = [&](auto element, auto angle, auto neighbours, auto wide) {
    using T = decltype(element);
    using A = decltype(angle);
    constexpr int N = WIDTH<T, wide>;
    const int64_t units = (heads + kv_heads) * (size - pairs) / N;  // of a position
    const int block_positions = static_cast<int>(std::max<int64_t>(THREADS / units, 1));
    launch<rope_fwd_kernel<T, A, neighbours, wide>>(
        device_of(q),
        "rope_fwd",
        Launch{.x = cdiv(positions, block_positions), .threads = THREADS},
        heads_of<T>(q, q_result),
        heads_of<T>(k, k_result),
        angles_of<A>(cos),
        angles_of<A>(sin),
        sign,
        Sizes{
            static_cast<int>(positions),
            static_cast<int>(length),
            static_cast<int>(heads),
            static_cast<int>(kv_heads),
            static_cast<int>(size),
            static_cast<int>(pairs)},
        block_positions);
  };
  dispatch(q.scalar_type(), "rope", [&](auto element) {
    using T = decltype(element);
    constexpr int64_t N = WIDTH<T, true>;
    const int64_t angle_bytes = cos.scalar_type() == ScalarType::Float ? 4 : 2;
    const bool is_wide = size % N == 0 && pairs % N == 0 && aligned_rows(q, sizeof(T)) && aligned_rows(k, sizeof(T)) &&
                         aligned_rows(cos, angle_bytes) && aligned_rows(sin, angle_bytes) &&
                         aligned(q_result, k_result);
    choose(interleaved, [&](auto neighbours) {
      choose(is_wide, [&](auto wide) {
        keep ? run(element, element, neighbours, wide) : run(element, float{}, neighbours, wide);
      });
    });
  });
  return {q_result, k_result};
}

std::tuple<Tensor, Tensor> rope_fwd(
    const Tensor& q, const Tensor& k, const Tensor& cos, const Tensor& sin, bool interleaved) {
  return rotate({"rope_fwd_cuda", "q", "k"}, q, k, cos, sin, interleaved, 1.0f);
}

std::tuple<Tensor, Tensor> rope_bwd(
    const Tensor& grad_q, const Tensor& grad_k, const Tensor& cos, const Tensor& sin, bool interleaved) {
  return rotate({"rope_bwd_cuda", "grad_q", "grad_k"}, grad_q, grad_k, cos, sin, interleaved, -1.0f);
}

STABLE_TORCH_LIBRARY_IMPL(fastgpt, FASTGPT_DISPATCH_KEY, m) {
  m.impl("rope_fwd_cuda", TORCH_BOX(&rope_fwd));
  m.impl("rope_bwd_cuda", TORCH_BOX(&rope_bwd));
}

}  // namespace
}  // namespace fastgpt
