"""GELU and GELU of a biased input: contract, registration, autograd."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import reference
from ..backends import select
from ._checks import (
    Checks,
    check_choice,
    check_floating,
    check_last_dim,
    check_same_dtype,
    check_tensors,
    no_float64_on_gpu_backends,
)
from ._library import define, vjp
from ._transforms import twice_differentiable

APPROXIMATE = ("none", "tanh")


def _check_bias(op: str, x: Tensor, bias: Tensor) -> Checks:
    return Checks(op, "x", x)("bias", bias, (x.size(-1),), x.dtype)


_FWD = define(
    "gelu_fwd",
    "(Tensor x, bool tanh) -> Tensor",
    fake=lambda x, tanh: torch.empty_like(x),
    reference=reference.gelu,
    check=lambda op, x, tanh: Checks(op, "x", x),
    module="gelu",
)
_BWD = define(
    "gelu_bwd",
    "(Tensor grad, Tensor x, bool tanh) -> Tensor",
    fake=lambda grad, x, tanh: torch.empty_like(x),
    reference=lambda grad, x, tanh: vjp(lambda x: reference.gelu(x, tanh), (x,), grad)[0],
    check=lambda op, grad, x, tanh: Checks(op, "x", x).like("grad", grad),
    module="gelu",
)
_BIAS_FWD = define(
    "bias_gelu_fwd",
    "(Tensor x, Tensor bias, bool tanh) -> Tensor",
    fake=lambda x, bias, tanh: torch.empty_like(x),
    reference=reference.bias_gelu,
    check=lambda op, x, bias, tanh: _check_bias(op, x, bias),
    module="gelu",
)
_BIAS_BWD = define(
    "bias_gelu_bwd",
    "(Tensor grad, Tensor x, Tensor bias, bool tanh) -> (Tensor, Tensor)",
    fake=lambda grad, x, bias, tanh: (torch.empty_like(x), torch.empty_like(bias)),
    reference=lambda grad, x, bias, tanh: vjp(lambda x, b: reference.bias_gelu(x, b, tanh), (x, bias), grad),
    check=lambda op, grad, x, bias, tanh: _check_bias(op, x, bias).like("grad", grad),
    module="gelu",
)


class _Gelu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, tanh: bool, backend: str) -> Tensor:
        ctx.save_for_backward(x)
        ctx.tanh, ctx.backend = tanh, backend
        return _FWD[backend](x, tanh)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (x,) = ctx.saved_tensors
        if twice_differentiable(grad):
            return *vjp(lambda x: reference.gelu(x, ctx.tanh), (x,), grad, create_graph=True), None, None
        return _BWD[ctx.backend](grad.contiguous(), x, ctx.tanh), None, None


class _BiasGelu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor, tanh: bool, backend: str) -> Tensor:
        ctx.save_for_backward(x, bias)
        ctx.tanh, ctx.backend = tanh, backend
        return _BIAS_FWD[backend](x, bias, tanh)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, bias = ctx.saved_tensors
        if twice_differentiable(grad):
            function = lambda x, b: reference.bias_gelu(x, b, ctx.tanh)  # noqa: E731
            return *vjp(function, (x, bias), grad, create_graph=True), None, None
        return *_BIAS_BWD[ctx.backend](grad.contiguous(), x, bias, ctx.tanh), None, None


def gelu(x: Tensor, approximate: str = "none") -> Tensor:
    """x·Φ(x), elementwise (Hendrycks & Gimpel, arXiv:1606.08415).

    Args:
        x: any shape and strides; float32, bfloat16, float16, float64.
        approximate: "none" for the exact Φ (erf) or "tanh".

    Returns:
        Contiguous, of x's shape and dtype.

    Raises:
        TypeError: x is not a floating tensor.
        ValueError: approximate is neither.
        BackendUnavailable: the chosen backend cannot run this case.
    """
    check_tensors("gelu", x=x)
    check_floating("gelu", x=x)
    check_choice("gelu", "approximate", approximate, APPROXIMATE)
    backend = select("gelu", x.device, lambda b: no_float64_on_gpu_backends(b, x.dtype))
    return _Gelu.apply(x.contiguous(), approximate == "tanh", backend)


def bias_gelu(x: Tensor, bias: Tensor, approximate: str = "none") -> Tensor:
    """gelu(x + bias); the sum is neither stored nor rounded.

    Args:
        x: (..., D), any strides; float32, bfloat16, float16, float64.
        bias: (D,), x's dtype.
        approximate: "none" or "tanh".

    Returns:
        Contiguous, of x's shape and dtype.

    Raises:
        TypeError, ValueError, BackendUnavailable: as `gelu`, or the shapes or dtypes do not match.
    """
    check_tensors("bias_gelu", x=x, bias=bias)
    check_floating("bias_gelu", x=x)
    check_same_dtype("bias_gelu", x=x, bias=bias)
    check_choice("bias_gelu", "approximate", approximate, APPROXIMATE)
    if x.dim() == 0:
        raise ValueError("bias_gelu: x must have at least one dimension, got a scalar")
    check_last_dim("bias_gelu", x.shape[-1], bias=bias)
    backend = select("bias_gelu", x.device, lambda b: no_float64_on_gpu_backends(b, x.dtype))
    return _BiasGelu.apply(x.contiguous(), bias.contiguous(), approximate == "tanh", backend)
