"""Benchmark of attention: causal, without dropout."""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as T
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from bench.harness.cases import VERIFIED_BYTES, Case, Function, Op, Peer, Sweep
from bench.harness.peers import MissingError, require, sixteen_bits
from fastgpt import ops


def inputs(case: Case, device: torch.device) -> list[Tensor]:
    return [case.randn("B", "H", "T", "D", device=device) for _ in range(3)]


def ours(case: Case) -> Function:
    return lambda q, k, v: ops.attention(q, k, v, causal="upper_left")


def pytorch(case: Case) -> Function:
    return lambda q, k, v: T.scaled_dot_product_attention(q, k, v, is_causal=True)


def pinned(name: str, backend: SDPBackend) -> Peer:
    """Return scaled_dot_product_attention with a fixed backend as a peer."""

    def make(case: Case) -> Function:
        def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            try:
                with sdpa_kernel(backend):
                    return T.scaled_dot_product_attention(q, k, v, is_causal=True)
            except RuntimeError as error:
                if "No viable backend" in str(error) or "No available kernel" in str(error):
                    raise MissingError(
                        f"PyTorch has no kernel of this backend for {case.dtype} on this device"
                    ) from None
                raise

        return attention

    return Peer(name, "torch", make)


def flex(case: Case, options: Any = None) -> Function:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    device, length = ("cuda" if torch.cuda.is_available() else "cpu"), case.dims["T"]
    mask = create_block_mask(lambda b, h, i, j: i >= j, None, None, length, length, device=device)
    compiled = torch.compile(flex_attention, dynamic=False, fullgraph=True)
    return lambda q, k, v: compiled(q, k, v, block_mask=mask, kernel_options=options)


def flex_flash(case: Case) -> Function:
    """Return FlexAttention on the kernels of FlashAttention-4."""
    sixteen_bits(case, require("flash_attn.cute", "flash-attn-4", gpu=True))
    return flex(case, {"BACKEND": "FLASH"})


def flash_attn(case: Case) -> Function:
    attention = sixteen_bits(case, require("flash_attn", "flash-attn", gpu=True)).flash_attn_func

    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attention(*(x.transpose(1, 2) for x in (q, k, v)), causal=True).transpose(1, 2)

    return function


def flash_attn_4(case: Case) -> Function:
    attention = sixteen_bits(case, require("flash_attn.cute", "flash-attn-4", gpu=True)).flash_attn_func

    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        found = attention(*(x.transpose(1, 2) for x in (q, k, v)), causal=True)
        return (found[0] if isinstance(found, tuple) else found).transpose(1, 2)

    return function


def transformers(case: Case) -> Function:
    """Return the attention of transformers' GPT-2 with attn_implementation="eager"."""
    eager = require("transformers.models.gpt2.modeling_gpt2", "transformers").eager_attention_forward
    length, scale = case.dims["T"], case.dims["D"] ** -0.5
    module = torch.nn.Module()

    @functools.cache  # the model creates its mask once per step, not per layer
    def mask(dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.full((1, 1, length, length), torch.finfo(dtype).min, dtype=dtype, device=device).triu(1)

    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return eager(module, q, k, v, mask(q.dtype, q.device), scaling=scale)[0].transpose(1, 2)

    return function


def flops(case: Case) -> tuple[float, float]:
    """Count two products forward and five backward over the unmasked pairs."""
    b, h, t, d = case.dims.values()
    product = 2 * b * h * d * t * (t + 1) / 2
    return 2 * product, 7 * product


def moved(case: Case) -> tuple[float, float]:
    """Count q, k, v, out and the log-sum-exp forward; backward reads them and dout and writes three gradients."""
    b, h, t, d = case.dims.values()
    tensor, lse = b * h * t * d * case.itemsize, 4 * b * h * t
    return 4 * tensor + lse, 12 * tensor + 2 * lse


def min_peak_bytes(case: Case) -> float:
    """Count the output and three gradients."""
    b, h, t, d = case.dims.values()
    return 4 * b * h * t * d * case.itemsize


def part(case: Case, tensors: list[Any]) -> list[Any]:
    """Select so many heads that the float64 scores need at most `VERIFIED_BYTES`; heads are independent."""
    heads = max(1, int(VERIFIED_BYTES / (48 * case.dims["T"] ** 2)))
    if heads >= case.dims["B"] * case.dims["H"]:
        return list(tensors)
    return [t[:1, : min(heads, case.dims["H"])] for t in tensors]


def sizes(*rows: tuple[int, int, int, int]) -> list[dict[str, int]]:
    return [dict(zip("BHTD", row, strict=True)) for row in rows]


OP = Op(
    name="attention",
    shapes={
        "tiny": sizes((1, 2, 40, 16)),
        "quick": sizes((16, 6, 256, 64)),
        "cpu": sizes((16, 6, 256, 64), (1, 12, 1024, 64), (1, 4, 2048, 128), (1, 4, 4096, 64)),
        "gpu": sizes((16, 12, 1024, 64), (4, 12, 4096, 64), (8, 16, 2048, 128), (1, 16, 16384, 128)),
    },
    inputs=inputs,
    ours=ours,
    pytorch=pytorch,
    peers=[
        pinned("SDPA math", SDPBackend.MATH),
        pinned("SDPA flash", SDPBackend.FLASH_ATTENTION),
        pinned("SDPA efficient", SDPBackend.EFFICIENT_ATTENTION),
        pinned("SDPA cuDNN", SDPBackend.CUDNN_ATTENTION),
        Peer("FlexAttention", "torch", flex),
        Peer("FlexAttention FLASH", "torch", flex_flash),
        Peer("flash-attn", "flash-attn", flash_attn),
        Peer("FlashAttention-4", "flash-attn-4", flash_attn_4),
        Peer("transformers", "transformers", transformers),
    ],
    flops=flops,
    bytes=moved,
    min_peak_bytes=min_peak_bytes,
    sweeps=[
        Sweep(
            "T",
            {"B": 1, "H": 8, "T": 0, "D": 64},
            {
                "tiny": [16, 32, 48],
                "cpu": [256, 512, 1024, 2048, 4096],
                "gpu": [1024, 2048, 4096, 8192, 16384],
            },
        )
    ],
    part=part,
)


def bench_attention(case: Case, run: Any) -> None:
    run(OP, case)
