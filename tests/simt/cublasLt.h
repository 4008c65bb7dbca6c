// A host implementation of the part of cuBLASLt that csrc/cuda/cublaslt.cuh uses, for 16-bit numbers. Names and values
// are those of NVIDIA's header, the behaviour is that of its documentation. It refuses what cuBLASLt refuses.
#pragma once

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <utility>

#define CUBLAS_VER_MAJOR 13

enum cublasStatus_t { CUBLAS_STATUS_SUCCESS = 0, CUBLAS_STATUS_INVALID_VALUE = 7, CUBLAS_STATUS_NOT_SUPPORTED = 15 };
enum cudaDataType_t { CUDA_R_32F = 0, CUDA_R_16F = 2, CUDA_R_16BF = 14 };
enum cublasComputeType_t { CUBLAS_COMPUTE_32F = 68 };
enum cublasOperation_t { CUBLAS_OP_N = 0, CUBLAS_OP_T = 1 };
enum cublasLtEpilogue_t {
  CUBLASLT_EPILOGUE_BIAS = 4,
  CUBLASLT_EPILOGUE_GELU = 32,
  CUBLASLT_EPILOGUE_GELU_AUX = 160,
  CUBLASLT_EPILOGUE_DGELU = 192,
  CUBLASLT_EPILOGUE_DGELU_BGRAD = 208,
};
enum cublasLtMatmulDescAttributes_t {
  CUBLASLT_MATMUL_DESC_TRANSA = 3,
  CUBLASLT_MATMUL_DESC_EPILOGUE = 7,
  CUBLASLT_MATMUL_DESC_BIAS_POINTER = 8,
  CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_POINTER = 11,
  CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_LD = 12,
};
enum cublasLtMatmulPreferenceAttributes_t {
  CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES = 1,
  CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK = 3,
  CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES = 5,
  CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES = 6,
};

enum cublasLtReductionScheme_t {
  CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE = 2,
  CUBLASLT_REDUCTION_SCHEME_OUTPUT_TYPE = 4,
  CUBLASLT_REDUCTION_SCHEME_MASK = 7,
};

struct cublasLtContext {};
struct cublasLtMatmulDescOpaque_t {
  cublasOperation_t transpose_a = CUBLAS_OP_N;
  int epilogue = 1;
  void* bias = nullptr;
  void* aux = nullptr;
  int64_t aux_stride = 0;
};
struct cublasLtMatrixLayoutOpaque_t {
  cudaDataType_t type;
  uint64_t rows, columns;
  int64_t stride;  // between columns
};
struct cublasLtMatmulPreferenceOpaque_t {
  uint64_t workspace = 0;
  uint32_t alignment_a = 256, alignment_b = 256, reduction = CUBLASLT_REDUCTION_SCHEME_MASK;
};
struct cublasLtMatmulAlgo_t {
  uint64_t data[8];
};
struct cublasLtMatmulHeuristicResult_t {
  cublasLtMatmulAlgo_t algo;
  cublasStatus_t state;
};
using cublasLtHandle_t = cublasLtContext*;
using cublasLtMatmulDesc_t = cublasLtMatmulDescOpaque_t*;
using cublasLtMatrixLayout_t = cublasLtMatrixLayoutOpaque_t*;
using cublasLtMatmulPreference_t = cublasLtMatmulPreferenceOpaque_t*;

inline cublasStatus_t cublasLtCreate(cublasLtHandle_t* created) {
  *created = new cublasLtContext;
  return CUBLAS_STATUS_SUCCESS;
}
inline cublasStatus_t cublasLtMatmulDescCreate(cublasLtMatmulDesc_t* created, cublasComputeType_t, cudaDataType_t) {
  *created = new cublasLtMatmulDescOpaque_t;
  return CUBLAS_STATUS_SUCCESS;
}
inline cublasStatus_t cublasLtMatmulDescDestroy(cublasLtMatmulDesc_t d) {
  delete d;
  return CUBLAS_STATUS_SUCCESS;
}
template <typename T>
cublasStatus_t simt_copy(T& field, const void* value, size_t bytes) {
  if (bytes != sizeof(field)) return CUBLAS_STATUS_INVALID_VALUE;
  std::memcpy(&field, value, bytes);
  return CUBLAS_STATUS_SUCCESS;
}

