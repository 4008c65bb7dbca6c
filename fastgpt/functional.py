"""A drop-in for `torch.nn.functional`:  `from fastgpt import functional as F`.

Six functions run on fastgpt's kernels, with PyTorch's results, dtypes, errors and autocast. Every
other name is PyTorch's own. What the kernels do not cover, and every call that PyTorch would refuse,
goes to PyTorch under "auto"; a backend that was chosen by name raises `BackendUnavailable` instead.
`fastgpt.explain(F.gelu, x)` says which way a call goes and why.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as _torch
from torch import Tensor

from fastgpt import ops
from fastgpt.ops._attention_checks import check_same_length
from fastgpt.ops._checks import FLOATS, autocast_dtype
from fastgpt.ops._checks import no_float64_on_gpu_backends as _no_float64
from fastgpt.ops._fallback import goes_to_pytorch, plain_reason
from fastgpt.ops.attention import refusal as _attention_refusal

# PyTorch's own, whatever `fastgpt.patch_functional` does to the module.
PYTORCH_GELU = _torch.gelu
PYTORCH_LAYER_NORM = _torch.layer_norm
PYTORCH_RMS_NORM = _torch.rms_norm
PYTORCH_ATTENTION = _torch.scaled_dot_product_attention
PYTORCH_CROSS_ENTROPY = _torch.cross_entropy
PYTORCH_LINEAR_CROSS_ENTROPY = getattr(_torch, "linear_cross_entropy", None)  # from PyTorch 2.13 on


def __getattr__(name: str) -> Any:
    return getattr(_torch, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *dir(_torch)})


def _number(value: Any) -> bool:
    return isinstance(value, (int, float))


def _autocast_to(tensor: Tensor) -> torch.dtype:
    """The dtype in which autocast's lower-precision functions see the tensor."""
    cast = autocast_dtype(tensor.device)
    return tensor.dtype if cast is None or tensor.dtype == torch.float64 else cast


def _has_usual_strides(t: Tensor) -> bool:
    """Return whether a tensor has the strides of a new one, also in dimensions of size 1 and if it is empty."""
    step = 1
    for size, stride in zip(reversed(t.shape), reversed(t.stride()), strict=True):
        if stride != step:
            return False
        step *= max(size, 1)
    return True


def gelu(input: Tensor, approximate: str = "none", *, out: Tensor | None = None) -> Tensor:
    """`torch.nn.functional.gelu` on fastgpt's kernels; see `fastgpt.ops.gelu`. `out` goes to PyTorch."""
    reason = plain_reason(input)
    if reason is None and approximate not in ("none", "tanh"):
        reason = "approximate is neither 'none' nor 'tanh'"
    elif out is not None:
        reason = reason or "out is given, which PyTorch writes into"
    if goes_to_pytorch("gelu", input, reason, lambda b: _no_float64(b, input.dtype)):
        if out is not None:
            return PYTORCH_GELU(input, approximate=approximate, out=out)  # type: ignore[call-arg]
        return PYTORCH_GELU(input, approximate=approximate)
    if input.is_contiguous():
        if (0 in input.shape or 1 in input.shape) and not _has_usual_strides(input):
            input = input.clone(memory_format=torch.contiguous_format)
        return ops.gelu(input, approximate)
    # PyTorch keeps the order of the dimensions in memory (channels last, transposed): so does the drop-in.
    order = input.dim_order(ambiguity_check=False)
    return ops.gelu(input.permute(order), approximate).permute([order.index(d) for d in range(input.dim())])


