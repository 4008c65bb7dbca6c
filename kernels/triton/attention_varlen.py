"""Attention within packed documents: the kernels of attention.py, with one batch entry per document.

Shapes: q (total_q, H, D), k (total_k, Hk, D), v (total_k, Hk, DV), stats (H, total_q, 2). Document n is the rows
cu_seqlens_q[n] .. cu_seqlens_q[n + 1] of q, and likewise of k and v. The grid is made for the longest document;
programs after the end of theirs return at once. The host never reads cu_seqlens.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .attention import launch_fwd
from .attention_bwd import launch_bwd
from .attention_launch import AttentionOptions, PackedDocuments
from .checks import contiguous


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
    """Return out (total_q, H, DV) and stats."""
    contiguous("attention_varlen_fwd_triton", cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k)
    packed = PackedDocuments(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    options = AttentionOptions(None, alibi_slopes, seed, scale, lower_right, left, right, softcap, dropout_p)
    # Rows after the last document are 0 and see no column.
    out = q.new_zeros(q.shape[0], q.shape[1], v.shape[2])
    stats = q.new_zeros((q.shape[1], q.shape[0], 2), dtype=torch.float32)
    stats[..., 0] = -torch.inf
    launch_fwd(
        *packed.as_batch(out),
        packed.expand(stats),
        *packed.as_batch(q, k, v),
        packed,
        options,
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
    """Return dq, dk and dv."""
    contiguous("attention_varlen_bwd_triton", cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k)
    packed = PackedDocuments(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    options = AttentionOptions(None, alibi_slopes, seed, scale, lower_right, left, right, softcap, dropout_p)
    dq, dk, dv = q.new_zeros(q.shape), k.new_zeros(k.shape), v.new_zeros(v.shape)
    launch_bwd(
        *packed.as_batch(dq, dk, dv, grad_out),
        grad_lse,
        *packed.as_batch(q, k, v, out),
        packed.expand(stats),
        packed,
        options,
        deterministic,
    )
    return dq, dk, dv
