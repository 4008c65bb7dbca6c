"""Benchmark of add_layer_norm: residual addition followed by LayerNorm."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as T
from torch import Tensor

from bench.harness.cases import Case, Function, Op, Peer, Sweep
from bench.harness.peers import compiled, eager, require
from fastgpt import ops


def inputs(case: Case, device: torch.device) -> list[Tensor]:
    return [case.randn(*letters, device=device) for letters in ("NC", "NC", "C", "C")]


def ours(case: Case) -> Function:
    return lambda x, r, w, b: ops.add_layer_norm(x, r, w, b)[0]


def pytorch(case: Case) -> Function:
    return lambda x, r, w, b: T.layer_norm(x + r, w.shape, w, b)


def liger(case: Case) -> Function:
    function = require("liger_kernel.transformers.functional", "liger-kernel", triton=True).liger_layer_norm
    return lambda x, r, w, b: function(x + r, w, b, 1e-5)


def flops(case: Case) -> tuple[float, float]:
    """Count 8 operations per element forward and 12 backward, approximately."""
    size = case.dims["N"] * case.dims["C"]
    return 8 * size, 20 * size


def moved(case: Case) -> tuple[float, float]:
    """Count two reads and two writes (result and sum) forward, two reads and one write backward."""
    size = case.dims["N"] * case.dims["C"] * case.itemsize
    return 4 * size, 7 * size


def min_peak_bytes(case: Case) -> float:
    """Count the result, the sum, and one gradient for both branches."""
    return 3 * case.dims["N"] * case.dims["C"] * case.itemsize


OP = Op(
    name="add_layer_norm",
    shapes={
        "tiny": [{"N": 8, "C": 64}],
        "quick": [{"N": 4096, "C": 768}],
        "cpu": [{"N": 4096, "C": 768}, {"N": 4096, "C": 3072}],
        "gpu": [{"N": 16384, "C": 768}, {"N": 16384, "C": 4096}],
    },
    inputs=inputs,
    ours=ours,
    pytorch=pytorch,
    peers=[eager(pytorch), compiled(pytorch), Peer("Liger-Kernel", "liger-kernel", liger)],
    flops=flops,
    bytes=moved,
    min_peak_bytes=min_peak_bytes,
    sweeps=[
        Sweep(
            "N",
            {"N": 0, "C": 768},
            {"tiny": [4, 8, 16], "cpu": [2048, 4096, 8192, 16384], "gpu": [4096, 8192, 16384, 32768]},
        )
    ],
)


def bench_add_layer_norm(case: Case, run: Any) -> None:
    run(OP, case)