inline cublasStatus_t cublasLtMatmulDescSetAttribute(
    cublasLtMatmulDesc_t d, cublasLtMatmulDescAttributes_t which, const void* value, size_t bytes) {
  switch (which) {
    case CUBLASLT_MATMUL_DESC_TRANSA:
      return simt_copy(d->transpose_a, value, bytes);
    case CUBLASLT_MATMUL_DESC_EPILOGUE:
      return simt_copy(d->epilogue, value, bytes);
    case CUBLASLT_MATMUL_DESC_BIAS_POINTER:
      return simt_copy(d->bias, value, bytes);
    case CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_POINTER:
      return simt_copy(d->aux, value, bytes);
    case CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_LD:
      return simt_copy(d->aux_stride, value, bytes);
  }
  return CUBLAS_STATUS_INVALID_VALUE;
}
inline cublasStatus_t cublasLtMatrixLayoutCreate(
    cublasLtMatrixLayout_t* created, cudaDataType_t type, uint64_t rows, uint64_t columns, int64_t stride) {
  *created = new cublasLtMatrixLayoutOpaque_t{type, rows, columns, stride};
  return CUBLAS_STATUS_SUCCESS;
}
inline cublasStatus_t cublasLtMatrixLayoutDestroy(cublasLtMatrixLayout_t l) {
  delete l;
  return CUBLAS_STATUS_SUCCESS;
}
inline cublasStatus_t cublasLtMatmulPreferenceCreate(cublasLtMatmulPreference_t* created) {
  *created = new cublasLtMatmulPreferenceOpaque_t;
  return CUBLAS_STATUS_SUCCESS;
}
inline cublasStatus_t cublasLtMatmulPreferenceDestroy(cublasLtMatmulPreference_t p) {
  delete p;
  return CUBLAS_STATUS_SUCCESS;
}
inline cublasStatus_t cublasLtMatmulPreferenceSetAttribute(
    cublasLtMatmulPreference_t p, cublasLtMatmulPreferenceAttributes_t which, const void* value, size_t bytes) {
  switch (which) {
    case CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES:
      return simt_copy(p->workspace, value, bytes);
    case CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK:
      return simt_copy(p->reduction, value, bytes);
    case CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES:
      return simt_copy(p->alignment_a, value, bytes);
    case CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES:
      return simt_copy(p->alignment_b, value, bytes);
  }
  return CUBLAS_STATUS_INVALID_VALUE;
}

// Whether there is a kernel for any product. In cuBLASLt that depends on the GPU.
inline bool simt_has_products = true;
extern "C" inline __attribute__((used, visibility("default"))) void simt_set_has_products(bool has) {
  simt_has_products = has;
}

// In bytes, 256 at most.
inline uint64_t simt_alignment(const void* p) {
  const auto begin = reinterpret_cast<uintptr_t>(p);
  return begin ? std::min<uint64_t>(begin & -begin, 256) : 256;
}

inline bool simt_is(const cublasLtMatmulDescOpaque_t& d, cublasLtEpilogue_t what) {
  return (d.epilogue & what) == what;
}

// Finds an algorithm if shapes and strides agree and the tensors of the epilogue are set, with a stride that is a
// multiple of eight. The algorithm stores the alignment of the pointers, which cublasLtMatmul checks.
inline cublasStatus_t cublasLtMatmulAlgoGetHeuristic(
    cublasLtHandle_t,
    cublasLtMatmulDesc_t d,
    cublasLtMatrixLayout_t a,
    cublasLtMatrixLayout_t b,
    cublasLtMatrixLayout_t c,
    cublasLtMatrixLayout_t out,
    cublasLtMatmulPreference_t p,
    int requested,
    cublasLtMatmulHeuristicResult_t* best,
    int* found) {
  *found = 0;
  const bool transposed = d->transpose_a == CUBLAS_OP_T;
  const uint64_t m = transposed ? a->columns : a->rows, k = transposed ? a->rows : a->columns;
  bool sound = simt_has_products && requested > 0 && b->rows == k && out->rows == m && out->columns == b->columns &&
               c->rows == m;
  for (const auto* l : {a, b, out}) sound = sound && l->stride >= static_cast<int64_t>(l->rows) && l->type == a->type;
  if (simt_is(*d, CUBLASLT_EPILOGUE_BIAS) || simt_is(*d, CUBLASLT_EPILOGUE_DGELU_BGRAD))
    sound = sound && d->bias != nullptr;
  if (simt_is(*d, CUBLASLT_EPILOGUE_GELU_AUX) || simt_is(*d, CUBLASLT_EPILOGUE_DGELU))
    sound = sound && d->aux != nullptr && d->aux_stride % 8 == 0 && d->aux_stride >= static_cast<int64_t>(m);
  if (!sound) return CUBLAS_STATUS_NOT_SUPPORTED;
  *found = 1;
  best->algo = {{p->alignment_a, p->alignment_b, simt_alignment(d->bias), simt_alignment(d->aux), p->reduction}};
  best->state = CUBLAS_STATUS_SUCCESS;
  return CUBLAS_STATUS_SUCCESS;
}

