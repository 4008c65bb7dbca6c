"""Benchmarks of rms_norm and of add_rms_norm, the residual addition followed by RMSNorm."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as T
from torch import Tensor

from bench.harness.cases import Case, Function, Op, Peer, Sweep
from bench.harness.peers import compiled, eager, require
from fastgpt import ops

EPS = 1e-6
SHAPES = {
    "tiny": [{"N": 8, "C": 64}],
    "quick": [{"N": 4096, "C": 3072}],
    "cpu": [{"N": 4096, "C": 768}, {"N": 4096, "C": 3072}],
    "gpu": [{"N": 16384, "C": 768}, {"N": 16384, "C": 4096}],
}
ROWS = Sweep(
    "N",
    {"N": 0, "C": 768},
    {"tiny": [4, 8, 16], "cpu": [2048, 4096, 8192, 16384], "gpu": [4096, 8192, 16384, 32768]},
)


def inputs(case: Case, device: torch.device) -> list[Tensor]:
    return [case.randn(*letters, device=device) for letters in ("NC", "C")]


def ours(case: Case) -> Function:
    return lambda x, w: ops.rms_norm(x, w, EPS)


def pytorch(case: Case) -> Function:
    return lambda x, w: T.rms_norm(x, w.shape, w, EPS)


def liger(case: Case) -> Function:
    function = require("liger_kernel.transformers.functional", "liger-kernel", triton=True).liger_rms_norm
    return lambda x, w: function(x, w, EPS, in_place=False)


def flops(case: Case) -> tuple[float, float]:
    """Count 4 operations per element forward and 8 backward, approximately."""
    size = case.dims["N"] * case.dims["C"]
    return 4 * size, 12 * size


def moved(case: Case) -> tuple[float, float]:
    """Count one read and one write forward, two reads and one write backward."""
    size = case.dims["N"] * case.dims["C"] * case.itemsize
    return 2 * size, 5 * size


def min_peak_bytes(case: Case) -> float:
    """Count the result and the gradient."""
    return 2 * case.dims["N"] * case.dims["C"] * case.itemsize


OP = Op(
    name="rms_norm",
    shapes=SHAPES,
    inputs=inputs,
    ours=ours,
    pytorch=pytorch,
    peers=[eager(pytorch), compiled(pytorch), Peer("Liger-Kernel", "liger-kernel", liger)],
    flops=flops,
    bytes=moved,
    min_peak_bytes=min_peak_bytes,
    sweeps=[ROWS],
)


def added_inputs(case: Case, device: torch.device) -> list[Tensor]:
    return [case.randn(*letters, device=device) for letters in ("NC", "NC", "C")]


def added_ours(case: Case) -> Function:
    return lambda x, r, w: ops.add_rms_norm(x, r, w, EPS)[0]


def added_pytorch(case: Case) -> Function:
    return lambda x, r, w: T.rms_norm(x + r, w.shape, w, EPS)


def added_liger(case: Case) -> Function:
    function = require(
        "liger_kernel.transformers.functional", "liger-kernel", triton=True
    ).liger_fused_add_rms_norm
    return lambda x, r, w: function(x, r, w, EPS, in_place=False)[0]


def added_moved(case: Case) -> tuple[float, float]:
    """Count two reads and two writes (result and sum) forward, two reads and one write backward."""
    size = case.dims["N"] * case.dims["C"] * case.itemsize
    return 4 * size, 7 * size


def added_min_peak_bytes(case: Case) -> float:
    """Count the result, the sum, and one gradient for both branches."""
    return 3 * case.dims["N"] * case.dims["C"] * case.itemsize


ADDED = Op(
    name="add_rms_norm",
    shapes=SHAPES,
    inputs=added_inputs,
    ours=added_ours,
    pytorch=added_pytorch,
    peers=[eager(added_pytorch), compiled(added_pytorch), Peer("Liger-Kernel", "liger-kernel", added_liger)],
    flops=flops,
    bytes=added_moved,
    min_peak_bytes=added_min_peak_bytes,
)


def bench_rms_norm(case: Case, run: Any) -> None:
    run(OP, case)


def bench_add_rms_norm(case: Case, run: Any) -> None:
    run(ADDED, case)
