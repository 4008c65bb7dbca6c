"""Products of Triton's interpreter whose bits depend neither on the layout of the operands nor on the CPU.

A backward computes the scores of its forward again, transposed, and must get the same numbers (docs/design.md says why
it does on a GPU). numpy adds up the terms in an order of its own, which on a CPU without AVX-512 was seen to differ
between the two. In float64, rounded once, the order does not show.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle


def patch_interpreter_products() -> None:
    """Patches the interpreter of this process, before `patch_interpreter_bf16`; calling it again changes nothing."""
    former = InterpreterBuilder.create_dot
    if hasattr(former, "__wrapped__"):
        return

    @functools.wraps(former)
    def create_dot(self: InterpreterBuilder, a: Any, b: Any, acc: Any, *rest: Any) -> TensorHandle:
        floats = all(np.issubdtype(x.data.dtype, np.floating) for x in (a, b))
        if acc.data.dtype != np.float32 or not floats:
            return former(self, a, b, acc, *rest)
        with np.errstate(over="ignore", invalid="ignore"):
            product = np.matmul(a.data.astype(np.float64), b.data.astype(np.float64)).astype(np.float32)
            return TensorHandle(product + acc.data, acc.dtype.scalar)

    InterpreterBuilder.create_dot = create_dot
