"""RMSNorm, alone and with the residual addition before it: contract, registration, autograd."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import reference
from ..backends import select
from ..reference.precision import accumulator
from ..reference.rms_norm import rstd as reference_rstd
from ._checks import (
    ANY,
    FLOATS,
    Checks,
    check_floating,
    check_last_dim,
    check_tensors,
    no_float64_on_gpu_backends,
)
from ._library import define, vjp
from ._transforms import twice_differentiable

# One pair of kernels serves both ops. Without a residual the sum is x, and the result `sum` is empty. Without a weight
# the gradient `dweight` is empty.


def _check_fwd(
    op: str, x: Tensor, residual: Tensor | None, weight: Tensor | None, eps: float, offset: float
) -> None:
    check = Checks(op, "x", x, (ANY, ANY))
    check("residual", residual, x.shape, *check.floats)("weight", weight, x.shape[1:], *FLOATS)


def _check_bwd(
    op: str,
    grad_normed: Tensor,
    grad_sum: Tensor | None,
    total: Tensor,
    weight: Tensor | None,
    rstd: Tensor,
    offset: float,
) -> None:
    check = Checks(op, "total", total, (ANY, ANY)).like("grad_normed", grad_normed).like("grad_sum", grad_sum)
    check("weight", weight, total.shape[1:], *FLOATS)
    check("rstd", rstd, total.shape[:1], accumulator(total.dtype))


def _fake_fwd(
    x: Tensor, residual: Tensor | None, weight: Any, eps: float, offset: float
) -> tuple[Tensor, ...]:
    dtype = x.dtype if residual is None else torch.promote_types(x.dtype, residual.dtype)
    normed = x.new_empty(x.shape, dtype=dtype)
    total = x.new_empty(0) if residual is None else torch.empty_like(normed)
    return normed, total, x.new_empty(x.shape[:1], dtype=accumulator(dtype))


def _reference_fwd(
    x: Tensor, residual: Tensor | None, weight: Tensor | None, eps: float, offset: float
) -> tuple[Tensor, ...]:
    normed, total = reference.add_rms_norm(x, residual, weight, eps, offset)
    rstd = reference_rstd(total.to(accumulator(total.dtype)), eps)
    return normed, (x.new_empty(0) if residual is None else total), rstd[:, 0]


def _fake_bwd(
    grad_normed: Tensor, grad_sum: Any, total: Tensor, weight: Any, rstd: Tensor, offset: float
) -> tuple[Tensor, ...]:
    return torch.empty_like(total), rstd.new_empty(0 if weight is None else total.shape[1])


def _reference_bwd(
    grad_normed: Tensor,
    grad_sum: Tensor | None,
    total: Tensor,
    weight: Tensor | None,
    rstd: Tensor,
    offset: float,
) -> tuple[Tensor, ...]:
    """With n = sum·rstd and g = grad·(offset + weight):  dsum = rstd·(g - n·mean(g·n)) + grad_sum."""
    acc = rstd.dtype
    n = total.to(acc) * rstd[:, None]
    grad = grad_normed.to(acc)
    g = grad if weight is None else grad * (offset + weight.to(acc))
    dsum = rstd[:, None] * (g - n * (g * n).mean(dim=1, keepdim=True))
    if grad_sum is not None:
        dsum = dsum + grad_sum.to(acc)
    return dsum.to(total.dtype), rstd.new_empty(0) if weight is None else (grad * n).sum(dim=0)


_FWD = define(
    "rms_norm_fwd",
    "(Tensor x, Tensor? residual, Tensor? weight, float eps, float offset) -> (Tensor, Tensor, Tensor)",
    fake=_fake_fwd,
    reference=_reference_fwd,
    check=_check_fwd,
    module="rms_norm",
)
_BWD = define(
    "rms_norm_bwd",
    "(Tensor grad_normed, Tensor? grad_sum, Tensor total, Tensor? weight, Tensor rstd, float offset)"
    " -> (Tensor, Tensor)",
    fake=_fake_bwd,
    reference=_reference_bwd,
    check=_check_bwd,
    module="rms_norm",
)


class _RMSNorm(torch.autograd.Function):
    """On rows: x (N, D). Without a residual the sum is x itself and only `normed` is returned."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        residual: Tensor | None,
        weight: Tensor | None,
        eps: float,
        offset: float,
        backend: str,
    ) -> Any:
        normed, total, rstd = _FWD[backend](x, residual, weight, eps, offset)
        ctx.save_for_backward(x if residual is None else total, weight, rstd)
        ctx.set_materialize_grads(False)
        ctx.eps, ctx.offset, ctx.backend = eps, offset, backend
        ctx.x_dtype, ctx.residual_dtype = x.dtype, None if residual is None else residual.dtype
        return normed if residual is None else (normed, total)

    @staticmethod
    def backward(
        ctx: Any, grad_normed: Tensor | None, grad_sum: Tensor | None = None
    ) -> tuple[Tensor | None, ...]:
        total, weight, rstd = ctx.saved_tensors
        dsum, dweight = grad_sum, None
        if grad_normed is not None and twice_differentiable(grad_normed, grad_sum):
            function = lambda t, w: reference.rms_norm(t, w, ctx.eps, ctx.offset)  # noqa: E731
            dsum, dweight = vjp(function, (total, weight), grad_normed, create_graph=True)
            dsum = dsum if grad_sum is None or dsum is None else dsum + grad_sum
        elif grad_normed is not None:
            grad_sum = None if grad_sum is None else grad_sum.contiguous()
            dsum, dweight = _BWD[ctx.backend](
                grad_normed.contiguous(), grad_sum, total, weight, rstd, ctx.offset
            )
        return (
            None if dsum is None else dsum.to(ctx.x_dtype),
            None if dsum is None or ctx.residual_dtype is None else dsum.to(ctx.residual_dtype),
            None if weight is None or dweight is None else dweight.to(weight.dtype),
            None,
            None,
            None,
        )


