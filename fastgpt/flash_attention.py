"""PyTorch's own flash attention on fastgpt's kernels, for models that nothing else here reaches.

    import fastgpt.flash_attention                                   # makes the name known, changes nothing
    torch.nn.attention.activate_flash_attention_impl("fastgpt")      # PyTorch's operators are ours now,
    torch.nn.attention.restore_flash_attention_impl()                # and PyTorch's again

While it is active, whatever arrives at PyTorch's flash attention runs on our kernels: scaled_dot_product_attention and
what is built on it (`nn.MultiheadAttention`, transformers with "sdpa"), on a GPU also `varlen_attn`. Shapes, dtypes and
strides of the results are PyTorch's, so that autograd, autocast and `torch.compile` see no difference. A call that our
kernels do not cover goes on to the implementation that was there before, untouched.

The registry is described in `torch.nn.attention`; the operators' layouts are those of torch/_meta_registrations.py, and
the alignment of a causal mask on a GPU (lower right) is FlashAttention's (arXiv:2307.08691, from its version 2.1 on).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.attention
from torch import Tensor

from fastgpt.backends import PYTORCH, select
from fastgpt.ops._attention_checks import check_same_length
from fastgpt.ops._checks import FLOATS, unit_stride
from fastgpt.ops.attention import band_bounds, lse_of, refusal, statistics_of

NAME = "fastgpt"

_HALF = (torch.float16, torch.bfloat16)


@dataclass
class _Active:
    """Our registrations; PyTorch's registry keeps this object while they are active."""

    library: torch.library.Library | None

    def remove(self) -> None:
        """Gives the operators back; may be called again."""
        if self.library is not None:
            self.library._destroy()
        self.library = None


def _register() -> _Active:
    """Register our kernels: `activate_flash_attention_impl("fastgpt")` calls this."""
    library = torch.library.Library("aten", "IMPL")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="(?s).*[Oo]verrid")  # overriding is the purpose
        for key, functions in IMPLEMENTATIONS.items():
            for name, function in functions.items():
                # A build without CUDA lacks them, and has no tensors that could ask for them.
                if torch._C._dispatch_has_kernel_for_dispatch_key(f"aten::{name}", key):
                    original = torch.library.get_kernel(f"aten::{name}", key)
                    library.impl(name, _before(function, original), key, with_keyset=True)
    return _Active(library)


def _before(function: Callable[..., Any], original: Any) -> Callable[..., Any]:
    """`function`, and where it answers None, the operator's own implementation with the same arguments."""

    def implementation(keys: Any, *args: Any, **kwargs: Any) -> Any:
        found = function(*args, **kwargs)
        return original.call_boxed(keys, *args, **kwargs) if found is None else found

    return implementation


def _backend(q: Tensor, v: Tensor, mask: Tensor | None, reason: str | None) -> str | None:
    """The backend that serves the call, or None for PyTorch; `reason` is why none of ours can, if so."""
    case = (lambda _: reason) if reason else (lambda backend: refusal(backend, q, v, mask))
    chosen = select("attention", q.device, case, drop_in=True)
    return None if chosen == PYTORCH else chosen


def _reason(q: Tensor, k: Tensor, v: Tensor, dropout_p: float, dtypes: tuple[torch.dtype, ...]) -> str | None:
    """Return why our kernels do not serve q, k, v of (B, heads, L, D) or (total, heads, D), or None."""
    if k.dim() == v.dim():
        check_same_length(k, v, -2 if k.dim() == 4 else 0)
    if dropout_p != 0.0:
        return "dropout draws from PyTorch's generator there"
    if q.dtype not in dtypes or not q.dtype == k.dtype == v.dtype:
        return f"the dtypes are {q.dtype}, {k.dtype} and {v.dtype}"
    if not q.device == k.device == v.device:
        return "the tensors are on different devices"
    if not q.dim() == k.dim() == v.dim() or k.shape != v.shape or q.shape[-1] != k.shape[-1]:
        return "the shapes of query, key and value do not match"
    if 0 in (q.numel(), k.numel()):
        return "a tensor is empty"
    heads = -3 if q.dim() == 4 else -2
    if q.shape[heads] % k.shape[heads] or (q.dim() == 4 and q.shape[0] != k.shape[0]):
        return "the heads or the batches of query and key do not match"
    return None


