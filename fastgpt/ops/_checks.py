"""The checks that the ops share, one message each, raised before any memory is touched.

The public functions check what their callers pass. `Checks` does so for the registered ops, torch.ops.fastgpt.X_fwd_b,
which can be called without them: by torch.export'ed programs, TorchScript, other packages.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ._transforms import active, check_no_transform

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
ANY = -1  # matches every size


class Checks:
    """The checks of a registered op's tensors, made before every implementation in Python.

    The compiled implementations make the same, by the same names: csrc/cpu/checks.h, csrc/cuda/checks.cuh.

    Args:
        op: the op's name with its backend, such as "gelu_bwd_triton".
        name, main: the argument that the others are compared with: of a dtype that the backend computes in.
        sizes: those of `main`, ANY for any; None for any number of them.

    Raises:
        ValueError: a size or a device is not as said.
        TypeError: a dtype is not.
    """

    __slots__ = ("device", "floats", "main", "op")

    def __init__(self, op: str, name: str, main: Tensor, sizes: tuple[int, ...] | None = None) -> None:
        self.op, self.main, self.device = op, main, main.device
        self.floats = FLOATS[:3] if op.endswith(("_triton", "_cuda")) else FLOATS
        self(name, main, main.shape if sizes is None else sizes, *self.floats)

    def __call__(self, name: str, t: Tensor | None, sizes: tuple[int, ...], *dtypes: torch.dtype) -> Checks:
        """Check that an argument, if it is given, has these sizes, one of these dtypes, and is on main's device."""
        if t is None:
            return self
        if t.device != self.device:
            raise ValueError(f"{self.op}: {name} must be on {self.device}, got {t.device}")
        if t.shape != sizes and not _match(t.shape, sizes):
            wanted = f"{list(sizes)} (-1: any)" if ANY in sizes else f"{list(sizes)}"
            raise ValueError(f"{self.op}: {name} must have the sizes {wanted}, got {list(t.shape)}")
        if t.dtype not in dtypes:
            wanted = " or ".join(map(str, dtypes))
            raise TypeError(f"{self.op}: {name} must have the dtype {wanted}, got {t.dtype}")
        return self

    def like(self, name: str, t: Tensor | None) -> Checks:
        """Check that an argument, if it is given, has the sizes and the dtype of the main one."""
        return self(name, t, self.main.shape, self.main.dtype)


def _match(shape: torch.Size, sizes: tuple[int, ...]) -> bool:
    if len(shape) != len(sizes):
        return False
    for n, wanted in zip(shape, sizes, strict=True):  # noqa: SIM110  (a third of the time of `all`)
        if wanted not in (ANY, n):
            return False
    return True


def check_tensors(op: str, **tensors: Any) -> None:
    """Every argument is a dense tensor, and all are on one device. None is allowed and skipped.

    Raises:
        TypeError: an argument is not a tensor.
        ValueError: layouts or devices do not fit.
        BackendUnavailable: a transform is active that the op has no rule for.
    """
    if (transform := active()) is not None:
        check_no_transform(op, transform, tensors)
    first: tuple[str, Tensor] | None = None
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{op}: {name} must be a torch.Tensor, got {type(tensor).__name__}")
        if tensor.layout != torch.strided or tensor.is_nested:
            raise ValueError(f"{op}: {name} must be a dense tensor, got layout {tensor.layout}")
        if first is None:
            first = name, tensor
        elif tensor.device != first[1].device:
            raise ValueError(
                f"{op}: {name} is on {tensor.device} but {first[0]} is on {first[1].device}; move them to one device"
            )


def check_floating(op: str, **tensors: Tensor | None) -> None:
    """Every tensor has one of the dtypes that the kernels compute in.

    Raises:
        TypeError: it has not.
    """
    for name, tensor in tensors.items():
        if tensor is not None and tensor.dtype not in FLOATS:
            raise TypeError(f"{op}: {name} must be float32, bfloat16, float16 or float64, got {tensor.dtype}")


def check_same_dtype(op: str, **tensors: Tensor | None) -> None:
    """All tensors have one dtype.

    Raises:
        TypeError: they have not.
    """
    first = next((tensor.dtype for tensor in tensors.values() if tensor is not None), None)
    if any(tensor is not None and tensor.dtype != first for tensor in tensors.values()):
        given = {name: tensor.dtype for name, tensor in tensors.items() if tensor is not None}
        listed = ", ".join(f"{name} {dtype}" for name, dtype in given.items())
        raise TypeError(f"{op}: the dtypes must be equal, got {listed}")


def check_last_dim(op: str, size: int, **vectors: Tensor | None) -> None:
    """Each vector has the shape (size,).

    Raises:
        ValueError: it has not.
    """
    for name, vector in vectors.items():
        if vector is not None and (vector.dim() != 1 or vector.shape[0] != size):
            raise ValueError(f"{op}: {name} must have shape ({size},), got {tuple(vector.shape)}")


def check_choice(op: str, name: str, value: Any, choices: tuple[str, ...]) -> None:
    """The value is one of the choices.

    Raises:
        ValueError: it is not.
    """
    if value not in choices:
        raise ValueError(f"{op}: {name} must be one of {', '.join(map(repr, choices))}, got {value!r}")


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """Return the dtype of the active autocast on the device, or None."""
    # is_autocast_enabled raises for meta.
    if device.type == "meta" or not torch.is_autocast_enabled(device.type):
        return None
    return torch.get_autocast_dtype(device.type)


def distinct(first: Tensor, *others: Tensor) -> tuple[Tensor, ...]:
    """The tensors, aliased where one stands twice: Dynamo wants the inputs of an autograd function distinct."""
    if not torch.compiler.is_compiling():
        return first, *others
    found = [first]
    for t in others:
        found.append(t.view_as(t) if any(t is f for f in found) else t)
    return tuple(found)


def unit_stride(t: Tensor) -> Tensor:
    """The tensor, copied unless its last dimension has the stride 1.

    `Tensor.contiguous` is not enough: PyTorch counts an empty tensor, or one whose last dimension has size 1, as
    contiguous regardless of its strides.
    """
    return t if t.stride(-1) == 1 else t.clone(memory_format=torch.contiguous_format)


def no_float64_on_gpu_backends(backend: str, dtype: torch.dtype) -> str | None:
    """The reason why a GPU backend refuses float64, or None."""
    if backend in ("triton", "cuda") and dtype == torch.float64:
        return f"the {backend} kernels compute in float32; float64 is served by cpp and reference"
    return None


def check_tokens(idx: Tensor) -> None:
    """Raise ValueError unless idx is a (B, T) tensor of integers."""
    if idx.dim() != 2 or idx.is_floating_point() or idx.is_complex() or idx.dtype == torch.bool:
        raise ValueError(f"idx must be a (B, T) tensor of integers, not {tuple(idx.shape)} of {idx.dtype}")
