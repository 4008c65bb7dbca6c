// What the launchers of attention.cpp and attention_varlen.cpp share. Tensors are (B, heads, L, D), rows contiguous,
// and (B, heads, L) for one number a row; undefined where there is none. stats: (B, heads, L, 2), m and l of each row.
#pragma once

#include "attention_tiles.h"
#include "checks.h"

namespace fastgpt {

Tensor rows_contiguous(const Tensor& t);

// (documents, heads) of slopes that are that or (heads,).
Tensor prepare_slopes(const OptionalTensor& slopes, int64_t documents, int64_t heads, at::ScalarType acc);

// What goes with the rows of q: slopes (H,) or (documents, H), and the seed of the dropout.
void check_extras(
    const Checks& check,
    const Tensor& q,
    const OptionalTensor& slopes,
    int64_t documents,
    const OptionalTensor& seed,
    double dropout_p);

// What all documents of a call have in common.
Problem describe(
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

// Writes out and stats of the documents.
void attend(
    const Problems& documents,
    const Tensor& q,
    const Tensor& k,
    const Tensor& v,
    const Tensor& mask,
    const Tensor& slopes,
    const Tensor& out,
    const Tensor& stats);

// Writes dq, dk and dv of the documents.
void attend_backward(
    const Problems& documents,
    const Tensor& grad,
    const Tensor& grad_lse,
    const Tensor& q,
    const Tensor& k,
    const Tensor& v,
    const Tensor& out,
    const Tensor& stats,
    const Tensor& mask,
    const Tensor& slopes,
    const Tensor& dq,
    const Tensor& dk,
    const Tensor& dv);

}  // namespace fastgpt
