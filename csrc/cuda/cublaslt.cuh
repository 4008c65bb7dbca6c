// A product of 16-bit matrices by cuBLASLt, with tanh GELU or its derivative in the epilogue.
//
// FASTGPT_EPILOGUE is defined, and the class exists, if cublasLt.h was found at compile time. The functions are looked
// up by name in the cuBLASLt that PyTorch has loaded, so this library also loads if there is none. cuBLASLt does not
// have a kernel for every product: callers need a fallback.
#pragma once

#include "tensors.cuh"

#if __has_include(<cublasLt.h>)
#include <cublasLt.h>

#include <array>
#include <compare>
#include <map>
#include <memory>
#include <mutex>
#define FASTGPT_EPILOGUE
#endif

namespace fastgpt {

#ifdef FASTGPT_EPILOGUE

// The functions of cuBLASLt, by name.
struct Cublas {
  FASTGPT_CUBLASLT(Create);
  FASTGPT_CUBLASLT(Matmul);
  FASTGPT_CUBLASLT(MatmulAlgoGetHeuristic);
  FASTGPT_CUBLASLT(MatmulDescCreate);
  FASTGPT_CUBLASLT(MatmulDescDestroy);
  FASTGPT_CUBLASLT(MatmulDescSetAttribute);
  FASTGPT_CUBLASLT(MatmulPreferenceCreate);
  FASTGPT_CUBLASLT(MatmulPreferenceDestroy);
  FASTGPT_CUBLASLT(MatmulPreferenceSetAttribute);
  FASTGPT_CUBLASLT(MatrixLayoutCreate);
  FASTGPT_CUBLASLT(MatrixLayoutDestroy);

  static const Cublas& get() {
    static const Cublas functions;
    return functions;
  }
};

inline void check(cublasStatus_t status, const char* what) {
  STD_TORCH_CHECK(status == CUBLAS_STATUS_SUCCESS, "fastgpt: ", what, " failed with cublasStatus_t ", int{status});
}

// A cuBLASLt descriptor, destroyed at the end of its scope.
template <typename T>
using Owned = std::unique_ptr<std::remove_pointer_t<T>, cublasStatus_t (*)(T)>;

// The operation on the sums before they are rounded and written.
struct Epilogue {
  int kind;              // a cublasLtEpilogue_t
  const Tensor* vector;  // (N,): the bias, or the output for the sums of the columns; or null
  const Tensor* z;       // (M, N): the pre-activation, which GELU writes and its derivative reads; or null
};

// out (M, N) = epilogue(x (M, K) · Wᵀ), W (N, K). cuBLAS is column-major: x is its K × M, and out its N × M = W · x,
// with W transposed if it is row-major.
class CublasLtProduct {
 public:
  static constexpr uint64_t WORKSPACE = 32 << 20;  // bytes, as NVIDIA recommends for Hopper (less for other GPUs)

  // Whether cuBLASLt supports the product: 16 bits, rows aligned to 16 bytes, N and K multiples of 8.
  static bool supports(const Tensor& x, const Tensor& weight) {
    const int64_t n = weight.size(0), k = x.size(1);
    return Cublas::get().Create && x.scalar_type() != ScalarType::Float && x.size(0) > 0 && x.size(0) < INT32_MAX &&
           n > 0 && n < INT32_MAX && n % 8 == 0 && k > 0 && k % 8 == 0 && is_row_major(x) && aligned(x, weight) &&
           (is_row_major(weight) || is_column_major(weight));
  }

  CublasLtProduct(const Tensor& x, const Tensor& weight, const Tensor& out, Epilogue epilogue)
      : device_(device_of(x)), x_(x), weight_(weight), out_(out) {
    cublasLtMatmulDesc_t created;
    check(lt_.MatmulDescCreate(&created, CUBLAS_COMPUTE_32F, CUDA_R_32F), "cublasLtMatmulDescCreate");
    description_ = {created, lt_.MatmulDescDestroy};
    const bool transposed = is_row_major(weight);
    set(CUBLASLT_MATMUL_DESC_TRANSA, transposed ? CUBLAS_OP_T : CUBLAS_OP_N);
    set(CUBLASLT_MATMUL_DESC_EPILOGUE, static_cast<cublasLtEpilogue_t>(epilogue.kind));
    if (epilogue.vector) set(CUBLASLT_MATMUL_DESC_BIAS_POINTER, static_cast<const void*>(epilogue.vector->data_ptr()));
    if (epilogue.z) {
      set(CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_POINTER, static_cast<void*>(epilogue.z->data_ptr()));
      set(CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_LD, int64_t{epilogue.z->stride(0)});
    }
    const int64_t m = out.size(0), n = out.size(1), k = x.size(1), weight_stride = weight.stride(transposed ? 0 : 1);
    a_ = transposed ? layout(k, n, weight_stride) : layout(n, k, weight_stride);
    b_ = layout(k, m, x.stride(0)), d_ = layout(n, m, out.stride(0));
    key_ = {device_.index(), x.scalar_type(), epilogue.kind, transposed, m, n, k, weight_stride, x.stride(0)};
    const std::array tensors{&weight, &x, epilogue.vector, epilogue.z};
    std::ranges::transform(tensors, key_.alignment.begin(), alignment_of);
  }

