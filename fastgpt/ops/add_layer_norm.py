"""Residual addition + layer normalisation: contract, registration, autograd."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import reference
from ..backends import select
from ..reference.add_layer_norm import centre
from ..reference.precision import accumulator
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

# The mean is float64 in the ops: sum - mean must keep its digits where a row has a large offset.


def _check_fwd(
    op: str, x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None, eps: float
) -> None:
    check = Checks(op, "x", x, (ANY, ANY))
    check("residual", residual, x.shape, *check.floats)
    check("weight", weight, x.shape[1:], *FLOATS)("bias", bias, x.shape[1:], *FLOATS)


def _check_bwd(
    op: str,
    grad_normed: Tensor,
    grad_sum: Tensor | None,
    total: Tensor,
    weight: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
) -> None:
    check = Checks(op, "total", total, (ANY, ANY)).like("grad_normed", grad_normed).like("grad_sum", grad_sum)
    check("weight", weight, total.shape[1:], *FLOATS)
    check("mean", mean, total.shape[:1], torch.float64)(
        "rstd", rstd, total.shape[:1], accumulator(total.dtype)
    )


def _fake_fwd(x: Tensor, residual: Tensor | None, weight: Any, bias: Any, eps: float) -> tuple[Tensor, ...]:
    dtype = x.dtype if residual is None else torch.promote_types(x.dtype, residual.dtype)
    normed = x.new_empty(x.shape, dtype=dtype)
    total = x.new_empty(0) if residual is None else torch.empty_like(normed)
    mean = x.new_empty(x.shape[:1], dtype=torch.float64)
    return normed, total, mean, torch.empty_like(mean, dtype=accumulator(dtype))


def _reference_fwd(
    x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, ...]:
    normed, total = reference.add_layer_norm(x, residual, weight, bias, eps)
    z = total.to(accumulator(total.dtype))
    centred, mean = centre(z)
    rstd = torch.rsqrt(centred.square().mean(dim=-1) + eps)
    return normed, (x.new_empty(0) if residual is None else total), mean[:, 0], rstd


def _fake_bwd(
    grad_normed: Tensor, grad_sum: Any, total: Tensor, weight: Any, mean: Tensor, rstd: Tensor
) -> tuple[Tensor, ...]:
    vector = rstd.new_empty(total.shape[1])
    return torch.empty_like(total), vector, torch.empty_like(vector)


def _reference_bwd(
    grad_normed: Tensor,
    grad_sum: Tensor | None,
    total: Tensor,
    weight: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
) -> tuple[Tensor, ...]:
    """With n = (sum - mean)·rstd and g = grad·weight:  dsum = rstd·(g - mean(g) - n·mean(g·n)) + grad_sum."""
    acc = rstd.dtype
    n = (total.double() - mean[:, None]).to(acc) * rstd[:, None]
    grad = grad_normed.to(acc)
    g = grad if weight is None else grad * weight.to(acc)
    dsum = rstd[:, None] * (g - g.mean(dim=1, keepdim=True) - n * (g * n).mean(dim=1, keepdim=True))
    if grad_sum is not None:
        dsum = dsum + grad_sum.to(acc)
    return dsum.to(total.dtype), (grad * n).sum(dim=0), grad.sum(dim=0)


_FWD = define(
    "add_layer_norm_fwd",
    "(Tensor x, Tensor? residual, Tensor? weight, Tensor? bias, float eps) -> (Tensor, Tensor, Tensor, Tensor)",
    fake=_fake_fwd,
    reference=_reference_fwd,
    check=_check_fwd,
    module="add_layer_norm",
)
_BWD = define(
    "add_layer_norm_bwd",
    "(Tensor grad_normed, Tensor? grad_sum, Tensor total, Tensor? weight, Tensor mean, Tensor rstd)"
    " -> (Tensor, Tensor, Tensor)",
    fake=_fake_bwd,
    reference=_reference_bwd,
    check=_check_bwd,
    module="add_layer_norm",
)


class _AddLayerNorm(torch.autograd.Function):
    """On rows: x (N, D). Without a residual the sum is x itself and only `normed` is returned."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        residual: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
        eps: float,
        backend: str,
    ) -> Any:
        normed, total, mean, rstd = _FWD[backend](x, residual, weight, bias, eps)
        ctx.save_for_backward(x if residual is None else total, weight, bias, mean, rstd)
        ctx.set_materialize_grads(False)
        ctx.eps, ctx.backend = eps, backend
        ctx.x_dtype, ctx.residual_dtype = x.dtype, None if residual is None else residual.dtype
        return normed if residual is None else (normed, total)

    @staticmethod
    def backward(
        ctx: Any, grad_normed: Tensor | None, grad_sum: Tensor | None = None
    ) -> tuple[Tensor | None, ...]:
        total, weight, bias, mean, rstd = ctx.saved_tensors
        dsum, dweight, dbias = grad_sum, None, None
        if grad_normed is not None and twice_differentiable(grad_normed, grad_sum):
            function = lambda t, w, b: reference.add_layer_norm(t, None, w, b, ctx.eps)[0]  # noqa: E731
            dsum, dweight, dbias = vjp(function, (total, weight, bias), grad_normed, create_graph=True)
            dsum = dsum if grad_sum is None or dsum is None else dsum + grad_sum
        elif grad_normed is not None:
            grad_sum = None if grad_sum is None else grad_sum.contiguous()
            dsum, dweight, dbias = _BWD[ctx.backend](
                grad_normed.contiguous(), grad_sum, total, weight, mean, rstd
            )
        return (
            None if dsum is None else dsum.to(ctx.x_dtype),
            None if dsum is None or ctx.residual_dtype is None else dsum.to(ctx.residual_dtype),
            None if weight is None or dweight is None else dweight.to(weight.dtype),
            None if bias is None or dbias is None else dbias.to(bias.dtype),
            None,
            None,
        )


