"""Attention over packed documents of different lengths: contract, registration, autograd."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastgpt import reference
from fastgpt.backends import select
from fastgpt.ops._checks import autocast_dtype, check_floating, check_same_dtype, check_tensors
from fastgpt.ops._library import define, twice_differentiable, vjp
from fastgpt.ops.attention import band_bounds, dropout_seed
from fastgpt.reference.precision import accumulator

_ARGUMENTS = (
    "Tensor q, Tensor k, Tensor v, Tensor cu_seqlens_q, Tensor cu_seqlens_k, Tensor? alibi_slopes, Tensor? seed, "
    "float scale, bool lower_right, int left, int right, float softcap, float dropout_p"
)


def _reference(
    q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, slopes: Any, seed: Any, *options: Any
) -> Any:
    names = ("scale", "lower_right", "left", "right", "softcap", "dropout_p")
    keywords = dict(zip(names, options, strict=True))
    return reference.attention_varlen(q, k, v, cu_q, cu_k, slopes, seed, **keywords)


def _reference_bwd(grad: Tensor, grad_lse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> Any:
    return vjp(lambda q, k, v: _reference(q, k, v, *rest), (q, k, v), (grad, grad_lse))


def _fake_fwd(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    out = q.new_empty(q.shape[0], q.shape[1], v.shape[2])
    return out, q.new_empty(q.shape[1], q.shape[0], dtype=accumulator(q.dtype))


_FWD = define(
    "attention_varlen_fwd",
    f"({_ARGUMENTS}) -> (Tensor, Tensor)",
    fake=_fake_fwd,
    reference=_reference,
    module=None,
)
_BWD = define(
    "attention_varlen_bwd",
    f"(Tensor grad_out, Tensor? grad_lse, {_ARGUMENTS}) -> (Tensor, Tensor, Tensor)",
    fake=lambda grad, grad_lse, q, k, v, *_: (torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)),
    reference=_reference_bwd,
    module=None,
)


class _AttentionVarlen(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, fixed: tuple[Any, ...], backend: str) -> Any:
        tensors, options = fixed[:4], fixed[4:]
        ctx.save_for_backward(q, k, v, *tensors)
        ctx.set_materialize_grads(False)
        ctx.options, ctx.backend = options, backend
        return _FWD[backend](q, k, v, *fixed)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, grad_lse: Tensor | None) -> tuple[Tensor | None, ...]:
        q, k, v, *tensors = ctx.saved_tensors
        if twice_differentiable():
            function = lambda q, k, v: _reference(q, k, v, *tensors, *ctx.options)  # noqa: E731
            return *vjp(function, (q, k, v), (grad, grad_lse), create_graph=True), None, None
        grad = q.new_zeros(q.shape[0], q.shape[1], v.shape[2]) if grad is None else grad
        return *_BWD[ctx.backend](grad, grad_lse, q, k, v, *tensors, *ctx.options), None, None


def attention_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    *,
    scale: float | None = None,
    causal: str = "none",
    window: int | tuple[int, int] | None = None,
    softcap: float | None = None,
    alibi_slopes: Tensor | None = None,
    dropout_p: float = 0.0,
    seed: int | Tensor | None = None,
    return_lse: bool = False,
    deterministic: bool = False,
) -> Any:
    """`attention` over documents packed one after another, none of which sees another.

    Args:
        q: (total_q, H, D). Document n holds rows cu_seqlens_q[n] to cu_seqlens_q[n+1].
        k, v: (total_k, Hk, D) and (total_k, Hk, Dv), likewise by cu_seqlens_k.
        cu_seqlens_q, cu_seqlens_k: (documents + 1,) int32 or int64, ascending from 0.
        max_seqlen_q, max_seqlen_k: no document is longer; sizes the kernels' grids.
        alibi_slopes: (H,) or (documents, H).
        other options: as `attention`, within each document.

    Returns:
        (total_q, H, Dv) in q's dtype; with return_lse also (H, total_q) float32. Rows after the
        last document are 0.

    Raises:
        TypeError, ValueError, BackendUnavailable: as `attention`.
    """
    op = "attention_varlen"
    check_tensors(
        op, q=q, k=k, v=v, cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k, alibi_slopes=alibi_slopes
    )
    check_floating(op, q=q, k=k, v=v)
    if not q.dim() == k.dim() == v.dim() == 3 or k.shape[:2] != v.shape[:2] or q.shape[2] != k.shape[2]:
        raise ValueError(
            f"{op}: q (total_q, H, D), k (total_k, Hk, D) and v (total_k, Hk, Dv) must agree, "
            f"got {tuple(q.shape)}, {tuple(k.shape)} and {tuple(v.shape)}"
        )
    if k.shape[1] == 0 or q.shape[1] % k.shape[1]:
        raise ValueError(
            f"{op}: the {k.shape[1]} heads of k and v must divide the {q.shape[1]} heads of q (GQA)"
        )
    for name, cu in (("cu_seqlens_q", cu_seqlens_q), ("cu_seqlens_k", cu_seqlens_k)):
        if cu.dim() != 1 or cu.shape[0] < 1 or cu.dtype not in (torch.int32, torch.int64):
            raise ValueError(
                f"{op}: {name} must be (documents + 1,) of int32 or int64, got {tuple(cu.shape)} {cu.dtype}"
            )
    if cu_seqlens_q.shape != cu_seqlens_k.shape:
        raise ValueError(f"{op}: cu_seqlens_q and cu_seqlens_k must name the same number of documents")
    bounds = band_bounds(op, causal, window)
    cast = autocast_dtype(q.device)
    if cast is not None:
        q, k, v = (t if t.dtype == torch.float64 else t.to(cast) for t in (q, k, v))
    check_same_dtype(op, q=q, k=k, v=v)
    backend = select(op, q.device, lambda b: None)
    key = dropout_seed(op, dropout_p, seed, q.device)
    if alibi_slopes is not None:
        alibi_slopes = alibi_slopes.detach().to(accumulator(q.dtype))
    scale = max(q.shape[2], 1) ** -0.5 if scale is None else float(scale)
    fixed = (
        cu_seqlens_q,
        cu_seqlens_k,
        alibi_slopes,
        key,
        scale,
        *bounds,
        float(softcap or 0.0),
        float(dropout_p),
    )
    out, lse = _AttentionVarlen.apply(q, k, v, fixed, backend)
    return (out, lse) if return_lse else out
