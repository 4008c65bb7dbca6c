"""Softmax cross-entropy: contract, registration, autograd, reduction."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .. import reference
from ..backends import select
from ..reference.cross_entropy import capped, check_targets, softmax_statistics
from ..reference.precision import accumulator
from ._checks import (
    ANY,
    Checks,
    autocast_dtype,
    check_choice,
    check_floating,
    check_last_dim,
    check_tensors,
    no_float64_on_gpu_backends,
    unit_stride,
)
from ._library import define, vjp
from ._transforms import is_batched, twice_differentiable

REDUCTIONS = ("mean", "sum", "none")

_OPTIONS = (
    "Tensor? weight, int ignore_index, float label_smoothing, float z_loss, float softcap, float logit_scale"
)
# statistics (N, 2): the row's maximum m and Σ exp(x - m). In one number, lse = m + log Σ, the logarithm would be lost
# beside a large m. With a logit scale k and no softcap, m is the maximum of the logits without k, and the sum is
# Σ exp(k·(x - m)): the largest exponent is exactly 0, however a compiler contracts product and difference.
_BWD_ARGUMENTS = (
    f"Tensor grad_loss, Tensor? grad_lse, Tensor logits, Tensor target, Tensor statistics, {_OPTIONS}"
)


def _check_rows(op: str, logits: Tensor, target: Tensor, weight: Tensor | None) -> Checks:
    check = Checks(op, "logits", logits, (ANY, ANY))
    check("target", target, logits.shape[:1], torch.int64)
    return check("weight", weight, logits.shape[1:], accumulator(logits.dtype))


def _check_fwd(
    op: str, logits: Tensor, target: Tensor, weight: Tensor | None, ignore_index: int, *_: Any
) -> None:
    _check_rows(op, logits, target, weight)
    check_targets(target, logits.shape[1], ignore_index)


def _check_bwd(
    op: str,
    grad_loss: Tensor,
    grad_lse: Tensor | None,
    logits: Tensor,
    target: Tensor,
    statistics: Tensor,
    weight: Tensor | None,
    *_: Any,
) -> None:
    check, rows, acc = _check_rows(op, logits, target, weight), logits.shape[:1], accumulator(logits.dtype)
    check("grad_loss", grad_loss, rows, acc)("grad_lse", grad_lse, rows, acc)
    check("statistics", statistics, (*rows, 2), acc)


def _check_written(op: str, logits: Tensor) -> None:
    if logits.shape[0] > 1 and logits.stride(0) < logits.shape[1]:
        raise ValueError(f"{op}: the rows of logits must not overlap, because they are written")


def _check_bwd_inplace(
    op: str, grad_loss: Tensor, grad_lse: Tensor | None, logits: Tensor, *rest: Any
) -> None:
    _check_bwd(op, grad_loss, grad_lse, logits, *rest)
    _check_written(op, logits)


def _check_with_grad_inplace(op: str, logits: Tensor, *rest: Any) -> None:
    _check_fwd(op, logits, *rest)
    _check_written(op, logits)


def _fake_fwd(logits: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    loss = logits.new_empty(logits.shape[0], dtype=accumulator(logits.dtype))
    return loss, loss.new_empty((*loss.shape, 2))


def _reference_bwd(
    grad_loss: Tensor,
    grad_lse: Tensor | None,
    logits: Tensor,
    target: Tensor,
    statistics: Tensor,
    *options: Any,
) -> Tensor:
    found = vjp(lambda x: reference.cross_entropy(x, target, *options), (logits,), (grad_loss, grad_lse))[0]
    return found.contiguous()


def _reference_fwd(logits: Tensor, target: Tensor, *options: Any) -> tuple[Tensor, Tensor]:
    loss = reference.cross_entropy(logits, target, *options)[0]
    return loss, saved_statistics(logits, *options[-2:])


def saved_statistics(logits: Tensor, softcap: float, logit_scale: float) -> Tensor:
    """Return m and the sum of the exponentials (N, 2), as the kernels save them."""
    x = capped(logits, softcap, logit_scale if softcap else 1.0)
    m, _ = softmax_statistics(x)
    exponents = (x - m[:, None]) * exponent_scale(softcap, logit_scale)
    return torch.stack((m, exponents.exp().sum(dim=1)), dim=1)


def exponent_scale(softcap: float, logit_scale: float) -> float:
    """Return the factor of x - m: with a softcap, the logits were scaled before it."""
    return 1.0 if softcap else logit_scale


def _reference_bwd_inplace(
    grad_loss: Tensor,
    grad_lse: Tensor | None,
    logits: Tensor,
    target: Tensor,
    statistics: Tensor,
    *options: Any,
) -> None:
    logits.copy_(_reference_bwd(grad_loss, grad_lse, logits, target, statistics, *options))


def _reference_with_grad_inplace(logits: Tensor, target: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    options = rest[:-1]
    loss, statistics = _reference_fwd(logits, target, *options)
    _reference_bwd_inplace(torch.ones_like(loss), None, logits, target, statistics, *options)
    return loss, statistics


_FWD = define(
    "cross_entropy_fwd",
    f"(Tensor logits, Tensor target, {_OPTIONS}) -> (Tensor, Tensor)",
    fake=_fake_fwd,
    reference=_reference_fwd,
    check=_check_fwd,
    module="cross_entropy",
)
_BWD = define(
    "cross_entropy_bwd",
    f"({_BWD_ARGUMENTS}) -> Tensor",
    fake=lambda grad_loss, grad_lse, logits, *_: logits.new_empty(logits.shape),
    reference=_reference_bwd,
    check=_check_bwd,
    module="cross_entropy",
)
_BWD_INPLACE = define(
    "cross_entropy_bwd_inplace",
    f"({_BWD_ARGUMENTS.replace('Tensor logits', 'Tensor(a!) logits')}) -> ()",
    fake=lambda *_: None,
    reference=_reference_bwd_inplace,
    check=_check_bwd_inplace,
    module="cross_entropy",
)
# Loss, statistics, and over the logits the gradient of the sum of the losses. block_bytes: how much of a row a block of
# the CUDA kernel may keep, 0 for its own choice.
_WITH_GRAD_INPLACE = define(
    "cross_entropy_with_grad_inplace",
    f"(Tensor(a!) logits, Tensor target, {_OPTIONS}, int block_bytes) -> (Tensor, Tensor)",
    fake=_fake_fwd,
    reference=_reference_with_grad_inplace,
    check=_check_with_grad_inplace,
    module="cross_entropy",
)


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        target: Tensor,
        weight: Tensor | None,
        options: tuple[Any, ...],
        inplace: bool,
        with_lse: bool,
        backend: str,
    ) -> Any:
        loss, statistics = _FWD[backend](logits, target, weight, *options)
        ctx.save_for_backward(logits, target, statistics, weight)
        ctx.set_materialize_grads(False)
        ctx.options, ctx.inplace, ctx.backend = options, inplace, backend
        if not with_lse:
            return loss
        m, log_sum = statistics[:, 0], statistics[:, 1].log()
        return loss, torch.add(log_sum, m, alpha=exponent_scale(*options[-2:]))

    @staticmethod
    def backward(
        ctx: Any, grad_loss: Tensor | None, grad_lse: Tensor | None = None
    ) -> tuple[Tensor | None, ...]:
        logits, target, statistics, weight = ctx.saved_tensors
        if twice_differentiable(grad_loss, grad_lse):
            function = lambda x: reference.cross_entropy(x, target, weight, *ctx.options)  # noqa: E731
            return *vjp(function, (logits,), (grad_loss, grad_lse), create_graph=True), *[None] * 6
        grad_loss = statistics.new_zeros(target.shape) if grad_loss is None else grad_loss.contiguous()
        grad_lse = None if grad_lse is None else grad_lse.contiguous()
        arguments = (grad_loss, grad_lse, logits, target, statistics, weight, *ctx.options)
        if ctx.inplace and not is_batched(grad_loss):
            _BWD_INPLACE[ctx.backend](*arguments)
            return logits, *[None] * 6
        return _BWD[ctx.backend](*arguments), *[None] * 6


def reduce_rows(
    loss: Tensor, target: Tensor, weight: Tensor | None, ignore_index: int, reduction: str
) -> Tensor:
    """The reduction of `torch.nn.functional.cross_entropy`: a mean is over the weights of the valid targets."""
    if reduction == "none":
        return loss
    if reduction == "sum":
        return loss.sum()
    return loss.sum() / mean_denominator(loss.dtype, target, weight, ignore_index)


def mean_denominator(dtype: torch.dtype, target: Tensor, weight: Tensor | None, ignore_index: int) -> Tensor:
    """The sum of the class weights of the targets that are not ignored; a scalar."""
    valid = target != ignore_index
    if weight is None or weight.shape[0] == 0:
        return valid.sum().to(dtype)
    # `take`, because Dynamo reads the value of an index that is a scalar tensor.
    return torch.where(valid, weight.to(dtype).take(torch.where(valid, target, 0)), 0).sum()


def dtype_of_loss(values: Tensor, asked: torch.dtype | None) -> torch.dtype:
    """Return the given dtype, or PyTorch's for logits or hidden states like `values`."""
    if asked is not None:
        return asked
    return values.dtype if autocast_dtype(values.device) is None else accumulator(values.dtype)


