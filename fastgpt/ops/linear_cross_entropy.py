"""Cross-entropy of a linear layer's output, without ever holding the logits: contract, registration, autograd."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import reference
from ..backends import select
from ..reference.cross_entropy import check_targets
from ..reference.linear_cross_entropy import project
from ..reference.precision import accumulator
from ._checks import (
    ANY,
    Checks,
    autocast_dtype,
    check_floating,
    check_last_dim,
    check_same_dtype,
    check_tensors,
    no_float64_on_gpu_backends,
)
from ._library import define, vjp
from ._transforms import is_batched, twice_differentiable
from .cross_entropy import (
    check_loss_options,
    dtype_of_loss,
    mean_denominator,
    reduce_rows,
    saved_statistics,
)

_OPTIONS = (
    "Tensor? class_weight, int ignore_index, float label_smoothing, float z_loss, float softcap, float logit_scale,"
    " int chunk"
)


def _check_layer(
    op: str,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    class_weight: Tensor | None,
) -> Checks:
    check = Checks(op, "hidden", hidden, (ANY, ANY))
    check("weight", weight, (ANY, hidden.shape[1]), hidden.dtype)(
        "bias", bias, weight.shape[:1], hidden.dtype
    )
    check("target", target, hidden.shape[:1], torch.int64)
    return check("class_weight", class_weight, weight.shape[:1], accumulator(hidden.dtype))


def _check_fwd(
    op: str,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    class_weight: Tensor | None,
    ignore_index: int,
    *_: Any,
) -> None:
    _check_layer(op, hidden, weight, bias, target, class_weight)
    check_targets(target, weight.shape[0], ignore_index)


def _check_bwd(
    op: str,
    grad_loss: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    statistics: Tensor,
    class_weight: Tensor | None,
    *_: Any,
) -> None:
    check, rows = _check_layer(op, hidden, weight, bias, target, class_weight), hidden.shape[:1]
    check("grad_loss", grad_loss, rows, accumulator(hidden.dtype))
    check("statistics", statistics, (*rows, 2), accumulator(hidden.dtype))


def _reference_fwd(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    class_weight: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float,
    logit_scale: float,
    chunk: int,
    with_grad: bool,
) -> tuple[Tensor, ...]:
    options = (target, class_weight, ignore_index, label_smoothing, z_loss, softcap, logit_scale)
    logits = project(hidden, weight, bias)
    loss = reference.cross_entropy(logits, *options)[0]
    statistics = saved_statistics(logits, softcap, logit_scale)
    if not with_grad:
        return loss, statistics, *(loss.new_empty(0) for _ in range(3))
    inputs = tuple(None if t is None else t.to(loss.dtype) for t in (hidden, weight, bias))
    function = lambda h, w, b: reference.linear_cross_entropy(h, w, b, *options)[0]  # noqa: E731
    grads = vjp(function, inputs, torch.ones_like(loss))
    return loss, statistics, *(loss.new_empty(0) if g is None else g for g in grads)


def _reference_bwd(
    grad_loss: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    statistics: Tensor,
    class_weight: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float,
    logit_scale: float,
    chunk: int,
) -> tuple[Tensor, ...]:
    options = (target, class_weight, ignore_index, label_smoothing, z_loss, softcap, logit_scale)
    function = lambda h, w, b: reference.linear_cross_entropy(h, w, b, *options)[0]  # noqa: E731
    grads = vjp(function, (hidden, weight, bias), grad_loss)
    return tuple(hidden.new_empty(0) if g is None else g for g in grads)


def _fake_fwd(hidden: Tensor, weight: Tensor, bias: Tensor | None, *rest: Any) -> tuple[Tensor, ...]:
    with_grad = rest[-1]
    acc = accumulator(hidden.dtype)
    loss = hidden.new_empty(hidden.shape[0], dtype=acc)
    shapes = (hidden.shape, weight.shape, (0,) if bias is None else bias.shape)
    grads = (hidden.new_empty(shape if with_grad else (0,), dtype=acc) for shape in shapes)
    return loss, loss.new_empty((*loss.shape, 2)), *grads


def _fake_bwd(
    grad_loss: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor | None, *_: Any
) -> tuple[Tensor, ...]:
    dbias = hidden.new_empty(0 if bias is None else bias.shape)
    return hidden.new_empty(hidden.shape), weight.new_empty(weight.shape), dbias


_FWD = define(
    "linear_cross_entropy_fwd",
    f"(Tensor hidden, Tensor weight, Tensor? bias, Tensor target, {_OPTIONS}, bool with_grad)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    fake=_fake_fwd,
    reference=_reference_fwd,
    check=_check_fwd,
    module="linear_cross_entropy",
    cuda="linear_cross_entropy.linear_cross_entropy_fwd_cuda",
)
_BWD = define(
    "linear_cross_entropy_bwd",
    f"(Tensor grad_loss, Tensor hidden, Tensor weight, Tensor? bias, Tensor target, Tensor statistics, {_OPTIONS})"
    " -> (Tensor, Tensor, Tensor)",
    fake=_fake_bwd,
    reference=_reference_bwd,
    check=_check_bwd,
    module="linear_cross_entropy",
    cuda="linear_cross_entropy.linear_cross_entropy_bwd_cuda",
)


def _rounded(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """The layer in hidden's dtype, which is autocast's where the parameters' is not."""
    return hidden, weight.to(hidden.dtype), None if bias is None else bias.to(hidden.dtype)


