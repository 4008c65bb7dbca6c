"""What the kernels share: a tanh, and what a launcher asks of a device."""

from __future__ import annotations

import contextlib
import functools
from contextlib import AbstractContextManager

import torch
import triton
import triton.language as tl
from torch import Tensor

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def reciprocal(x):
    """1 / x of a positive x to 2 ulp, 0 of inf: two instructions, where a division that fears subnormals has six."""
    r = tl.rsqrt(x)
    return r * r


@triton.jit
def tanh(x):
    """tanh in fp32 to 2 ulp, from one exp, since Triton has none that its interpreter can run.

    1 - 2 / (exp(2x) + 1) cancels near 0, so that a polynomial (odd, degree 11, fitted to the relative error)
    takes over for |x| < 0.6. Saturates to ±1 without NaN: exp(2x) may be inf.
    """
    z = x * x
    p = ((((-0.00590587 * z + 0.02080539) * z - 0.05378668) * z + 0.13331958) * z - 0.33333299) * z
    return tl.where(tl.abs(x) < 0.6, x + x * p, 1.0 - 2.0 * reciprocal(tl.exp2(x * (2.0 * LOG2E)) + 1.0))


def on_device_of(x: Tensor) -> AbstractContextManager[object]:
    """Triton launches on the current device, which need not be the tensors' where there are several."""
    return torch.cuda.device_of(x) if x.is_cuda and _gpus() > 1 else _NOTHING


_NOTHING = contextlib.nullcontext()  # may be entered again and again


@functools.cache
def _gpus() -> int:
    return torch.cuda.device_count()


def capability(x: Tensor) -> tuple[int, int] | None:
    """The compute capability of the tensor's GPU; None for a CPU tensor, which only the interpreter takes."""
    return _capability(x.device.index) if x.is_cuda else None


@functools.cache
def _capability(index: int) -> tuple[int, int]:
    return torch.cuda.get_device_capability(index)


def multiprocessors(x: Tensor) -> int:
    """Of the tensor's GPU; 16 for a CPU tensor, to try in the interpreter what is chosen by it."""
    return _multiprocessors(x.device.index) if x.is_cuda else 16


@functools.cache
def _multiprocessors(index: int) -> int:
    return int(torch.cuda.get_device_properties(index).multi_processor_count)


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """Without the 2 microseconds that Triton's own takes on the host."""
    return 1 << max(n - 1, 0).bit_length()


def is_tf32(x: torch.Tensor) -> bool:
    """Whether x's products may be rounded to tf32, for which there are tensor cores: PyTorch's own switch.

    `allow_tf32`, the older name of the same, raises where the newer one was set.
    """
    return x.dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32"
