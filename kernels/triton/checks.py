"""Checks of strides, at the beginning of every launcher.

Sizes, dtypes and devices are checked where the ops are registered (`Checks` in fastgpt/ops/_checks.py). The functions
here have the names of those in csrc/cuda/checks.cuh.
"""

from __future__ import annotations

from torch import Tensor


def contiguous(op: str, **tensors: Tensor | None) -> None:
    """Raise ValueError unless each tensor that is not None is contiguous."""
    for name, t in tensors.items():
        if t is not None and not t.is_contiguous():
            raise ValueError(f"{op}: {name} must be contiguous")


def rows_contiguous(op: str, **tensors: Tensor) -> None:
    """Raise ValueError unless the last dimension of each tensor is contiguous."""
    for name, t in tensors.items():
        if t.stride(-1) != 1 and t.shape[-1] > 1 and t.numel():
            raise ValueError(f"{op}: the rows of {name} must be contiguous")
