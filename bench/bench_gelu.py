"""GELU and bias_gelu, forward + backward, beside PyTorch."""

import pytest
import torch
import torch.nn.functional as T

from fastgpt import ops

SHAPES = [(4096, 3072)]


@pytest.mark.parametrize("implementation", ["fastgpt", "pytorch"])
@pytest.mark.parametrize("approximate", ["none", "tanh"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def bench_gelu(measure, shape, dtype, approximate, implementation):
    pytorch = lambda x: T.gelu(x, approximate=approximate)  # noqa: E731
    ours = lambda x: ops.gelu(x, approximate)  # noqa: E731
    x = torch.randn(shape, dtype=dtype).requires_grad_()
    measure(ours if implementation == "fastgpt" else pytorch, pytorch, [x])


@pytest.mark.parametrize("implementation", ["fastgpt", "pytorch"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def bench_bias_gelu(measure, shape, implementation):
    pytorch = lambda x, b: T.gelu(x + b)  # noqa: E731
    x, b = torch.randn(shape).requires_grad_(), torch.randn(shape[1]).requires_grad_()
    measure(ops.bias_gelu if implementation == "fastgpt" else pytorch, pytorch, [x, b])
