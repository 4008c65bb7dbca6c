"""Benchmark of linear_cross_entropy: the output projection followed by cross-entropy."""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as T
from torch import Tensor

from bench.harness.cases import Case, Function, Maker, Op, Peer, Sweep
from bench.harness.peers import MissingError, compiled, eager, require
from fastgpt import ops


def inputs(case: Case, device: torch.device) -> list[Tensor]:
    target = torch.randint(0, case.dims["V"], (case.dims["N"],), device=device)
    weight = case.randn("V", "C", scale=case.dims["C"] ** -0.5, device=device)
    return [case.randn("N", "C", device=device), weight, target]


def ours(case: Case) -> Function:
    return ops.linear_cross_entropy


def pytorch(case: Case) -> Function:
    return lambda h, w, y: T.cross_entropy(T.linear(h, w), y)


def chunked(case: Case) -> Function:
    """Return PyTorch's linear_cross_entropy, which computes the gradients in chunks during the forward.

    Its default options are for a GPU. On the CPU they take 30 times as long, and in bf16 the loss is wrong by 1. The
    options for the CPU, chunks of 512 rows and float32 accumulation, were the fastest of those tried.
    """
    if torch.cuda.is_available():
        options = torch.nn.LinearCrossEntropyOptions()
    else:
        options = torch.nn.LinearCrossEntropyOptions(
            acc_policy="balanced",
            acc_dtype=None if case.dtype == "fp32" else torch.float32,
            chunking_method=None,
            batch_chunk_size=512,
        )
    return lambda h, w, y: T.linear_cross_entropy(h, w, y, options=options)


def chunked_by(policy: Literal["balanced", "compact"]) -> Maker:
    """Return the maker of the same function on a GPU, with an accumulation policy other than PyTorch's default."""

    def make(case: Case) -> Function:
        if not torch.cuda.is_available():
            raise MissingError('needs a CUDA GPU; "PyTorch chunked" has the best options for the CPU')
        options = torch.nn.LinearCrossEntropyOptions(acc_policy=policy)
        return lambda h, w, y: T.linear_cross_entropy(h, w, y, options=options)

    return make


def liger(case: Case) -> Function:
    functional = require("liger_kernel.transformers.functional", "liger-kernel", triton=True)
    return functional.liger_fused_linear_cross_entropy


def cce(implementation: str) -> Any:
    def make(case: Case) -> Function:
        module = require("cut_cross_entropy", "cut-cross-entropy", gpu=implementation == "cce")
        return lambda h, w, y: module.linear_cross_entropy(h, w, y, impl=implementation).to(h.dtype)

    return make


def quack(case: Case) -> Function:
    module = require("quack.linear_cross_entropy", "quack-kernels", gpu=True)
    return lambda h, w, y: module.chunked_linear_cross_entropy(h, w, y, reduction="mean").to(h.dtype)


def flops(case: Case) -> tuple[float, float]:
    """Count one product forward and two backward."""
    product = 2 * case.dims["N"] * case.dims["C"] * case.dims["V"]
    return product, 3 * product


def moved(case: Case) -> tuple[float, float]:
    """Count a read of hidden states and weight forward, and a read and a gradient of each backward."""
    size = (case.dims["N"] + case.dims["V"]) * case.dims["C"] * case.itemsize
    return size, 3 * size


def min_peak_bytes(case: Case) -> float:
    """Count the gradients of hidden states and weight."""
    return (case.dims["N"] + case.dims["V"]) * case.dims["C"] * case.itemsize


OP = Op(
    name="linear_cross_entropy",
    shapes={
        "tiny": [{"N": 8, "C": 32, "V": 64}],
        "quick": [{"N": 512, "C": 384, "V": 50304}],
        "cpu": [{"N": 2048, "C": 768, "V": 50304}],
        "gpu": [{"N": 16384, "C": 768, "V": 50304}, {"N": 8192, "C": 4096, "V": 128256}],
    },
    inputs=inputs,
    ours=ours,
    pytorch=pytorch,
    peers=[
        eager(pytorch),
        compiled(pytorch),
        Peer("PyTorch chunked", "torch", chunked),
        Peer("PyTorch chunked, balanced", "torch", chunked_by("balanced")),
        Peer("PyTorch chunked, compact", "torch", chunked_by("compact")),
        Peer("Liger-Kernel", "liger-kernel", liger),
        Peer("cut-cross-entropy", "cut-cross-entropy", cce("cce")),
        Peer("cut-cross-entropy (torch.compile)", "cut-cross-entropy", cce("torch_compile")),
        Peer("QuACK", "quack-kernels", quack),
    ],
    flops=flops,
    bytes=moved,
    min_peak_bytes=min_peak_bytes,
    sweeps=[
        Sweep(
            "N",
            {"N": 0, "C": 256, "V": 32768},
            {"tiny": [2, 4, 8], "cpu": [256, 512, 1024, 2048], "gpu": [2048, 4096, 8192, 16384, 32768]},
        ),
        Sweep(
            "V",
            {"N": 512, "C": 256, "V": 0},
            {"tiny": [64, 128, 256], "cpu": [8192, 16384, 32768, 65536],
             "gpu": [8192, 16384, 32768, 65536, 131072, 262144]},
        ),
    ],
)  # fmt: skip


def bench_linear_cross_entropy(case: Case, run: Any) -> None:
    run(OP, case)
