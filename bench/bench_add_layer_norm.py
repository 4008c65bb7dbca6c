"""Residual addition + layer normalisation, forward + backward, beside PyTorch's two ops."""

import pytest
import torch
import torch.nn.functional as T

from fastgpt import ops

SHAPES = [(4096, 768)]


@pytest.mark.parametrize("implementation", ["fastgpt", "pytorch"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def bench_add_layer_norm(measure, shape, dtype, implementation):
    pytorch = lambda x, r, w, b: T.layer_norm(x + r, shape[1:], w, b)  # noqa: E731
    ours = lambda x, r, w, b: ops.add_layer_norm(x, r, w, b)[0]  # noqa: E731
    inputs = [torch.randn(s).to(dtype).requires_grad_() for s in (shape, shape, shape[1:], shape[1:])]
    measure(ours if implementation == "fastgpt" else pytorch, pytorch, inputs)