def _rows(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors with contiguous rows, as the kernels want them."""
    return tuple(map(unit_stride, tensors))


def _laid_out(t: Tensor, like: Tensor) -> Tensor:
    """t in the strides that `torch.empty_like(like)` has, which is what PyTorch's operators promise."""
    wanted = torch.empty_like(like)
    return t if t.stride() == wanted.stride() else wanted.copy_(t)


def _scale(q: Tensor, scale: float | None) -> float:
    return float(q.shape[-1] ** -0.5 if scale is None else scale)


def _deterministic() -> bool:
    return torch.are_deterministic_algorithms_enabled()


def _run(name: str, backend: str, *args: Any) -> Any:
    return getattr(torch.ops.fastgpt, f"{name}_{backend}").default(*args)


# ---- CPU: q, k, v and the results (B, H, L, D); logsumexp (B, H, Lq), laid out as (B, Lq, H), float32 or float64 ----


def _cpu_reason(
    q: Tensor, k: Tensor, v: Tensor, dropout_p: float, is_causal: bool, mask: Tensor | None
) -> str | None:
    if q.dim() != 4:
        return f"the query has {q.dim()} dimensions"
    reason = _reason(q, k, v, dropout_p, FLOATS)
    if reason is not None or mask is None:
        return reason
    if is_causal:
        return "attn_mask and is_causal are both given"
    if mask.dtype != q.dtype and not (mask.dtype == torch.float32 and q.dtype in _HALF):
        return f"attn_mask is {mask.dtype}"
    wanted = (*q.shape[:3], k.shape[2])
    if mask.dim() not in (2, 4) or any(
        m != 1 and m != n for m, n in zip(mask.shape[::-1], wanted[::-1], strict=False)
    ):
        return f"attn_mask does not broadcast to {wanted}"
    return None


def _cpu_options(q: Tensor, is_causal: bool, scale: float | None) -> tuple[Any, ...]:
    causal = "upper_left" if is_causal else "none"
    return _scale(q, scale), *band_bounds("attention", causal, None), 0.0, 0.0


def _expanded(mask: Tensor | None, q: Tensor, k: Tensor) -> Tensor | None:
    return None if mask is None else mask.expand(*q.shape[:3], k.shape[2])


def _cpu_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    attn_mask: Tensor | None = None,
    scale: float | None = None,
) -> tuple[Tensor, Tensor] | None:
    """aten::_scaled_dot_product_flash_attention_for_cpu: (output, logsumexp); None for what is not ours."""
    reason = _cpu_reason(query, key, value, dropout_p, is_causal, attn_mask)
    backend = _backend(query, value, attn_mask, reason)
    if backend is None:
        return None
    mask, options = _expanded(attn_mask, query, key), _cpu_options(query, is_causal, scale)
    out, stats = _run("attention_fwd", backend, *_rows(query, key, value), mask, None, None, *options)
    lse = lse_of(stats)
    if mask is not None:  # PyTorch's logsumexp of a row that sees nothing: its own backward may be given it
        lse = lse.masked_fill(lse == -torch.inf, 0.0)
    return _laid_out(out, query), lse.transpose(1, 2).contiguous().transpose(1, 2)


