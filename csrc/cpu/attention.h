// Functions that the launchers of attention.cpp and attention_varlen.cpp share. Tensors are (B, heads, L, D) with
// contiguous rows, or (B, heads, L) with one number per row. stats: (B, heads, L, 2), m and l of each row.
#pragma once

#include "attention_tiles.h"
#include "checks.h"

namespace fastgpt {

Tensor rows_contiguous(const Tensor& t);

// Expands slopes (heads,) or (documents, heads) to (documents, heads).
OptionalTensor prepare_slopes(const OptionalTensor& slopes, int64_t documents, int64_t heads);

// Checks alibi_slopes (H,) or (documents, H), and the seed of the dropout.
void check_slopes_and_seed(
    const Checks& check,
    const Tensor& q,
    const OptionalTensor& slopes,
    int64_t documents,
    const OptionalTensor& seed,
    double dropout_p);

// The sizes and options that all documents of a call share.
Problem common_problem(
    const Tensor& q,
    const Tensor& k,
    const Tensor& v,
    const OptionalTensor& seed,
    double scale,
    bool lower_right,
    int64_t left,
    int64_t right,
    double softcap,
    double dropout_p);

// Computes out and stats of the documents.
void forward_documents(
    const Problems& documents,
    const Tensor& q,
    const Tensor& k,
    const Tensor& v,
    const OptionalTensor& mask,
    const OptionalTensor& slopes,
    const Tensor& out,
    const Tensor& stats);

// Computes dq, dk and dv of the documents.
void backward_documents(
    const Problems& documents,
    const Tensor& grad,
    const OptionalTensor& grad_lse,
    const Tensor& q,
    const Tensor& k,
    const Tensor& v,
    const Tensor& out,
    const Tensor& stats,
    const OptionalTensor& mask,
    const OptionalTensor& slopes,
    const Tensor& dq,
    const Tensor& dk,
    const Tensor& dv);

}  // namespace fastgpt