def layer_norm(
    input: Tensor,
    normalized_shape: list[int] | tuple[int, ...],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """`torch.nn.functional.layer_norm` on fastgpt's kernels; see `fastgpt.ops.add_layer_norm`."""
    shape = tuple(normalized_shape) if isinstance(normalized_shape, (list, tuple)) else ()
    parameters = [t for t in (weight, bias) if t is not None]
    reason = plain_reason(input, optional=(weight, bias)) or _norm_reason(input, shape, parameters)
    if reason is None:
        if any(t.dtype not in (input.dtype, torch.float32) for t in parameters) or (
            input.dtype == torch.float64 and any(t.dtype != torch.float64 for t in parameters)
        ):
            reason = "the parameters' dtypes do not match the input's"
        elif len({t.dtype for t in parameters}) > 1:
            reason = "weight and bias have different dtypes"
        elif not _number(eps):
            reason = f"eps is a {type(eps).__name__}"
    if goes_to_pytorch("add_layer_norm", input, reason, lambda b: _no_float64(b, input.dtype)):
        return PYTORCH_LAYER_NORM(input, normalized_shape, weight, bias, eps)
    if (
        input.is_cuda and autocast_dtype(input.device) is not None
    ):  # in autocast's float32 list there, not on the CPU
        input = input.float()
    size = torch.Size(shape).numel()
    flat = [None if t is None else t.reshape(size) for t in (weight, bias)]
    normed, _ = ops.add_layer_norm(input.reshape(-1, size), None, flat[0], flat[1], eps)
    return normed.view(input.shape)


def rms_norm(
    input: Tensor,
    normalized_shape: list[int] | tuple[int, ...],
    weight: Tensor | None = None,
    eps: float | None = None,
) -> Tensor:
    """`torch.nn.functional.rms_norm` on fastgpt's kernels; see `fastgpt.ops.rms_norm`.

    Without eps it is `torch.finfo(torch.float32).eps`, and that of float64 for a float64 input.
    """
    shape = tuple(normalized_shape) if isinstance(normalized_shape, (list, tuple)) else ()
    parameters = [] if weight is None else [weight]
    reason = plain_reason(input, optional=(weight,)) or _norm_reason(input, shape, parameters)
    if reason is None:
        if weight is not None and (
            weight.dtype not in FLOATS or torch.float64 in {weight.dtype} - {input.dtype}
        ):
            reason = f"the dtypes are {input.dtype} and {weight.dtype}"
        elif eps is not None and not _number(eps):
            reason = f"eps is a {type(eps).__name__}"
        elif _is_channels_last(input):
            reason = "the input is channels last, and PyTorch's result would be"
    if goes_to_pytorch("rms_norm", input, reason, lambda b: _no_float64(b, input.dtype)):
        return PYTORCH_RMS_NORM(input, normalized_shape, weight, eps)
    if input.is_cuda and autocast_dtype(input.device) is not None:  # as in layer_norm
        input = input.float()
    size = torch.Size(shape).numel()
    if eps is None:
        eps = torch.finfo(torch.float64 if input.dtype == torch.float64 else torch.float32).eps
    flat = None if weight is None else weight.reshape(size)
    return ops.rms_norm(input.reshape(-1, size), flat, eps).view(input.shape)


def _norm_reason(input: Tensor, shape: tuple[Any, ...], parameters: list[Tensor]) -> str | None:
    """Return why no kernel can normalize the input over dimensions of this shape, or None."""
    if not shape or tuple(input.shape[-len(shape) :]) != shape or any(t.shape != shape for t in parameters):
        return "the shapes do not match"
    if any(isinstance(n, bool) for n in shape):
        return "normalized_shape holds a bool"
    return "the input is empty" if input.numel() == 0 else None


def _is_channels_last(t: Tensor) -> bool:
    """Return whether a tensor of images or volumes has its channels last in memory, and not also first."""
    formats: dict[int, Any] = {4: torch.channels_last, 5: torch.channels_last_3d}
    return t.dim() in formats and not t.is_contiguous() and t.is_contiguous(memory_format=formats[t.dim()])


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """`torch.nn.functional.scaled_dot_product_attention` on fastgpt's kernels; see `fastgpt.ops.attention`.

    As there, `is_causal` with Lq ≠ Lk is aligned to the upper left. Inputs are (..., L, E) of two to
    four dimensions. The dropout masks come from another generator than PyTorch's, so that they
    differ from PyTorch's for the same seed.
    """
    options = (attn_mask, dropout_p, is_causal, scale, enable_gqa)
    out = attention(query, key, value, *options)
    if out is None:
        return pytorch_attention(query, key, value, *options)
    if query.is_contiguous() and not out.is_contiguous():
        dense = out.contiguous()
        if dense.stride() == query.stride():
            return dense
    return _laid_out(out, query, key, value, attn_mask, dropout_p)


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor | None:
    """`scaled_dot_product_attention` laid out as a contiguous (B, L, H, D), or None where PyTorch's serves the call."""
    reason = plain_reason(query, key, value, optional=(attn_mask,)) or _attention_reason(
        query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa
    )
    case = lambda b: _attention_refusal(b, query, value, attn_mask)  # noqa: E731
    if goes_to_pytorch("attention", query, reason, case):
        return None
    if attn_mask is not None and attn_mask.dtype != torch.bool:
        # Autocast rounds the mask with the rest: finfo.min of float32 becomes -inf.
        attn_mask = attn_mask.to(autocast_dtype(query.device) or attn_mask.dtype)
    shape = query.shape
    while query.dim() < 4:  # one head of a batch
        query, key, value = query.unsqueeze(-3), key.unsqueeze(-3), value.unsqueeze(-3)
    if attn_mask is not None and len(shape) == 3 and attn_mask.dim() == 3:
        attn_mask = attn_mask.unsqueeze(1)
    out = ops.attention(
        query,
        key,
        value,
        scale=scale,
        causal="upper_left" if is_causal else "none",
        attn_mask=attn_mask,
        dropout_p=dropout_p,
    )
    return out.reshape(*shape[:-1], value.shape[-1]) if len(shape) < 4 else out


def pytorch_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Any, dropout_p: Any, causal: Any, scale: Any, gqa: Any
) -> Tensor:
    """PyTorch's attention, which is not handed keys and values that it would read beside."""
    if all(isinstance(t, Tensor) and not t.is_nested and t.dim() > 1 for t in (key, value)):
        check_same_length(key, value)
    return PYTORCH_ATTENTION(query, key, value, mask, dropout_p, causal, scale=scale, enable_gqa=gqa)


