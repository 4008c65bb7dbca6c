// A linear layer on the CPU:  y = x·Wᵀ + b,  dx = dy·W,  dW = dyᵀ·x,  db = Σ dy.
//
// x (M, K), W (N, K). A product takes 2·M·N·K FLOPs. The second factor is packed once per call into panels of GEMM_N
// columns, in the order in which the units are multiplied. Each packed element is used for 2·M FLOPs, so the packing
// costs little once M is a few hundred. The weight may be float while x is bfloat16, as under autocast. It is rounded
// during packing and is never stored as bfloat16, and its gradient is not rounded. A task multiplies BLOCK_M rows,
// which stay in the L2 cache, by several panels. Sums are float and are rounded once.
//
// A product with few rows, as in decoding, is bound by reading W: M·N·K multiply-adds for N·K elements. Then W is read
// once, in place, without packing. A row of W is multiplied with all rows of x, which are in the L1 cache as float. For
// 8 rows a vector takes 8 multiply-adds and 9 loads, 5 cycles for 64 bytes, which is faster than memory delivers them.
//
// PyTorch computes the product for other types, for odd sizes (whose rows do not divide into pairs), and on CPUs
// without bfloat16 multiplication.
#include "checks.h"
#include "gemm.h"
#include "kernel.h"
#include "vector.h"