def check_loss_options(
    op: str,
    target: Tensor,
    reduction: Any,
    label_smoothing: Any,
    z_loss: Any,
    softcap: Any,
    logit_scale: Any,
) -> None:
    """The checks that the two cross-entropy ops share."""
    check_choice(op, "reduction", reduction, REDUCTIONS)
    if target.dtype != torch.int64:
        raise TypeError(f"{op}: target must hold int64 class indices, got {target.dtype}")
    if not 0.0 <= label_smoothing <= 1.0:
        raise ValueError(f"{op}: label_smoothing must be between 0 and 1, got {label_smoothing}")
    if z_loss < 0:
        raise ValueError(f"{op}: z_loss must not be negative, got {z_loss}")
    if softcap is not None and softcap < 0:
        raise ValueError(f"{op}: softcap must be positive, or None for none, got {softcap}")
    if isinstance(logit_scale, Tensor):
        raise TypeError(
            f"{op}: logit_scale must be a number, got a tensor; multiply by a learned scale before the op"
        )
    if not 0 < logit_scale < math.inf:
        raise ValueError(f"{op}: logit_scale must be positive and finite, got {logit_scale}")


def _can_be_written(rows: Tensor) -> bool:
    """Return whether a kernel can write over the rows (N, V), of a last stride of 1: no two elements share memory.

    Nor are they a view with PyTorch's negative bit, which no kernel sees: PyTorch hands it a copy.
    """
    overlap = rows.shape[0] > 1 and rows.stride(0) < rows.shape[1]
    return not overlap and (torch.compiler.is_compiling() or not rows.is_neg())