def _laid_out(out: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout_p: float) -> Tensor:
    """The result in the strides of PyTorch's, which callers may view without a copy.

    On a CPU its flash attention answers in those of `empty_like(query)`, and its other implementation in those of a
    contiguous tensor.
    """
    if q.device.type != "cpu":
        return out
    if q.dtype != out.dtype:  # autocast's
        q, k, v = (torch.empty_like(t, dtype=out.dtype) for t in (q, k, v))
    flash = (
        q.dim() == 4
        and dropout_p == 0.0
        and q.shape[-1] == v.shape[-1]
        and q.numel() > 0
        and k.numel() > 0
        and q.stride(-1) == k.stride(-1) == v.stride(-1) == 1
        and (mask is None or (mask.dim() != 3 and not mask.requires_grad))
        and torch._C._get_flash_sdp_enabled()
    )
    if not flash and not out.numel():
        return out.new_empty(out.shape).copy_(out)
    if not flash or q.is_contiguous():
        # By way of one dimension, so that dimensions of size 1 have their usual strides.
        dense = out.contiguous().view(-1).view(out.shape)
        if not flash or dense.stride() == q.stride():
            return dense
    if out.stride() == q.stride():
        return out
    like = torch.empty_like(q)
    return out if out.stride() == like.stride() else like.copy_(out)


def _attention_reason(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout_p: Any, is_causal: Any, scale: Any, gqa: Any
) -> str | None:
    """Return why no backend of fastgpt can serve these shapes, dtypes and options, or None."""
    numbers = _number(dropout_p) and (scale is None or _number(scale))
    if not (isinstance(is_causal, bool) and isinstance(gqa, bool) and numbers):
        return "is_causal, enable_gqa, dropout_p or scale is of the wrong type"
    if not 2 + gqa <= q.dim() <= 4 or k.dim() != q.dim() or v.dim() != q.dim():
        return f"the inputs have {q.dim()}, {k.dim()} and {v.dim()} dimensions"
    groups = q.dim() == 4 and gqa
    batch = slice(0, -3) if groups else slice(0, -2)
    if q.shape[batch] != k.shape[batch] or k.shape[:-1] != v.shape[:-1] or q.shape[-1] != k.shape[-1]:
        return "the shapes of query, key and value do not match (PyTorch may broadcast them)"
    if q.dim() == 4 and (k.shape[1] == 0 or q.shape[1] % k.shape[1]):
        return "the heads of key and value do not divide those of query"
    dtype = _autocast_to(q)
    if not dtype == _autocast_to(k) == _autocast_to(v):
        return "the dtypes of query, key and value differ"
    if k.dtype not in FLOATS or v.dtype not in FLOATS:
        return f"the dtypes are {k.dtype} and {v.dtype}"
    if mask is not None:
        if is_causal:
            return "attn_mask and is_causal are both given"
        # A mask to be added must be float32 or have the query's dtype, before and after autocast.
        added = mask.dtype in (torch.float32, q.dtype) and _autocast_to(mask) in (torch.float32, dtype)
        if mask.dtype != torch.bool and not added:
            return f"attn_mask is {mask.dtype}"
        wanted = (*q.shape[:-1], k.shape[-2])
        fits = all(m == 1 or m == n for m, n in zip(mask.shape[::-1], wanted[::-1], strict=False))
        if not 2 <= mask.dim() <= q.dim() or not fits:
            return f"attn_mask does not broadcast to {wanted}"
    if not 0.0 <= dropout_p <= 1.0:
        return "dropout_p is not between 0 and 1"
    return None


def cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Tensor:
    """`torch.nn.functional.cross_entropy` on fastgpt's kernels; see `fastgpt.ops.cross_entropy`.

    Class indices with any number of dimensions run on the kernels, as (N, C), (C) or (N, C, d1, ...);
    class probabilities go to PyTorch. For the backward the input itself is kept, not its log-softmax: where it
    is changed in place between forward and backward, autograd raises a RuntimeError, and PyTorch's function does not.
    """
    reason = plain_reason(input, target, optional=(weight,)) or _loss_reason(
        target, weight, input.dtype, size_average, ignore_index, reduce, reduction, label_smoothing
    )
    if reason is None:
        classes = 1 if input.dim() > 1 else 0
        if input.dim() > 2 and target.dtype != torch.int64:
            reason = f"the targets of a K-dimensional loss are {target.dtype}"
        elif input.dim() == 0 or (*input.shape[:classes], *input.shape[classes + 1 :]) != tuple(target.shape):
            reason = "the shapes of input and target do not match"
        elif weight is not None and tuple(weight.shape) != (input.shape[classes],):
            reason = "weight does not have one entry a class"
        elif input.shape[classes] == 0:
            reason = "there are no classes"
    if goes_to_pytorch("cross_entropy", input, reason, lambda b: _no_float64(b, input.dtype)):
        return PYTORCH_CROSS_ENTROPY(
            input, target, weight, size_average, ignore_index, reduce, reduction, label_smoothing
        )
    if input.dim() > 2:
        input = input.movedim(1, -1)
    loss = ops.cross_entropy(
        input,
        target.long(),
        weight=weight,
        ignore_index=ignore_index,
        reduction=reduction,
        label_smoothing=label_smoothing,
    )
    return loss


def linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    weight: Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int | None = None,
    label_smoothing: float = 0.0,
    options: Any = None,
) -> Tensor:
    """`torch.nn.functional.linear_cross_entropy` (PyTorch 2.13) on fastgpt's kernels.

    See `fastgpt.ops.linear_cross_entropy`. Class probabilities, K-dimensional weights and explicit
    `options` go to PyTorch, or, before 2.13, to `linear` followed by `cross_entropy`.
    """
    ignored = -100 if ignore_index is None else ignore_index
    reason = plain_reason(input, linear_weight, target, optional=(linear_bias, weight)) or _loss_reason(
        target, weight, input.dtype, None, ignored, None, reduction, label_smoothing
    )
    if reason is None:
        if linear_weight.dim() != 2 or input.dim() not in (1, 2) or input.shape[-1] != linear_weight.shape[1]:
            reason = "the shapes are not (N, D) and (V, D)"
        elif tuple(target.shape) != tuple(input.shape[:-1]):
            reason = "the shapes of input and target do not match"
        elif any(t is not None and tuple(t.shape) != linear_weight.shape[:1] for t in (linear_bias, weight)):
            reason = "a bias or weight does not have one entry a class"
        elif options is not None:
            reason = "options ask for PyTorch's own chunking"
        elif any(
            t is not None and _autocast_to(t) != _autocast_to(input) for t in (linear_weight, linear_bias)
        ):
            reason = "the dtypes differ"
        elif linear_weight.shape[0] == 0:
            reason = "there are no classes"
    if goes_to_pytorch("linear_cross_entropy", input, reason, lambda b: _no_float64(b, input.dtype)):
        keywords: dict[str, Any] = dict(weight=weight, reduction=reduction, label_smoothing=label_smoothing)
        if PYTORCH_LINEAR_CROSS_ENTROPY is not None:
            return PYTORCH_LINEAR_CROSS_ENTROPY(
                input,
                linear_weight,
                target,
                linear_bias=linear_bias,
                ignore_index=ignore_index,
                options=options,
                **keywords,
            )
        logits = _torch.linear(input, linear_weight, linear_bias)
        return PYTORCH_CROSS_ENTROPY(logits, target, ignore_index=ignored, **keywords)
    return ops.linear_cross_entropy(
        input,
        linear_weight,
        target.long(),
        bias=linear_bias,
        class_weight=weight,
        ignore_index=ignored,
        reduction=reduction,
        label_smoothing=label_smoothing,
    )


def _loss_reason(
    target: Tensor,
    weight: Tensor | None,
    dtype: torch.dtype,
    size_average: Any,
    ignore_index: Any,
    reduce: Any,
    reduction: Any,
    label_smoothing: Any,
) -> str | None:
    """Return why no backend of fastgpt can serve these arguments of a cross-entropy, or None."""
    if target.is_floating_point():
        return "the targets are class probabilities"
    if target.dtype not in (torch.int64, torch.uint8):
        return f"the targets are {target.dtype}"
    if size_average is not None or reduce is not None:
        return "size_average and reduce are deprecated"
    if reduction not in ("mean", "sum", "none"):
        return f"reduction is {reduction!r}"
    if not (_number(label_smoothing) and 0.0 <= label_smoothing <= 1.0):
        return "label_smoothing is no number between 0 and 1"
    if target.dtype != torch.int64 and label_smoothing:
        return f"the targets of a smoothed loss are {target.dtype}"
    if not isinstance(ignore_index, int) or isinstance(ignore_index, bool):
        return f"ignore_index is a {type(ignore_index).__name__}"
    if not -(2**63) <= ignore_index < 2**63:
        return f"ignore_index {ignore_index} is no int64"
    if weight is not None and (weight.dtype != dtype or weight.requires_grad):
        return "weight has another dtype than the input, or requires a gradient"
    return None
