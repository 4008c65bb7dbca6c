// What csrc/cuda/linear_gelu.cu asks of cuBLASLt, with a meaning for the host: names and values of NVIDIA's header,
// done as its documentation says, for 16-bit numbers. What the real one refuses is refused.
#pragma once

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>

#define CUBLAS_VER_MAJOR 13

enum cublasStatus_t { CUBLAS_STATUS_SUCCESS = 0, CUBLAS_STATUS_INVALID_VALUE = 7, CUBLAS_STATUS_NOT_SUPPORTED = 15 };
enum cudaDataType_t { CUDA_R_32F = 0, CUDA_R_16F = 2, CUDA_R_16BF = 14 };
enum cublasComputeType_t { CUBLAS_COMPUTE_32F = 68 };
enum cublasOperation_t { CUBLAS_OP_N = 0, CUBLAS_OP_T = 1 };
enum cublasLtEpilogue_t { CUBLASLT_EPILOGUE_BIAS = 4, CUBLASLT_EPILOGUE_GELU = 32, CUBLASLT_EPILOGUE_GELU_AUX = 160 };
enum cublasLtMatmulDescAttributes_t {
  CUBLASLT_MATMUL_DESC_TRANSA = 3,
  CUBLASLT_MATMUL_DESC_EPILOGUE = 7,
  CUBLASLT_MATMUL_DESC_BIAS_POINTER = 8,
  CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_POINTER = 11,
  CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_LD = 12,
};
enum cublasLtMatmulPreferenceAttributes_t { CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES = 1 };

struct cublasLtContext {};
struct cublasLtMatmulDescOpaque_t {
  cublasOperation_t transpose_a = CUBLAS_OP_N;
  int epilogue = 1;
  const void* bias = nullptr;
  void* aux = nullptr;
  int64_t aux_stride = 0;
};
struct cublasLtMatrixLayoutOpaque_t {
  cudaDataType_t type;
  uint64_t rows, columns;
  int64_t stride;  // from column to column
};
struct cublasLtMatmulPreferenceOpaque_t {
  uint64_t workspace = 0;
};
struct cublasLtMatmulAlgo_t {
  uint64_t data[8];
};
struct cublasLtMatmulHeuristicResult_t {
  cublasLtMatmulAlgo_t algo;
};
using cublasLtHandle_t = cublasLtContext*;
using cublasLtMatmulDesc_t = cublasLtMatmulDescOpaque_t*;
using cublasLtMatrixLayout_t = cublasLtMatrixLayoutOpaque_t*;
using cublasLtMatmulPreference_t = cublasLtMatmulPreferenceOpaque_t*;

inline cublasStatus_t cublasLtCreate(cublasLtHandle_t* made) {
  *made = new cublasLtContext;
  return CUBLAS_STATUS_SUCCESS;
}
inline cublasStatus_t cublasLtMatmulDescCreate(cublasLtMatmulDesc_t* made, cublasComputeType_t, cudaDataType_t) {
  *made = new cublasLtMatmulDescOpaque_t;
  return CUBLAS_STATUS_SUCCESS;
}
inline cublasStatus_t cublasLtMatmulDescDestroy(cublasLtMatmulDesc_t d) {
  delete d;
  return CUBLAS_STATUS_SUCCESS;
}
inline cublasStatus_t cublasLtMatmulDescSetAttribute(
    cublasLtMatmulDesc_t d, cublasLtMatmulDescAttributes_t which, const void* value, size_t bytes) {
  const auto into = [&](auto& field) {
    if (bytes != sizeof(field)) return CUBLAS_STATUS_INVALID_VALUE;
    std::memcpy(&field, value, bytes);
    return CUBLAS_STATUS_SUCCESS;
  };
  switch (which) {
    case CUBLASLT_MATMUL_DESC_TRANSA:
      return into(d->transpose_a);
    case CUBLASLT_MATMUL_DESC_EPILOGUE:
      return into(d->epilogue);
    case CUBLASLT_MATMUL_DESC_BIAS_POINTER:
      return into(d->bias);
    case CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_POINTER:
      return into(d->aux);
    case CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_LD:
      return into(d->aux_stride);
  }
  return CUBLAS_STATUS_INVALID_VALUE;
}
inline cublasStatus_t cublasLtMatrixLayoutCreate(
    cublasLtMatrixLayout_t* made, cudaDataType_t type, uint64_t rows, uint64_t columns, int64_t stride) {
  *made = new cublasLtMatrixLayoutOpaque_t{type, rows, columns, stride};
  return CUBLAS_STATUS_SUCCESS;
}
inline cublasStatus_t cublasLtMatrixLayoutDestroy(cublasLtMatrixLayout_t l) {
  delete l;
  return CUBLAS_STATUS_SUCCESS;
}
inline cublasStatus_t cublasLtMatmulPreferenceCreate(cublasLtMatmulPreference_t* made) {
  *made = new cublasLtMatmulPreferenceOpaque_t;
  return CUBLAS_STATUS_SUCCESS;
}
inline cublasStatus_t cublasLtMatmulPreferenceDestroy(cublasLtMatmulPreference_t p) {
  delete p;
  return CUBLAS_STATUS_SUCCESS;
}
inline cublasStatus_t cublasLtMatmulPreferenceSetAttribute(
    cublasLtMatmulPreference_t p, cublasLtMatmulPreferenceAttributes_t, const void* value, size_t bytes) {
  if (bytes != sizeof(p->workspace)) return CUBLAS_STATUS_INVALID_VALUE;
  std::memcpy(&p->workspace, value, bytes);
  return CUBLAS_STATUS_SUCCESS;
}

