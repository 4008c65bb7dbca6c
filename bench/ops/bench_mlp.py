"""Benchmark of mlp: two linear layers with GELU between them."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as T
from torch import Tensor

from bench.harness.cases import Case, Function, Op
from bench.harness.peers import compiled, eager
from fastgpt import ops


def inputs(case: Case, device: torch.device) -> list[Tensor]:
    c, f = case.dims["C"], case.dims["F"]
    first = case.randn("F", "C", scale=c**-0.5, device=device), case.randn("F", device=device)
    second = case.randn("C", "F", scale=f**-0.5, device=device), case.randn("C", device=device)
    return [case.randn("N", "C", device=device), *first, *second]


def ours(case: Case) -> Function:
    return lambda x, w1, b1, w2, b2: ops.mlp(x, w1, b1, w2, b2, **case.options)


def pytorch(case: Case) -> Function:
    return lambda x, w1, b1, w2, b2: T.linear(T.gelu(T.linear(x, w1, b1), **case.options), w2, b2)


def flops(case: Case) -> tuple[float, float]:
    """Count two products forward and four backward."""
    product = 2 * case.dims["N"] * case.dims["C"] * case.dims["F"]
    return 2 * product, 6 * product


def moved(case: Case) -> tuple[float, float]:
    """Count reads of x and the weights, a write and a read of the activation, and a write of the result forward.

    For the backward, the forward also writes the pre-activation. Backward reads x, the weights, the activation, the
    pre-activation and the upstream gradient, writes the gradients of x and the weights, and writes the gradient of the
    pre-activation once and reads it twice.
    """
    n, c, f = (case.dims[letter] for letter in "NCF")
    rows, weights, hidden = (size * case.itemsize for size in (n * c, 2 * c * f, n * f))
    return 2 * rows + weights + 2 * hidden, 5 * rows + 3 * weights + 8 * hidden


def min_peak_bytes(case: Case) -> float:
    """Count the result, the gradients of x and the weights, the activation and the pre-activation."""
    n, c, f = (case.dims[letter] for letter in "NCF")
    return (2 * n * c + 2 * c * f + 2 * n * f) * case.itemsize


OP = Op(
    name="mlp",
    shapes={
        "tiny": [{"N": 8, "C": 32, "F": 64}],
        "quick": [{"N": 1024, "C": 768, "F": 3072}],
        "cpu": [{"N": 2048, "C": 768, "F": 3072}],
        "gpu": [{"N": 16384, "C": 768, "F": 3072}, {"N": 8192, "C": 4096, "F": 16384}],
    },
    inputs=inputs,
    ours=ours,
    pytorch=pytorch,
    peers=[eager(pytorch), compiled(pytorch)],
    flops=flops,
    bytes=moved,
    min_peak_bytes=min_peak_bytes,
    options=[{"approximate": "none"}, {"approximate": "tanh"}],
)


def bench_mlp(case: Case, run: Any) -> None:
    run(OP, case)