def rms_norm(x: Tensor, weight: Tensor | None = None, eps: float = 1e-6, *, offset: float = 0.0) -> Tensor:
    """x / sqrt(mean(x²) + eps) · (offset + weight) over the last dimension (arXiv:1910.07467).

    Args:
        x: (..., D), any strides; float32, bfloat16, float16, float64.
        weight: (D,), any floating dtype, or None: then the last factor is 1.
        eps: added to the mean of the squares.
        offset: added to the weight before it is rounded: 1 for Gemma's models, whose weights are stored less 1.

    Returns:
        x's shape and dtype.

    Raises:
        TypeError: an argument is not a floating tensor.
        ValueError: shapes or devices do not match, or there is an offset and no weight.
        BackendUnavailable: the chosen backend cannot run this case.
    """
    return _norm("rms_norm", x, None, weight, eps, offset)[0]


def add_rms_norm(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None = None,
    eps: float = 1e-6,
    *,
    offset: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """sum = x + residual and its `rms_norm` over the last dimension.

    Args:
        x: (..., D), any strides; float32, bfloat16, float16, float64.
        residual: x's shape, of any floating dtype, or None: then the sum is x itself.
        weight: (D,), any floating dtype, or None: then the last factor is 1.
        eps: added to the mean of the squares.
        offset: added to the weight before it is rounded: 1 for Gemma's models, whose weights are stored less 1.

    Returns:
        normed and sum, both of x's shape and of the promoted dtype of x and residual.

    Raises:
        TypeError: an argument is not a floating tensor.
        ValueError: shapes or devices do not match, or there is an offset and no weight.
        BackendUnavailable: the chosen backend cannot run this case.
    """
    return _norm("add_rms_norm", x, residual, weight, eps, offset)


def _norm(
    op: str, x: Tensor, residual: Tensor | None, weight: Tensor | None, eps: float, offset: float
) -> tuple[Tensor, Tensor]:
    check_tensors(op, x=x, residual=residual, weight=weight)
    check_floating(op, x=x, residual=residual, weight=weight)
    if x.dim() == 0:
        raise ValueError(f"{op}: x must have at least one dimension, got a scalar")
    if residual is not None and residual.shape != x.shape:
        raise ValueError(f"{op}: residual must have x's shape {tuple(x.shape)}, got {tuple(residual.shape)}")
    size = x.shape[-1]
    check_last_dim(op, size, weight=weight)
    if weight is None and offset != 0.0:
        raise ValueError(f"{op}: offset is added to weight, which is None; pass a weight, or offset=0.0")
    dtype = x.dtype if residual is None else torch.promote_types(x.dtype, residual.dtype)
    backend = select(op, x.device, lambda b: no_float64_on_gpu_backends(b, dtype))
    rows = x.reshape(-1, size) if size else x.reshape(x.shape[:-1].numel(), 0)
    residual_rows = None if residual is None else residual.reshape(rows.shape).contiguous()
    weight = None if weight is None else weight.contiguous()
    found = _RMSNorm.apply(rows.contiguous(), residual_rows, weight, eps, offset, backend)
    normed, total = (found, None) if residual is None else found
    return normed.view(x.shape), x if total is None else total.view(x.shape)
