// RMSNorm, alone and with the residual addition before it, on the CPU.
//
//   sum = x + residual, rounded;  n = sum·rstd, rstd = 1/√(mean(sum²) + eps);  normed = n·w, w = offset + weight
//   with g = grad·w:  dsum = rstd·(g - n·mean(g·n)) + grad_sum,  dweight = Σ grad·n over the rows
//
// If the sum of squares overflows, it is computed again for sum·2^-k, and rstd is 2^-k/√(mean + eps·2^-2k).
//
// Bytes moved: the forward reads x and residual and writes sum and normed. The backward reads grad_normed, grad_sum and
// sum and writes dsum. A row is read from memory once: the second pass over it finds it in the cache. Only rstd is
// saved. Large results are written with streaming (non-temporal) stores, which do not read the cache line first. The
// second pass prefetches the next row: without that, the memory would wait for it.
//
// dweight is computed over a fixed number of row spans, so its bits do not depend on the number of threads.
#include "checks.h"
#include "kernel.h"
#include "vector.h"

namespace fastgpt {
namespace {

// x, rounded to the storage type T.
template <typename T, typename A>
[[gnu::always_inline]] inline Vector<A> rounded_to(Vector<A> x) {
  if constexpr (std::is_same_v<T, A>) {
    return x;
  } else {
    T some[LANES<A>];
    store<T, A>(some, x);
    return load<A>(some);
  }
}

// Loads the cache line of p, which may be after the end of a tensor.
[[gnu::always_inline]] inline void prefetch(const void* p) { __builtin_prefetch(p); }

// 1/√(mean(z²) + eps) of a row.
template <typename A>
A rstd_of(const A* z, int64_t columns, A eps) {
  constexpr A SCALE = std::is_same_v<A, float> ? A(0x1p-80) : A(0x1p-600);
  const auto rstd = [&](A scale) {
    const A squares = sum_of<A>(columns, [&](int64_t j, auto... n) {
      const Vector<A> v = load<A>(z + j, n...) * scale;
      return v * v;
    });
    return squares > std::numeric_limits<A>::max() ? A(0)
                                                   : scale / std::sqrt(squares / A(columns) + eps * scale * scale);
  };
  const A found = rstd(A(1));
  return found == A(0) ? rstd(SCALE) : found;
}

// ---- forward ----

// weight: offset + weight, or null.
template <bool STREAMING, typename T>
void forward(
    const T* x,
    const T* residual,
    const compute_t<T>* weight,
    T* normed,
    T* total,
    compute_t<T>* rstd,
    int64_t rows,
    int64_t columns,
    double eps) {
  using A = compute_t<T>;
  parallel_for(0, rows, GRAIN / std::max<int64_t>(columns, 1) + 1, [&](int64_t begin, int64_t end) {
    std::vector<A> z(columns);
    for (int64_t row = begin; row < end; ++row) {
      const int64_t at = row * columns;
      if (residual)
        fill<STREAMING, A>(total + at, 0, columns, [&](int64_t j, auto... n) {
          const Vector<A> v = rounded_to<T, A>(load<A>(x + at + j, n...) + load<A>(residual + at + j, n...));
          store<A, A>(&z[j], v, n...);
          return v;
        });
      else
        over_vectors<A>(0, columns, [&](int64_t j, auto... n) { store<A, A>(&z[j], load<A>(x + at + j, n...), n...); });
      const A scale = rstd[row] = rstd_of(z.data(), columns, A(eps));
      fill<STREAMING, A>(normed + at, 0, columns, [&](int64_t j, auto... n) {
        prefetch(x + at + columns + j);
        if (residual) prefetch(residual + at + columns + j);
        const Vector<A> v = load<A>(&z[j], n...) * scale;
        return weight ? v * load<A>(weight + j, n...) : v;
      });
    }
    if (STREAMING) end_streaming();
  });
}

// ---- backward ----

// partial (parts, columns): the sum of dweight over each of `parts` spans of rows; null without a weight.
template <bool STREAMING, typename T>
void backward(
    const T* grad_normed,
    const T* grad_sum,
    const T* total,
    const compute_t<T>* weight,
    const compute_t<T>* rstd,
    T* dsum,
    compute_t<T>* partial,
    int64_t parts,
    int64_t rows,
    int64_t columns) {
  using A = compute_t<T>;
  const int64_t span = (rows + parts - 1) / parts;
  parallel_for(0, parts, 1, [&](int64_t begin, int64_t end) {
    for (int64_t part = begin; part < end; ++part) {
      A* dweight = partial + part * columns;
      for (int64_t row = part * span; row < std::min(rows, (part + 1) * span); ++row) {
        const int64_t at = row * columns;
        const A scale = rstd[row];
        const auto weighted = [&](int64_t j, auto... n) __attribute__((always_inline)) {
          const Vector<A> d = load<A>(grad_normed + at + j, n...);
          return weight ? d * load<A>(weight + j, n...) : d;
        };
        const A mean =
            sum_of<A>(
                columns,
                [&](int64_t j, auto... n) { return weighted(j, n...) * (load<A>(total + at + j, n...) * scale); }) /
            A(columns);
        fill<STREAMING, A>(dsum + at, 0, columns, [&](int64_t j, auto... n) {
          prefetch(total + at + columns + j);
          prefetch(grad_normed + at + columns + j);
          const Vector<A> z = load<A>(total + at + j, n...) * scale;
          if (weight)
            store<A, A>(dweight + j, load<A>(dweight + j, n...) + load<A>(grad_normed + at + j, n...) * z, n...);
          const Vector<A> d = scale * (weighted(j, n...) - z * mean);
          return grad_sum ? d + load<A>(grad_sum + at + j, n...) : d;
        });
      }
    }
    if (STREAMING) end_streaming();
  });
}

// ---- launchers ----

// Calls f(element, streaming). streaming: whether the results, of the size of x, are written with streaming stores.
template <typename F>
void dispatch_rows(const Tensor& x, ScalarType type, F&& f) {
  dispatch(type, "rms_norm", [&](auto element) {
    using T = decltype(element);
    // Each row must begin at a multiple of the vector size.
    if (is_streamed<T>(x.numel()) && x.size(1) * static_cast<int64_t>(sizeof(T)) % VECTOR_BYTES == 0)
      f(element, std::true_type{});
    else
      f(element, std::false_type{});
  });
}

// offset + weight in the compute type.
OptionalTensor offset_weight(const OptionalTensor& weight, ScalarType type, double offset) {
  if (!weight || offset == 0.0) return contiguous(weight, type);
  const Tensor given = contiguous(*weight, type);
  Tensor shifted = empty_like(given);
  dispatch(type, "rms_norm", [&](auto element) {
    using T = decltype(element);
    const T* from = given.const_data_ptr<T>();
    std::transform(from, from + given.numel(), shifted.mutable_data_ptr<T>(), [&](T w) { return T(offset) + w; });
  });
  return shifted;
}

std::tuple<Tensor, Tensor, Tensor> rms_norm_fwd(
    const Tensor& x_, const OptionalTensor& residual_, const OptionalTensor& weight_, double eps, double offset) {
  Checks("rms_norm_fwd_cpp", "x", x_, {ANY, ANY})("residual", residual_, x_.sizes(), FLOATS)(
      "weight", weight_, {x_.size(1)}, FLOATS);
  const auto type = residual_ ? promoted(x_.scalar_type(), residual_->scalar_type()) : x_.scalar_type();
  const auto acc = accumulator(type);
  const Tensor x = contiguous(x_, type);
  const OptionalTensor residual = contiguous(residual_, type), weight = offset_weight(weight_, acc, offset);
  const int64_t rows = x.size(0), columns = x.size(1);
  Tensor normed = empty({rows, columns}, type);
  Tensor total = residual_ ? empty({rows, columns}, type) : empty({0}, type);
  Tensor rstd = empty({rows}, acc);
  dispatch_rows(x, type, [&](auto element, auto streaming) {
    using T = decltype(element);
    using A = compute_t<T>;
    forward<streaming.value, T>(
        x.const_data_ptr<T>(),
        pointer<T>(residual),
        pointer<A>(weight),
        normed.mutable_data_ptr<T>(),
        total.mutable_data_ptr<T>(),
        rstd.mutable_data_ptr<A>(),
        rows,
        columns,
        eps);
  });
  return {normed, total, rstd};
}

std::tuple<Tensor, Tensor> rms_norm_bwd(
    const Tensor& grad_normed_,
    const OptionalTensor& grad_sum_,
    const Tensor& total_,
    const OptionalTensor& weight_,
    const Tensor& rstd_,
    double offset) {
  const Checks check("rms_norm_bwd_cpp", "total", total_, {ANY, ANY});
  const auto type = total_.scalar_type(), acc = accumulator(type);
  check.like("grad_normed", grad_normed_).like("grad_sum", grad_sum_);
  check("weight", weight_, {total_.size(1)}, FLOATS)("rstd", rstd_, {total_.size(0)}, acc);
  const Tensor grad_normed = contiguous(grad_normed_), total = contiguous(total_), rstd = contiguous(rstd_);
  const OptionalTensor grad_sum = contiguous(grad_sum_, type), weight = offset_weight(weight_, acc, offset);
  const int64_t rows = total.size(0), columns = total.size(1), parts = row_parts(rows);
  Tensor dsum = empty({rows, columns}, type);
  Tensor partial = zeros({weight ? parts : 1, weight ? columns : 0}, acc);
  dispatch_rows(total, type, [&](auto element, auto streaming) {
    using T = decltype(element);
    using A = compute_t<T>;
    backward<streaming.value, T>(
        grad_normed.const_data_ptr<T>(),
        pointer<T>(grad_sum),
        total.const_data_ptr<T>(),
        pointer<A>(weight),
        rstd.const_data_ptr<A>(),
        dsum.mutable_data_ptr<T>(),
        partial.mutable_data_ptr<A>(),
        parts,
        rows,
        columns);
  });
  return {dsum, sum_rows(partial, acc)};
}

STABLE_TORCH_LIBRARY_IMPL(fastgpt, CPU, m) {
  m.impl("rms_norm_fwd_cpp", TORCH_BOX(&rms_norm_fwd));
  m.impl("rms_norm_bwd_cpp", TORCH_BOX(&rms_norm_bwd));
}

}  // namespace
}  // namespace fastgpt
