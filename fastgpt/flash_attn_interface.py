"""FlashAttention's functions on fastgpt's kernels, for code that calls the package flash_attn.

    from fastgpt import flash_attn_interface as flash_attn

The functions have the layouts and arguments of FlashAttention 3 (Shah et al., arXiv:2407.08608; its
`flash_attn_interface`), and FlashAttention 2's `alibi_slopes` and `dropout_p` as keywords. They run on a CPU, on every
GPU and in float32 too. Hints to a GPU's scheduler (num_splits, pack_gqa, sm_margin, scheduler_metadata) are ignored. An
argument that asks for something else is an error that names it.

Shapes: B sequences, L tokens, H query heads and Hk heads of keys and values, Hk dividing H, D channels. Causality and
windows are aligned to the lower right: query i of Lq stands at key i + Lk - Lq of Lk.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import ops

__all__ = [
    "flash_attn_func",
    "flash_attn_qkvpacked_func",
    "flash_attn_varlen_func",
    "flash_attn_with_kvcache",
]

Window = tuple[int, int]
_ALL: Window = (-1, -1)


def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    softmax_scale: float | None = None,
    causal: bool = False,
    qv: Tensor | None = None,
    q_descale: Tensor | None = None,
    k_descale: Tensor | None = None,
    v_descale: Tensor | None = None,
    window_size: Window = _ALL,
    attention_chunk: int = 0,
    softcap: float = 0.0,
    num_splits: int = 1,
    pack_gqa: bool | None = None,
    deterministic: bool = False,
    sm_margin: int = 0,
    return_attn_probs: bool = False,
    *,
    alibi_slopes: Tensor | None = None,
    dropout_p: float = 0.0,
) -> Any:
    """Attention with the sequence before the heads; see `fastgpt.ops.attention`.

    Args:
        q: (B, Lq, H, D); float32, bfloat16, float16, float64.
        k, v: (B, Lk, Hk, D) and (B, Lk, Hk, Dv), q's dtype.
        softmax_scale: of the scores; None for 1/√D.
        causal: whether a query sees keys up to its own place only.
        window_size: keys seen before and after a query's place, -1 for no bound.
        softcap: scores become c·tanh(scores/c); 0 for none.
        deterministic: the same bits in every run.
        return_attn_probs: also return the log-sum-exp (not the probabilities, as in FlashAttention 3).
        alibi_slopes: (H,) or (B, H).
        dropout_p: share of the probabilities dropped.

    Returns:
        (B, Lq, H, Dv) in q's dtype; with return_attn_probs also the log-sum-exp (B, H, Lq), float32.

    Raises:
        ValueError: qv, attention_chunk or a descale factor is given; shapes or options do not fit.
        TypeError: the dtypes do not fit.
    """
    _refuse("flash_attn_func", qv=qv, q_descale=q_descale, k_descale=k_descale, v_descale=v_descale,
            attention_chunk=attention_chunk or None)  # fmt: skip
    options = _options(softmax_scale, causal, window_size, softcap, deterministic, alibi_slopes, dropout_p)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    found = ops.attention(q, k, v, return_lse=return_attn_probs, **options)
    return (found[0].transpose(1, 2), found[1]) if return_attn_probs else found.transpose(1, 2)


def flash_attn_qkvpacked_func(
    qkv: Tensor,
    softmax_scale: float | None = None,
    causal: bool = False,
    q_descale: Tensor | None = None,
    k_descale: Tensor | None = None,
    v_descale: Tensor | None = None,
    window_size: Window = _ALL,
    attention_chunk: int = 0,
    softcap: float = 0.0,
    deterministic: bool = False,
    num_heads_q: int | None = None,
    sm_margin: int = 0,
    return_attn_probs: bool = False,
    **more: Any,
) -> Any:
    """`flash_attn_func` of one tensor.

    Args:
        qkv: (B, L, 3, H, D), or with num_heads_q (B, L, H + 2 Hk, D): heads of queries, keys and values.
        num_heads_q: H.
        more: alibi_slopes and dropout_p.

    The other arguments, results and errors are those of `flash_attn_func`.
    """
    if num_heads_q is None:
        if qkv.dim() != 5 or qkv.shape[2] != 3:
            raise ValueError(
                f"flash_attn_qkvpacked_func: qkv must be (B, L, 3, H, D), got {tuple(qkv.shape)}"
            )
        q, k, v = qkv.unbind(2)
    else:
        rest = qkv.shape[2] - num_heads_q if qkv.dim() == 4 else -1
        if rest < 2 or rest % 2:
            raise ValueError(
                f"flash_attn_qkvpacked_func: with num_heads_q={num_heads_q} qkv must be (B, L, H + 2 Hk, D), "
                f"got {tuple(qkv.shape)}"
            )
        q, k, v = qkv.split([num_heads_q, rest // 2, rest // 2], dim=2)
    return flash_attn_func(
        q, k, v, softmax_scale, causal, None, q_descale, k_descale, v_descale, window_size, attention_chunk, softcap,
        deterministic=deterministic, return_attn_probs=return_attn_probs, **more,
    )  # fmt: skip


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    seqused_q: Tensor | None = None,
    seqused_k: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    qv: Tensor | None = None,
    q_descale: Tensor | None = None,
    k_descale: Tensor | None = None,
    v_descale: Tensor | None = None,
    window_size: Window = _ALL,
    attention_chunk: int = 0,
    softcap: float = 0.0,
    num_splits: int = 1,
    pack_gqa: bool | None = None,
    deterministic: bool = False,
    sm_margin: int = 0,
    return_attn_probs: bool = False,
    *,
    alibi_slopes: Tensor | None = None,
    dropout_p: float = 0.0,
) -> Any:
    """Attention within sequences that are packed one after another; see `fastgpt.ops.attention_varlen`.

    Args:
        q: (total_q, H, D). Sequence n has rows cu_seqlens_q[n] to cu_seqlens_q[n + 1].
        k, v: (total_k, Hk, D) and (total_k, Hk, Dv), by cu_seqlens_k.
        cu_seqlens_q, cu_seqlens_k: (B + 1,) int32 or int64, ascending from 0.
        max_seqlen_q, max_seqlen_k: no sequence is longer.

    The other arguments are those of `flash_attn_func`.

    Returns:
        (total_q, H, Dv) in q's dtype; with return_attn_probs also the log-sum-exp (H, total_q), float32.

    Raises:
        ValueError: also for seqused_q or seqused_k.
        TypeError: as `flash_attn_func`.
    """
    _refuse("flash_attn_varlen_func", seqused_q=seqused_q, seqused_k=seqused_k, qv=qv, q_descale=q_descale,
            k_descale=k_descale, v_descale=v_descale, attention_chunk=attention_chunk or None)  # fmt: skip
    options = _options(softmax_scale, causal, window_size, softcap, deterministic, alibi_slopes, dropout_p)
    lengths = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    return ops.attention_varlen(q, k, v, *lengths, return_lse=return_attn_probs, **options)


def flash_attn_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    qv: Tensor | None = None,
    rotary_cos: Tensor | None = None,
    rotary_sin: Tensor | None = None,
    cache_seqlens: int | Tensor | None = None,
    cache_batch_idx: Tensor | None = None,
    cache_leftpad: Tensor | None = None,
    page_table: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k_new: Tensor | None = None,
    max_seqlen_q: int | None = None,
    rotary_seqlens: Tensor | None = None,
    q_descale: Tensor | None = None,
    k_descale: Tensor | None = None,
    v_descale: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = _ALL,
    attention_chunk: int = 0,
    softcap: float = 0.0,
    rotary_interleaved: bool = True,
    scheduler_metadata: Tensor | None = None,
    num_splits: int = 0,
    pack_gqa: bool | None = None,
    sm_margin: int = 0,
    return_softmax_lse: bool = False,
) -> Any:
    """Attention to a cache of keys and values, which k and v are first appended to, in place. Without gradients.

    Args:
        q: (B, Lq, H, D), the queries of the last Lq tokens.
        k_cache, v_cache: (B, capacity, Hk, D) and (B, capacity, Hk, Dv).
        k, v: (B, Lnew, Hk, D) and (B, Lnew, Hk, Dv), written to the caches from each row's length on; None: nothing.
        rotary_cos, rotary_sin: (positions, R/2), by which q and k are rotated at their places in the cache (without
            causality and windows all of q at the first one); needs k.
        cache_seqlens: tokens in the cache before k: one number, or (B,) int32 or int64; None: it is full.
        rotary_interleaved: whether the rotation pairs neighbours, or halves (`fastgpt.ops.rope`).
        return_softmax_lse: also return the log-sum-exp.

    The other arguments are those of `flash_attn_func`.

    Returns:
        (B, Lq, H, Dv) in q's dtype; with return_softmax_lse also (B, H, Lq), float32.

    Raises:
        ValueError: page_table, cache_batch_idx, cache_leftpad or another argument is given that is not computed; k and
            v do not fit into the cache (checked where the lengths are on the CPU).
        TypeError: the dtypes do not fit.
    """
    name = "flash_attn_with_kvcache"
    _refuse(name, qv=qv, cache_batch_idx=cache_batch_idx, cache_leftpad=cache_leftpad, page_table=page_table,
            cu_seqlens_q=cu_seqlens_q, cu_seqlens_k_new=cu_seqlens_k_new, rotary_seqlens=rotary_seqlens,
            q_descale=q_descale, k_descale=k_descale, v_descale=v_descale,
            attention_chunk=attention_chunk or None)  # fmt: skip
    if (k is None) != (v is None) or (rotary_cos is None) != (rotary_sin is None):
        raise ValueError(f"{name}: k and v, and rotary_cos and rotary_sin, come in pairs")
    if rotary_cos is not None and k is None:
        raise ValueError(f"{name}: rotary_cos needs k and v")
    rows, capacity = k_cache.shape[:2]
    new = 0 if k is None else k.shape[1]
    before: int | Tensor = capacity - new if cache_seqlens is None else cache_seqlens
    on_device = isinstance(before, Tensor) and before.device.type != "cpu"
    shortest, longest = (0, capacity - new) if on_device else _bounds(before)
    if shortest < 0 or longest + new > capacity:
        raise ValueError(
            f"{name}: {longest} tokens and {new} new ones do not fit into {capacity} of the cache"
        )
    with torch.no_grad():
        starts = (
            before.to(q.device).long()
            if isinstance(before, Tensor)
            else torch.full((rows,), before, device=q.device)
        )
        if k is not None and v is not None:
            places = starts[:, None] + torch.arange(new, device=q.device)
            if rotary_cos is not None and rotary_sin is not None:
                moves = causal or window_size != _ALL
                q, k = _rotated(q, k, rotary_cos, rotary_sin, starts, moves, rotary_interleaved)
            row = torch.arange(rows, device=q.device)[:, None]
            k_cache[row, places], v_cache[row, places] = k.to(k_cache.dtype), v.to(v_cache.dtype)
        end = longest + new
        options = _options(softmax_scale, causal, window_size, softcap, False, None, 0.0)
        if shortest != longest or on_device:
            # Rows have different lengths: a mask hides what is behind each, and has causality and window.
            options |= {"causal": "none", "window": None}
            options["attn_mask"] = _seen(starts + new, q.shape[1], end, causal, window_size)
        found = ops.attention(
            q.transpose(1, 2), k_cache[:, :end].transpose(1, 2), v_cache[:, :end].transpose(1, 2),
            return_lse=return_softmax_lse, **options,
        )  # fmt: skip
    return (found[0].transpose(1, 2), found[1]) if return_softmax_lse else found.transpose(1, 2)


def _refuse(name: str, **given: Any) -> None:
    for argument, value in given.items():
        if value is not None:
            raise ValueError(f"{name}: {argument} is not computed by fastgpt")


def _options(
    scale: float | None,
    causal: bool,
    window: Window,
    softcap: float,
    deterministic: bool,
    alibi_slopes: Tensor | None,
    dropout_p: float,
) -> dict[str, Any]:
    """Options of `ops.attention`."""
    return {
        "scale": scale,
        "causal": "lower_right" if causal else "none",
        "window": None if tuple(window) == _ALL else tuple(window),
        "softcap": softcap or None,
        "deterministic": deterministic,
        "alibi_slopes": alibi_slopes,
        "dropout_p": dropout_p,
    }


def _bounds(lengths: int | Tensor) -> tuple[int, int]:
    if isinstance(lengths, Tensor):
        return (int(lengths.min()), int(lengths.max())) if lengths.numel() else (0, 0)
    return lengths, lengths


def _rotated(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, starts: Tensor, moves: bool, interleaved: bool
) -> tuple[Tensor, Tensor]:
    """Rotate q and k (B, L, heads, D) at starts (B,) and, for q if it moves, the places behind."""

    def angles(table: Tensor, length: int, step: int) -> Tensor:
        return table[starts[:, None] + step * torch.arange(length, device=starts.device)]

    queries = [angles(table, q.shape[1], int(moves)) for table in (cos, sin)]
    keys = [angles(table, k.shape[1], 1) for table in (cos, sin)]
    q_, k_ = q.transpose(1, 2), k.transpose(1, 2)
    q_ = ops.rope(q_, q_[:, :0], *queries, interleaved=interleaved)[0]
    k_ = ops.rope(k_[:, :0], k_, *keys, interleaved=interleaved)[1]
    return q_.transpose(1, 2), k_.transpose(1, 2)


def _seen(ends: Tensor, queries: int, columns: int, causal: bool, window: Window) -> Tensor:
    """Return which of the columns each query of rows with these ends (B,) attends to: (B, 1, queries, columns)."""
    column = torch.arange(columns, device=ends.device)
    place = ends[:, None] - queries + torch.arange(queries, device=ends.device)
    after = column - place[..., None]  # of a key behind a query
    seen = (column < ends[:, None, None]).expand_as(after)
    left, right = window[0], 0 if causal else window[1]
    if left >= 0:
        seen = seen & (after >= -left)
    if right >= 0:
        seen = seen & (after <= right)
    return seen[:, None]
