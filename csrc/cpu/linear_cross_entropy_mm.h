// Cross-entropy of a linear layer's output in bfloat16 by PyTorch's products, for CPUs with AMX (products.h). The
// mathematics is in cross_entropy.h and linear_cross_entropy.h.
//
// A chunk's logits (n, V) are a product in bfloat16. The gradient is written over them. Two more products give the
// chunk's parts of the gradients, which are summed in float32 over the chunks.
//
// Bytes moved beside the products: a chunk writes its logits, reads them twice and writes them once. It writes, and
// reads again, its part of dweight in bfloat16, and reads and writes dweight in float32.
#pragma once

#include "cross_entropy.h"
#include "products.h"

namespace fastgpt {

// Rows of a chunk: a quarter of all rows. Fewer than 256 rows do not pay for the passes over dweight. More than 1024
// do not make the products faster.
inline int64_t mm_chunk_rows(int64_t requested, int64_t rows) {
  const int64_t automatic = std::clamp<int64_t>((rows + 3) / 4, 256, 1024);
  return std::clamp<int64_t>(requested > 0 ? requested : automatic, 1, std::max<int64_t>(rows, 1));
}

// The rows [begin, begin + n) of a contiguous matrix.
inline Tensor rows_of(const Tensor& x, int64_t begin, int64_t n) {
  return as_strided(x, {n, x.size(1)}, {x.size(1), 1}, begin * x.size(1));
}

// to = from, or to += from
inline void accumulate_into(float* to, const Tensor& from, bool add) {
  const BFloat16* const x = from.const_data_ptr<BFloat16>();
  parallel_for(0, blocks(from.numel()), GRAIN / BLOCK, [&](int64_t begin, int64_t end) {
    over_vectors<float>(begin * BLOCK, std::min(from.numel(), end * BLOCK), [&](int64_t i, auto... n) {
      const Vector<float> more = load<float>(x + i, n...);
      store<float, float>(to + i, add ? load<float>(to + i, n...) + more : more, n...);
    });
  });
}

// The layer and its targets. All tensors are contiguous.
struct Layer {
  Tensor hidden, weight, target;
  OptionalTensor bias, class_weight;
  LossOptions options;
  int64_t chunk;
};

// The gradients in float32.
struct LayerGradients {
  float *hidden, *weight, *bias;
};

// Calls f(row, logits, target, i) for each row i, a chunk at a time. row: a CrossEntropyRow. f writes the gradient over
// the logits, if with_grad; then the products add it to the gradients of the layer.
template <typename F>
void mm_chunks(const Layer& layer, bool with_grad, LayerGradients gradients, F&& f) {
  const int64_t rows = layer.hidden.size(0), size = layer.hidden.size(1), vocab = layer.weight.size(0);
  const CrossEntropyRow<float> row(pointer<float>(layer.class_weight), vocab, layer.options);
  const int64_t* const target = layer.target.const_data_ptr<int64_t>();
  const int64_t step = mm_chunk_rows(layer.chunk, rows), grain = GRAIN / std::max<int64_t>(vocab, 1) + 1;
  for (int64_t first = 0; first < rows; first += step) {
    const int64_t n = std::min(step, rows - first);
    const Tensor hidden = rows_of(layer.hidden, first, n);
    const Tensor logits = linear(hidden, layer.weight, layer.bias);
    BFloat16* const x = logits.mutable_data_ptr<BFloat16>();
    parallel_for(0, n, grain, [&](int64_t begin, int64_t end) {
      const FlushSubnormals flush;
      for (int64_t i = begin; i < end; ++i) f(row, x + i * vocab, target[first + i], first + i);
    });
    if (!with_grad) continue;
    accumulate_into(gradients.hidden + first * size, mm(logits, layer.weight), false);
    accumulate_into(gradients.weight, mm(transposed(logits), hidden), first > 0);
    if (layer.bias) {
      const Tensor sums = sum_rows(logits, ScalarType::Float);
      const float* const more = sums.const_data_ptr<float>();
      for (int64_t j = 0; j < vocab; ++j) gradients.bias[j] += more[j];
    }
  }
}

// ---- forward; with_grad: also the gradients of the sum of the losses ----

inline void mm_forward(const Layer& layer, float* loss, float* statistics, bool with_grad, LayerGradients gradients) {
  mm_chunks(layer, with_grad, gradients, [&](const auto& row, BFloat16* x, int64_t y, int64_t i) {
    loss[i] = row.forward(x, y, statistics + 2 * i);
    if (with_grad) row.template backward<false>(x, x, y, statistics + 2 * i, 1.0f, 0.0f);
  });
}

// ---- backward, for upstream gradients that differ between rows; computes the logits again ----

inline void mm_backward(const Layer& layer, const float* grad, const float* statistics, LayerGradients gradients) {
  mm_chunks(layer, true, gradients, [&](const auto& row, BFloat16* x, int64_t y, int64_t i) {
    row.template backward<false>(x, x, y, statistics + 2 * i, grad[i], 0.0f);
  });
}

}  // namespace fastgpt
