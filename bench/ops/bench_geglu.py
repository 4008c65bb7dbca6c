"""Benchmark of geglu: the product of GELU(a) and b."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as T
from torch import Tensor

from bench.harness.cases import Case, Function, Op, Peer
from bench.harness.peers import MissingError, compiled, eager, require
from bench.ops.bench_gelu import SHAPES
from fastgpt import ops


def inputs(case: Case, device: torch.device) -> list[Tensor]:
    return [case.randn("N", "C", device=device), case.randn("N", "C", device=device)]


def ours(case: Case) -> Function:
    return lambda a, b: ops.geglu(a, b, case.options["approximate"])


def pytorch(case: Case) -> Function:
    return lambda a, b: T.gelu(a, approximate=case.options["approximate"]) * b


def liger(case: Case) -> Function:
    if case.options["approximate"] != "tanh":
        raise MissingError("supports the tanh approximation only")
    # It calls tanh of libdevice, which Triton's interpreter does not support.
    return require("liger_kernel.transformers.functional", "liger-kernel", gpu=True).liger_geglu


def flops(case: Case) -> tuple[float, float]:
    """Count 6 operations forward and 13 backward, approximately; erf, tanh and exp are one operation each."""
    size = case.dims["N"] * case.dims["C"]
    return 6 * size, 19 * size


def moved(case: Case) -> tuple[float, float]:
    """Count two reads and one write forward, three reads and two writes backward."""
    size = case.dims["N"] * case.dims["C"] * case.itemsize
    return 3 * size, 8 * size


def min_peak_bytes(case: Case) -> float:
    """Count the result and the two gradients."""
    return 3 * case.dims["N"] * case.dims["C"] * case.itemsize


OP = Op(
    name="geglu",
    shapes=SHAPES,
    inputs=inputs,
    ours=ours,
    pytorch=pytorch,
    peers=[
        eager(pytorch),
        compiled(pytorch),
        Peer("Liger-Kernel", "liger-kernel", liger, mutates=True),
    ],
    flops=flops,
    bytes=moved,
    min_peak_bytes=min_peak_bytes,
    options=[{"approximate": "none"}, {"approximate": "tanh"}],
)


def bench_geglu(case: Case, run: Any) -> None:
    run(OP, case)
