// A product of 16-bit matrices by cuBLASLt, with GELU by tanh or its derivative in its epilogue.
//
// It is there if cublasLt.h was there to compile against. The library itself, which PyTorch has loaded, is called by
// name, so that this one also loads where there is none; and not every product has a kernel, so that whoever asks for
// one has another way to go. Without the header, `call` alone is left.
#pragma once

#include <array>

#include "tensors.cuh"

#if __has_include(<cublasLt.h>)
#include <cublasLt.h>

#include <compare>
#include <map>
#include <memory>
#include <mutex>
#define FASTGPT_EPILOGUE
#endif

namespace fastgpt {

// Another op of ours or of PyTorch's, with results of these types.
template <typename... Results, typename... Arguments>
std::tuple<Results...> call(const char* op, const Arguments&... arguments) {
  std::array<StableIValue, std::max(sizeof...(arguments), sizeof...(Results))> stack{
      torch::stable::detail::from(arguments)...};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher(op, "", stack.data(), TORCH_ABI_VERSION));
  auto next = stack.begin();
  return {torch::stable::detail::to<Results>(*next++)...};
}

#ifdef FASTGPT_EPILOGUE

// What is called of the library, by name.
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
  STD_TORCH_CHECK(status == CUBLAS_STATUS_SUCCESS, "fastgpt: ", what, " failed: cuBLASLt's status ", int{status});
}

// A description, gone with its scope.
template <typename T>
using Owned = std::unique_ptr<std::remove_pointer_t<T>, cublasStatus_t (*)(T)>;

// What is done to the sums before they are rounded and written.
struct Epilogue {
  int kind;              // of cublasLtEpilogue_t
  const Tensor* vector;  // (N,), the bias that is added, or where the sums of the columns are written to; or null
  const Tensor* z;       // (M, N), the pre-activation, which GELU writes and its derivative reads; or null
};

// out (M, N) = epilogue(x (M, K) · Wᵀ), W (N, K). cuBLAS counts columns first: x is its K × M and out its N × M = W ·
// x, where W is transposed if it lies in rows.
class Product {
 public:
  static constexpr uint64_t WORKSPACE = 32 << 20;  // bytes, what NVIDIA recommends for Hopper; less elsewhere

  // Whether cuBLASLt takes them: 16 bits, rows that begin at multiples of 16 bytes, and eight columns at a time.
  static bool takes(const Tensor& x, const Tensor& weight) {
    const int64_t n = weight.size(0), k = x.size(1);
    return Cublas::get().Create && x.scalar_type() != ScalarType::Float && x.size(0) > 0 && x.size(0) < INT32_MAX &&
           n > 0 && n < INT32_MAX && n % 8 == 0 && k > 0 && k % 8 == 0 && lies_in_rows(x) && aligned(x, weight) &&
           (lies_in_rows(weight) || lies_in_columns(weight));
  }

  Product(const Tensor& x, const Tensor& weight, const Tensor& out, Epilogue epilogue)
      : device_(device_of(x)), x_(x), weight_(weight), out_(out) {
    cublasLtMatmulDesc_t made;
    check(lt_.MatmulDescCreate(&made, CUBLAS_COMPUTE_32F, CUDA_R_32F), "a description");
    description_ = {made, lt_.MatmulDescDestroy};
    const bool transposed = lies_in_rows(weight);
    set(CUBLASLT_MATMUL_DESC_TRANSA, transposed ? CUBLAS_OP_T : CUBLAS_OP_N);
    set(CUBLASLT_MATMUL_DESC_EPILOGUE, static_cast<cublasLtEpilogue_t>(epilogue.kind));
    if (epilogue.vector) set(CUBLASLT_MATMUL_DESC_BIAS_POINTER, static_cast<const void*>(epilogue.vector->data_ptr()));
    if (epilogue.z) {
      set(CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_POINTER, static_cast<void*>(epilogue.z->data_ptr()));
      set(CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_LD, int64_t{epilogue.z->stride(0)});
    }
    const int64_t m = out.size(0), n = out.size(1), k = x.size(1), apart = weight.stride(transposed ? 0 : 1);
    a_ = transposed ? layout(k, n, apart) : layout(n, k, apart);
    b_ = layout(k, m, x.stride(0)), d_ = layout(n, m, out.stride(0));
    key_ = {device_.index(), x.scalar_type(), epilogue.kind, transposed, m, n, k, apart, x.stride(0)};
    const std::array given{&weight, &x, epilogue.vector, epilogue.z};
    std::ranges::transform(given, key_.alignment.begin(), alignment_of);
  }

