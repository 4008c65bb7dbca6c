"""Benchmark of linear: x @ weight.T + bias."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as T
from torch import Tensor

from bench.harness.cases import Case, Function, Op
from bench.harness.peers import compiled, eager
from fastgpt import ops


def inputs(case: Case, device: torch.device) -> list[Tensor]:
    weight = case.randn("F", "C", scale=case.dims["C"] ** -0.5, device=device)
    return [case.randn("N", "C", device=device), weight, case.randn("F", device=device)]


def ours(case: Case) -> Function:
    return ops.linear


def pytorch(case: Case) -> Function:
    return T.linear


def flops(case: Case) -> tuple[float, float]:
    """Count one product forward and two backward."""
    product = 2 * case.dims["N"] * case.dims["C"] * case.dims["F"]
    return product, 3 * product


def moved(case: Case) -> tuple[float, float]:
    """Count reads of x and weight and a write of the result forward.

    Backward reads both and the upstream gradient, and writes two gradients.
    """
    layer = (case.dims["N"] + case.dims["F"]) * case.dims["C"] * case.itemsize
    size = case.dims["N"] * case.dims["F"] * case.itemsize
    return layer + size, 3 * layer + 2 * size


def min_peak_bytes(case: Case) -> float:
    """Count the result and the gradients of x and weight."""
    n, c, f = (case.dims[letter] for letter in "NCF")
    return (n * f + (n + f) * c) * case.itemsize


OP = Op(
    name="linear",
    shapes={
        "tiny": [{"N": 40, "C": 32, "F": 64}],
        "quick": [{"N": 1024, "C": 768, "F": 2304}],
        "cpu": [{"N": 4096, "C": 768, "F": 2304}],
        "gpu": [{"N": 16384, "C": 768, "F": 2304}],
    },
    inputs=inputs,
    ours=ours,
    pytorch=pytorch,
    peers=[eager(pytorch), compiled(pytorch)],
    flops=flops,
    bytes=moved,
    min_peak_bytes=min_peak_bytes,
)


def bench_linear(case: Case, run: Any) -> None:
    run(OP, case)