def _cpu_backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    logsumexp: Tensor,
    dropout_p: float,
    is_causal: bool,
    *,
    attn_mask: Tensor | None = None,
    scale: float | None = None,
) -> tuple[Tensor, ...] | None:
    """..._for_cpu_backward: the gradients, each laid out as (B, L, H, D); None for what is not ours."""
    reason = _cpu_reason(query, key, value, dropout_p, is_causal, attn_mask)
    backend = _backend(query, value, attn_mask, reason)
    if backend is None:
        return None
    mask, options = _expanded(attn_mask, query, key), _cpu_options(query, is_causal, scale)
    stats = statistics_of(logsumexp)
    tensors = (grad_out, None, *_rows(query, key, value, out), stats, mask, None, None)
    return tuple(_run("attention_bwd", backend, *tensors, *options, False, _deterministic())[:3])


# ---- CUDA: FlashAttention's layouts, (B, L, H, D), or (total, H, D) with cum_seq; logsumexp is float32 ----


def _cuda_reason(
    q: Tensor, k: Tensor, v: Tensor, dropout_p: float, cum_seq_q: Tensor | None, cum_seq_k: Tensor | None
) -> str | None:
    packed = cum_seq_q is not None
    if packed != (cum_seq_k is not None):
        return "only one of cum_seq_q and cum_seq_k is given"
    if q.dim() != (3 if packed else 4):
        return f"the query has {q.dim()} dimensions"
    if not packed and k.dim() == v.dim() == 4:
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    return _reason(q, k, v, dropout_p, _HALF)


def _cuda_options(
    q: Tensor, is_causal: bool, scale: float | None, left: int | None, right: int | None
) -> tuple[Any, ...]:
    window = (-1 if left is None else left, -1 if right is None else right)
    return (
        _scale(q, scale),
        *band_bounds("attention", "lower_right" if is_causal else "none", window),
        0.0,
        0.0,
    )


def _cuda_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cum_seq_q: Tensor | None,
    cum_seq_k: Tensor | None,
    max_q: int,
    max_k: int,
    dropout_p: float,
    is_causal: bool,
    return_debug_mask: bool,
    *,
    scale: float | None = None,
    window_size_left: int | None = None,
    window_size_right: int | None = None,
    seqused_k: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    block_table: Tensor | None = None,
    num_splits: int | None = None,
) -> tuple[Tensor, ...] | None:
    """aten::_flash_attention_forward: (output, logsumexp, rng_state, unused, debug_mask); None for what is not ours.

    logsumexp is (B, H, Lq), of packed documents (H, total_q).
    """
    reason = _cuda_reason(query, key, value, dropout_p, cum_seq_q, cum_seq_k)
    if return_debug_mask or any(x is not None for x in (seqused_k, alibi_slopes, block_table)):
        reason = "return_debug_mask, seqused_k, alibi_slopes or block_table is given"
    elif num_splits is not None and num_splits > 1:
        reason = "num_splits is given"
    backend = _backend(query, value, None, reason)
    if backend is None:
        return None
    options = _cuda_options(query, is_causal, scale, window_size_left, window_size_right)
    if cum_seq_q is not None:
        tensors = (*_rows(query, key, value), cum_seq_q, cum_seq_k, None, None)
        out, stats = _run("attention_varlen_fwd", backend, *tensors, max_q, max_k, *options)
    else:
        tensors = (*_rows(*(t.transpose(1, 2) for t in (query, key, value))), None, None, None)
        out, stats = _run("attention_fwd", backend, *tensors, *options)
        out = out.transpose(1, 2)
    # FlashAttention's logsumexp of a row that sees nothing, which its own backward may be given.
    lse = lse_of(stats)
    lse = lse.masked_fill(lse == -torch.inf, torch.inf)
    # Without dropout nobody reads the generator's state: as PyTorch leaves it, unwritten.
    rng_state, unused = (torch.empty(shape, dtype=torch.uint64, device=query.device) for shape in ((2,), ()))
    return _laid_out(out, query), lse, rng_state, unused, query.new_empty(0)


