"""Gives Triton's interpreter what it has not (triton 3.6 to 3.9): addition to memory through a tensor descriptor.

In the interpreter, kernels that add this way are launched only with this patch; otherwise they use pointers.
"""

from __future__ import annotations

from typing import Any

import triton.language as tl
from triton._C.libtriton import ir
from triton.runtime.interpreter import InterpreterBuilder, TensorDescHandle, TensorHandle


def _create_descriptor_reduce(
    self: InterpreterBuilder,
    kind: Any,
    desc: TensorDescHandle,
    value: TensorHandle,
    indices: list[TensorHandle],
) -> None:
    assert kind == ir.DESCRIPTOR_REDUCE_KIND.ADD
    assert value.dtype.scalar == tl.float32
    pointers, mask = desc.materialize_pointers(indices)
    m = TensorHandle(mask, tl.int1)
    self.create_atomic_rmw(ir.ATOMIC_OP.FADD, pointers, value, m, ir.MEM_SEMANTIC.RELAXED, None)


def patch_interpreter_descriptors() -> None:
    """Patches the interpreter of this process; calling it again changes nothing."""
    InterpreterBuilder.create_descriptor_reduce = _create_descriptor_reduce
