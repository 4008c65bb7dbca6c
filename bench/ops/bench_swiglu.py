"""Benchmark of swiglu: the product of SiLU(a) and b."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as T
from torch import Tensor

from bench.harness.cases import Case, Function, Op, Peer
from bench.harness.peers import compiled, eager, require
from fastgpt import ops


def inputs(case: Case, device: torch.device) -> list[Tensor]:
    return [case.randn("N", "C", device=device), case.randn("N", "C", device=device)]


def ours(case: Case) -> Function:
    return ops.swiglu


def pytorch(case: Case) -> Function:
    return lambda a, b: T.silu(a) * b


def liger(case: Case) -> Function:
    return require("liger_kernel.transformers.functional", "liger-kernel", gpu=True).liger_swiglu


def flops(case: Case) -> tuple[float, float]:
    """Count 5 operations forward and 11 backward, approximately; exp and a division are one operation each."""
    size = case.dims["N"] * case.dims["C"]
    return 5 * size, 16 * size


def moved(case: Case) -> tuple[float, float]:
    """Count two reads and one write forward, three reads and two writes backward."""
    size = case.dims["N"] * case.dims["C"] * case.itemsize
    return 3 * size, 8 * size


def min_peak_bytes(case: Case) -> float:
    """Count the result and the two gradients."""
    return 3 * case.dims["N"] * case.dims["C"] * case.itemsize


OP = Op(
    name="swiglu",
    shapes={
        "tiny": [{"N": 8, "C": 64}],
        "quick": [{"N": 4096, "C": 2048}],
        "cpu": [{"N": 4096, "C": 8192}],
        "gpu": [{"N": 16384, "C": 8192}, {"N": 16384, "C": 14336}],
    },
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
)


def bench_swiglu(case: Case, run: Any) -> None:
    run(OP, case)
