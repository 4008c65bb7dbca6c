"""Two linear layers with GELU between them: contract, registration, autograd.

The forward is linear_gelu's and linear's. As one op the backward knows the product that makes the activation's
gradient, so that GELU's derivative can stand in its epilogue: so it is in CUDA where cuBLASLt does it (tanh, 16 bits),
and that gradient is never in memory. Elsewhere it is linear's product and linear_gelu's pass.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import reference
from ._checks import ANY, Checks, check_choice
from ._library import define, vjp
from ._transforms import twice_differentiable
from .gelu import APPROXIMATE
from .linear import LINEAR_BWD, LINEAR_FWD, as_rows
from .linear_gelu import LinearGelu
from .linear_gelu import _backward as _linear_gelu_bwd
from .linear_gelu import _forward as _linear_gelu_fwd


def _check_bwd(op: str, grad: Tensor, z: Tensor, weight: Tensor, tanh: bool, with_bias: bool) -> None:
    check = Checks(op, "z", z, (ANY, ANY))("weight", weight, (ANY, z.shape[1]), z.dtype)
    check("grad", grad, (z.shape[0], weight.shape[0]), z.dtype)


def _fake_bwd(grad: Tensor, z: Tensor, weight: Tensor, tanh: bool, with_bias: bool) -> tuple[Tensor, Tensor]:
    return torch.empty_like(z), z.new_empty(z.shape[1] if with_bias else 0)


def _reference_bwd(
    grad: Tensor, z: Tensor, weight: Tensor, tanh: bool, with_bias: bool
) -> tuple[Tensor, Tensor]:
    function = lambda z, b: reference.linear(reference.bias_gelu(z, b, tanh), weight, None)  # noqa: E731
    dz, dbias = vjp(function, (z, z.new_zeros(z.shape[1])), grad)
    return dz.contiguous(), dbias if with_bias else z.new_empty(0)


# On rows: grad (M, C) of the second layer's result, the pre-activation z (M, N) and the second layer's weight (C, N) in
# one dtype. dz, which is (grad @ weight) * gelu'(z), and its sum over the rows, the first layer's dbias.
_MLP_BWD = define(
    "mlp_bwd",
    "(Tensor grad, Tensor z, Tensor weight, bool tanh, bool with_bias) -> (Tensor, Tensor)",
    fake=_fake_bwd,
    reference=_reference_bwd,
    check=_check_bwd,
    module=None,
)


def _backward(
    grad: Tensor, z: Tensor, bias1: Tensor | None, weight2: Tensor, tanh: bool, backend: str
) -> tuple[Tensor, Tensor | None]:
    if backend == "cpp":
        dy, _, _ = LINEAR_BWD[backend](grad, z, weight2, True, False, False)
        return _linear_gelu_bwd(dy, z, bias1, tanh, backend)
    dz, dbias = _MLP_BWD[backend](grad, z, weight2, tanh, bias1 is not None)
    return dz, None if bias1 is None else dbias.to(bias1.dtype)


class _MLP(torch.autograd.Function):
    """On rows: x (M, K). Kept are the pre-activation z and the activation y, both (M, N)."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight1: Tensor,
        bias1: Tensor | None,
        weight2: Tensor,
        bias2: Tensor | None,
        tanh: bool,
        with_z: bool,
        backend: str,
    ) -> Tensor:
        y, z = _linear_gelu_fwd(x, weight1, bias1, tanh, with_z, backend)
        ctx.save_for_backward(x, weight1, bias1, weight2, bias2, z, y)
        ctx.tanh, ctx.backend = tanh, backend
        return LINEAR_FWD[backend](y, weight2, bias2)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight1, bias1, weight2, bias2, z, y = ctx.saved_tensors
        if twice_differentiable(grad):
            function = lambda x, w1, b1, w2, b2: reference.mlp(x, w1, b1, w2, b2, ctx.tanh)  # noqa: E731
            inputs = (x, weight1, bias1, weight2, bias2)
            return *vjp(function, inputs, grad, create_graph=True), None, None, None
        needed = ctx.needs_input_grad[:5]
        found: list[Tensor | None] = [None] * 5
        if any(needed[3:]):
            found[3:] = LINEAR_BWD[ctx.backend](grad, y, weight2, False, *needed[3:])[1:]
        if any(needed[:3]):
            dz, found[2] = _backward(grad, z, bias1, weight2, ctx.tanh, ctx.backend)
            found[:2] = LINEAR_BWD[ctx.backend](dz, x, weight1, *needed[:2], False)[:2]
        return *(g if n else None for g, n in zip(found, needed, strict=True)), None, None, None


def mlp(
    x: Tensor,
    weight1: Tensor,
    bias1: Tensor | None,
    weight2: Tensor,
    bias2: Tensor | None,
    approximate: str = "none",
) -> Tensor:
    """gelu(x @ weight1.T + bias1) @ weight2.T + bias2: the MLP of a Transformer's layer (arXiv:1706.03762).

    Under autocast as `ops.linear`, but that bias1's gradient is rounded. For the backward the arguments, the
    pre-activation and the activation are kept.

    Args:
        x: (..., K), any strides; float32 (on a GPU tf32 where PyTorch's products may be), bfloat16, float16, float64.
        weight1: (N, K) as in `torch.nn.Linear`, any strides, x's dtype.
        bias1: (N,), x's dtype, or None.
        weight2: (C, N), any strides, x's dtype.
        bias2: (C,), x's dtype, or None.
        approximate: "none" for the exact GELU (erf) or "tanh" (Hendrycks & Gimpel, arXiv:1606.08415).

    Returns:
        (..., C), contiguous, in x's dtype (autocast's under autocast).

    Raises:
        TypeError: an argument is not a floating tensor, or the dtypes differ.
        ValueError: the shapes do not match, or approximate is neither.
        BackendUnavailable: the chosen backend cannot run this case.
    """
    check_choice("mlp", "approximate", approximate, APPROXIMATE)
    rows, layers, backend = as_rows("mlp", x, weight1=weight1, bias1=bias1, weight2=weight2, bias2=bias2)
    with_z = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (rows, *layers[:2]))
    if backend == "triton":  # which has no kernel of its own for the backward of both layers
        y = LinearGelu.apply(rows, *layers[:2], approximate == "tanh", with_z, backend)
        return torch.nn.functional.linear(y, *layers[2:]).view(*x.shape[:-1], weight2.shape[0])
    out = _MLP.apply(rows, *layers, approximate == "tanh", with_z, backend)
    return out.view(*x.shape[:-1], weight2.shape[0])
