"""Tensors of more than 2³¹ elements, where 32-bit offsets would wrap; they run where memory allows."""

import os

import pytest
import torch

import fastgpt
from fastgpt import ops

GIB = 2**30
ELEMENTS = 2**31 + 2**20


def needs(gibibytes):
    memory = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if memory < gibibytes * GIB:
        pytest.skip(f"needs {gibibytes} GiB of free memory, there are {memory / GIB:.0f}")


@pytest.fixture(autouse=True)
def _cpp():
    with fastgpt.use_backend("cpp"):
        yield


@pytest.mark.slow
def test_gelu():
    needs(18)
    x = torch.zeros(ELEMENTS, dtype=torch.bfloat16)
    x[-1] = 3.0
    x.requires_grad_()
    y = ops.gelu(x)
    assert y[-1] == ops.gelu(x[-1:].detach())[0]
    assert not y[:-1].any()
    (grad,) = torch.autograd.grad(y, x, torch.ones(1, dtype=torch.bfloat16).expand_as(y))
    assert grad[0] == 0.5
    assert grad[-1] > 1


@pytest.mark.slow
def test_cross_entropy():
    needs(12)
    vocab = 65536
    rows = ELEMENTS // vocab
    logits = torch.zeros(rows, vocab, dtype=torch.bfloat16)
    logits[-1] = torch.randn(vocab)
    target = torch.arange(rows) % vocab
    last = logits[-1:].clone().requires_grad_()
    expected = ops.cross_entropy(last, target[-1:], reduction="sum")
    (expected_grad,) = torch.autograd.grad(expected, last)
    logits.requires_grad_()
    loss = ops.cross_entropy(logits, target, reduction="none")
    assert loss[-1] == expected
    (grad,) = torch.autograd.grad(loss, logits, torch.ones_like(loss))
    assert torch.equal(grad[-1:], expected_grad)


@pytest.mark.slow
def test_attention():
    needs(12)
    size = 64
    columns = ELEMENTS // size
    k = torch.zeros(1, 1, columns, size, dtype=torch.bfloat16)
    v = torch.zeros(1, 1, columns, size, dtype=torch.bfloat16)
    k[0, 0, -1], v[0, 0, -1] = 8.0, 1.0
    q = torch.ones(1, 1, 1, size, dtype=torch.bfloat16)
    out, lse = ops.attention(q, k, v, scale=1.0, return_lse=True)
    # The last key's score is 512, all others 0: it takes all the weight.
    assert torch.equal(out, torch.ones_like(out))
    assert lse.item() == 512.0
