"""The decision whether PyTorch's own function serves a call of the drop-in or of an accelerated module."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._subclasses import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor

from ..backends import PYTORCH, select
from ._checks import FLOATS
from ._transforms import unserved

# A tensor subclass may define for itself what a function does; of these, the last two are plain tensors being traced.
_PLAIN = (Tensor, torch.nn.Parameter, FakeTensor, FunctionalTensor)


def plain_reason(*required: Any, optional: tuple[Any, ...] = ()) -> str | None:
    """Return why PyTorch must serve these arguments (for example tensors that are not dense), or None."""
    for tensor in (*required, *(t for t in optional if t is not None)):
        if type(tensor) not in _PLAIN:
            return f"an argument is a {type(tensor).__name__}, not a plain tensor"
        if tensor.layout != torch.strided or tensor.is_nested or tensor.is_quantized:
            return "an argument is sparse, nested or quantized"
        if tensor.device != required[0].device:
            return "the arguments are on different devices"
    if required[0].dtype not in FLOATS:
        return f"the dtype is {required[0].dtype}"
    return unserved()


def goes_to_pytorch(op: str, tensor: Any, reason: str | None, case: Callable[[str], str | None]) -> bool:
    """Return whether `torch.nn.functional` serves the call; `reason` says why no backend of fastgpt can."""
    device = tensor.device if isinstance(tensor, Tensor) else torch.device("cpu")
    return select(op, device, (lambda _: reason) if reason else case, drop_in=True) == PYTORCH
