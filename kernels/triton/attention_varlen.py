"""Attention over packed documents, none of which sees another: attention.py's kernels, a document per batch entry.

Shapes: q (total_q, H, D), k (total_k, Hk, D), v (total_k, Hk, DV), stats (H, total_q, 2); document n holds the rows
cu_seqlens_q[n] .. cu_seqlens_q[n + 1] of q and likewise of k and v. The grid is made for the longest document;
programs beyond the end of theirs return at once, and the bounds are never read on the host.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastgpt.kernels.attention import launch_fwd
from fastgpt.kernels.attention_bwd import launch_bwd
from fastgpt.kernels.attention_tiles import Documents
from fastgpt.kernels.checks import contiguous


def attention_varlen_fwd(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    alibi_slopes: Tensor | None,
    seed: Tensor | None,
    max_seqlen_q: int,
    max_seqlen_k: int,
    scale: float,
    lower_right: bool,
    left: int,
    right: int,
    softcap: float,
    dropout_p: float,
) -> tuple[Tensor, Tensor]:
    contiguous("attention_varlen_fwd_triton", cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k)
    documents = Documents(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    # What lies past the last document is 0, and sees nothing.
    out = q.new_zeros(q.shape[0], q.shape[1], v.shape[2])
    stats = q.new_zeros((q.shape[1], q.shape[0], 2), dtype=torch.float32)
    stats[..., 0] = -torch.inf
    launch_fwd(
        *documents.views(out),
        documents.share(stats),
        *documents.views(q, k, v),
        *(documents, None, alibi_slopes, seed),
        *(scale, lower_right, left, right, softcap, dropout_p),
    )
    return out, stats


def attention_varlen_bwd(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    stats: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    alibi_slopes: Tensor | None,
    seed: Tensor | None,
    max_seqlen_q: int,
    max_seqlen_k: int,
    scale: float,
    lower_right: bool,
    left: int,
    right: int,
    softcap: float,
    dropout_p: float,
    deterministic: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    contiguous("attention_varlen_bwd_triton", cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k)
    documents = Documents(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    dq, dk, dv = q.new_zeros(q.shape), k.new_zeros(k.shape), v.new_zeros(v.shape)
    launch_bwd(
        *documents.views(dq, dk, dv, grad_out),
        grad_lse,
        *documents.views(q, k, v, out),
        documents.share(stats),
        *(documents, None, alibi_slopes, seed),
        *(scale, lower_right, left, right, softcap, dropout_p, deterministic),
    )
    return dq, dk, dv
