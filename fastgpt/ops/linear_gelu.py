"""GELU of a linear layer's output: contract and autograd, on the kernels of gelu and bias_gelu.

The products are PyTorch's on every backend; between them lies one pass forward and one backward. The bias is
added by the product, so that z = x @ weight.T + bias is rounded once. Were it added in the pass, to a product
already rounded, a z near 0 would carry the error of a large x @ weight.T: more than the error rule allows. The
backward is bias_gelu's with a bias of 0, because its pass also sums dbias. Reads and writes of (rows, N) matrices:
product 1 (3 where `addmm` fills its result with the bias first, as on the CPU), gelu 2, backward 3.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from fastgpt import reference
from fastgpt.backends import select
from fastgpt.ops._checks import (
    autocast_dtype,
    check_choice,
    check_floating,
    check_last_dim,
    check_same_dtype,
    check_tensors,
    distinct,
    no_float64_on_gpu_backends,
)
from fastgpt.ops._library import twice_differentiable, vjp
from fastgpt.ops.gelu import _BIAS_BWD, _BWD, _FWD, APPROXIMATE


class _LinearGelu(torch.autograd.Function):
    """On rows: x (M, K). Of the results only the pre-activation z is kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, tanh: bool, backend: str) -> Tensor:
        z = linear(x, weight, bias)
        ctx.save_for_backward(x, weight, bias, z)
        ctx.tanh, ctx.backend = tanh, backend
        return _FWD[backend](z, tanh)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, z = ctx.saved_tensors
        if twice_differentiable():
            function = lambda x, w, b: reference.linear_gelu(x, w, b, ctx.tanh)  # noqa: E731
            return *vjp(function, (x, weight, bias), grad, create_graph=True), None, None
        grad, dbias = grad.contiguous(), None
        if bias is None:
            dz = _BWD[ctx.backend](grad, z, ctx.tanh)
        else:
            dz, dbias = _BIAS_BWD[ctx.backend](grad, z, torch.zeros_like(bias), ctx.tanh)
        x_needed, weight_needed = ctx.needs_input_grad[:2]
        return dz @ weight if x_needed else None, dz.T @ x if weight_needed else None, dbias, None, None


def linear_gelu(x: Tensor, weight: Tensor, bias: Tensor | None = None, approximate: str = "none") -> Tensor:
    """gelu(x @ weight.T + bias): a linear layer and its activation (Hendrycks & Gimpel, arXiv:1606.08415).

    Under autocast the arguments are cast to its dtype, as `linear` would. For the backward the arguments and
    the pre-activation are kept, not the activation.

    Args:
        x: (..., K), any strides; float32, bfloat16, float16, float64.
        weight: (N, K) as in `torch.nn.Linear`, any strides, x's dtype.
        bias: (N,), x's dtype, or None.
        approximate: "none" for the exact GELU (erf) or "tanh".

    Returns:
        (..., N), contiguous, in x's dtype (autocast's under autocast).

    Raises:
        TypeError: an argument is not a floating tensor, or the dtypes differ.
        ValueError: the shapes do not match, or approximate is neither.
        BackendUnavailable: the backend asked for cannot run this case.
    """
    op = "linear_gelu"
    check_tensors(op, x=x, weight=weight, bias=bias)
    check_floating(op, x=x, weight=weight, bias=bias)
    check_choice(op, "approximate", approximate, APPROXIMATE)
    if x.dim() == 0:
        raise ValueError(f"{op}: x must have at least one dimension, got a scalar")
    if weight.dim() != 2 or weight.shape[1] != x.shape[-1]:
        raise ValueError(f"{op}: weight must have shape (N, {x.shape[-1]}), got {tuple(weight.shape)}")
    check_last_dim(op, weight.shape[0], bias=bias)

    cast = autocast_dtype(x.device)
    if cast is not None and x.dtype != torch.float64:
        x, weight = x.to(cast), weight.to(cast)
        bias = None if bias is None else bias.to(cast)
    check_same_dtype(op, x=x, weight=weight, bias=bias)
    backend = select(op, x.device, lambda b: no_float64_on_gpu_backends(b, x.dtype))

    rows, weight = distinct(torch.atleast_2d(x).flatten(0, -2), weight)
    y = _LinearGelu.apply(rows, weight, bias, approximate == "tanh", backend)
    return y.view(*x.shape[:-1], weight.shape[0])