class _LinearCrossEntropy(torch.autograd.Function):
    """The reduced loss.

    Parameters may be float32 beside hidden states that autocast rounded; their gradients are then not rounded.

    For a sum or mean every row has the same upstream gradient up to a scalar, so the forward computes
    the gradients of the sum while a chunk's logits are in memory (three products in all) and the backward
    scales them, in place: the weight's is as large as the weight. A second backward (retain_graph) computes
    them again. For "none" the backward computes each chunk's logits again (four products).
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        target: Tensor,
        class_weight: Tensor | None,
        options: tuple[Any, ...],
        reduction: str,
        with_grad: bool,
        backend: str,
    ) -> Tensor:
        with_grad = with_grad and reduction != "none"
        layer = _rounded(hidden, weight, bias)
        loss, statistics, *grads = _FWD[backend](*layer, target, class_weight, *options, with_grad)
        denominator = None
        if reduction == "mean":
            denominator = mean_denominator(loss.dtype, target, class_weight, options[0])
        ctx.save_for_backward(hidden, weight, bias, target, statistics, class_weight, denominator)
        ctx.grads = grads if with_grad else None
        ctx.options, ctx.reduction, ctx.backend = options, reduction, backend
        if reduction == "none":
            return loss
        return loss.sum() if denominator is None else loss.sum() / denominator

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, target, statistics, class_weight, denominator = ctx.saved_tensors
        inputs = (hidden, weight, bias)
        if twice_differentiable(grad):

            def function(h: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
                layer = _rounded(h, w, b)
                rows = reference.linear_cross_entropy(*layer, target, class_weight, *ctx.options[:-1])[0]
                return reduce_rows(rows, target, class_weight, ctx.options[0], ctx.reduction)

            return *vjp(function, inputs, grad, create_graph=True), *[None] * 6
        if ctx.reduction == "none":
            layer = _rounded(*inputs)
            found = _BWD[ctx.backend](
                grad.contiguous(), *layer, target, statistics, class_weight, *ctx.options
            )
        else:
            # Nothing valid makes the denominator 0: the loss is NaN and the gradients are 0, as PyTorch has it.
            scale = grad if denominator is None else torch.where(denominator == 0, 0, grad / denominator)
            found = ctx.grads
            if found is None:
                layer = _rounded(*inputs)
                found = _FWD[ctx.backend](*layer, target, class_weight, *ctx.options, True)[2:]
            if is_batched(grad):
                found = tuple(g * scale for g in found)
            else:
                ctx.grads = None
                for g in found:
                    g.mul_(scale)
        needed = zip(found, inputs, ctx.needs_input_grad, strict=False)
        return *(g.to(x.dtype) if n else None for g, x, n in needed), *[None] * 6


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    bias: Tensor | None = None,
    class_weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    chunk: int | None = None,
    loss_dtype: torch.dtype | None = None,
) -> Tensor:
    """`cross_entropy(hidden @ weight.T + bias, target)` that never holds more than a chunk of the logits.

    Under autocast the inputs are cast to its dtype, as `linear` would, and the loss is float32, as
    that of `cross_entropy`.

    Args:
        hidden: (..., D); float32, bfloat16, float16, float64.
        weight: (V, D), hidden's dtype.
        target: (...), int64 class indices; out of range as in `cross_entropy`.
        bias: (V,), hidden's dtype, or None.
        class_weight: (V,) weights of the classes in the loss; no gradient flows to them.
        ignore_index, reduction, label_smoothing, z_loss, softcap, logit_scale: as `cross_entropy`.
        chunk: rows of logits held at a time; None lets the backend choose.
        loss_dtype: as `cross_entropy`.

    Returns:
        The loss, scalar or (...).

    Raises:
        TypeError, ValueError, IndexError, BackendUnavailable: as `cross_entropy`.
    """
    op = "linear_cross_entropy"
    check_tensors(op, hidden=hidden, weight=weight, target=target, bias=bias, class_weight=class_weight)
    check_floating(op, hidden=hidden, weight=weight, bias=bias, class_weight=class_weight)
    if hidden.dim() == 0 or hidden.shape[:-1] != target.shape:
        raise ValueError(
            f"{op}: hidden (..., D) and target (...) must match, got {tuple(hidden.shape)} and {tuple(target.shape)}"
        )
    if weight.dim() != 2 or weight.shape[1] != hidden.shape[-1]:
        raise ValueError(f"{op}: weight must have shape (V, {hidden.shape[-1]}), got {tuple(weight.shape)}")
    if chunk is not None and chunk < 1:
        raise ValueError(f"{op}: chunk must be at least 1, or None, got {chunk}")
    check_loss_options(op, target, reduction, label_smoothing, z_loss, softcap, logit_scale)
    check_last_dim(op, weight.shape[0], bias=bias, class_weight=class_weight)

    cast = autocast_dtype(hidden.device)
    if cast is None or hidden.dtype == torch.float64:
        check_same_dtype(op, hidden=hidden, weight=weight, bias=bias)
    else:
        hidden = hidden.to(cast)
        if weight.dtype != torch.float32:
            weight = weight.to(cast)
        if bias is not None and bias.dtype != torch.float32:
            bias = bias.to(cast)
    backend = select(op, hidden.device, lambda b: no_float64_on_gpu_backends(b, hidden.dtype))

    rows = hidden.reshape(target.numel(), hidden.shape[-1]).contiguous()
    flat = target.reshape(-1).contiguous()
    if class_weight is not None:
        class_weight = class_weight.detach().to(accumulator(hidden.dtype)).contiguous()
    bias = None if bias is None else bias.contiguous()
    numbers = (float(label_smoothing), float(z_loss), float(softcap or 0.0), float(logit_scale))
    options = (ignore_index, *numbers, chunk or 0)
    with_grad = torch.is_grad_enabled() and (
        hidden.requires_grad or weight.requires_grad or (bias is not None and bias.requires_grad)
    )
    loss = _LinearCrossEntropy.apply(
        rows, weight.contiguous(), bias, flat, class_weight, options, reduction, with_grad, backend
    )
    if reduction == "none":
        loss = loss.view(target.shape)
    return loss.to(dtype_of_loss(hidden, loss_dtype))
