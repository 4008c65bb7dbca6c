"""Functions that all kernels share: tanh and a reciprocal on the device, and properties of the GPU on the host."""

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
    """Return 1 / x of x > 0 to 2 ulp, and 0 of inf, in two instructions.

    An IEEE division, which handles subnormals, takes six.
    """
    r = tl.rsqrt(x)
    return r * r


@triton.jit
def tanh(x):
    """Return tanh(x) in fp32 to 2 ulp, with one exp. Triton has no tanh that its interpreter can run.

    1 - 2 / (exp(2x) + 1) cancels near 0. For |x| < 0.6 there is a polynomial (odd, of degree 11, fitted to the relative
    error) instead. The result saturates to ±1 without NaN: exp(2x) may be inf.
    """
    z = x * x
    p = ((((-0.00590587 * z + 0.02080539) * z - 0.05378668) * z + 0.13331958) * z - 0.33333299) * z
    return tl.where(tl.abs(x) < 0.6, x + x * p, 1.0 - 2.0 * reciprocal(tl.exp2(x * (2.0 * LOG2E)) + 1.0))


def on_device_of(x: Tensor) -> AbstractContextManager[object]:
    """Make the tensor's GPU the current one, on which Triton launches; nothing to do if there is only one."""
    return torch.cuda.device_of(x) if x.is_cuda and _gpus() > 1 else _NOTHING


_NOTHING = contextlib.nullcontext()  # may be entered any number of times


@functools.cache
def _gpus() -> int:
    return torch.cuda.device_count()


def capability(x: Tensor) -> tuple[int, int] | None:
    """Return the compute capability of the tensor's GPU; None for a CPU tensor, in Triton's interpreter."""
    return _capability(x.device.index) if x.is_cuda else None


@functools.cache
def _capability(index: int) -> tuple[int, int]:
    return torch.cuda.get_device_capability(index)


def multiprocessors(x: Tensor) -> int:
    """Return the number of multiprocessors of the tensor's GPU; 16 for a CPU tensor, in the interpreter."""
    return _multiprocessors(x.device.index) if x.is_cuda else 16


@functools.cache
def _multiprocessors(index: int) -> int:
    return int(torch.cuda.get_device_properties(index).multi_processor_count)


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """Return the least power of 2 that is at least n. `triton.next_power_of_2` takes 2 microseconds on the host."""
    return 1 << max(n - 1, 0).bit_length()


def is_tf32(x: torch.Tensor) -> bool:
    """Return whether PyTorch's switch allows products of x in tf32, which tensor cores multiply.

    `allow_tf32`, the switch's older name, raises once the newer one has been set.
    """
    return x.dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32"
