"""Benchmarks of gelu, and of bias_gelu: GELU(x + bias)."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as T
from torch import Tensor

from bench.harness.cases import Case, Function, Op, Peer, Sweep
from bench.harness.peers import MissingError, compiled, eager, require
from fastgpt import ops


def inputs(case: Case, device: torch.device) -> list[Tensor]:
    return [case.randn("N", "C", device=device)]


def ours(case: Case) -> Function:
    return lambda x: ops.gelu(x, case.options["approximate"])


def pytorch(case: Case) -> Function:
    return lambda x: T.gelu(x, approximate=case.options["approximate"])


def transformers(case: Case) -> Function:
    """Return "gelu_new", GPT-2's activation in transformers: the tanh approximation as elementwise operations."""
    if case.options["approximate"] != "tanh":
        raise MissingError("its GPT-2 has the tanh approximation only")
    return require("transformers.activations", "transformers").ACT2FN["gelu_new"]


def flops(case: Case) -> tuple[float, float]:
    """Count 5 operations forward and 9 backward, approximately; erf, tanh and exp are one operation each."""
    size = case.dims["N"] * case.dims["C"]
    return 5 * size, 14 * size


def moved(case: Case) -> tuple[float, float]:
    """Count one read and one write forward, two reads and one write backward."""
    size = case.dims["N"] * case.dims["C"] * case.itemsize
    return 2 * size, 5 * size


def min_peak_bytes(case: Case) -> float:
    """Count the result and the gradient."""
    return 2 * case.dims["N"] * case.dims["C"] * case.itemsize


SHAPES = {
    "tiny": [{"N": 8, "C": 64}],
    "quick": [{"N": 4096, "C": 3072}],
    "cpu": [{"N": 4096, "C": 3072}],
    "gpu": [{"N": 16384, "C": 3072}, {"N": 16384, "C": 16384}],
}
ROWS = Sweep(
    "N",
    {"N": 0, "C": 3072},
    {"tiny": [4, 8, 16], "cpu": [1024, 2048, 4096, 8192], "gpu": [2048, 4096, 8192, 16384, 32768]},
)

OP = Op(
    name="gelu",
    shapes=SHAPES,
    inputs=inputs,
    ours=ours,
    pytorch=pytorch,
    peers=[eager(pytorch), compiled(pytorch), Peer("transformers", "transformers", transformers)],
    flops=flops,
    bytes=moved,
    min_peak_bytes=min_peak_bytes,
    options=[{"approximate": "none"}, {"approximate": "tanh"}],
    sweeps=[ROWS],
)


def biased_inputs(case: Case, device: torch.device) -> list[Tensor]:
    return [case.randn("N", "C", device=device), case.randn("C", device=device)]


def biased_ours(case: Case) -> Function:
    return ops.bias_gelu


def biased_pytorch(case: Case) -> Function:
    return lambda x, b: T.gelu(x + b)


BIAS_GELU = Op(
    name="bias_gelu",
    shapes=SHAPES,
    inputs=biased_inputs,
    ours=biased_ours,
    pytorch=biased_pytorch,
    peers=[eager(biased_pytorch), compiled(biased_pytorch)],
    flops=flops,
    bytes=moved,
    min_peak_bytes=min_peak_bytes,
)


def bench_gelu(case: Case, run: Any) -> None:
    run(OP, case)


def bench_bias_gelu(case: Case, run: Any) -> None:
    run(BIAS_GELU, case)
