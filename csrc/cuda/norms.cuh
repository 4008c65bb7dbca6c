// What LayerNorm and RMSNorm share: how rows are divided among threads, and the choices of their launchers.
#pragma once

#include "checks.cuh"
#include "row_threads.cuh"
#include "tensors.cuh"

namespace fastgpt {

constexpr int THREADS = 512;  // of a block, at most
// Elements of a row in the registers of a thread. The backward also has a version with twice as many.
constexpr int FWD_ELEMENTS = 32, BWD_ELEMENTS = 8;
// Warps of a block if a row needs fewer. Such a block processes several rows.
constexpr int FWD_WARPS = 4, BWD_WARPS = 12;
// Blocks of the backward: about as many as a GPU runs at once. Each writes partial sums, so not more.
constexpr int PARTIALS = 256;

// Elements in a vector: 16 bytes of the sum, or one element if rows are not aligned to 16 bytes.
template <typename T, bool WIDE>
constexpr int WIDTH = WIDE ? 16 / sizeof(T) : 1;

// ---- launchers ----

inline OptionalTensor as(const OptionalTensor& x, ScalarType dtype) {
  return x.has_value() ? OptionalTensor(torch::stable::to(*x, dtype)) : OptionalTensor();
}

inline bool is_aligned(const OptionalTensor& x) { return !x.has_value() || aligned(*x); }

// Whether rows are a multiple of 16 bytes long, so that each begins aligned if the tensor does.
inline bool wide_rows(const Tensor& x) { return x.size(1) * static_cast<int64_t>(x.element_size()) % 16 == 0; }

// Whole warps for a row of vectors, with `per_thread` vectors for each thread.
inline int threads_for(int64_t vectors, int per_thread, int most) {
  return static_cast<int>(std::clamp<int64_t>(cdiv(cdiv(vectors, per_thread), WARP) * WARP, WARP, most));
}

// The columns of x, in 32 bits.
inline int columns_of(const char* op, const Tensor& x) {
  STD_TORCH_CHECK(
      x.size(1) < (int64_t{1} << 31) - 65536,
      "fastgpt: ",
      op,
      " supports rows of less than 2^31 - 65536 elements, got ",
      x.size(1));
  return static_cast<int>(x.size(1));
}

// Calls f with the number of elements of a row in the registers of a thread of the backward, 0 if they are too many.
template <bool WIDE, typename F>
void choose_elements(int columns, F&& f) {
  if (columns <= THREADS * BWD_ELEMENTS) return f(std::integral_constant<int, BWD_ELEMENTS>{});
  if constexpr (WIDE)
    if (columns <= THREADS * 2 * BWD_ELEMENTS) return f(std::integral_constant<int, 2 * BWD_ELEMENTS>{});
  f(std::integral_constant<int, 0>{});
}

// Calls f with values of the types of x (also the type of the sum) and of the residual.
template <typename F>
void with_types(const char* op, ScalarType x, ScalarType residual, F&& f) {
  if (x == residual)
    dispatch(x, op, [&](auto element) { f(element, element); });
  else if (residual == ScalarType::BFloat16)
    f(float{}, bf16{});
  else
    f(float{}, fp16{});
}

}  // namespace fastgpt
