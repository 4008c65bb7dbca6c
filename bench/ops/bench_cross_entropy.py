"""Benchmark of cross_entropy: softmax-cross-entropy of logits."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as T
from torch import Tensor

from bench.harness.cases import Case, Function, Op, Peer, Sweep
from bench.harness.peers import compiled, eager, require
from fastgpt import ops


def inputs(case: Case, device: torch.device) -> list[Tensor]:
    target = torch.randint(0, case.dims["V"], (case.dims["N"],), device=device)
    return [case.randn("N", "V", device=device), target]


def ours(case: Case) -> Function:
    return ops.cross_entropy


def pytorch(case: Case) -> Function:
    return T.cross_entropy


def liger(case: Case) -> Function:
    functional = require("liger_kernel.transformers.functional", "liger-kernel", triton=True)
    return functional.liger_cross_entropy


def quack(case: Case) -> Function:
    function = require("quack.cross_entropy", "quack-kernels", gpu=True).cross_entropy
    return lambda x, y: function(x, y, reduction="mean").to(x.dtype)


def flops(case: Case) -> tuple[float, float]:
    """Count maximum, subtraction, exponential and addition forward; subtraction, exponential and product backward."""
    size = case.dims["N"] * case.dims["V"]
    return 4 * size, 7 * size


def moved(case: Case) -> tuple[float, float]:
    """Count a read of the logits forward, and a second read and a write of their gradient backward."""
    size = case.dims["N"] * case.dims["V"] * case.itemsize
    return size, 3 * size


def min_peak_bytes(case: Case) -> float:
    """Count the gradient of the logits."""
    return case.dims["N"] * case.dims["V"] * case.itemsize


OP = Op(
    name="cross_entropy",
    shapes={
        "tiny": [{"N": 8, "V": 100}],
        "quick": [{"N": 1024, "V": 50257}],
        "cpu": [{"N": 2048, "V": 50257}, {"N": 16384, "V": 256}],
        "gpu": [{"N": 16384, "V": 50257}, {"N": 8192, "V": 128256}, {"N": 16384, "V": 32768}],
    },
    inputs=inputs,
    ours=ours,
    pytorch=pytorch,
    peers=[
        eager(pytorch),
        compiled(pytorch),
        Peer("Liger-Kernel", "liger-kernel", liger, mutates=True),
        Peer("QuACK", "quack-kernels", quack),
    ],
    flops=flops,
    bytes=moved,
    min_peak_bytes=min_peak_bytes,
    sweeps=[
        Sweep(
            "N",
            {"N": 0, "V": 50257},
            {"tiny": [2, 4, 8], "cpu": [256, 512, 1024, 2048], "gpu": [2048, 4096, 8192, 16384, 32768]},
        ),
        Sweep(
            "V",
            {"N": 1024, "V": 0},
            {"tiny": [64, 128, 256], "cpu": [8192, 16384, 32768, 65536, 131072],
             "gpu": [8192, 16384, 32768, 65536, 131072, 262144]},
        ),
    ],
)  # fmt: skip


def bench_cross_entropy(case: Case, run: Any) -> None:
    run(OP, case)