// Whether there is a kernel for any product: what the real one has depends on the GPU.
inline bool simt_has_products = true;
extern "C" inline __attribute__((used, visibility("default"))) void simt_set_has_products(bool has) {
  simt_has_products = has;
}

// Shapes and strides that agree; what the epilogue reads and writes is there, in columns of a multiple of eight.
inline cublasStatus_t cublasLtMatmulAlgoGetHeuristic(
    cublasLtHandle_t,
    cublasLtMatmulDesc_t d,
    cublasLtMatrixLayout_t a,
    cublasLtMatrixLayout_t b,
    cublasLtMatrixLayout_t c,
    cublasLtMatrixLayout_t out,
    cublasLtMatmulPreference_t,
    int asked,
    cublasLtMatmulHeuristicResult_t*,
    int* found) {
  *found = 0;
  const bool transposed = d->transpose_a == CUBLAS_OP_T;
  const uint64_t m = transposed ? a->columns : a->rows, k = transposed ? a->rows : a->columns;
  bool sound =
      simt_has_products && asked > 0 && b->rows == k && out->rows == m && out->columns == b->columns && c->rows == m;
  for (const auto* l : {a, b, out}) sound = sound && l->stride >= static_cast<int64_t>(l->rows) && l->type == a->type;
  if (d->epilogue & CUBLASLT_EPILOGUE_BIAS) sound = sound && d->bias != nullptr;
  if (d->epilogue & 128)
    sound = sound && d->aux != nullptr && d->aux_stride % 8 == 0 && d->aux_stride >= static_cast<int64_t>(m);
  if (!sound) return CUBLAS_STATUS_NOT_SUPPORTED;
  *found = 1;
  return CUBLAS_STATUS_SUCCESS;
}

template <typename T>
void simt_multiply(
    const cublasLtMatmulDescOpaque_t& d,
    const T* a,
    const cublasLtMatrixLayoutOpaque_t& la,
    const T* b,
    const cublasLtMatrixLayoutOpaque_t& lb,
    T* out,
    const cublasLtMatrixLayoutOpaque_t& lout) {
  const bool transposed = d.transpose_a == CUBLAS_OP_T;
  for (uint64_t j = 0; j < lout.columns; ++j)
    for (uint64_t i = 0; i < lout.rows; ++i) {
      double z = 0;
      for (uint64_t l = 0; l < lb.rows; ++l)
        z += double{static_cast<float>(a[transposed ? l + i * la.stride : i + l * la.stride])} *
             double{static_cast<float>(b[l + j * lb.stride])};
      if (d.epilogue & CUBLASLT_EPILOGUE_BIAS) z += static_cast<float>(static_cast<const T*>(d.bias)[i]);
      if (d.epilogue & 128) static_cast<T*>(d.aux)[i + j * d.aux_stride] = static_cast<T>(static_cast<float>(z));
      const double gelu = 0.5 * z * (1 + std::tanh(std::sqrt(2 / M_PI) * (z + 0.044715 * z * z * z)));
      out[i + j * lout.stride] = static_cast<T>(static_cast<float>(d.epilogue & CUBLASLT_EPILOGUE_GELU ? gelu : z));
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
    const cublasLtMatmulAlgo_t*,
    void*,
    size_t,
    void*) {
  const auto multiply = [&](auto element) {
    using T = decltype(element);
    simt_multiply<T>(*d, static_cast<const T*>(a), *la, static_cast<const T*>(b), *lb, static_cast<T*>(out), *lout);
    return CUBLAS_STATUS_SUCCESS;
  };
  if (la->type == CUDA_R_16F) return multiply(c10::Half{});
  return la->type == CUDA_R_16BF ? multiply(c10::BFloat16{}) : CUBLAS_STATUS_NOT_SUPPORTED;
}
