"""Cross-entropy, forward + backward, beside PyTorch."""

import pytest
import torch
import torch.nn.functional as T

from fastgpt import ops

SHAPES = [(2048, 50257)]


@pytest.mark.parametrize("implementation", ["fastgpt", "pytorch"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def bench_cross_entropy(measure, shape, dtype, implementation):
    y = torch.randint(0, shape[1], shape[:1])
    pytorch = lambda x: T.cross_entropy(x, y)  # noqa: E731
    ours = lambda x: ops.cross_entropy(x, y)  # noqa: E731
    logits = torch.randn(shape).to(dtype).requires_grad_()
    measure(ours if implementation == "fastgpt" else pytorch, pytorch, [logits])
