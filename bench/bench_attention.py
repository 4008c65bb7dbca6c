"""Causal attention, forward + backward, beside PyTorch's scaled_dot_product_attention."""

import pytest
import torch
import torch.nn.functional as T

from fastgpt import ops

SHAPES = [(16, 6, 256, 64), (1, 12, 1024, 64), (1, 4, 2048, 128)]  # batch, heads, length, head size


@pytest.mark.parametrize("implementation", ["fastgpt", "pytorch"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def bench_attention(measure, shape, dtype, implementation):
    pytorch = lambda q, k, v: T.scaled_dot_product_attention(q, k, v, is_causal=True)  # noqa: E731
    ours = lambda q, k, v: ops.attention(q, k, v, causal="upper_left")  # noqa: E731
    qkv = [torch.randn(shape).to(dtype).requires_grad_() for _ in range(3)]
    measure(ours if implementation == "fastgpt" else pytorch, pytorch, qkv)
