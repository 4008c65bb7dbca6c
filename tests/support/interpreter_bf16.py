"""Mends bf16 in Triton's interpreter, so that kernels can be tested there as they are written for the GPU.

The interpreter (triton 3.6 to 3.9) keeps bf16 as the uint16 of its bits, since numpy has no such type. Moving
such blocks about is right: loads, stores, reshapes and selections copy bits. Computing with them is not: a
product multiplies the bits as integers, `tl.dot` as well, and the cast from fp32 cuts the low bits off where
a GPU rounds to nearest even. `patch_interpreter_bf16()` wraps the arithmetic: operands become fp32, results
are rounded back.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpreterBuilder, ReduceOps, TensorHandle

# Methods of the builder that compute. Those of them that compare return bool, which is not rounded.
_ARITHMETIC = (
    *("binary_op", "unary_op", "ternary_op", "create_fma", "create_dot"),
    *("create_fabs", "create_rsqrt", "create_erf"),
)


def widen(bits: np.ndarray) -> np.ndarray:
    """bf16 bits to fp32: bf16 is the upper half of fp32."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def narrow(x: np.ndarray) -> np.ndarray:
    """fp32 to bf16 bits, to nearest even: plus almost half a unit, plus one if the last kept bit is odd."""
    bits = np.ascontiguousarray(x, dtype=np.float32).view(np.uint32)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(x), np.uint16(0x7FC0), rounded)  # NaN's mantissa might overflow to infinity


def _is_bf16(handle: Any) -> bool:
    # A comparison's result keeps its operands' dtype in the handle, hence the look at the data.
    return (
        isinstance(handle, TensorHandle)
        and handle.dtype.scalar == tl.bfloat16
        and handle.data.dtype == np.uint16
    )


def _widened(handle: Any) -> Any:
    return TensorHandle(widen(handle.data), tl.float32) if _is_bf16(handle) else handle


def _arithmetic(method: Callable[..., TensorHandle]) -> Callable[..., TensorHandle]:
    @functools.wraps(method)
    def mended(self: InterpreterBuilder, *args: Any) -> TensorHandle:
        # A dot's and an fma's result have the dtype of the last handle, every other's that of all of them.
        last = [a for a in args if isinstance(a, TensorHandle)][-1]
        result = method(self, *map(_widened, args))
        if _is_bf16(last) and np.issubdtype(result.data.dtype, np.floating):
            return TensorHandle(narrow(result.data), tl.bfloat16)
        return result

    return mended


def _cast(method: Callable[..., TensorHandle]) -> Callable[..., TensorHandle]:
    @functools.wraps(method)
    def mended(self: InterpreterBuilder, src: TensorHandle, dst_type: Any, *rounding: Any) -> TensorHandle:
        to_bf16 = dst_type.scalar == tl.bfloat16
        if not _is_bf16(src) and not to_bf16:
            return method(self, src, dst_type, *rounding)
        data = _widened(src).data
        if to_bf16:
            return TensorHandle(narrow(data.astype(np.float32)), tl.bfloat16)
        return TensorHandle(data.astype(interpreter._get_np_dtype(dst_type)), dst_type.scalar)

    return mended


def _reduction(method: Callable[..., Any]) -> Callable[..., Any]:
    """A sum or a maximum of bf16: in fp32, and rounded once."""

    @functools.wraps(method)
    def mended(self: ReduceOps, input: Any, *args: Any, **kwargs: Any) -> Any:
        if not isinstance(input, tl.tensor) or not _is_bf16(input.handle):
            return method(self, input, *args, **kwargs)
        wide = tl.tensor(_widened(input.handle), tl.block_type(tl.float32, list(input.shape)))
        result = method(self, wide, *args, **kwargs)
        if isinstance(result, tuple):  # (maximum, index)
            return _narrowed(result[0]), result[1]
        return _narrowed(result)

    return mended


def _narrowed(x: tl.tensor) -> tl.tensor:
    kind = tl.block_type(tl.bfloat16, list(x.shape)) if x.shape else tl.bfloat16
    return tl.tensor(TensorHandle(narrow(x.handle.data), tl.bfloat16), kind)


def patch_interpreter_bf16() -> None:
    """Patches the interpreter of this process; calling it again changes nothing."""
    if hasattr(InterpreterBuilder.create_fma, "__wrapped__"):
        return
    wraps = {name: _arithmetic for name in _ARITHMETIC} | {"cast_impl": _cast, "create_fp_to_fp": _cast}
    for name, wrap in wraps.items():
        setattr(InterpreterBuilder, name, wrap(getattr(InterpreterBuilder, name)))
    # Missing there: a bf16 constant other than 0.
    InterpreterBuilder.get_bf16 = lambda self, value: TensorHandle(
        narrow(np.array([value], dtype=np.float32)), tl.bfloat16
    )
    ReduceOps.sum = _reduction(ReduceOps.sum)
    ReduceOps.min_max = _reduction(ReduceOps.min_max)
