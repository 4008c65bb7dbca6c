"""GELU of a linear layer's output: contract, registration, autograd.

The bias is added in the product's accumulator, so that z = x @ weight.T + bias is rounded once. Were it added in a
pass, to a product already rounded, a z near 0 would carry the error of a large x @ weight.T: more than the error rule
allows. Triton has the activation in the product's epilogue, and so has CUDA where cuBLASLt does (tanh, 16 bits); else,
and in C++, it is a pass after linear's product. The backward is the pass of bias_gelu with a bias of 0, because it
also sums dbias, and linear's products.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import reference
from ._checks import ANY, Checks, check_choice
from ._library import define, vjp
from ._transforms import twice_differentiable
from .gelu import _BIAS_BWD, _BWD, _FWD, APPROXIMATE
from .linear import LINEAR_BWD, LINEAR_FWD, as_rows


def _check_fwd(op: str, x: Tensor, weight: Tensor, bias: Tensor | None, tanh: bool, with_z: bool) -> None:
    check = Checks(op, "x", x, (ANY, ANY))("weight", weight, (ANY, x.shape[1]), x.dtype)
    check("bias", bias, weight.shape[:1], x.dtype)


def _fake_fwd(
    x: Tensor, weight: Tensor, bias: Tensor | None, tanh: bool, with_z: bool
) -> tuple[Tensor, Tensor]:
    shape = (x.shape[0], weight.shape[0])
    return x.new_empty(shape), x.new_empty(shape if with_z else (0,))


def _reference_fwd(
    x: Tensor, weight: Tensor, bias: Tensor | None, tanh: bool, with_z: bool
) -> tuple[Tensor, Tensor]:
    z = reference.linear(x, weight, bias) if with_z else x.new_empty(0)
    return reference.linear_gelu(x, weight, bias, tanh), z


def _reference_bwd(grad: Tensor, z: Tensor, tanh: bool) -> tuple[Tensor, Tensor]:
    bias = z.new_zeros(z.shape[1])
    dz, dbias = vjp(lambda x, b: reference.bias_gelu(x, b, tanh), (z, bias), grad)
    return dz.contiguous(), dbias


# On rows: x (M, K), weight (N, K), bias (N,). The activation and, `with_z`, the pre-activation, rounded apart.
_LINEAR_GELU_FWD = define(
    "linear_gelu_fwd",
    "(Tensor x, Tensor weight, Tensor? bias, bool tanh, bool with_z) -> (Tensor, Tensor)",
    fake=_fake_fwd,
    reference=_reference_fwd,
    check=_check_fwd,
    module="linear_gelu",
)


# dz and its sum over the rows, dbias.
_LINEAR_GELU_BWD = define(
    "linear_gelu_bwd",
    "(Tensor grad, Tensor z, bool tanh) -> (Tensor, Tensor)",
    fake=lambda grad, z, tanh: (torch.empty_like(z), z.new_empty(z.shape[1])),
    reference=_reference_bwd,
    check=lambda op, grad, z, tanh: Checks(op, "z", z, (ANY, ANY)).like("grad", grad),
    module="linear_gelu",
)


def _forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, tanh: bool, with_z: bool, backend: str
) -> tuple[Tensor, Tensor]:
    if backend == "cpp":
        z = LINEAR_FWD[backend](x, weight, bias)
        return _FWD[backend](z, tanh), z
    return _LINEAR_GELU_FWD[backend](x, weight, bias, tanh, with_z)


def _backward(
    grad: Tensor, z: Tensor, bias: Tensor | None, tanh: bool, backend: str
) -> tuple[Tensor, Tensor | None]:
    """dz and, in its dtype, the gradient of the bias that was added, if one was."""
    if bias is None:
        return _BWD[backend](grad, z, tanh), None
    if backend in ("cpp", "cuda"):
        dz, dbias = _BIAS_BWD[backend](grad, z, z.new_zeros(z.shape[1]), tanh)
    else:
        dz, dbias = _LINEAR_GELU_BWD[backend](grad, z, tanh)
    return dz, dbias.to(bias.dtype)


class LinearGelu(torch.autograd.Function):
    """On rows: x (M, K). Of the results only the pre-activation z is kept."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, tanh: bool, with_z: bool, backend: str
    ) -> Tensor:
        y, z = _forward(x, weight, bias, tanh, with_z, backend)
        ctx.save_for_backward(x, weight, bias, z)
        ctx.tanh, ctx.backend = tanh, backend
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, z = ctx.saved_tensors
        if twice_differentiable(grad):
            function = lambda x, w, b: reference.linear_gelu(x, w, b, ctx.tanh)  # noqa: E731
            return *vjp(function, (x, weight, bias), grad, create_graph=True), None, None, None
        dz, dbias = _backward(grad.contiguous(), z, bias, ctx.tanh, ctx.backend)
        x_needed, weight_needed = ctx.needs_input_grad[:2]
        dx, dweight, _ = LINEAR_BWD[ctx.backend](dz, x, weight, x_needed, weight_needed, False)
        return dx if x_needed else None, dweight if weight_needed else None, dbias, None, None, None


def linear_gelu(x: Tensor, weight: Tensor, bias: Tensor | None = None, approximate: str = "none") -> Tensor:
    """gelu(x @ weight.T + bias): a linear layer and its activation (Hendrycks & Gimpel, arXiv:1606.08415).

    Under autocast as `ops.linear`, but that the bias's gradient is rounded. For the backward the arguments and the
    pre-activation are kept, not the activation.

    Args:
        x: (..., K), any strides; float32 (on a GPU tf32 where PyTorch's products may be), bfloat16, float16, float64.
        weight: (N, K) as in `torch.nn.Linear`, any strides, x's dtype.
        bias: (N,), x's dtype, or None.
        approximate: "none" for the exact GELU (erf) or "tanh".

    Returns:
        (..., N), contiguous, in x's dtype (autocast's under autocast).

    Raises:
        TypeError: an argument is not a floating tensor, or the dtypes differ.
        ValueError: the shapes do not match, or approximate is neither.
        BackendUnavailable: the chosen backend cannot run this case.
    """
    check_choice("linear_gelu", "approximate", approximate, APPROXIMATE)
    rows, (w, b), backend = as_rows("linear_gelu", x, weight=weight, bias=bias)
    with_z = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (rows, w, b))
    y = LinearGelu.apply(rows, w, b, approximate == "tanh", with_z, backend)
    return y.view(*x.shape[:-1], weight.shape[0])