def add_layer_norm(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> tuple[Tensor, Tensor]:
    """sum = x + residual and its layer normalisation over the last dimension (arXiv:1607.06450).

    Args:
        x: (..., D), any strides; float32, bfloat16, float16, float64.
        residual: x's shape, of any floating dtype, or None: then the sum is x itself.
        weight, bias: (D,), any floating dtype, or None for 1 and 0.
        eps: added to the variance.

    Returns:
        normed and sum, both of x's shape and of the promoted dtype of x and residual.

    Raises:
        TypeError: an argument is not a floating tensor.
        ValueError: shapes or devices do not match.
        BackendUnavailable: the chosen backend cannot run this case.
    """
    check_tensors("add_layer_norm", x=x, residual=residual, weight=weight, bias=bias)
    check_floating("add_layer_norm", x=x, residual=residual, weight=weight, bias=bias)
    if x.dim() == 0:
        raise ValueError("add_layer_norm: x must have at least one dimension, got a scalar")
    if residual is not None and residual.shape != x.shape:
        raise ValueError(
            f"add_layer_norm: residual must have x's shape {tuple(x.shape)}, got {tuple(residual.shape)}"
        )
    size = x.shape[-1]
    check_last_dim("add_layer_norm", size, weight=weight, bias=bias)
    dtype = x.dtype if residual is None else torch.promote_types(x.dtype, residual.dtype)
    backend = select("add_layer_norm", x.device, lambda b: no_float64_on_gpu_backends(b, dtype))
    rows = x.reshape(-1, size) if size else x.reshape(x.shape[:-1].numel(), 0)
    residual_rows = None if residual is None else residual.reshape(rows.shape).contiguous()
    weight, bias = (None if t is None else t.contiguous() for t in (weight, bias))
    found = _AddLayerNorm.apply(rows.contiguous(), residual_rows, weight, bias, eps, backend)
    normed, total = (found, None) if residual is None else found
    return normed.view(x.shape), x if total is None else total.view(x.shape)
