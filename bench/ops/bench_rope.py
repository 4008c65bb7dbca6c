"""Benchmark of rope: rotary position embedding of queries and keys, halves of a head as pairs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bench.harness.cases import Case, Function, Op, Peer
from bench.harness.machine import DTYPES
from bench.harness.peers import compiled, eager, require
from fastgpt import ops


def inputs(case: Case, device: torch.device) -> list[Tensor]:
    """Create q and k as projections give them, (B, T, heads, D), and cos and sin (T, D / 2)."""
    length, size = case.dims["T"], case.dims["D"]
    frequency = 10000.0 ** (-torch.arange(0, size, 2, device=device) / size)
    angle = torch.arange(length, device=device)[:, None] * frequency
    cos, sin = (t.to(DTYPES[case.dtype]) for t in (angle.cos(), angle.sin()))
    return [case.randn(*"BTHD", device=device), case.randn(*"BTKD", device=device), cos, sin]


def ours(case: Case) -> Function:
    return lambda q, k, cos, sin: ops.rope(q.transpose(1, 2), k.transpose(1, 2), cos, sin)


def pytorch(case: Case) -> Function:
    def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        a, b = x.transpose(1, 2).chunk(2, dim=-1)
        return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)

    return lambda q, k, cos, sin: (rotate(q, cos, sin), rotate(k, cos, sin))


def liger(case: Case) -> Function:
    """Return Liger-Kernel's function, whose cos and sin have the angles of both halves of a head."""
    function = require("liger_kernel.transformers.functional", "liger-kernel", gpu=True).liger_rope
    both: dict[int, tuple[Tensor, Tensor]] = {}  # repeated once per tensor, outside the timed rounds

    def rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        if cos.data_ptr() not in both:
            both[cos.data_ptr()] = torch.cat((cos, cos), dim=-1)[None], torch.cat((sin, sin), dim=-1)[None]
        return function(q.transpose(1, 2), k.transpose(1, 2), *both[cos.data_ptr()])

    return rope


def elements(case: Case) -> int:
    """Count the elements of q and k."""
    return case.dims["B"] * (case.dims["H"] + case.dims["K"]) * case.dims["T"] * case.dims["D"]


def flops(case: Case) -> tuple[float, float]:
    """Count 3 operations for each element in each direction."""
    return 3 * elements(case), 6 * elements(case)


def moved(case: Case) -> tuple[float, float]:
    """Count one read and one write in each direction; cos and sin are small."""
    return 2 * elements(case) * case.itemsize, 4 * elements(case) * case.itemsize


def min_peak_bytes(case: Case) -> float:
    """Count the results and the gradients."""
    return 2 * elements(case) * case.itemsize


OP = Op(
    name="rope",
    shapes={
        "tiny": [{"B": 1, "H": 3, "K": 1, "T": 9, "D": 8}],
        "quick": [{"B": 4, "H": 12, "K": 4, "T": 1024, "D": 64}],
        "cpu": [
            {"B": 4, "H": 12, "K": 4, "T": 1024, "D": 64},
            {"B": 1, "H": 32, "K": 8, "T": 2048, "D": 128},
        ],
        "gpu": [
            {"B": 8, "H": 32, "K": 8, "T": 4096, "D": 128},
            {"B": 16, "H": 12, "K": 12, "T": 1024, "D": 64},
        ],
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


def bench_rope(case: Case, run: Any) -> None:
    run(OP, case)
