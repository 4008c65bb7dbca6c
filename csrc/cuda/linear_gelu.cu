// GELU of a linear layer's output: z = x Wᵀ + b, y = gelu(z). The backward is gelu.cu's, from z.
//
// GELU by tanh of 16-bit numbers stands in the epilogue of cuBLASLt's product, if cublasLt.h was there to compile
// against: y is made of z as it comes out of the sums, and z written only where a backward wants it. Everything else,
// and what cuBLASLt has no kernel for, is PyTorch's product and a pass over z.
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
namespace {

#ifdef FASTGPT_EPILOGUE

// What is called of the library, which PyTorch has loaded: by name, so that this one also loads where there is none.
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

void check(cublasStatus_t status, const char* what) {
  STD_TORCH_CHECK(status == CUBLAS_STATUS_SUCCESS, "fastgpt: ", what, " failed: cuBLASLt's status ", int{status});
}

// A description, gone with its scope.
template <typename T>
using Owned = std::unique_ptr<std::remove_pointer_t<T>, cublasStatus_t (*)(T)>;

// cuBLAS counts columns first: row-major x (M, K) is its K × M, y its N × M = Wᵀ (transposed K × N) · x.
class Product {
 public:
  static constexpr uint64_t WORKSPACE = 32 << 20;  // bytes, what NVIDIA recommends for Hopper; less elsewhere

  Product(const Tensor& x, const Tensor& weight, const OptionalTensor& bias, const Tensor& y, const Tensor& z)
      : device_(device_of(x)), x_(x), weight_(weight), y_(y) {
    cublasLtMatmulDesc_t made;
    check(lt_.MatmulDescCreate(&made, CUBLAS_COMPUTE_32F, CUDA_R_32F), "a description");
    description_ = {made, lt_.MatmulDescDestroy};
    const bool with_z = z.numel() > 0;
    int epilogue = CUBLASLT_EPILOGUE_GELU;
    if (bias.has_value()) epilogue |= CUBLASLT_EPILOGUE_BIAS;
    if (with_z) epilogue |= CUBLASLT_EPILOGUE_GELU_AUX;
    set(CUBLASLT_MATMUL_DESC_TRANSA, CUBLAS_OP_T);
    set(CUBLASLT_MATMUL_DESC_EPILOGUE, static_cast<cublasLtEpilogue_t>(epilogue));
    if (bias.has_value()) set(CUBLASLT_MATMUL_DESC_BIAS_POINTER, static_cast<const void*>(bias->data_ptr()));
    if (with_z) {
      set(CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_POINTER, static_cast<void*>(z.data_ptr()));
      set(CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_LD, int64_t{z.stride(0)});
    }
    a_ = layout(weight), b_ = layout(x), d_ = layout(y);
    key_ = {device_.index(), x.scalar_type(), epilogue, y.size(1), y.size(0), x.size(1), weight.stride(0), x.stride(0)};
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
            y_.data_ptr(),
            d_.get(),
            y_.data_ptr(),
            d_.get(),
            &*algorithm,
            workspace.data_ptr(),
            WORKSPACE,
            device_.stream()),
        "linear_gelu's product");
    return true;
  }

 private:
  struct Key {
    int device;
    ScalarType dtype;
    int epilogue;
    int64_t m, n, k, a_stride, b_stride;
    auto operator<=>(const Key&) const = default;
  };
  using Algorithm = std::optional<cublasLtMatmulAlgo_t>;

  template <typename T>
  void set(cublasLtMatmulDescAttributes_t which, T value) {
    check(lt_.MatmulDescSetAttribute(description_.get(), which, &value, sizeof(value)), "an attribute");
  }

  Owned<cublasLtMatrixLayout_t> layout(const Tensor& rows) {
    const auto type = rows.scalar_type() == ScalarType::Half ? CUDA_R_16F : CUDA_R_16BF;
    cublasLtMatrixLayout_t made;
    check(lt_.MatrixLayoutCreate(&made, type, rows.size(1), rows.size(0), rows.stride(0)), "a layout");
    return {made, lt_.MatrixLayoutDestroy};
  }

  // Of the current device, made once and kept.
  cublasLtHandle_t handle() {
    static std::mutex mutex;
    static std::map<int, cublasLtHandle_t> known;
    const std::lock_guard lock(mutex);
    auto [place, is_new] = known.try_emplace(key_.device);
    if (is_new) check(lt_.Create(&place->second), "a handle");
    return place->second;
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
    const uint64_t bytes = WORKSPACE;
    check(
        lt_.MatmulPreferenceSetAttribute(made, CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, &bytes, sizeof(bytes)),
        "a preference");
    cublasLtMatmulHeuristicResult_t best{};
    int found = 0;
    const cublasStatus_t status = lt_.MatmulAlgoGetHeuristic(
        handle(), description_.get(), a_.get(), b_.get(), d_.get(), d_.get(), made, 1, &best, &found);
    if (known.size() == MOST) known.clear();
    return known[key_] = status == CUBLAS_STATUS_SUCCESS && found > 0 ? Algorithm(best.algo) : std::nullopt;
  }

  const Cublas& lt_ = Cublas::get();
  const Device device_;
  const Tensor &x_, &weight_, &y_;
  Owned<cublasLtMatmulDesc_t> description_{nullptr, nullptr};
  Owned<cublasLtMatrixLayout_t> a_{nullptr, nullptr}, b_{nullptr, nullptr}, d_{nullptr, nullptr};
  Key key_;
};

// Whether cuBLASLt takes them: rows that begin at multiples of 16 bytes, and eight columns at a time.
bool fits(const Tensor& x, const Tensor& weight, const OptionalTensor& bias) {
  const auto rows = [](const Tensor& t) {
    return t.stride(1) == 1 && t.stride(0) >= t.size(1) && t.stride(0) % 8 == 0 && t.size(0) < INT32_MAX && aligned(t);
  };
  return Cublas::get().Create && x.scalar_type() != ScalarType::Float && x.numel() > 0 && weight.size(0) > 0 &&
         weight.size(0) % 8 == 0 && x.size(1) % 8 == 0 && rows(x) && rows(weight) &&
         (!bias.has_value() || (bias->stride(0) == 1 && aligned(*bias)));
}

#endif

// Another op of ours or of PyTorch's, with one result.
template <typename... Arguments>
Tensor call(const char* op, const Arguments&... arguments) {
  std::array<StableIValue, sizeof...(arguments)> stack{torch::stable::detail::from(arguments)...};
  STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher(op, "", stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

std::tuple<Tensor, Tensor> linear_gelu_fwd(
    const Tensor& x, const Tensor& weight, const OptionalTensor& bias, bool tanh, bool with_z) {
  const Tensor none = empty(x, {0}, x.scalar_type());
#ifdef FASTGPT_EPILOGUE
  if (tanh && fits(x, weight, bias)) {
    const Tensor y = empty(x, {x.size(0), weight.size(0)}, x.scalar_type());
    const Tensor z = with_z ? torch::stable::empty_like(y) : none;
    if (Product(x, weight, bias, y, z).run()) return {y, z};
  }
#endif
  const Tensor z = call("fastgpt::linear_fwd_cuda", x, weight, bias);
  return {call("fastgpt::gelu_fwd_cuda", z, tanh), with_z ? z : none};
}

STABLE_TORCH_LIBRARY_IMPL(fastgpt, FASTGPT_DISPATCH_KEY, m) {
  m.impl("linear_gelu_fwd_cuda", TORCH_BOX(&linear_gelu_fwd));
}

}  // namespace
}  // namespace fastgpt
