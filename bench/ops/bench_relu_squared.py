"""Benchmark of relu_squared: the square of ReLU."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as T
from torch import Tensor

from bench.harness.cases import Case, Function, Op
from bench.harness.peers import compiled, eager
from bench.ops.bench_gelu import SHAPES
from fastgpt import ops


def inputs(case: Case, device: torch.device) -> list[Tensor]:
    return [case.randn("N", "C", device=device)]


def ours(case: Case) -> Function:
    return ops.relu_squared


def pytorch(case: Case) -> Function:
    return lambda x: T.relu(x).square()


def flops(case: Case) -> tuple[float, float]:
    """Count 2 operations forward and 3 backward."""
    size = case.dims["N"] * case.dims["C"]
    return 2 * size, 5 * size


def moved(case: Case) -> tuple[float, float]:
    """Count one read and one write forward, two reads and one write backward."""
    size = case.dims["N"] * case.dims["C"] * case.itemsize
    return 2 * size, 5 * size


def min_peak_bytes(case: Case) -> float:
    """Count the result and the gradient."""
    return 2 * case.dims["N"] * case.dims["C"] * case.itemsize


OP = Op(
    name="relu_squared",
    shapes=SHAPES,
    inputs=inputs,
    ours=ours,
    pytorch=pytorch,
    peers=[eager(pytorch), compiled(pytorch)],
    flops=flops,
    bytes=moved,
    min_peak_bytes=min_peak_bytes,
)


def bench_relu_squared(case: Case, run: Any) -> None:
    run(OP, case)
