"""Scaled dot-product attention: contract, registration, autograd."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import reference
from ..backends import select, shared_memory
from ..reference.precision import accumulator
from ._attention_checks import check_extras_fit, check_shapes, check_sinks
from ._checks import (
    ANY,
    Checks,
    autocast_dtype,
    check_choice,
    check_floating,
    check_same_dtype,
    check_tensors,
    distinct,
    no_float64_on_gpu_backends,
    unit_stride,
)
from ._library import define, vjp
from ._sinks import with_sinks
from ._transforms import twice_differentiable

CAUSAL = ("none", "upper_left", "lower_right")
MAX_HEAD_DIM = 256  # of the kernels; the reference has no limit

# Bytes of shared memory a block that CUDA's backward needs for float32 beyond a head_dim of 128. Every other case has a
# kernel for 99 KiB, the smallest limit among GPUs of compute capability 8.0 and later.
FLOAT32_BYTES = 137 << 10

_OPTIONS = "float scale, bool lower_right, int left, int right, float softcap, float dropout_p"
_EXTRAS = "Tensor? attn_mask, Tensor? alibi_slopes, Tensor? seed"


# stats (B, H, Lq, 2): the row's largest score m and l = log Σ exp(s - m); -inf and 0 where it sees nothing. In one
# number, lse = m + l, l would be lost beside large scores.
def lse_of(stats: Tensor) -> Tensor:
    return stats[..., 0] + stats[..., 1]


def statistics_of(lse: Tensor) -> Tensor:
    """The statistics where only lse (...) is known, as in PyTorch's operators: m = lse, l = 0."""
    return torch.stack((lse, torch.zeros_like(lse)), dim=-1)


def check_extras(
    check: Checks, k: Tensor, slopes: Tensor | None, documents: int, seed: Tensor | None, dropout_p: float
) -> None:
    """Arguments that have the heads and rows of q; `attention_varlen` uses it too."""
    q, heads = check.main, check.main.shape[1]
    if k.shape[1] == 0 or heads % k.shape[1]:
        raise ValueError(f"{check.op}: the {k.shape[1]} heads of k must divide the {heads} heads of q")
    by_document = slopes is not None and slopes.dim() != 1
    check("alibi_slopes", slopes, (documents, heads) if by_document else (heads,), accumulator(q.dtype))
    check("seed", seed, (1,), torch.int64)
    if seed is None and dropout_p != 0:
        raise ValueError(f"{check.op}: dropout needs a seed")


def _check_inputs(
    op: str, q: Tensor, k: Tensor, v: Tensor, mask: Any, slopes: Any, seed: Any, dropout_p: float
) -> Checks:
    check, (batch, heads, rows, size) = Checks(op, "q", q, (ANY,) * 4), q.shape
    check("k", k, (batch, ANY, ANY, size), q.dtype)("v", v, (*k.shape[:3], ANY), q.dtype)
    if mask is not None:
        whole = (batch, heads, rows, k.shape[2])
        sizes = tuple(1 if m == 1 else n for m, n in zip(mask.shape, whole, strict=False))
        check("attn_mask", mask, sizes if len(sizes) == mask.dim() == 4 else whole, torch.bool, *check.floats)
    check_extras(check, k, slopes, batch, seed, dropout_p)
    return check


def _check_fwd(op: str, *arguments: Any) -> None:
    q, k, v, mask, slopes, seed, *_, dropout_p = arguments
    _check_inputs(op, q, k, v, mask, slopes, seed, dropout_p)


def _check_bwd(op: str, *arguments: Any) -> None:
    grad_out, grad_lse, q, k, v, out, stats, mask, slopes, seed, *_, dropout_p, _, _ = arguments
    check = _check_inputs(op, q, k, v, mask, slopes, seed, dropout_p)
    rows, acc = q.shape[:3], accumulator(q.dtype)
    check("grad_out", grad_out, (*rows, v.shape[3]), q.dtype)("out", out, (*rows, v.shape[3]), q.dtype)
    check("grad_lse", grad_lse, rows, acc)("stats", stats, (*rows, 2), acc)


