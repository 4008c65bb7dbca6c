"""Tensors whose elements share memory, have PyTorch's negative bit, or are empty with the strides of others."""

import pytest
import torch
import torch.nn.functional as T

from fastgpt import functional as F
from fastgpt import ops

VIEWS = {
    "a row for all": ((1, 9), lambda t: t.expand(4, 9)),
    "windows": ((40,), lambda t: t.as_strided((4, 9), (5, 1))),
    "windows that touch": ((40,), lambda t: t.as_strided((4, 9), (9, 1))),
    "a column for all": ((4, 1), lambda t: t.expand(4, 9)),
    "one number": ((1, 1), lambda t: t.expand(4, 9)),
    "one class": ((1, 1), lambda t: t.expand(4, 1)),
    "three dimensions": ((1, 2, 9), lambda t: t.expand(2, 2, 9)),
    "between others": ((2, 1, 9), lambda t: t.expand(2, 2, 9)),
    "negative bit": ((4, 9), torch._neg_view),
    "no rows": ((1, 9), lambda t: t.expand(4, 9)[:0]),
}


@pytest.mark.parametrize("view", VIEWS)
def test_gradient_in_the_memory_of_the_logits_is_right(backend, view):
    shape, make = VIEWS[view]
    base = torch.randn(shape, requires_grad=True)
    logits = make(base)
    before, target = base.detach().clone(), torch.zeros(logits.shape[:-1], dtype=torch.int64)
    loss = ops.cross_entropy(logits, target, reduction="sum", inplace_backward=True)
    expected = T.cross_entropy(make(base.double()).flatten(0, -2), target.flatten(), reduction="sum")
    gradients = [torch.autograd.grad(total, base)[0] for total in (loss, expected)]
    torch.testing.assert_close(*gradients)
    written = view == "windows that touch"  # the one whose memory can be
    assert written or torch.equal(base, before)


def test_batched_upstream_gradients_leave_the_logits_alone(backend):
    x = torch.randn(3, 5, requires_grad=True)
    logits = x * 1
    before = logits.detach().clone()
    loss = ops.cross_entropy(logits, torch.arange(3), reduction="none", inplace_backward=True)
    (batch,) = torch.autograd.grad(loss, x, torch.eye(3), is_grads_batched=True)
    (expected,) = torch.autograd.grad(T.cross_entropy(x, torch.arange(3), reduction="sum"), x)
    torch.testing.assert_close(batch.sum(0), expected)
    assert torch.equal(logits, before)


def test_shared_memory_is_seen_while_compiling():
    base = torch.randn(1, 9, requires_grad=True)
    target = torch.arange(4)
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda b: ops.cross_entropy(b.expand(4, 9), target, inplace_backward=True),
        backend="aot_eager",
        fullgraph=True,
    )
    losses = compiled(base), T.cross_entropy(base.expand(4, 9), target)
    torch.testing.assert_close(*(torch.autograd.grad(loss, base)[0] for loss in losses))


def test_empty_tensors_with_the_strides_of_others(backend):
    """`contiguous` keeps the strides of what is empty."""
    none = torch.zeros(0, dtype=torch.int64)
    rows = torch.randn(4, 1).expand(4, 7)[:0]
    assert F.cross_entropy(rows, none).isnan()
    assert F.cross_entropy(rows, none, reduction="sum") == 0
    assert F.linear_cross_entropy(rows, torch.randn(1, 7).expand(5, 7), none, reduction="sum") == 0
    assert F.gelu(rows).shape == ops.linear_gelu(rows, torch.randn(7, 7)).shape == (0, 7)
    bounds = torch.zeros(2, dtype=torch.int64)
    for shape in ((0, 2, 3, 8), (2, 2, 0, 8), (2, 2, 3, 0)):
        q = torch.randn(1).expand(shape)
        assert F.scaled_dot_product_attention(q, q, q).shape == shape
    q = torch.randn(1).expand(0, 2, 8)
    assert ops.attention_varlen(q, q, q, bounds, bounds, 1, 1).shape == q.shape


def test_last_dimension_of_one_element_with_any_stride(backend):
    column = torch.randn(4, 7)[:, ::7]
    target = torch.zeros(4, dtype=torch.int64)
    torch.testing.assert_close(F.cross_entropy(column, target), torch.tensor(0.0))
    q = torch.randn(2, 3, 4, 7)[..., ::7]
    torch.testing.assert_close(
        F.scaled_dot_product_attention(q, q, q), T.scaled_dot_product_attention(q, q, q)
    )
    assert ops.linear(column, torch.randn(5, 3)[:, ::3]).shape == (4, 5)
