// Rotary position embedding of queries and keys on the CPU.
//
//   (x_i, x_j) → (x_i·cos_p - x_j·sin_p, x_j·cos_p + x_i·sin_p) for pair p of the first R channels; others are copied
//   pair p: the channels p and p + R/2, or 2p and 2p + 1 (interleaved)
//
// The backward is the same with -sin. Bytes moved: q and k are read once and their results are written once, in the
// layout (B, T, heads, D). A thread takes whole positions: cos and sin of a position are read once, for all heads of q
// and k. Large results are written with streaming (non-temporal) stores.
#include "checks.h"
#include "kernel.h"
#include "vector.h"

namespace fastgpt {
namespace {

// q or k (B, heads, T, D) and its result. The strides are in elements; the last one is 1.
template <typename T>
struct Heads {
  const T* from;
  T* to;
  int64_t heads, batch_stride, head_stride, row_stride;
};

// cos or sin; batch_stride is 0 if all entries of the batch share it.
template <typename A>
struct Angles {
  const A* data;
  int64_t batch_stride, row_stride;
};

struct Extent {
  int64_t batch, length, size, pairs;
};

// The neighbours 2i and 2i + 1, exchanged.
[[gnu::always_inline]] inline Floats swap_pairs(Floats x) {
  using Both = VectorOf<uint64_t, LANES<float> / 2>::type;
  const Both both = bit_cast<Both>(x);
  return bit_cast<Floats>(both << 32 | both >> 32);
}
[[gnu::always_inline]] inline Doubles swap_pairs(Doubles x) {
  Doubles y;
  for (int64_t i = 0; i < LANES<double>; ++i) y[i] = x[i ^ 1];
  return y;
}

// Writes one head of one position. cos and sin as in `rotate`.
template <bool STREAMING, bool INTERLEAVED, typename T, typename A>
[[gnu::always_inline]] inline void rotate_head(const T* x, T* y, const A* cos, const A* sin, const Extent& e) {
  const int64_t turned = 2 * e.pairs;
  if constexpr (INTERLEAVED)
    fill<STREAMING, A>(y, 0, turned, [&](int64_t i, auto... n) {
      const Vector<A> v = load<A>(x + i, n...);
      return v * load<A>(cos + i, n...) + swap_pairs(v) * load<A>(sin + i, n...);
    });
  else
    fill_two<STREAMING, A>(y, y + e.pairs, 0, e.pairs, [&](int64_t i, auto... n) {
      const Vector<A> a = load<A>(x + i, n...), b = load<A>(x + e.pairs + i, n...);
      const Vector<A> c = load<A>(cos + i, n...), s = load<A>(sin + i, n...);
      return Two<A>{a * c - b * s, b * c + a * s};
    });
  std::copy(x + turned, x + e.size, y + turned);
}

// sign: 1, or -1 for the negative angle.
template <bool STREAMING, bool INTERLEAVED, typename T, typename A = compute_t<T>>
void rotate(const Heads<T> (&tensors)[2], const Angles<A>& cos, const Angles<A>& sin, A sign, const Extent& e) {
  const int64_t elements = (tensors[0].heads + tensors[1].heads) * e.size;
  parallel_for(0, e.batch * e.length, GRAIN / std::max<int64_t>(elements, 1) + 1, [&](int64_t begin, int64_t end) {
    // Interleaved, each channel has its factors: those of its pair, where sin is negative for the first channel.
    constexpr int64_t COPIES = INTERLEAVED ? 2 : 1;
    std::vector<A> factors(2 * COPIES * e.pairs);
    A *const c = factors.data(), *const s = c + COPIES * e.pairs;
    for (int64_t position = begin; position < end; ++position) {
      const int64_t b = position / e.length, t = position % e.length;
      const A* cos_row = cos.data + b * cos.batch_stride + t * cos.row_stride;
      const A* sin_row = sin.data + b * sin.batch_stride + t * sin.row_stride;
      for (int64_t p = 0; p < e.pairs; ++p) {
        if constexpr (INTERLEAVED) {
          c[2 * p] = c[2 * p + 1] = cos_row[p];
          s[2 * p] = -(s[2 * p + 1] = sign * sin_row[p]);
        } else {
          c[p] = cos_row[p];
          s[p] = sign * sin_row[p];
        }
      }
      for (const Heads<T>& x : tensors) {
        const T* from = x.from + b * x.batch_stride + t * x.row_stride;
        T* to = x.to + position * x.heads * e.size;
        for (int64_t h = 0; h < x.heads; ++h)
          rotate_head<STREAMING, INTERLEAVED>(from + h * x.head_stride, to + h * e.size, c, s, e);
      }
    }
    if (STREAMING) end_streaming();
  });
}

// ---- launchers ----

// x with a contiguous last dimension.
Tensor unit_stride(const Tensor& x) { return x.size(-1) <= 1 || x.stride(-1) == 1 ? x : contiguous(x); }

// An empty result like x (B, H, T, D), laid out as (B, T, H, D).
Tensor by_position(const Tensor& x) {
  const auto step = [](int64_t n) { return std::max<int64_t>(n, 1); };
  const int64_t size = step(x.size(3)), row = size * step(x.size(1)), entry = row * step(x.size(2));
  return empty_strided(x.sizes(), {entry, size, row, 1}, x.scalar_type());
}

template <typename T>
Heads<T> heads_of(const Tensor& x, Tensor& result) {
  return {x.const_data_ptr<T>(), result.mutable_data_ptr<T>(), x.size(1), x.stride(0), x.stride(1), x.stride(2)};
}

template <typename A>
Angles<A> angles_of(const Tensor& x) {
  return {x.const_data_ptr<A>(), x.dim() == 3 ? x.stride(0) : 0, x.stride(-2)};
}

// names: of the op, of q and of k.
std::tuple<Tensor, Tensor> launch(
    const char* const (&names)[3],
    const Tensor& q_,
    const Tensor& k_,
    const Tensor& cos_,
    const Tensor& sin_,
    bool interleaved,
    double sign) {
  const Checks check(names[0], names[1], q_, {ANY, ANY, ANY, ANY});
  const ScalarType type = q_.scalar_type(), acc = accumulator(type);
  const int64_t batch = q_.size(0), length = q_.size(2), size = q_.size(3);
  check(names[2], k_, {batch, ANY, length, size}, type);
  if (cos_.dim() == 2)
    check("cos", cos_, {length, ANY}, FLOATS);
  else
    check("cos", cos_, {batch, length, ANY}, FLOATS);
  check("sin", sin_, cos_.sizes(), cos_.scalar_type());
  const Extent e{batch, length, size, cos_.size(-1)};
  require(2 * e.pairs <= size, names[0], ": cos rotates ", 2 * e.pairs, " channels of ", size);

  const Tensor q = unit_stride(q_), k = unit_stride(k_), cos = unit_stride(to(cos_, acc)),
               sin = unit_stride(to(sin_, acc));
  Tensor q_result = by_position(q), k_result = by_position(k);
  const auto run = [&](auto element, auto streaming, auto neighbours) {
    using T = decltype(element);
    using A = compute_t<T>;
    rotate<streaming.value, neighbours.value, T>(
        {heads_of<T>(q, q_result), heads_of<T>(k, k_result)}, angles_of<A>(cos), angles_of<A>(sin), A(sign), e);
  };
  dispatch(type, "rope", [&](auto element) {
    // With streaming stores each vector must begin at a multiple of its size.
    const int64_t bytes = sizeof(element), unit = interleaved ? 2 * e.pairs : e.pairs;
    const bool streaming = is_streamed<decltype(element)>(q.numel() + k.numel()) && size * bytes % VECTOR_BYTES == 0 &&
                           unit * bytes % VECTOR_BYTES == 0;
    const auto with = [&](auto s) {
      interleaved ? run(element, s, std::true_type{}) : run(element, s, std::false_type{});
    };
    streaming ? with(std::true_type{}) : with(std::false_type{});
  });
  return {q_result, k_result};
}

std::tuple<Tensor, Tensor> rope_fwd(
    const Tensor& q, const Tensor& k, const Tensor& cos, const Tensor& sin, bool interleaved) {
  return launch({"rope_fwd_cpp", "q", "k"}, q, k, cos, sin, interleaved, 1.0);
}

std::tuple<Tensor, Tensor> rope_bwd(
    const Tensor& grad_q, const Tensor& grad_k, const Tensor& cos, const Tensor& sin, bool interleaved) {
  return launch({"rope_bwd_cpp", "grad_q", "grad_k"}, grad_q, grad_k, cos, sin, interleaved, -1.0);
}

STABLE_TORCH_LIBRARY_IMPL(fastgpt, CPU, m) {
  m.impl("rope_fwd_cpp", TORCH_BOX(&rope_fwd));
  m.impl("rope_bwd_cpp", TORCH_BOX(&rope_bwd));
}

}  // namespace
}  // namespace fastgpt
