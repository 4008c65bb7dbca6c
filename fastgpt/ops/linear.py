"""A linear layer whose master weight is rounded as it is multiplied: contract, registration, autograd.

The C++ kernels multiply bfloat16 where the CPU does and leave the rest to PyTorch, whose products the GPU has
throughout.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import reference
from ..backends import select
from ..reference.precision import accumulator
from ._checks import (
    ANY,
    Checks,
    autocast_dtype,
    check_floating,
    check_last_dim,
    check_same_dtype,
    check_tensors,
    distinct,
    no_float64_on_gpu_backends,
)
from ._library import define, vjp
from ._torch_linear import linear_bwd, linear_fwd
from ._transforms import twice_differentiable


def _check_layer(op: str, x: Tensor, weight: Tensor) -> Checks:
    return Checks(op, "x", x, (ANY, ANY))("weight", weight, (ANY, x.shape[1]), x.dtype, accumulator(x.dtype))


def _check_fwd(op: str, x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    _check_layer(op, x, weight)("bias", bias, weight.shape[:1], x.dtype, accumulator(x.dtype))


def _check_bwd(op: str, grad: Tensor, x: Tensor, weight: Tensor, *_: bool) -> None:
    _check_layer(op, x, weight)("grad", grad, (x.shape[0], weight.shape[0]), x.dtype)


def _fake_bwd(
    grad: Tensor, x: Tensor, weight: Tensor, with_x: bool, with_weight: bool, with_bias: bool
) -> tuple[Tensor, Tensor, Tensor]:
    dx = x.new_empty(x.shape if with_x else (0,))
    dweight = weight.new_empty(weight.shape if with_weight else (0,))
    return dx, dweight, weight.new_empty(weight.shape[0] if with_bias else 0)


def _reference_bwd(
    grad: Tensor, x: Tensor, weight: Tensor, with_x: bool, with_weight: bool, with_bias: bool
) -> tuple[Tensor, Tensor, Tensor]:
    bias = weight.new_zeros(weight.shape[0])
    grads = vjp(reference.linear, (x, weight, bias), grad)
    asked = zip(grads, (with_x, with_weight, with_bias), strict=True)
    dx, dweight, dbias = (g.contiguous() if wanted else g.new_empty(0) for g, wanted in asked)
    return dx, dweight, dbias


# On rows: x (M, K); weight (N, K) and bias (N,) in x's dtype or in float32. A gradient has the dtype of what it
# is the gradient of, dbias that of the weight.
LINEAR_FWD = define(
    "linear_fwd",
    "(Tensor x, Tensor weight, Tensor? bias) -> Tensor",
    fake=lambda x, weight, bias: x.new_empty(x.shape[0], weight.shape[0]),
    reference=reference.linear,
    check=_check_fwd,
    module=None,
    triton=linear_fwd,
    cuda=linear_fwd,
)
LINEAR_BWD = define(
    "linear_bwd",
    "(Tensor grad, Tensor x, Tensor weight, bool with_x, bool with_weight, bool with_bias) -> (Tensor, Tensor, Tensor)",
    fake=_fake_bwd,
    reference=_reference_bwd,
    check=_check_bwd,
    module=None,
    triton=linear_bwd,
    cuda=linear_bwd,
)


# On these backends the products are PyTorch's (_torch_linear.py), whose autograd in C++ takes the host half of
# the time of an autograd.Function.
PRODUCTS_OF_PYTORCH = ("triton", "cuda")


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, backend: str) -> Tensor:
        ctx.save_for_backward(x, weight, bias)
        ctx.backend = backend
        return LINEAR_FWD[backend](x, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias = ctx.saved_tensors
        if twice_differentiable(grad):
            return *vjp(reference.linear, (x, weight, bias), grad, create_graph=True), None
        needed = ctx.needs_input_grad[:3]
        found = LINEAR_BWD[ctx.backend](grad, x, weight, *needed)
        return *(g if n else None for g, n in zip(found, needed, strict=True)), None


def as_rows(op: str, x: Tensor, **parameters: Tensor | None) -> tuple[Tensor, list[Any], str]:
    """Checks the arguments of layers that follow each other, a weight and a bias each.

    Returns x (M, K) and the parameters as the kernels take them, and the backend.
    """
    check_tensors(op, x=x, **parameters)
    check_floating(op, x=x, **parameters)
    if x.dim() == 0:
        raise ValueError(f"{op}: x must have at least one dimension, got a scalar")
    size, names = x.shape[-1], list(parameters)
    for w, b in zip(names[::2], names[1::2], strict=True):
        weight = parameters[w]
        if weight is None:
            raise TypeError(f"{op}: {w} must be a torch.Tensor, got NoneType")
        if weight.dim() != 2 or weight.shape[1] != size:
            raise ValueError(f"{op}: {w} must have shape (N, {size}), got {tuple(weight.shape)}")
        size = weight.shape[0]
        check_last_dim(op, size, **{b: parameters[b]})

    cast = autocast_dtype(x.device)
    if cast is None or x.dtype == torch.float64:
        check_same_dtype(op, x=x, **parameters)
        cast = x.dtype
    backend = select(op, x.device, lambda b: no_float64_on_gpu_backends(b, x.dtype))
    x = x.to(cast)
    given = [p for p in parameters.values() if p is not None]
    # The C++ kernels round a float32 weight while they read it; the others want it rounded once for both directions.
    if backend != "cpp" or any(p.dtype != torch.float32 for p in given):
        given = [p.to(cast) for p in given]
    rows, *given = distinct(x.flatten(0, -2) if x.dim() > 1 else x.unsqueeze(0), *given)
    left = iter(given)
    return rows, [None if p is None else next(left) for p in parameters.values()], backend


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x @ weight.T + bias, as `torch.nn.functional.linear`.

    Under autocast x is cast to its dtype, as `linear` would. A float32 weight stays what it is: it is rounded
    as it is multiplied, and on the C++ backend its gradient comes in float32 without having been rounded.

    Args:
        x: (..., K), any strides; float32, bfloat16, float16, float64.
        weight: (N, K) as in `torch.nn.Linear`, any strides, x's dtype.
        bias: (N,), x's dtype, or None.

    Returns:
        (..., N), contiguous, in x's dtype (autocast's under autocast).

    Raises:
        TypeError: an argument is not a floating tensor, or the dtypes differ.
        ValueError: the shapes do not match.
        BackendUnavailable: the chosen backend cannot run this case.
    """
    rows, (w, b), backend = as_rows("linear", x, weight=weight, bias=bias)
    if backend in PRODUCTS_OF_PYTORCH:
        return torch.nn.functional.linear(rows, w, b).view(*x.shape[:-1], weight.shape[0])
    return _Linear.apply(rows, w, b, backend).view(*x.shape[:-1], weight.shape[0])
