"""Linear + cross-entropy, forward + backward, beside PyTorch's two ops."""

import pytest
import torch
import torch.nn.functional as T

from fastgpt import ops

SHAPES = [(2048, 768, 50304)]  # rows, width, vocabulary


@pytest.mark.parametrize("implementation", ["fastgpt", "pytorch"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def bench_linear_cross_entropy(measure, shape, dtype, implementation):
    rows, width, vocab = shape
    y = torch.randint(0, vocab, (rows,))
    pytorch = lambda h, w: T.cross_entropy(T.linear(h, w), y)  # noqa: E731
    ours = lambda h, w: ops.linear_cross_entropy(h, w, y)  # noqa: E731
    hidden = torch.randn(rows, width).to(dtype).requires_grad_()
    weight = (width**-0.5 * torch.randn(vocab, width)).to(dtype).requires_grad_()
    measure(ours if implementation == "fastgpt" else pytorch, pytorch, [hidden, weight])
