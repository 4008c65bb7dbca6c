"""Checks of the arguments of attention."""

from __future__ import annotations

import torch
from torch import Tensor

from ._checks import check_floating, check_last_dim


def check_same_length(k: Tensor, v: Tensor, dim: int = -2) -> None:
    """Raise RuntimeError unless keys and values have one length.

    PyTorch's own kernels read and write beyond the shorter of the two.
    """
    if k.shape[dim] != v.shape[dim]:
        raise RuntimeError(
            f"scaled_dot_product_attention: key and value must have the same length, got {tuple(k.shape)} and "
            f"{tuple(v.shape)}"
        )


def check_shapes(q: Tensor, k: Tensor, v: Tensor) -> None:
    """Raise ValueError unless q, k and v are (B, H, Lq, D), (B, Hk, Lk, D) and (B, Hk, Lk, Dv), Hk a divisor of H."""
    if not q.dim() == k.dim() == v.dim() == 4:
        raise ValueError(
            "attention: q, k and v must be (batch, heads, length, head_dim), "
            f"got {tuple(q.shape)}, {tuple(k.shape)} and {tuple(v.shape)}"
        )
    if q.shape[0] != k.shape[0] or k.shape[:3] != v.shape[:3]:
        raise ValueError(
            "attention: q, k and v must agree in batch, and k and v in heads and length, "
            f"got {tuple(q.shape)}, {tuple(k.shape)} and {tuple(v.shape)}"
        )
    if q.shape[3] != k.shape[3]:
        raise ValueError(f"attention: q and k must have one head_dim, got {q.shape[3]} and {k.shape[3]}")
    if k.shape[1] == 0 or q.shape[1] % k.shape[1]:
        raise ValueError(
            f"attention: the {k.shape[1]} heads of k and v must divide the {q.shape[1]} heads of q (GQA)"
        )


def check_extras_fit(q: Tensor, k: Tensor, attn_mask: Tensor | None, alibi_slopes: Tensor | None) -> None:
    """Raise ValueError unless attn_mask broadcasts to the scores and alibi_slopes are (H,) or (B, H)."""
    batch, heads, rows, _ = q.shape
    if attn_mask is not None:
        if attn_mask.dtype != torch.bool:
            check_floating("attention", attn_mask=attn_mask)
        wanted = (batch, heads, rows, k.shape[2])
        fits = attn_mask.dim() <= 4 and all(
            m == 1 or m == n for m, n in zip(reversed(attn_mask.shape), reversed(wanted), strict=False)
        )
        if not fits:
            raise ValueError(f"attention: attn_mask must broadcast to {wanted}, got {tuple(attn_mask.shape)}")
    if alibi_slopes is not None and tuple(alibi_slopes.shape) not in ((heads,), (batch, heads)):
        raise ValueError(
            f"attention: alibi_slopes must be ({heads},) or ({batch}, {heads}), got {tuple(alibi_slopes.shape)}"
        )


def check_sinks(op: str, heads: int, sinks: Tensor | None) -> None:
    """Raise TypeError or ValueError unless sinks are (H,), floating, H the heads of q."""
    check_floating(op, sinks=sinks)
    check_last_dim(op, heads, sinks=sinks)
