"""Detection of PyTorch's active transforms: torch.func, forward mode, vmap of a backward, second derivatives.

The registered ops have no batching rule and no forward derivative. The drop-in asks `active` and leaves such a call to
PyTorch's function; `fastgpt.ops` refuses it; a backward differentiates the reference then.
"""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.autograd import forward_ad

from ..backends import refuse

_functorch_is_active = torch._C._are_functorch_transforms_active
_tracing_state = torch._C._get_tracing_state

_FUNC = "a torch.func transform is active"
_FORWARD = "forward-mode differentiation is active"


def active() -> str | None:
    """The transform that the ops have no rule for, in words, or None.

    While Dynamo traces code inside a transform, that transform is active. Dynamo calls this function at trace time and
    treats the result as a constant, which is safe because it already guards the state of both transforms.
    """
    if _functorch_is_active():
        return _FUNC
    if forward_ad._current_level >= 0:
        return _FORWARD
    return None


# What `torch.compiler.assume_constant_result` sets; calling that would import all of Dynamo, and Triton with it.
active._dynamo_marked_constant = True  # type: ignore[attr-defined]


def unserved() -> str | None:
    """`active`, or that torch.jit.trace records operators; why the drop-in leaves everything to PyTorch, or None."""
    if _functorch_is_active():
        return _FUNC
    if forward_ad._current_level >= 0:
        return _FORWARD
    if _tracing_state() is not None:
        return "torch.jit.trace records operators, to save and run them without Python"
    return None


unserved._dynamo_marked_constant = True  # type: ignore[attr-defined]

# The functions of the drop-in that compute what an op does.
_DROP_IN = {
    "attention": "scaled_dot_product_attention",
    "add_layer_norm": "layer_norm",
    "rms_norm": "rms_norm",
    "cross_entropy": "cross_entropy",
    "linear_cross_entropy": "linear_cross_entropy",
    "gelu": "gelu",
}


def check_no_transform(op: str, transform: str, tensors: dict[str, Any]) -> None:
    """Raise BackendUnavailable under a transform of torch.func, or where forward mode has a tangent to carry on."""
    if transform == _FUNC or any(has_tangent(t) for t in tensors.values()):
        _refuse(op, transform)


def _refuse(op: str, transform: str) -> NoReturn:
    instead = f"fastgpt.functional.{_DROP_IN[op]}" if op in _DROP_IN else f"fastgpt.reference.{op}"
    refuse(
        op,
        f"{transform}, and fastgpt.ops.{op} has no rule for it; call {instead}, which runs PyTorch's operators",
    )


def has_tangent(tensor: Any) -> bool:
    """Return whether a tensor is a dual number of the current forward-mode level."""
    if forward_ad._current_level < 0 or not isinstance(tensor, Tensor):
        return False
    return forward_ad.unpack_dual(tensor).tangent is not None


def is_batched(grad: Tensor) -> bool:
    """Return whether an upstream gradient is a batch under the vmap of `torch.autograd.grad(is_grads_batched=True)`."""
    return not torch.compiler.is_compiling() and torch._C._functorch.is_legacy_batchedtensor(grad)


def twice_differentiable(*grads: Tensor | None) -> bool:
    """Return whether the running backward must itself be differentiable: then it differentiates the reference.

    It must with `create_graph=True`, under transforms of torch.func, and where an upstream gradient has a tangent, of
    which the result then has one too.
    """
    transform = active()
    differentiates = torch.is_grad_enabled() or transform == _FUNC
    if transform is not None and not differentiates:
        differentiates = any(map(has_tangent, grads))
    return differentiates and not torch.compiler.is_compiling()
