"""GELU of a linear layer's output: contract and autograd, on the kernels of linear, gelu and bias_gelu.

The bias is added by the product, so that z = x @ weight.T + bias is rounded once. Were it added in the pass, to a
product already rounded, a z near 0 would carry the error of a large x @ weight.T: more than the error rule allows.
The backward is bias_gelu's with a bias of 0, because its pass also sums dbias. Reads and writes of (rows, N)
matrices beside the products: gelu 2, backward 3.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastgpt import reference
from fastgpt.ops._checks import check_choice
from fastgpt.ops._library import twice_differentiable, vjp
from fastgpt.ops.gelu import _BIAS_BWD, _BWD, _FWD, APPROXIMATE
from fastgpt.ops.linear import LINEAR_BWD, LINEAR_FWD, as_rows


class _LinearGelu(torch.autograd.Function):
    """On rows: x (M, K). Of the results only the pre-activation z is kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, tanh: bool, backend: str) -> Tensor:
        z = LINEAR_FWD[backend](x, weight, bias)
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
            dz, dbias = _BIAS_BWD[ctx.backend](grad, z, z.new_zeros(bias.shape), ctx.tanh)
            dbias = dbias.to(bias.dtype)
        x_needed, weight_needed = ctx.needs_input_grad[:2]
        dx, dweight, _ = LINEAR_BWD[ctx.backend](dz, x, weight, x_needed, weight_needed, False)
        return dx if x_needed else None, dweight if weight_needed else None, dbias, None, None


def linear_gelu(x: Tensor, weight: Tensor, bias: Tensor | None = None, approximate: str = "none") -> Tensor:
    """gelu(x @ weight.T + bias): a linear layer and its activation (Hendrycks & Gimpel, arXiv:1606.08415).

    Under autocast as `ops.linear`. For the backward the arguments and the pre-activation are kept, not the
    activation.

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
    check_choice("linear_gelu", "approximate", approximate, APPROXIMATE)
    rows, w, b, backend = as_rows("linear_gelu", x, weight, bias)
    y = _LinearGelu.apply(rows, w, b, approximate == "tanh", backend)
    return y.view(*x.shape[:-1], weight.shape[0])
