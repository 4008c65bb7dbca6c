"""What the program runs on the GPU that does not exist: a name for each call, and its function.

A function takes nothing and returns nothing; it makes its tensors on "cuda".
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from fastgpt import flash_attention, functional, ops
from fastgpt.generation.kv_cache import KVCache
from fastgpt.model import GPT, GPTConfig

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
MANY = 70_000  # more than the second and third axis of a grid have


def cuda(*shape: int, dtype: torch.dtype = BF16, grad: bool = False) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="cuda", requires_grad=grad)


def targets(n: int, classes: int) -> Tensor:
    return torch.randint(0, classes, (n,), device="cuda")


def trained(function: Callable[..., Any], *inputs: Tensor) -> None:
    """Forward and backward."""
    found = function(*inputs)
    for out in found if isinstance(found, tuple) else (found,):
        out.backward(torch.empty_like(out), retain_graph=True)
    assert all(x.grad is not None for x in inputs)


def attention(
    batch: int = 8, heads: int = 12, kv_heads: int = 12, rows: int = 1024, size: int = 64, dtype: torch.dtype = BF16,
    mask: torch.dtype | None = None, **options: Any,
) -> Callable[[], None]:  # fmt: skip
    def run() -> None:
        q, k, v = (cuda(batch, rows, n, size, dtype=dtype, grad=True) for n in (heads, kv_heads, kv_heads))
        given = options if mask is None else options | {"attn_mask": cuda(batch, 1, rows, rows, dtype=mask)}
        if given.get("alibi_slopes"):
            given = given | {"alibi_slopes": cuda(heads, dtype=FP32)}
        trained(
            lambda q, k, v: ops.attention(*(t.transpose(1, 2) for t in (q, k, v)), **{"causal": "lower_right"} | given),
            q, k, v,
        )  # fmt: skip

    return run


def decoding(batch: int, heads: int, length: int, size: int = 64) -> Callable[[], None]:
    def run() -> None:
        cache = cuda(batch, heads, 8192, size)[:, :, :length]
        with torch.no_grad():
            ops.attention(cuda(batch, 1, heads, size).transpose(1, 2), cache, cache, causal="lower_right")

    return run


def documents(count: int, rows: int, dtype: torch.dtype = BF16) -> Callable[[], None]:
    def run() -> None:
        q, k, v = (cuda(count * rows, 12, 64, dtype=dtype, grad=True) for _ in range(3))
        bounds = torch.zeros(count + 1, dtype=torch.int32, device="cuda")
        trained(
            lambda *qkv: ops.attention_varlen(*qkv, bounds, bounds, rows, rows, causal="lower_right"), q, k, v
        )

    return run


def losses(dtype: torch.dtype = BF16, **options: Any) -> Iterator[tuple[str, Callable[[], None]]]:
    def cross_entropy() -> None:
        y = targets(8192, 50257)
        trained(lambda x: ops.cross_entropy(x, y, **options), cuda(8192, 50257, dtype=dtype, grad=True))

    def linear_cross_entropy() -> None:
        y = targets(8192, 50257)
        inputs = cuda(8192, 768, dtype=dtype, grad=True), cuda(50257, 768, dtype=dtype, grad=True)
        trained(lambda h, w: ops.linear_cross_entropy(h, w, y, **options), *inputs)

    yield "cross_entropy", cross_entropy
    yield "linear_cross_entropy", linear_cross_entropy


def pointwise(dtype: torch.dtype = BF16, rows: int = 8192) -> Iterator[tuple[str, Callable[[], None]]]:
    def leaf(*shape: int) -> Tensor:
        return cuda(*shape, dtype=dtype, grad=True)

    weights = (3072, 768), (3072,), (768, 3072), (768,)
    yield "gelu", lambda: trained(ops.gelu, leaf(rows, 3072))
    yield "bias_gelu", lambda: trained(ops.bias_gelu, leaf(rows, 3072), leaf(3072))
    yield "geglu", lambda: trained(ops.geglu, leaf(rows, 3072), leaf(rows, 3072))
    yield "swiglu", lambda: trained(ops.swiglu, leaf(rows, 3072), leaf(rows, 3072))
    yield "relu_squared", lambda: trained(ops.relu_squared, leaf(rows, 3072))
    yield "linear", lambda: trained(ops.linear, leaf(rows, 768), leaf(3072, 768), leaf(3072))
    yield "linear_gelu", lambda: trained(ops.linear_gelu, leaf(rows, 768), leaf(3072, 768), leaf(3072))
    yield "mlp", lambda: trained(ops.mlp, leaf(rows, 768), *(leaf(*shape) for shape in weights))
    yield (
        "add_layer_norm",
        lambda: trained(ops.add_layer_norm, leaf(rows, 768), leaf(rows, 768), leaf(768), leaf(768)),
    )
    yield "rms_norm", lambda: trained(ops.rms_norm, leaf(rows, 768), leaf(768))
    yield "add_rms_norm", lambda: trained(ops.add_rms_norm, leaf(rows, 768), leaf(rows, 768), leaf(768))
    yield "rope", lambda: trained(rotated(rows), leaf(rows, 12, 64), leaf(rows, 4, 64))


def rotated(rows: int, **options: Any) -> Callable[[Tensor, Tensor], Any]:
    """RoPE of q and k (rows, heads, 64), one sequence."""
    cos = cuda(rows, 32)
    return lambda q, k: ops.rope(
        q.transpose(0, 1)[None], k.transpose(0, 1)[None], cos, cos.clone(), **options
    )


def drop_in() -> Iterator[tuple[str, Callable[[], None]]]:
    """PyTorch's functions, by `fastgpt.functional` and by PyTorch's registry of flash attention."""

    def sdpa() -> None:
        q, k, v = (cuda(8, 12, 1024, 64, grad=True) for _ in range(3))
        trained(lambda *qkv: functional.scaled_dot_product_attention(*qkv, is_causal=True), q, k, v)

    def cross_entropy() -> None:
        y = targets(8192, 50257)
        trained(lambda x: functional.cross_entropy(x, y), cuda(8192, 50257, grad=True))

    def registered() -> None:
        q = cuda(8, 12, 1024, 64)
        found = flash_attention._cuda_sdpa_forward(q, q, q, 0.0, True)
        assert found is None or found[0].shape == q.shape

    yield "functional attention", sdpa
    yield "functional cross_entropy", cross_entropy
    yield "functional gelu", lambda: trained(functional.gelu, cuda(8192, 3072, grad=True))
    yield (
        "functional layer_norm",
        lambda: trained(
            lambda x, w, b: functional.layer_norm(x, (768,), w, b),
            *(cuda(*shape, grad=True) for shape in ((8192, 768), (768,), (768,))),
        ),
    )
    yield "registered attention", registered


def calls() -> Iterator[tuple[str, Callable[[], None]]]:
    """Every op, with the options and sizes that lead to other kernels, tiles or grids."""
    for dtype, name in ((BF16, "bf16"), (FP32, "fp32")):
        for size in (64, 128, 256):
            yield f"attention {name} d{size}", attention(size=size, dtype=dtype)
            yield (
                f"attention {name} d{size} deterministic",
                attention(size=size, dtype=dtype, deterministic=True),
            )
            dropped = attention(size=size, dtype=dtype, mask=torch.bool, dropout_p=0.1)
            yield f"attention {name} d{size} dropout mask", dropped
        yield from ((f"{op} {name}", run) for op, run in pointwise(dtype))
        yield from ((f"{op} {name}", run) for op, run in losses(dtype))
    yield "attention fp16", attention(dtype=FP16)
    yield "attention small", attention(batch=1, rows=128)
    yield "attention grouped", attention(kv_heads=4)
    everything = attention(mask=FP32, dropout_p=0.9, alibi_slopes=True, softcap=30.0, window=100)
    yield "attention everything", everything
    for length in (1, 1000, 8192):
        yield f"attention decoding {length}", decoding(1, 12, length)
    yield "attention decoding one head", decoding(1, 1, 8192, 128)
    yield "attention_varlen", documents(8, 1024)
    yield "linear_gelu 16 rows", dict(pointwise(rows=16))["linear_gelu"]
    yield "cross_entropy smoothing", dict(losses(label_smoothing=0.1))["cross_entropy"]
    yield "attention many batches", attention(batch=MANY, heads=1, kv_heads=1, rows=16)
    yield "attention many heads", attention(batch=1, heads=MANY, kv_heads=MANY, rows=17)
    yield "attention many batches, decoding", decoding(MANY, 1, 16)
    yield "attention_varlen many documents", documents(MANY, 16)
    yield from drop_in()


def gpt(n_layer: int = 2) -> GPT:
    """GPT-2 124M, with fewer layers: all have the same kernels."""
    with torch.device("cuda"):
        return GPT(GPTConfig(n_layer=n_layer, n_head=12, n_embd=768, vocab_size=50304, block_size=1024))


def train(model: GPT, batch: int, length: int) -> None:
    idx = torch.randint(0, 50304, (batch, length), device="cuda")
    with torch.autocast("cuda", torch.bfloat16):
        loss = model(idx, idx)[1]
    loss.backward()
    model.zero_grad()


def generate(model: GPT, prompt: int, count: int) -> None:
    """A prompt, then a token at a time, by a key-value cache."""
    cache = KVCache(model.config.n_layer, model.config.block_size)
    with torch.no_grad(), torch.autocast("cuda", torch.bfloat16):
        for length in (prompt, *[1] * count):
            model.hidden_states(torch.randint(0, 50304, (1, length), device="cuda"), cache)