def _cuda_backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    logsumexp: Tensor,
    cum_seq_q: Tensor | None,
    cum_seq_k: Tensor | None,
    max_q: int,
    max_k: int,
    dropout_p: float,
    is_causal: bool,
    rng_state: Tensor | None,
    unused: Tensor | None,
    *,
    scale: float | None = None,
    window_size_left: int | None = None,
    window_size_right: int | None = None,
) -> tuple[Tensor, ...] | None:
    """aten::_flash_attention_backward: the gradients, laid out as what they belong to; None for what is not ours."""
    reason = _cuda_reason(query, key, value, dropout_p, cum_seq_q, cum_seq_k)
    backend = _backend(query, value, None, reason)
    if backend is None:
        return None
    options = _cuda_options(query, is_causal, scale, window_size_left, window_size_right)
    q, k, v, out, grad_out = _rows(query, key, value, out, grad_out)
    stats = statistics_of(logsumexp)
    if cum_seq_q is not None:
        extras = (cum_seq_q, cum_seq_k, None, None, max_q, max_k, *options, _deterministic())
        found = _run("attention_varlen_bwd", backend, grad_out, None, q, k, v, out, stats, *extras)
    else:
        q, k, v, out, grad_out = (t.transpose(1, 2) for t in (q, k, v, out, grad_out))
        extras = (None, None, None, *options, False, _deterministic())
        found = _run("attention_bwd", backend, grad_out, None, q, k, v, out, stats, *extras)
        found = [t.transpose(1, 2) for t in found[:3]]
    return tuple(_laid_out(t, x) for t, x in zip(found, (query, key, value), strict=True))


def _cuda_sdpa_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    return_debug_mask: bool = False,
    *,
    scale: float | None = None,
) -> tuple[Any, ...] | None:
    """aten::_scaled_dot_product_flash_attention, of (B, H, L, D); None for what is not ours."""
    if not query.dim() == key.dim() == value.dim() == 4:
        return None
    q, k, v = (t.transpose(1, 2) for t in (query, key, value))
    rows, columns = query.shape[2], key.shape[2]
    found = _cuda_forward(
        q, k, v, None, None, rows, columns, dropout_p, is_causal, return_debug_mask, scale=scale
    )
    if found is None:
        return None
    out, lse, *rest = found
    return out.transpose(1, 2), lse, None, None, rows, columns, *rest


def _cuda_sdpa_backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    logsumexp: Tensor,
    cum_seq_q: Tensor | None,
    cum_seq_k: Tensor | None,
    max_q: int,
    max_k: int,
    dropout_p: float,
    is_causal: bool,
    philox_seed: Tensor | None,
    philox_offset: Tensor | None,
    *,
    scale: float | None = None,
) -> tuple[Tensor, ...] | None:
    """aten::_scaled_dot_product_flash_attention_backward, of (B, H, L, D); None for what is not ours."""
    grad, q, k, v, o = (t.transpose(1, 2) for t in (grad_out, query, key, value, out))
    state = philox_seed, philox_offset
    found = _cuda_backward(
        grad, q, k, v, o, logsumexp, None, None, max_q, max_k, dropout_p, is_causal, *state, scale=scale
    )
    return None if found is None else tuple(t.transpose(1, 2) for t in found)


# By dispatch key, the operators that an active "fastgpt" takes over. Left to PyTorch: overloads for quantized
# tensors, and the forward that writes into a tensor of the caller's.
IMPLEMENTATIONS: dict[str, dict[str, Callable[..., Any]]] = {
    "CPU": {
        "_scaled_dot_product_flash_attention_for_cpu": _cpu_forward,
        "_scaled_dot_product_flash_attention_for_cpu_backward": _cpu_backward,
    },
    "CUDA": {
        "_flash_attention_forward": _cuda_forward,
        "_flash_attention_backward": _cuda_backward,
        "_scaled_dot_product_flash_attention": _cuda_sdpa_forward,
        "_scaled_dot_product_flash_attention_backward": _cuda_sdpa_backward,
    },
}

torch.nn.attention.register_flash_attention_impl(NAME, register_fn=_register)
