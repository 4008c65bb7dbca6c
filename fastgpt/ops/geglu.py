"""GEGLU, a linear unit gated by GELU: contract, registration, autograd."""

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
    check_same_dtype,
    check_tensors,
    distinct,
    no_float64_on_gpu_backends,
)
from ._library import define, vjp
from ._transforms import twice_differentiable
from .gelu import APPROXIMATE

_FWD = define(
    "geglu_fwd",
    "(Tensor a, Tensor b, bool tanh) -> Tensor",
    fake=lambda a, b, tanh: torch.empty_like(a),
    reference=reference.geglu,
    check=lambda op, a, b, tanh: Checks(op, "a", a).like("b", b),
    module="gelu",
)
_BWD = define(
    "geglu_bwd",
    "(Tensor grad, Tensor a, Tensor b, bool tanh) -> (Tensor, Tensor)",
    fake=lambda grad, a, b, tanh: (torch.empty_like(a), torch.empty_like(b)),
    reference=lambda grad, a, b, tanh: vjp(lambda a, b: reference.geglu(a, b, tanh), (a, b), grad),
    check=lambda op, grad, a, b, tanh: Checks(op, "a", a).like("b", b).like("grad", grad),
    module="gelu",
)


class _Geglu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor, tanh: bool, backend: str) -> Tensor:
        ctx.save_for_backward(a, b)
        ctx.tanh, ctx.backend = tanh, backend
        return _FWD[backend](a, b, tanh)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        a, b = ctx.saved_tensors
        if twice_differentiable(grad):
            function = lambda a, b: reference.geglu(a, b, ctx.tanh)  # noqa: E731
            return *vjp(function, (a, b), grad, create_graph=True), None, None
        return *_BWD[ctx.backend](grad.contiguous(), a, b, ctx.tanh), None, None


def geglu(a: Tensor, b: Tensor, approximate: str = "none") -> Tensor:
    """gelu(a)·b, elementwise (Shazeer, arXiv:2002.05202); gelu(a) is neither stored nor rounded.

    In that paper a = x @ W and b = x @ V. Where one product gives both, they are the halves of its last
    dimension, `a, b = h.chunk(2, dim=-1)`; what is not contiguous is copied.

    Args:
        a: the gate; any shape and strides; float32, bfloat16, float16, float64.
        b: a's shape and dtype, any strides.
        approximate: "none" for the exact GELU (erf) or "tanh".

    Returns:
        Contiguous, of a's shape and dtype.

    Raises:
        TypeError: an argument is not a floating tensor, or the dtypes differ.
        ValueError: the shapes differ, or approximate is neither.
        BackendUnavailable: the chosen backend cannot run this case.
    """
    check_tensors("geglu", a=a, b=b)
    check_floating("geglu", a=a, b=b)
    check_same_dtype("geglu", a=a, b=b)
    check_choice("geglu", "approximate", approximate, APPROXIMATE)
    if a.shape != b.shape:
        raise ValueError(f"geglu: b must have a's shape {tuple(a.shape)}, got {tuple(b.shape)}")
    backend = select("geglu", a.device, lambda backend: no_float64_on_gpu_backends(backend, a.dtype))
    return _Geglu.apply(*distinct(a.contiguous(), b.contiguous()), approximate == "tanh", backend)
