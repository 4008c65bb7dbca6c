"""Attention over packed documents of different lengths: contract, registration, autograd."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import reference
from ..backends import select
from ..reference.attention import check_documents
from ..reference.precision import accumulator
from ._attention_checks import check_sinks
from ._checks import (
    ANY,
    Checks,
    autocast_dtype,
    check_floating,
    check_same_dtype,
    check_tensors,
    distinct,
    unit_stride,
)
from ._library import define, vjp
from ._sinks import with_sinks
from ._transforms import twice_differentiable
from .attention import band_bounds, check_extras, dropout_seed, lse_of, refusal, statistics_of

_EXTRAS = "Tensor cu_seqlens_q, Tensor cu_seqlens_k, Tensor? alibi_slopes, Tensor? seed"
_LONGEST = "int max_seqlen_q, int max_seqlen_k"
_OPTIONS = f"{_LONGEST}, float scale, bool lower_right, int left, int right, float softcap, float dropout_p"


def _check_inputs(
    op: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_q: Tensor,
    cu_k: Tensor,
    slopes: Any,
    seed: Any,
    *options: Any,
) -> Checks:
    check = Checks(op, "q", q, (ANY,) * 3)
    check("k", k, (ANY, ANY, q.shape[2]), q.dtype)("v", v, (*k.shape[:2], ANY), q.dtype)
    check("cu_seqlens_q", cu_q, (ANY,), torch.int32, torch.int64)
    check("cu_seqlens_k", cu_k, cu_q.shape, torch.int32, torch.int64)
    if not cu_q.numel():
        raise ValueError(f"{op}: cu_seqlens_q must have documents + 1 elements, got none")
    check_extras(check, k, slopes, cu_q.shape[0] - 1, seed, options[-1])
    check_documents(q, k, cu_q, cu_k)
    return check


def _check_bwd(op: str, *arguments: Any) -> None:
    grad_out, grad_lse, q, k, v, out, stats, *rest = arguments
    check, (rows, heads, _) = _check_inputs(op, q, k, v, *rest[:-1]), q.shape
    check("grad_out", grad_out, (rows, heads, v.shape[2]), q.dtype)
    check("out", out, (rows, heads, v.shape[2]), q.dtype)
    check("grad_lse", grad_lse, (heads, rows), accumulator(q.dtype))
    check("stats", stats, (heads, rows, 2), accumulator(q.dtype))


def _reference(
    q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, slopes: Any, seed: Any, *options: Any
) -> Any:
    names = ("scale", "lower_right", "left", "right", "softcap", "dropout_p")
    keywords = dict(zip(names, options[2:], strict=True))  # the reference needs no largest lengths
    return reference.attention_varlen(q, k, v, cu_q, cu_k, slopes, seed, **keywords)


def _reference_fwd(*arguments: Any) -> tuple[Tensor, Tensor]:
    out, lse = _reference(*arguments)
    return out, statistics_of(lse)


def _fake_fwd(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    out = q.new_empty(q.shape[0], q.shape[1], v.shape[2])
    return out, q.new_empty(q.shape[1], q.shape[0], 2, dtype=accumulator(q.dtype))


def _fake_bwd(grad: Tensor, grad_lse: Any, q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, ...]:
    return tuple(t.new_empty(t.shape) for t in (q, k, v))


def _reference_bwd(
    grad: Tensor, grad_lse: Any, q: Tensor, k: Tensor, v: Tensor, out: Any, stats: Any, *rest: Any
) -> tuple[Tensor, ...]:
    found = vjp(lambda q, k, v: _reference(q, k, v, *rest[:-1]), (q, k, v), (grad, grad_lse))
    return tuple(t.contiguous() for t in found)


_FWD = define(
    "attention_varlen_fwd",
    f"(Tensor q, Tensor k, Tensor v, {_EXTRAS}, {_OPTIONS}) -> (Tensor, Tensor)",
    fake=_fake_fwd,
    reference=_reference_fwd,
    check=_check_inputs,
    module="attention_varlen",
)
_BWD = define(
    "attention_varlen_bwd",
    "(Tensor grad_out, Tensor? grad_lse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor stats,"
    f" {_EXTRAS}, {_OPTIONS}, bool deterministic) -> (Tensor, Tensor, Tensor)",
    fake=_fake_bwd,
    reference=_reference_bwd,
    check=_check_bwd,
    module="attention_varlen",
)


class _AttentionVarlen(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cu_q: Tensor,
        cu_k: Tensor,
        slopes: Tensor | None,
        seed: Tensor | None,
        options: tuple[Any, ...],
        deterministic: bool,
        with_lse: bool,
        backend: str,
    ) -> Any:
        out, stats = _FWD[backend](q, k, v, cu_q, cu_k, slopes, seed, *options)
        ctx.save_for_backward(q, k, v, out, stats, cu_q, cu_k, slopes, seed)
        ctx.set_materialize_grads(False)
        ctx.options, ctx.deterministic, ctx.backend = options, deterministic, backend
        return (out, lse_of(stats)) if with_lse else out

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, grad_lse: Tensor | None = None) -> tuple[Tensor | None, ...]:
        q, k, v, out, stats, *extras = ctx.saved_tensors
        if twice_differentiable(grad, grad_lse):
            function = lambda q, k, v: _reference(q, k, v, *extras, *ctx.options)  # noqa: E731
            return *vjp(function, (q, k, v), (grad, grad_lse), create_graph=True), *[None] * 8
        grad = torch.zeros_like(out) if grad is None else grad
        grad_lse = None if grad_lse is None else grad_lse.contiguous()
        deterministic = ctx.deterministic or torch.are_deterministic_algorithms_enabled()
        found = _BWD[ctx.backend](grad, grad_lse, q, k, v, out, stats, *extras, *ctx.options, deterministic)
        return *found, *[None] * 8


def _check_documents(
    q: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, alibi_slopes: Tensor | None
) -> None:
    op = "attention_varlen"
    for name, cu in (("cu_seqlens_q", cu_seqlens_q), ("cu_seqlens_k", cu_seqlens_k)):
        if cu.dim() != 1 or cu.shape[0] < 1 or cu.dtype not in (torch.int32, torch.int64):
            raise ValueError(
                f"{op}: {name} must be (documents + 1,) of int32 or int64, got {tuple(cu.shape)} {cu.dtype}"
            )
    if cu_seqlens_q.shape != cu_seqlens_k.shape:
        raise ValueError(f"{op}: cu_seqlens_q and cu_seqlens_k must name the same number of documents")
    documents, heads = cu_seqlens_q.shape[0] - 1, q.shape[1]
    if alibi_slopes is not None and tuple(alibi_slopes.shape) not in ((heads,), (documents, heads)):
        raise ValueError(
            f"{op}: alibi_slopes must be ({heads},) or ({documents}, {heads}), got {tuple(alibi_slopes.shape)}"
        )


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
    sinks: Tensor | None = None,
    dropout_p: float = 0.0,
    seed: int | Tensor | None = None,
    return_lse: bool = False,
    deterministic: bool = False,
) -> Any:
    """Compute `attention` over documents packed one after another; rows attend within their document only.

    Args:
        q: (total_q, H, D). Document n holds rows cu_seqlens_q[n] to cu_seqlens_q[n+1].
        k, v: (total_k, Hk, D) and (total_k, Hk, Dv), by cu_seqlens_k.
        cu_seqlens_q, cu_seqlens_k: (documents + 1,) int32 or int64, ascending from 0.
        max_seqlen_q, max_seqlen_k: no document is longer; sizes the kernels' grids.
        alibi_slopes: (H,) or (documents, H).
        sinks: (H,), of every document.
        other options: as `attention`, within each document.

    Returns:
        (total_q, H, Dv) in q's dtype; with return_lse also (H, total_q) float32 (float64 for float64). Rows
        after the last document are 0 (and -inf, or their sink) and have gradient 0.

    Raises:
        TypeError, ValueError, BackendUnavailable: as `attention`.
    """
    op = "attention_varlen"
    check_tensors(
        op, q=q, k=k, v=v, cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k, alibi_slopes=alibi_slopes,
        sinks=sinks,
    )  # fmt: skip
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
    _check_documents(q, cu_seqlens_q, cu_seqlens_k, alibi_slopes)
    check_sinks(op, q.shape[1], sinks)
    bounds = band_bounds(op, causal, window)
    if softcap is not None and softcap < 0:
        raise ValueError(f"{op}: softcap must be positive, or None for none, got {softcap}")
    cast = autocast_dtype(q.device)
    if cast is not None:
        q, k, v = (t if t.dtype == torch.float64 else t.to(cast) for t in (q, k, v))
    check_same_dtype(op, q=q, k=k, v=v)
    backend = select(op, q.device, lambda b: refusal(b, q, v, None))

    key = dropout_seed(op, dropout_p, seed, q.device)
    q, k, v = map(unit_stride, (q, k, v))
    if alibi_slopes is not None:
        alibi_slopes = alibi_slopes.detach().to(accumulator(q.dtype)).contiguous()
    scale = max(q.shape[2], 1) ** -0.5 if scale is None else float(scale)
    options = (max_seqlen_q, max_seqlen_k, scale, *bounds, float(softcap or 0.0), float(dropout_p))
    q, k, v, cu_q, cu_k = distinct(q, k, v, cu_seqlens_q, cu_seqlens_k)
    if scale < 0:  # the kernels' scales are positive
        q, options = -q, (*options[:2], -scale, *options[3:])
    extras = (cu_q, cu_k, alibi_slopes, key)
    with_lse = return_lse or sinks is not None
    found = _AttentionVarlen.apply(q, k, v, *extras, options, deterministic, with_lse, backend)
    if sinks is None:
        return found
    out, lse = with_sinks(found[0], found[1], sinks, return_lse)
    return (out, lse) if return_lse else out