  // False where cuBLASLt has no kernel for it.
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
        "a product with GELU in its epilogue");
    return true;
  }

 private:
  struct Key {
    int device;
    ScalarType dtype;
    int epilogue;
    bool transposed;
    int64_t m, n, k, apart, x_stride;
    std::array<uint32_t, 4> alignment;  // of weight, x, vector and z, on which the choice of a kernel depends
    auto operator<=>(const Key&) const = default;
  };
  using Algorithm = std::optional<cublasLtMatmulAlgo_t>;

  template <typename T>
  void set(cublasLtMatmulDescAttributes_t which, T value) {
    check(lt_.MatmulDescSetAttribute(description_.get(), which, &value, sizeof(value)), "an attribute");
  }

  static bool lies_in_rows(const Tensor& t) {
    return t.stride(1) == 1 && t.stride(0) >= t.size(1) && t.stride(0) % 8 == 0;
  }
  static bool lies_in_columns(const Tensor& t) {
    return t.stride(0) == 1 && t.stride(1) >= t.size(0) && t.stride(1) % 8 == 0;
  }

  // In bytes; 256 is what cuBLASLt expects of what it is not told about, and PyTorch's memory has.
  static uint32_t alignment_of(const Tensor* t) {
    if (!t) return 256;
    const auto begin = reinterpret_cast<uintptr_t>(t->data_ptr());
    return static_cast<uint32_t>(std::min<uintptr_t>(begin & -begin, 256));
  }

  // By columns, `apart` from one to the next.
  Owned<cublasLtMatrixLayout_t> layout(int64_t rows, int64_t columns, int64_t apart) {
    const auto type = x_.scalar_type() == ScalarType::Half ? CUDA_R_16F : CUDA_R_16BF;
    cublasLtMatrixLayout_t made;
    check(lt_.MatrixLayoutCreate(&made, type, rows, columns, apart), "a layout");
    return {made, lt_.MatrixLayoutDestroy};
  }

  // Of the current device, made once and kept.
  cublasLtHandle_t handle() {
    static std::mutex mutex;
    static std::map<int, cublasLtHandle_t> known;
    const std::lock_guard lock(mutex);
    cublasLtHandle_t& found = known[key_.device];
    if (!found) check(lt_.Create(&found), "a handle");
    return found;
  }

  // The heuristic's first, asked once for a shape: asking takes longer than a launch.
  Algorithm find_algorithm() {
    static std::mutex mutex;
    static std::map<Key, Algorithm> known;
    constexpr size_t MOST = 4096;
    const std::lock_guard lock(mutex);
    if (const auto place = known.find(key_); place != known.end()) return place->second;
    cublasLtMatmulPreference_t made;
    check(lt_.MatmulPreferenceCreate(&made), "a preference");
    const Owned<cublasLtMatmulPreference_t> preference(made, lt_.MatmulPreferenceDestroy);
    const auto prefer = [&](cublasLtMatmulPreferenceAttributes_t which, auto value) {
      check(lt_.MatmulPreferenceSetAttribute(made, which, &value, sizeof(value)), "a preference");
    };
    prefer(CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, uint64_t{WORKSPACE});
    // Sums that are cut along K are put together in float: unless said, they may be rounded before that.
    prefer(CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK, static_cast<uint32_t>(CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE));
    prefer(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, key_.alignment[0]);
    prefer(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES, key_.alignment[1]);
    cublasLtMatmulHeuristicResult_t best{};
    int found = 0;
    const cublasStatus_t status = lt_.MatmulAlgoGetHeuristic(
        handle(), description_.get(), a_.get(), b_.get(), d_.get(), d_.get(), made, 1, &best, &found);
    if (status != CUBLAS_STATUS_NOT_SUPPORTED) check(status, "a choice of a kernel");
    if (known.size() == MOST) known.clear();
    return known[key_] = found > 0 && best.state == CUBLAS_STATUS_SUCCESS ? Algorithm(best.algo) : std::nullopt;
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
