"""The square of ReLU: contract, registration, autograd."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import reference
from ..backends import select
from ._checks import Checks, check_floating, check_tensors, no_float64_on_gpu_backends
from ._library import define, vjp
from ._transforms import twice_differentiable

_FWD = define(
    "relu_squared_fwd",
    "(Tensor x) -> Tensor",
    fake=torch.empty_like,
    reference=reference.relu_squared,
    check=lambda op, x: Checks(op, "x", x),
    module="relu_squared",
)
_BWD = define(
    "relu_squared_bwd",
    "(Tensor grad, Tensor x) -> Tensor",
    fake=lambda grad, x: torch.empty_like(x),
    reference=lambda grad, x: vjp(reference.relu_squared, (x,), grad)[0],
    check=lambda op, grad, x: Checks(op, "x", x).like("grad", grad),
    module="relu_squared",
)


class _ReluSquared(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, backend: str) -> Tensor:
        ctx.save_for_backward(x)
        ctx.backend = backend
        return _FWD[backend](x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (x,) = ctx.saved_tensors
        if twice_differentiable(grad):
            return *vjp(reference.relu_squared, (x,), grad, create_graph=True), None
        return _BWD[ctx.backend](grad.contiguous(), x), None


def relu_squared(x: Tensor) -> Tensor:
    """max(x, 0)², elementwise (So et al., "Primer", arXiv:2109.08668); max(x, 0) is not stored.

    Args:
        x: any shape and strides; float32, bfloat16, float16, float64.

    Returns:
        Contiguous, of x's shape and dtype.

    Raises:
        TypeError: x is not a floating tensor.
        BackendUnavailable: the chosen backend cannot run this case.
    """
    check_tensors("relu_squared", x=x)
    check_floating("relu_squared", x=x)
    backend = select("relu_squared", x.device, lambda b: no_float64_on_gpu_backends(b, x.dtype))
    return _ReluSquared.apply(x.contiguous(), backend)