namespace fastgpt {
namespace {

// With fewer rows, packing the weight does not pay.
constexpr int64_t MIN_ROWS = 32;

bool can_pack(const Tensor& x, const Tensor& weight) {
  const int64_t m = x.size(0), n = weight.size(0), k = weight.size(1);
  return FOLD<factor_t<BFloat16>> > 1 && x.scalar_type() == ScalarType::BFloat16 && m >= MIN_ROWS && n > 0 && k > 0 &&
         n % 2 == 0 && k % 2 == 0;
}

#if defined(__AVX512BF16__)

using U = Unit<BFloat16>;
constexpr int64_t PANEL = GEMM_N<U>, HALF = LANES<float>;
static_assert(PANEL == 2 * HALF);

// Rows of a task, and the bytes of L2 cache that they may take.
constexpr int64_t BLOCK_M = 128, L2_BYTES = 512 << 10;
// Panels of a task.
constexpr int64_t SPAN = 8;
// The product is split along k after this many units, so that this part of a panel stays in the cache.
constexpr int64_t BLOCK_K = 1024;

// ---- packing ----

// A matrix of units, stored in panels of PANEL columns.
struct Panels {
  Tensor space;
  U* data;
  int64_t depth;  // units of a column
  Panels(int64_t depth, int64_t columns)
      : space(empty({padded<U>(columns) * depth}, ScalarType::Int)),  // PyTorch aligns to cache lines
        data(reinterpret_cast<U*>(space.mutable_data_ptr<int32_t>())),
        depth(depth) {}
  U* at(int64_t column) const { return data + column / PANEL * PANEL * depth; }
};

// Half a row of a panel, from two consecutive rows.
[[gnu::always_inline]] inline Bits pair_rows(Floats upper, Floats lower) {
  return widened(to_bfloat16(upper)) | widened(to_bfloat16(lower)) << 16;
}
// Half a row of a panel, from 2 · HALF consecutive elements of a row.
[[gnu::always_inline]] inline Bits pair_columns(Floats first, Floats second) {
  return std::bit_cast<Bits>(_mm512_cvtne2ps_pbh(second, first));
}

// Packs the transpose of a matrix (rows, size). Pairs are along its rows.
template <typename W>
Panels pack_rows_as_columns(const W* in, int64_t rows, int64_t size) {
  const Panels out(size / 2, rows);
  parallel_for(0, (rows + HALF - 1) / HALF, 4, [&](int64_t begin, int64_t end) {
    alignas(64) U square[HALF * HALF], turned[HALF * HALF];
    for (int64_t i = begin * HALF; i < std::min(end * HALF, rows); i += HALF)
      for (int64_t k = 0; k < out.depth; k += HALF) {
        const int64_t units = std::min(HALF, out.depth - k);
        for (int64_t r = 0; r < HALF; ++r) {
          const W* from = in + (i + r) * size + 2 * k;
          Bits x = {};
          if (i + r < rows && units == HALF)
            x = pair_columns(load<float>(from), load<float>(from + HALF));
          else if (i + r < rows)
            x = pair_columns(
                load<float>(from, std::min(HALF, 2 * units)),
                load<float>(from + HALF, std::max<int64_t>(0, 2 * units - HALF)));
          *reinterpret_cast<Bits*>(square + r * HALF) = x;
        }
        transpose_square(turned, HALF, square, HALF);
        for (int64_t c = 0; c < units; ++c)
          std::memcpy(out.at(i) + (k + c) * PANEL + i % PANEL, turned + c * HALF, HALF * sizeof(U));
      }
  });
  return out;
}

// Packs a matrix (rows, size). Pairs are along its columns. Writes the sum of each column to `sums` if given.
template <typename W>
Panels pack_columns(const W* in, int64_t rows, int64_t size, float* sums) {
  const Panels out((rows + 1) / 2, size);
  parallel_for(0, (size + PANEL - 1) / PANEL, 1, [&](int64_t begin, int64_t end) {
    for (int64_t j = begin * PANEL; j < std::min(end * PANEL, size); j += PANEL) {
      const auto pack = [&](auto is_whole) {
        Floats sum[2] = {};
        for (int64_t i = 0; i < rows; i += 2)
          for (int64_t h = 0; h < 2; ++h) {
            const auto part = [&](int64_t row) {
              const W* from = in + row * size + j + h * HALF;
              if constexpr (is_whole.value)
                return load<float>(from);
              else
                return load<float>(from, std::clamp<int64_t>(size - j - h * HALF, 0, HALF));
            };
            const Floats upper = part(i), lower = i + 1 < rows ? part(i + 1) : Floats{};
            sum[h] += upper + lower;
            *reinterpret_cast<Bits*>(out.at(j) + i / 2 * PANEL + h * HALF) = pair_rows(upper, lower);
          }
        if (!sums) return;
        for (int64_t c = 0; c < std::min(PANEL, size - j); ++c) sums[j + c] = sum[c / HALF][c % HALF];
      };
      size - j >= PANEL ? pack(std::true_type{}) : pack(std::false_type{});
    }
  });
  return out;
}

// ---- products ----

// C (m, n) = A·B in float, tile by tile. Calls finish(i, rows, j, columns, tile) with each tile (rows, PANEL).
// rows_from(i): the rows of A starting at i, a multiple of PANEL.
template <typename A, typename F>
void multiply(int64_t m, int64_t n, const Panels& b, A&& rows_from, F&& finish) {
  const int64_t fitting = L2_BYTES / (b.depth * static_cast<int64_t>(sizeof(U))) / PANEL * PANEL;
  const int64_t block = std::clamp<int64_t>(fitting, PANEL, BLOCK_M);
  const int64_t blocks = (m + block - 1) / block, width = SPAN * PANEL, spans = (n + width - 1) / width;
  parallel_for(0, blocks * spans, 1, [&](int64_t begin, int64_t end) {
    alignas(64) float c[BLOCK_M * PANEL];
    for (int64_t task = begin; task < end; ++task) {
      const int64_t first = task / spans * block, last = std::min(m, first + block);
      for (int64_t j = task % spans * width; j < std::min(n, (task % spans + 1) * width); j += PANEL) {
        for (int64_t k = 0; k < b.depth; k += BLOCK_K) {
          const int64_t depth = std::min(BLOCK_K, b.depth - k);
          const Operand<U> panel{b.at(j) + k * PANEL, PANEL};
          for (int64_t i = first; i < last; i += PANEL) {
            const Operand<U> rows = rows_from(i), some{rows.data + k * rows.column, rows.row, rows.column};
            float* const to = c + (i - first) * PANEL;
            const int64_t count = std::min(PANEL, last - i);
            k ? gemm<true>(count, PANEL, depth, some, panel, to, PANEL)
              : gemm<false>(count, PANEL, depth, some, panel, to, PANEL);
          }
        }
        finish(first, last - first, j, std::min(PANEL, n - j), c);
      }
    }
  });
}

// Writes the rows of a tile to a matrix of `size` columns, with the bias added.
template <typename T>
auto writer(T* out, int64_t size, const BFloat16* bias) {
  return [=](int64_t i, int64_t rows, int64_t j, int64_t columns, const float* tile) {
    for (int64_t r = 0; r < rows; ++r)
      over_vectors<float>(0, columns, [&](int64_t c, auto... n) {
        const Floats offset = bias ? load<float>(bias + j + c, n...) : Floats{};
        store<T, float>(out + (i + r) * size + j + c, load<float>(tile + r * PANEL + c) + offset, n...);
      });
  };
}

template <typename W>
void forward(const Tensor& x, const Tensor& weight, const BFloat16* bias, Tensor& y) {
  const int64_t m = x.size(0), n = weight.size(0), k = weight.size(1);
  const auto* rows = reinterpret_cast<const U*>(x.const_data_ptr<BFloat16>());
  const Panels b = pack_rows_as_columns(weight.const_data_ptr<W>(), n, k);
  const auto from = [&](int64_t i) { return Operand<U>{rows + i * k / 2, k / 2}; };
  multiply(m, n, b, from, writer(y.mutable_data_ptr<BFloat16>(), n, bias));
}

template <typename W>
void backward_x(const Tensor& grad, const Tensor& weight, Tensor& dx) {
  const int64_t m = grad.size(0), n = weight.size(0), k = weight.size(1);
  const auto* rows = reinterpret_cast<const U*>(grad.const_data_ptr<BFloat16>());
  const Panels b = pack_columns(weight.const_data_ptr<W>(), n, k, nullptr);
  const auto from = [&](int64_t i) { return Operand<U>{rows + i * n / 2, n / 2}; };
  multiply(m, k, b, from, writer(dx.mutable_data_ptr<BFloat16>(), k, nullptr));
}

template <typename W>
void backward_weight(const Tensor& grad, const Tensor& x, Tensor& dweight, float* dbias) {
  const int64_t m = grad.size(0), n = grad.size(1), k = x.size(1);
  const Panels a = pack_columns(grad.const_data_ptr<BFloat16>(), m, n, dbias);
  const Panels b = pack_columns(x.const_data_ptr<BFloat16>(), m, k, nullptr);
  const auto from = [&](int64_t i) { return Operand<U>{a.at(i), 1, PANEL}; };
  multiply(n, k, b, from, writer(dweight.mutable_data_ptr<W>(), k, nullptr));
}

#endif

// ---- few rows ----

constexpr int64_t FEW_ROWS = 8;
// Bytes of L1 cache that x may take. If x is larger, several rows of W share each load of x.
constexpr int64_t L1_BYTES = 16 << 10;
// Prefetch distance in bytes. The hardware prefetcher stops at each page.
constexpr int64_t PREFETCH_DISTANCE = 2048;

// y[r, c] = x[r]·w[c] + bias[c] for ROWS rows of x and LINES rows of w, `size` long. `stride`: between rows of y.
template <int ROWS, int LINES, typename T>
void dot_rows(const float* x, const T* w, int64_t size, const T* bias, T* y, int64_t stride) {
  Floats sums[ROWS][LINES] = {};
  over_vectors<float>(0, size, [&](int64_t k, auto... n) {
    Floats line[LINES];
    for (int c = 0; c < LINES; ++c) {
      const T* from = w + c * size + k;
      line[c] = load<float>(from, n...);
      __builtin_prefetch(from + PREFETCH_DISTANCE / sizeof(T));
    }
    for (int r = 0; r < ROWS; ++r) {
      const Floats row = load<float>(x + r * size + k, n...);
      for (int c = 0; c < LINES; ++c) sums[r][c] += row * line[c];
    }
  });
  for (int r = 0; r < ROWS; ++r)
    for (int c = 0; c < LINES; ++c)
      y[r * stride + c] = static_cast<T>(lane_sum<float>(sums[r][c]) + (bias ? static_cast<float>(bias[c]) : 0.0f));
}

// Calls f with n, at most N, as a compile-time constant.
template <int N, typename F>
void with_constant(int64_t n, F&& f) {
  if (n == N)
    f(std::integral_constant<int, N>{});
  else if constexpr (N > 1)
    with_constant<N - 1>(n, f);
}

// Processes LINES rows of W and at most ROWS rows of x at a time.
template <int ROWS, int LINES, typename T>
void multiply_few(const float* x, int64_t m, const T* w, int64_t n, int64_t k, const T* bias, T* y) {
  parallel_for(0, n / LINES, std::max<int64_t>(1, GRAIN / (LINES * k)), [&](int64_t begin, int64_t end) {
    for (int64_t c = begin * LINES; c < end * LINES; c += LINES)
      for (int64_t r = 0; r < m; r += ROWS)
        with_constant<ROWS>(std::min<int64_t>(ROWS, m - r), [&](auto rows) {
          dot_rows<rows.value, LINES>(x + r * k, w + c * k, k, bias ? bias + c : nullptr, y + r * n + c, n);
        });
  });
}

template <typename T>
void forward_few(const Tensor& x, const Tensor& weight, const OptionalTensor& bias_, Tensor& y) {
  const int64_t m = x.size(0), n = weight.size(0), k = weight.size(1);
  const Tensor rows = contiguous(x, ScalarType::Float);
  const T* const bias = pointer<T>(bias_);
  const auto multiply = [&](auto most, auto lines) {
    multiply_few<most.value, lines.value>(
        rows.const_data_ptr<float>(), m, weight.const_data_ptr<T>(), n, k, bias, y.mutable_data_ptr<T>());
  };
  if (n % 4 || m * k * static_cast<int64_t>(sizeof(float)) <= L1_BYTES)
    multiply(std::integral_constant<int, FEW_ROWS>{}, std::integral_constant<int, 1>{});
  else
    multiply(std::integral_constant<int, 4>{}, std::integral_constant<int, 4>{});
}

bool is_few(const Tensor& x, const Tensor& weight, const OptionalTensor& bias) {
  const int64_t m = x.size(0), n = weight.size(0), k = weight.size(1);
  const auto type = weight.scalar_type();
  return m > 0 && m <= FEW_ROWS && k > 0 && n > 0 && weight.is_contiguous() &&
         (type == ScalarType::Float || type == ScalarType::BFloat16) && x.scalar_type() == type &&
         (!bias || (bias->is_contiguous() && bias->scalar_type() == type));
}

// ---- launchers ----

// x (M, K), weight (N, K). The weight has the dtype of x or of its accumulator.
Checks check_layer(const char* op, const Tensor& x, const Tensor& weight) {
  const Checks check(op, "x", x, {ANY, ANY});
  return check("weight", weight, {ANY, x.size(1)}, {x.scalar_type(), accumulator(x.scalar_type())});
}

Tensor mm(const Tensor& a, const Tensor& b) { return std::get<0>(call_op<Tensor>("aten::mm", a, b)); }

// Calls f with a value of the weight's element type.
template <typename F>
void dispatch_weight(const Tensor& weight, F&& f) {
  weight.scalar_type() == ScalarType::Float ? f(float{}) : f(BFloat16{});
}

Tensor linear_fwd(const Tensor& x_, const Tensor& weight_, const OptionalTensor& bias_) {
  const auto type = x_.scalar_type();
  check_layer("linear_fwd_cpp", x_, weight_)("bias", bias_, {weight_.size(0)}, {type, accumulator(type)});
#if defined(__AVX512BF16__)
  if (can_pack(x_, weight_)) {
    const Tensor x = contiguous(x_), weight = contiguous(weight_);
    const OptionalTensor bias = contiguous(bias_, type);
    Tensor y = empty({x.size(0), weight.size(0)}, type);
    dispatch_weight(weight, [&](auto element) {
      using W = decltype(element);
      forward<W>(x, weight, pointer<BFloat16>(bias), y);
    });
    return y;
  }
#endif
  if (is_few(x_, weight_, bias_)) {
    Tensor y = empty({x_.size(0), weight_.size(0)}, type);
    dispatch_weight(weight_, [&](auto element) { forward_few<decltype(element)>(x_, weight_, bias_, y); });
    return y;
  }
  const OptionalTensor bias = bias_ ? OptionalTensor(to(*bias_, type)) : bias_;
  return std::get<0>(call_op<Tensor>("aten::linear", x_, to(weight_, type), bias));
}

std::tuple<Tensor, Tensor, Tensor> linear_bwd(
    const Tensor& grad_, const Tensor& x_, const Tensor& weight_, bool with_x, bool with_weight, bool with_bias) {
  const auto type = x_.scalar_type(), weight_type = weight_.scalar_type();
  check_layer("linear_bwd_cpp", x_, weight_)("grad", grad_, {x_.size(0), weight_.size(0)}, type);
  Tensor dx = empty({0}, type), dweight = empty({0}, weight_type);
  Tensor dbias = empty({0}, weight_type);
#if defined(__AVX512BF16__)
  if (can_pack(x_, weight_)) {
    const Tensor grad = contiguous(grad_), x = contiguous(x_), weight = contiguous(weight_);
    if (with_x) dx = empty_like(x);
    if (with_weight) dweight = empty_like(weight);
    Tensor sums = empty({with_bias ? weight.size(0) : 0}, ScalarType::Float);
    dispatch_weight(weight, [&](auto element) {
      using W = decltype(element);
      if (with_x) backward_x<W>(grad, weight, dx);
      if (with_weight) backward_weight<W>(grad, x, dweight, with_bias ? sums.mutable_data_ptr<float>() : nullptr);
    });
    if (with_bias) dbias = to(with_weight ? sums : sum_rows(grad, ScalarType::Float), weight_type);
    return {dx, dweight, dbias};
  }
#endif
  if (with_x) dx = mm(grad_, to(weight_, type));
  if (with_weight) dweight = to(mm(transposed(grad_), x_), weight_type);
  if (with_bias) dbias = to(sum_rows(grad_, accumulator(type)), weight_type);
  return {dx, dweight, dbias};
}

STABLE_TORCH_LIBRARY_IMPL(fastgpt, CPU, m) {
  m.impl("linear_fwd_cpp", TORCH_BOX(&linear_fwd));
  m.impl("linear_bwd_cpp", TORCH_BOX(&linear_bwd));
}

}  // namespace
}  // namespace fastgpt
