"""SwiGLU, a linear unit gated by SiLU: contract, registration, autograd."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import reference
from ..backends import select
from ._checks import (
    Checks,
    check_floating,
    check_same_dtype,
    check_tensors,
    distinct,
    no_float64_on_gpu_backends,
)
from ._library import define, vjp
from ._transforms import twice_differentiable

_FWD = define(
    "swiglu_fwd",
    "(Tensor a, Tensor b) -> Tensor",
    fake=lambda a, b: torch.empty_like(a),
    reference=reference.swiglu,
    check=lambda op, a, b: Checks(op, "a", a).like("b", b),
    module="swiglu",
)
_BWD = define(
    "swiglu_bwd",
    "(Tensor grad, Tensor a, Tensor b) -> (Tensor, Tensor)",
    fake=lambda grad, a, b: (torch.empty_like(a), torch.empty_like(b)),
    reference=lambda grad, a, b: vjp(reference.swiglu, (a, b), grad),
    check=lambda op, grad, a, b: Checks(op, "a", a).like("b", b).like("grad", grad),
    module="swiglu",
)


class _Swiglu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor, backend: str) -> Tensor:
        ctx.save_for_backward(a, b)
        ctx.backend = backend
        return _FWD[backend](a, b)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        a, b = ctx.saved_tensors
        if twice_differentiable(grad):
            return *vjp(reference.swiglu, (a, b), grad, create_graph=True), None
        return *_BWD[ctx.backend](grad.contiguous(), a, b), None


def swiglu(a: Tensor, b: Tensor) -> Tensor:
    """silu(a)·b, elementwise (Shazeer, arXiv:2002.05202); silu(a) = a·sigmoid(a) is neither stored nor rounded.

    In that paper a = x @ W and b = x @ V. Where one product gives both, they are the halves of its last
    dimension, `a, b = h.chunk(2, dim=-1)`; what is not contiguous is copied.

    Args:
        a: the gate; any shape and strides; float32, bfloat16, float16, float64.
        b: a's shape and dtype, any strides.

    Returns:
        Contiguous, of a's shape and dtype.

    Raises:
        TypeError: an argument is not a floating tensor, or the dtypes differ.
        ValueError: the shapes differ.
        BackendUnavailable: the chosen backend cannot run this case.
    """
    check_tensors("swiglu", a=a, b=b)
    check_floating("swiglu", a=a, b=b)
    check_same_dtype("swiglu", a=a, b=b)
    if a.shape != b.shape:
        raise ValueError(f"swiglu: b must have a's shape {tuple(a.shape)}, got {tuple(b.shape)}")
    backend = select("swiglu", a.device, lambda backend: no_float64_on_gpu_backends(backend, a.dtype))
    return _Swiglu.apply(*distinct(a.contiguous(), b.contiguous()), backend)