def cross_entropy(
    logits: Tensor,
    target: Tensor,
    *,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    return_lse: bool = False,
    inplace_backward: bool = False,
    loss_dtype: torch.dtype | None = None,
) -> Any:
    """Softmax cross-entropy with class indices, in one read of the logits.

    The formula is in `fastgpt.reference.cross_entropy`; without z_loss, softcap and logit_scale it is that of
    `torch.nn.functional.cross_entropy`, in every reduction.

    Args:
        logits: (..., V); float32, bfloat16, float16, float64. The last dimension holds the classes.
        target: (...), int64. A target outside [0, V) other than ignore_index raises IndexError on
            the CPU; on a GPU its row's loss and gradient are NaN (TRITON_DEBUG=1 traps it).
        weight: (V,) class weights; no gradient flows to them.
        ignore_index: rows with this target count for nothing.
        reduction: "mean" (over the weights of the targets), "sum" or "none".
        label_smoothing: share of the uniform distribution in the target, 0 to 1 (arXiv:1512.00567).
        z_loss: weight of lse² (arXiv:2204.02311).
        softcap: the logits become c·tanh(logits/c); None or 0 for none.
        logit_scale: multiplies the logits, before the softcap (Cohere's `logit_scale`, the inverse of Granite's
            `logits_scaling` and of a temperature). A positive number; no gradient flows to it.
        return_lse: also return the log-sum-exp of each row, differentiable.
        inplace_backward: the backward writes the gradient over the logits, saving their size in
            memory. The logits must not be used afterwards, by you or by another op's backward. Logits whose elements
            share memory (`expand`) are left as they are.
        loss_dtype: of the loss, which is computed in float32 (float64 for float64) and rounded once; None for the
            logits' dtype, or float32 under autocast, as PyTorch has it.

    Returns:
        The loss, scalar or (...); with return_lse
        also the log-sum-exp (...), float32 (float64 for float64).

    Raises:
        TypeError: an argument is not a tensor of a dtype said above.
        ValueError: shapes, devices or options do not fit.
        IndexError: a target is out of range, on the CPU. On a GPU, where asking would wait for it, the loss and
            gradient of that row are NaN; nothing is read through the target.
        BackendUnavailable: the chosen backend cannot run this case.
    """
    check_tensors("cross_entropy", logits=logits, target=target, weight=weight)
    check_floating("cross_entropy", logits=logits, weight=weight)
    if logits.dim() == 0 or logits.shape[:-1] != target.shape:
        raise ValueError(
            "cross_entropy: logits (..., V) and target (...) must match, "
            f"got {tuple(logits.shape)} and {tuple(target.shape)}"
        )
    check_loss_options("cross_entropy", target, reduction, label_smoothing, z_loss, softcap, logit_scale)
    vocab = logits.shape[-1]
    check_last_dim("cross_entropy", vocab, weight=weight)
    backend = select("cross_entropy", logits.device, lambda b: no_float64_on_gpu_backends(b, logits.dtype))

    rows = unit_stride(logits.reshape(target.numel(), vocab))
    inplace = inplace_backward and _can_be_written(rows)
    if weight is not None:
        weight = weight.detach().to(accumulator(logits.dtype)).contiguous()
    flat = target.reshape(-1).contiguous()
    numbers = (float(label_smoothing), float(z_loss), float(softcap or 0.0), float(logit_scale))
    options = (ignore_index, *numbers)
    found = _CrossEntropy.apply(rows, flat, weight, options, inplace, return_lse, backend)
    loss, lse = found if return_lse else (found, None)
    loss = reduce_rows(loss.view(target.shape), target, weight, ignore_index, reduction)
    loss = loss.to(dtype_of_loss(logits, loss_dtype))
    return loss if lse is None else (loss, lse.view(target.shape))