// gelu(z) / z and gelu'(z), for tanh GELU.
inline std::pair<double, double> simt_gelu(double z) {
  const double root = std::sqrt(2 / M_PI), t = std::tanh(root * (z + 0.044715 * z * z * z));
  return {0.5 * (1 + t), 0.5 * (1 + t) + 0.5 * z * (1 - t * t) * root * (1 + 3 * 0.044715 * z * z)};
}

template <typename T>
void simt_multiply(
    const cublasLtMatmulDescOpaque_t& d,
    bool rounds,
    const T* a,
    const cublasLtMatrixLayoutOpaque_t& la,
    const T* b,
    const cublasLtMatrixLayoutOpaque_t& lb,
    T* out,
    const cublasLtMatrixLayoutOpaque_t& lout) {
  const bool transposed = d.transpose_a == CUBLAS_OP_T;
  const auto to = [](double x) { return static_cast<T>(static_cast<float>(x)); };
  T* const bias = static_cast<T*>(d.bias);
  T* const aux = static_cast<T*>(d.aux);
  for (uint64_t i = 0; i < lout.rows; ++i) {
    double sum = 0;
    for (uint64_t j = 0; j < lout.columns; ++j) {
      double y = 0;
      for (uint64_t l = 0; l < lb.rows; ++l) {
        y += double{static_cast<float>(a[transposed ? l + i * la.stride : i + l * la.stride])} *
             double{static_cast<float>(b[l + j * lb.stride])};
        if (rounds && l % 4 == 3) y = static_cast<float>(to(y));  // a split along K whose partial sums are rounded
      }
      if (simt_is(d, CUBLASLT_EPILOGUE_BIAS)) y += static_cast<float>(bias[i]);
      if (simt_is(d, CUBLASLT_EPILOGUE_GELU_AUX)) aux[i + j * d.aux_stride] = to(y);
      if (simt_is(d, CUBLASLT_EPILOGUE_GELU)) y *= simt_gelu(y).first;
      if (simt_is(d, CUBLASLT_EPILOGUE_DGELU)) y *= simt_gelu(static_cast<float>(aux[i + j * d.aux_stride])).second;
      sum += y;
      out[i + j * lout.stride] = to(y);
    }
    if (simt_is(d, CUBLASLT_EPILOGUE_DGELU_BGRAD)) bias[i] = to(sum);
  }
}

inline cublasStatus_t cublasLtMatmul(
    cublasLtHandle_t,
    cublasLtMatmulDesc_t d,
    const void*,
    const void* a,
    cublasLtMatrixLayout_t la,
    const void* b,
    cublasLtMatrixLayout_t lb,
    const void*,
    const void*,
    cublasLtMatrixLayout_t,
    void* out,
    cublasLtMatrixLayout_t lout,
    const cublasLtMatmulAlgo_t* algorithm,
    void*,
    size_t,
    void*) {
  const void* const pointers[] = {a, b, d->bias, d->aux};
  for (int i = 0; i < 4; ++i)
    if (simt_alignment(pointers[i]) < algorithm->data[i]) return CUBLAS_STATUS_INVALID_VALUE;
  const auto multiply = [&](auto element) {
    using T = decltype(element);
    const bool rounds = algorithm->data[4] & CUBLASLT_REDUCTION_SCHEME_OUTPUT_TYPE;
    simt_multiply<T>(
        *d, rounds, static_cast<const T*>(a), *la, static_cast<const T*>(b), *lb, static_cast<T*>(out), *lout);
    return CUBLAS_STATUS_SUCCESS;
  };
  if (la->type == CUDA_R_16F) return multiply(c10::Half{});
  return la->type == CUDA_R_16BF ? multiply(c10::BFloat16{}) : CUBLAS_STATUS_NOT_SUPPORTED;
}