  // Computes the product. Returns false if cuBLASLt has no kernel for it.
  bool run() {
    const Algorithm algorithm = find_algorithm();
    if (!algorithm) return false;
    const float one = 1.0f, zero = 0.0f;
    const Tensor workspace = empty(x_, {int64_t{WORKSPACE}}, ScalarType::Byte);
    check(
        lt_.Matmul(
            handle(),
            description_.get(),
            &one,
            weight_.data_ptr(),
            a_.get(),
            x_.data_ptr(),
            b_.get(),
            &zero,
            out_.data_ptr(),
            d_.get(),
            out_.data_ptr(),
            d_.get(),
            &*algorithm,
            workspace.data_ptr(),
            WORKSPACE,
            device_.stream()),
        "cublasLtMatmul with a GELU epilogue");
    return true;
  }

 private:
  struct Key {
    int device;
    ScalarType dtype;
    int epilogue;
    bool transposed;
    int64_t m, n, k, weight_stride, x_stride;
    std::array<uint32_t, 4> alignment;  // of weight, x, vector and z; the choice of a kernel depends on it
    auto operator<=>(const Key&) const = default;
  };
  using Algorithm = std::optional<cublasLtMatmulAlgo_t>;

  template <typename T>
  void set(cublasLtMatmulDescAttributes_t which, T value) {
    check(
        lt_.MatmulDescSetAttribute(description_.get(), which, &value, sizeof(value)), "cublasLtMatmulDescSetAttribute");
  }

  static bool is_row_major(const Tensor& t) {
    return t.stride(1) == 1 && t.stride(0) >= t.size(1) && t.stride(0) % 8 == 0;
  }
  static bool is_column_major(const Tensor& t) {
    return t.stride(0) == 1 && t.stride(1) >= t.size(0) && t.stride(1) % 8 == 0;
  }

  // In bytes, at most 256: the default of cuBLASLt, and the alignment of PyTorch's memory.
  static uint32_t alignment_of(const Tensor* t) {
    if (!t) return 256;
    const auto begin = reinterpret_cast<uintptr_t>(t->data_ptr());
    return static_cast<uint32_t>(std::min<uintptr_t>(begin & -begin, 256));
  }

  // A column-major matrix. `stride`: between columns.
  Owned<cublasLtMatrixLayout_t> layout(int64_t rows, int64_t columns, int64_t stride) {
    const auto type = x_.scalar_type() == ScalarType::Half ? CUDA_R_16F : CUDA_R_16BF;
    cublasLtMatrixLayout_t created;
    check(lt_.MatrixLayoutCreate(&created, type, rows, columns, stride), "cublasLtMatrixLayoutCreate");
    return {created, lt_.MatrixLayoutDestroy};
  }

  // The handle of the current device. It is created once.
  cublasLtHandle_t handle() {
    static std::mutex mutex;
    static std::map<int, cublasLtHandle_t> handles;
    const std::lock_guard lock(mutex);
    cublasLtHandle_t& found = handles[key_.device];
    if (!found) check(lt_.Create(&found), "cublasLtCreate");
    return found;
  }

  // The first choice of the heuristic. It is cached by shape, because a query takes longer than a launch.
  Algorithm find_algorithm() {
    static std::mutex mutex;
    static std::map<Key, Algorithm> cache;
    constexpr size_t MAX_ENTRIES = 4096;
    const std::lock_guard lock(mutex);
    if (const auto entry = cache.find(key_); entry != cache.end()) return entry->second;
    cublasLtMatmulPreference_t created;
    check(lt_.MatmulPreferenceCreate(&created), "cublasLtMatmulPreferenceCreate");
    const Owned<cublasLtMatmulPreference_t> preference(created, lt_.MatmulPreferenceDestroy);
    const auto prefer = [&](cublasLtMatmulPreferenceAttributes_t which, auto value) {
      check(
          lt_.MatmulPreferenceSetAttribute(created, which, &value, sizeof(value)),
          "cublasLtMatmulPreferenceSetAttribute");
    };
    prefer(CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, uint64_t{WORKSPACE});
    // Partial sums of a split along K are added in float. By default they may be rounded to 16 bits first.
    prefer(CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK, static_cast<uint32_t>(CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE));
    prefer(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, key_.alignment[0]);
    prefer(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES, key_.alignment[1]);
    cublasLtMatmulHeuristicResult_t best{};
    int found = 0;
    const cublasStatus_t status = lt_.MatmulAlgoGetHeuristic(
        handle(), description_.get(), a_.get(), b_.get(), d_.get(), d_.get(), created, 1, &best, &found);
    if (status != CUBLAS_STATUS_NOT_SUPPORTED) check(status, "cublasLtMatmulAlgoGetHeuristic");
    if (cache.size() == MAX_ENTRIES) cache.clear();
    return cache[key_] = found > 0 && best.state == CUBLAS_STATUS_SUCCESS ? Algorithm(best.algo) : std::nullopt;
  }

  const Cublas& lt_ = Cublas::get();
  const Device device_;
  const Tensor &x_, &weight_, &out_;
  Owned<cublasLtMatmulDesc_t> description_{nullptr, nullptr};
  Owned<cublasLtMatrixLayout_t> a_{nullptr, nullptr}, b_{nullptr, nullptr}, d_{nullptr, nullptr};
  Key key_;
};

#endif

}  // namespace fastgpt