def _head_major(like: Tensor, shape: tuple[int, ...]) -> Tensor:
    """An empty (B, heads, L, D) tensor laid out as (B, L, heads, D), as the layers around attention want it."""
    batch, heads, length, size = shape
    return like.new_empty(batch, length, heads, size).transpose(1, 2)


def _as_head_major(t: Tensor) -> Tensor:
    return _head_major(t, tuple(t.shape)).copy_(t)


def _keywords(options: tuple[Any, ...]) -> dict[str, Any]:
    names = ("scale", "lower_right", "left", "right", "softcap", "dropout_p")
    return dict(zip(names, options, strict=True))


def _fake_fwd(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    out = _head_major(q, (*q.shape[:3], v.shape[3]))
    return out, q.new_empty((*q.shape[:3], 2), dtype=accumulator(q.dtype))


def _reference_fwd(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    slopes: Tensor | None,
    seed: Tensor | None,
    *options: Any,
) -> tuple[Tensor, Tensor]:
    out, lse = reference.attention(q, k, v, mask, slopes, seed, **_keywords(options))
    return _as_head_major(out), statistics_of(lse)


def _fake_bwd(
    grad: Tensor,
    grad_lse: Any,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Any,
    stats: Any,
    mask: Tensor | None,
    *rest: Any,
) -> tuple[Tensor, ...]:
    dmask = mask.new_empty(mask.shape) if mask is not None and rest[-2] else q.new_empty(0)
    return *(_head_major(t, tuple(t.shape)) for t in (q, k, v)), dmask


def _reference_bwd(
    grad: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    stats: Tensor,
    mask: Tensor | None,
    slopes: Tensor | None,
    seed: Tensor | None,
    *rest: Any,
) -> tuple[Tensor, ...]:
    *options, mask_grad, _ = rest  # the reference is deterministic anyway
    function = _differentiable(mask if not mask_grad else None, slopes, seed, tuple(options))
    inputs = (q, k, v, mask if mask_grad else None)
    dq, dk, dv, dmask = vjp(function, inputs, (grad, grad_lse))
    return *(_as_head_major(t) for t in (dq, dk, dv)), (
        q.new_empty(0) if dmask is None else dmask.contiguous()
    )


def _differentiable(
    fixed_mask: Tensor | None, slopes: Tensor | None, seed: Tensor | None, options: tuple[Any, ...]
) -> Any:
    """The reference as a function of (q, k, v, mask), where a mask that needs no gradient is fixed instead."""

    def function(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        mask = fixed_mask if mask is None else mask
        return reference.attention(q, k, v, mask, slopes, seed, **_keywords(options))

    return function


_FWD = define(
    "attention_fwd",
    f"(Tensor q, Tensor k, Tensor v, {_EXTRAS}, {_OPTIONS}) -> (Tensor, Tensor)",
    fake=_fake_fwd,
    reference=_reference_fwd,
    check=_check_fwd,
    module="attention",
)
_BWD = define(
    "attention_bwd",
    "(Tensor grad_out, Tensor? grad_lse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor stats,"
    f" {_EXTRAS}, {_OPTIONS}, bool mask_grad, bool deterministic) -> (Tensor, Tensor, Tensor, Tensor)",
    fake=_fake_bwd,
    reference=_reference_bwd,
    check=_check_bwd,
    module="attention",
)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor | None,
        slopes: Tensor | None,
        seed: Tensor | None,
        options: tuple[Any, ...],
        deterministic: bool,
        with_lse: bool,
        backend: str,
    ) -> Any:
        out, stats = _FWD[backend](q, k, v, mask, slopes, seed, *options)
        ctx.save_for_backward(q, k, v, mask, slopes, seed, out, stats)
        ctx.set_materialize_grads(False)
        ctx.options, ctx.deterministic, ctx.backend = options, deterministic, backend
        return (out, lse_of(stats)) if with_lse else out

    @staticmethod
    def backward(
        ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None = None
    ) -> tuple[Tensor | None, ...]:
        q, k, v, mask, slopes, seed, out, stats = ctx.saved_tensors
        mask_grad = ctx.needs_input_grad[3]
        if twice_differentiable(grad_out, grad_lse):
            function = _differentiable(None if mask_grad else mask, slopes, seed, ctx.options)
            inputs = (q, k, v, mask if mask_grad else None)
            return *vjp(function, inputs, (grad_out, grad_lse), create_graph=True), *[None] * 6
        grad_out = torch.zeros_like(out) if grad_out is None else grad_out
        grad_lse = None if grad_lse is None else grad_lse.contiguous()
        deterministic = ctx.deterministic or torch.are_deterministic_algorithms_enabled()
        found = _BWD[ctx.backend](
            grad_out,
            grad_lse,
            q,
            k,
            v,
            out,
            stats,
            mask,
            slopes,
            seed,
            *ctx.options,
            mask_grad,
            deterministic,
        )
        return *found[:3], found[3] if mask_grad else None, *[None] * 6


def band_bounds(op: str, causal: str, window: int | tuple[int, int] | None) -> tuple[bool, int, int]:
    """(lower_right, left, right) of `reference.attention.band` for the public options."""
    check_choice(op, "causal", causal, CAUSAL)
    left, right = (window, window) if isinstance(window, int) else (window or (-1, -1))
    if isinstance(left, bool) or isinstance(right, bool) or left < -1 or right < -1:
        raise ValueError(
            f"{op}: window must be a count of columns or (left, right), -1 for no bound, got {window!r}"
        )
    return causal != "upper_left", left, right if causal == "none" else 0


def dropout_seed(op: str, dropout_p: float, seed: int | Tensor | None, device: torch.device) -> Tensor | None:
    """The key of the dropout mask as a one-element int64 tensor; None without dropout."""
    if not 0.0 <= dropout_p <= 1.0:
        raise ValueError(f"{op}: dropout_p must be between 0 and 1, got {dropout_p}")
    if dropout_p == 0.0:
        return None
    if seed is None:
        return torch.randint(-(2**63), 2**63 - 1, (1,), dtype=torch.int64, device=device)
    if isinstance(seed, Tensor):
        if seed.numel() != 1 or seed.dtype != torch.int64:
            raise ValueError(
                f"{op}: a seed tensor must hold one int64, got {tuple(seed.shape)} of {seed.dtype}"
            )
        return seed.reshape(1).to(device)
    return torch.full((1,), (seed + 2**63) % 2**64 - 2**63, dtype=torch.int64, device=device)


def refusal(backend: str, q: Tensor, v: Tensor, attn_mask: Tensor | None) -> str | None:
    """Return why a kernel backend cannot run the case, or None."""
    if backend == "reference":
        return None
    if max(q.shape[-1], v.shape[-1]) > MAX_HEAD_DIM:
        return (
            f"head_dim is {max(q.shape[-1], v.shape[-1])} and the {backend} kernel goes up to {MAX_HEAD_DIM}"
        )
    if backend == "cuda" and attn_mask is not None and attn_mask.requires_grad and torch.is_grad_enabled():
        return f"attn_mask requires a gradient, which the {backend} kernel does not compute"
    if backend == "cuda" and q.dtype == torch.float32 and max(q.shape[-1], v.shape[-1]) > 128:
        available = shared_memory(q.device.type, q.device.index)
        if available < FLOAT32_BYTES:
            return (
                f"float32 with a head_dim over 128 takes {FLOAT32_BYTES >> 10} KiB of shared memory a block, and this "
                f"GPU has {available >> 10}"
            )
    return no_float64_on_gpu_backends(backend, q.dtype)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float | None = None,
    causal: str = "none",
    window: int | tuple[int, int] | None = None,
    softcap: float | None = None,
    alibi_slopes: Tensor | None = None,
    attn_mask: Tensor | None = None,
    sinks: Tensor | None = None,
    dropout_p: float = 0.0,
    seed: int | Tensor | None = None,
    return_lse: bool = False,
    deterministic: bool = False,
) -> Any:
    """Attention that never stores the scores (arXiv:1706.03762; tiled as in FlashAttention, arXiv:2205.14135).

        out = dropout(softmax(mask(softcap(scale·q·kᵀ) - alibi)))·v
        softmax(x)ⱼ = exp(xⱼ) / (exp(s) + Σₖ exp(xₖ)) with a sink s

    Args:
        q: (B, H, Lq, D), any strides; float32, bfloat16, float16, float64. Triton rounds the products of float32 to
            tf32 where PyTorch's may be (`torch.backends.cuda.matmul.fp32_precision`), else none does.
        k, v: (B, Hk, Lk, D) and (B, Hk, Lk, Dv), q's dtype; Hk divides H (grouped queries).
        scale: of the scores; None for 1/√D.
        causal: "none"; "upper_left": row i sees columns j ≤ i; "lower_right": j ≤ i + Lk - Lq.
        window: columns seen to each side of the diagonal, or (left, right), -1 for no bound. The
            diagonal is j = i + Lk - Lq unless causal is "upper_left".
        softcap: scores become c·tanh(scores/c); None or 0 for none.
        alibi_slopes: (H,) or (B, H): -slope·|i + offset - j| is added (arXiv:2108.12409).
        attn_mask: broadcastable to (B, H, Lq, Lk); bool (True takes part) or floating (added).
        sinks: (H,), any floating dtype: the logit of a column without a value that every row of a head sees
            (arXiv:2309.17453, arXiv:2508.10925). Neither scale, softcap nor dropout applies to it; -inf for none.
        dropout_p: share of the probabilities dropped; the mask is a pure function of the seed and
            the element's place (`fastgpt.reference.dropout_keep`), the same on every backend.
        seed: an int, an int64 tensor of one element, or None to draw one from torch's generator.
        return_lse: also return the log-sum-exp of the scores, with the sink, differentiable.
        deterministic: the same bits in every run, as under `torch.use_deterministic_algorithms`. On a GPU dq is
            otherwise added up by atomic additions; Triton then takes seven matrix products a tile instead of five,
            CUDA C++ fewer blocks. The reference and C++ always keep that promise.

    Returns:
        (B, H, Lq, Dv) in q's dtype, a view of a contiguous (B, Lq, H, Dv); with return_lse also
        (B, H, Lq) float32 (float64 for float64). A row that sees nothing gives 0 (and -inf, or its
        sink) and has gradient 0. Under autocast q, k and v are cast to its dtype.

    Raises:
        TypeError: an argument is not a tensor, or the dtypes do not fit.
        ValueError: shapes, devices or options do not fit.
        BackendUnavailable: the chosen backend cannot run this case.
    """
    check_tensors("attention", q=q, k=k, v=v, attn_mask=attn_mask, alibi_slopes=alibi_slopes, sinks=sinks)
    check_floating("attention", q=q, k=k, v=v)
    check_shapes(q, k, v)
    check_extras_fit(q, k, attn_mask, alibi_slopes)
    check_sinks("attention", q.shape[1], sinks)
    bounds = band_bounds("attention", causal, window)
    if softcap is not None and softcap < 0:
        raise ValueError(f"attention: softcap must be positive, or None for none, got {softcap}")
    cast = autocast_dtype(q.device)
    if cast is not None:
        q, k, v = (t if t.dtype == torch.float64 else t.to(cast) for t in (q, k, v))
    check_same_dtype("attention", q=q, k=k, v=v)
    backend = select("attention", q.device, lambda b: refusal(b, q, v, attn_mask))

    key = dropout_seed("attention", dropout_p, seed, q.device)
    q, k, v = map(unit_stride, (q, k, v))
    if attn_mask is not None:
        attn_mask = attn_mask[(None,) * (4 - attn_mask.dim())]
    if alibi_slopes is not None:
        alibi_slopes = alibi_slopes.detach().to(accumulator(q.dtype)).contiguous()
    scale = max(q.shape[3], 1) ** -0.5 if scale is None else float(scale)
    options = (scale, *bounds, float(softcap or 0.0), float(dropout_p))
    q, k, v = distinct(q, k, v)
    if scale < 0:  # the kernels' scales are positive
        q, options = -q, (-scale, *options[1:])
    extras = (attn_mask, alibi_slopes, key)
    with_lse = return_lse or sinks is not None
    found = _Attention.apply(q, k, v, *extras, options, deterministic, with_lse, backend)
    if sinks is None:
        return found
    out, lse = with_sinks(found[0].transpose(1, 2), found[1], sinks, return_lse)
    return (out.transpose(1, 2), lse) if return_lse else out.transpose(1, 2)
