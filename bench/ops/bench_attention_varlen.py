"""Benchmark of attention_varlen: causal attention over packed documents of different lengths."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as T
from torch import Tensor

from bench.harness.cases import Case, Function, Op, Peer
from bench.harness.peers import eager, require, sixteen_bits
from fastgpt import ops


def lengths(case: Case) -> list[int]:
    """Split N rows into B documents, always in the same way; the longest is 13 times as long as the shortest."""
    documents, rows = case.dims["B"], case.dims["N"]
    weights = 0.1 + 1.2 * torch.arange(documents).double() / max(1, documents - 1)
    weights = weights[torch.randperm(documents, generator=torch.Generator().manual_seed(0))]
    ends = (weights.cumsum(0) / weights.sum() * rows).round().long().tolist()
    return [end - start for start, end in zip([0, *ends], ends, strict=False)]


def inputs(case: Case, device: torch.device) -> list[Tensor]:
    bounds = torch.tensor([0, *lengths(case)], device=device).cumsum(0).int()
    return [*(case.randn("N", "H", "D", device=device) for _ in range(3)), bounds]


def ours(case: Case) -> Function:
    longest = max(lengths(case))
    return lambda q, k, v, bounds: ops.attention_varlen(
        q, k, v, bounds, bounds, longest, longest, causal="upper_left"
    )


def pytorch(case: Case) -> Function:
    """Call scaled_dot_product_attention for each document."""
    split = lengths(case)

    def function(q: Tensor, k: Tensor, v: Tensor, bounds: Tensor) -> Tensor:
        splits = (t.transpose(0, 1)[None].split(split, dim=2) for t in (q, k, v))
        documents = zip(*splits, strict=True)
        outs = [T.scaled_dot_product_attention(a, b, c, is_causal=True) for a, b, c in documents]
        return torch.cat(outs, dim=2)[0].transpose(0, 1)

    return function


def padded(case: Case) -> Function:
    """Pad all documents to the longest as one batch; the causal mask hides the padding."""
    split = lengths(case)
    documents, longest = len(split), max(split)
    places = torch.cat([n * longest + torch.arange(length) for n, length in enumerate(split)])

    def function(q: Tensor, k: Tensor, v: Tensor, bounds: Tensor) -> Tensor:
        at = places.to(q.device)
        a, b, c = (
            t.new_zeros(documents * longest, *t.shape[1:])
            .index_copy(0, at, t)
            .unflatten(0, (documents, longest))
            .transpose(1, 2)
            for t in (q, k, v)
        )
        out = T.scaled_dot_product_attention(a, b, c, is_causal=True)
        return out.transpose(1, 2).flatten(0, 1)[at]

    return function


def flash_attn(case: Case) -> Function:
    attention = sixteen_bits(case, require("flash_attn", "flash-attn", gpu=True)).flash_attn_varlen_func
    longest = max(lengths(case))
    return lambda q, k, v, bounds: attention(q, k, v, bounds, bounds, longest, longest, causal=True)


def flash_attn_4(case: Case) -> Function:
    attention = sixteen_bits(
        case, require("flash_attn.cute", "flash-attn-4", gpu=True)
    ).flash_attn_varlen_func
    longest = max(lengths(case))

    def function(q: Tensor, k: Tensor, v: Tensor, bounds: Tensor) -> Tensor:
        options: dict[str, Any] = {"cu_seqlens_q": bounds, "cu_seqlens_k": bounds}
        options |= {"max_seqlen_q": longest, "max_seqlen_k": longest}
        found = attention(q, k, v, causal=True, **options)
        return found[0] if isinstance(found, tuple) else found

    return function


def varlen_attn(case: Case) -> Function:
    """Return PyTorch's varlen_attn."""
    attention = sixteen_bits(case, require("torch.nn.attention.varlen", "torch", gpu=True)).varlen_attn
    longest = max(lengths(case))
    return lambda q, k, v, bounds: attention(q, k, v, bounds, bounds, longest, longest, window_size=(-1, 0))


def flops(case: Case) -> tuple[float, float]:
    """Count two products forward and five backward over the unmasked pairs of each document."""
    pairs = sum(n * (n + 1) / 2 for n in lengths(case))
    product = 2 * case.dims["H"] * case.dims["D"] * pairs
    return 2 * product, 7 * product


def moved(case: Case) -> tuple[float, float]:
    """Count q, k, v, out and the log-sum-exp forward; backward reads them and dout and writes three gradients."""
    rows = case.dims["N"] * case.dims["H"]
    tensor, lse = rows * case.dims["D"] * case.itemsize, 4 * rows
    return 4 * tensor + lse, 12 * tensor + 2 * lse


def min_peak_bytes(case: Case) -> float:
    """Count the output and three gradients."""
    return 4 * case.dims["N"] * case.dims["H"] * case.dims["D"] * case.itemsize


def sizes(*rows: tuple[int, int, int, int]) -> list[dict[str, int]]:
    return [dict(zip("BNHD", row, strict=True)) for row in rows]


OP = Op(
    name="attention_varlen",
    shapes={
        "tiny": sizes((3, 40, 2, 16)),
        "quick": sizes((32, 4096, 6, 64)),
        "cpu": sizes((32, 4096, 6, 64), (200, 16384, 6, 64), (4, 4096, 12, 64)),
        "gpu": sizes((32, 32768, 12, 64), (400, 32768, 12, 64)),
    },
    inputs=inputs,
    ours=ours,
    pytorch=pytorch,
    peers=[
        eager(pytorch),
        Peer("PyTorch padded", "torch", padded),
        Peer("PyTorch varlen_attn", "torch", varlen_attn),
        Peer("flash-attn", "flash-attn", flash_attn),
        Peer("FlashAttention-4", "flash-attn-4", flash_attn_4),
    ],
    flops=flops,
    bytes=moved,
    min_peak_bytes=min_peak_bytes,
)


def bench_attention_varlen(case: Case, run: Any) -> None:
    run(OP, case)
