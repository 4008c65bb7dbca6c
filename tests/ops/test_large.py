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


@pytest.mark.slow
def test_attention_sums_more_than_two_to_the_24_keys():
    """A float32 sum that grows by one at a time would stand still there: the log-sum-exp, the output and dv."""
    columns = 2**25
    k = torch.zeros(1, 1, 1, 8).expand(1, 1, columns, 8)
    v = torch.zeros(1, 1, columns, 1)
    v[0, 0, columns // 2 :] = 1.0
    out, lse = ops.attention(torch.zeros(1, 1, 1, 8), k, v.requires_grad_(), return_lse=True)
    torch.testing.assert_close(lse.item(), 25 * 0.6931471805599453, rtol=1e-6, atol=0)
    torch.testing.assert_close(out.item(), 0.5, rtol=1e-5, atol=0)
    (dv,) = torch.autograd.grad(out.sum(), v)
    torch.testing.assert_close(dv, torch.full_like(dv, 2.0**-25))


@pytest.mark.slow
def test_attention_varlen():
    """The last document lies beyond 2³¹ elements of k and v; the first is all that comes before."""
    needs(12)
    size, last = 64, 100
    columns = ELEMENTS // size
    k = torch.zeros(columns, 1, size, dtype=torch.bfloat16)
    v = torch.zeros(columns, 1, size, dtype=torch.bfloat16)
    k[-last:], v[-last:] = torch.randn(2, last, 1, size).bfloat16()
    q = torch.randn(2, 1, size).bfloat16()
    bounds_q, bounds_k = torch.tensor([0, 1, 2]), torch.tensor([0, columns - last, columns])
    out = ops.attention_varlen(q, k, v, bounds_q, bounds_k, 1, columns)
    assert not out[0].any()
    one, all_keys = torch.tensor([0, 1]), torch.tensor([0, last])
    expected = ops.attention_varlen(q[1:], k[-last:], v[-last:], one, all_keys, 1, last)
    assert torch.equal(out[1:], expected)


@pytest.mark.slow
def test_geglu():
    """One tensor for all arguments and gradients: forward and backward as registered, to spare memory."""
    needs(18)
    x = torch.zeros(ELEMENTS, dtype=torch.bfloat16)
    x[-1] = 3.0
    y = torch.ops.fastgpt.geglu_fwd_cpp(x, x, False)
    assert torch.equal(y[-1:], ops.geglu(x[-1:], x[-1:]))
    assert not y[:-1].any()
    del y
    da, db = torch.ops.fastgpt.geglu_bwd_cpp(x, x, x, False)
    end = x[-1:].clone()
    for got, expected in zip((da, db), torch.ops.fastgpt.geglu_bwd_cpp(end, end, end, False), strict=True):
        assert torch.equal(got[-1:], expected)
        assert not got[:-1].any()


@pytest.mark.slow
def test_swiglu():
    """One tensor for all arguments and gradients: forward and backward as registered, to spare memory."""
    needs(18)
    x = torch.zeros(ELEMENTS, dtype=torch.bfloat16)
    x[-1] = 3.0
    y = torch.ops.fastgpt.swiglu_fwd_cpp(x, x)
    assert torch.equal(y[-1:], ops.swiglu(x[-1:], x[-1:]))
    assert not y[:-1].any()
    del y
    da, db = torch.ops.fastgpt.swiglu_bwd_cpp(x, x, x)
    end = x[-1:].clone()
    for got, expected in zip((da, db), torch.ops.fastgpt.swiglu_bwd_cpp(end, end, end), strict=True):
        assert torch.equal(got[-1:], expected)
        assert not got[:-1].any()


@pytest.mark.slow
def test_add_layer_norm():
    needs(16)
    size = 2048
    x = torch.zeros(ELEMENTS // size, size, dtype=torch.bfloat16)
    x[-1] = torch.randn(size)
    weight, bias = torch.ones(size).bfloat16(), torch.zeros(size).bfloat16()
    with torch.no_grad():
        y, total = ops.add_layer_norm(x, x, weight, bias)
        y_last, total_last = ops.add_layer_norm(x[-1:], x[-1:], weight, bias)
    assert torch.equal(y[-1:], y_last)
    assert torch.equal(total[-1:], total_last)
    assert not y[:-1].any()


@pytest.mark.slow
def test_rms_norm():
    needs(16)
    size = 2048
    x = torch.zeros(ELEMENTS // size, size, dtype=torch.bfloat16)
    x[-1] = torch.randn(size)
    weight = torch.ones(size).bfloat16()
    with torch.no_grad():
        y, total = ops.add_rms_norm(x, x, weight)
        y_last, total_last = ops.add_rms_norm(x[-1:], x[-1:], weight)
    assert torch.equal(y[-1:], y_last)
    assert torch.equal(total[-1:], total_last)
    assert not y[:-1].any()


@pytest.mark.slow
def test_linear():
    """The result has more than 2³¹ elements, and so has the upstream gradient of the backward."""
    needs(12)
    size, width = 32, 2048
    x = torch.zeros(ELEMENTS // width, size, dtype=torch.bfloat16)
    x[-1] = torch.randn(size)
    weight = torch.randn(width, size)
    rounded = weight.bfloat16()
    y = torch.ops.fastgpt.linear_fwd_cpp(x, weight, None)
    torch.testing.assert_close(y[-1], rounded @ x[-1])
    assert not y[:-1].any()
    dx, dweight, dbias = torch.ops.fastgpt.linear_bwd_cpp(y, x, weight, True, True, True)
    torch.testing.assert_close(dx[-1], y[-1] @ rounded)
    assert not dx[:-1].any()
    torch.testing.assert_close(dweight, y[-1:].float().T @ x[-1:].float())
    torch.testing.assert_close(dbias, y[-1].float())


@pytest.mark.slow
def test_rope():
    """More positions than fit, with the heads of q far apart; as registered, to spare memory."""
    needs(10)
    length = ELEMENTS // 32
    q = torch.zeros(1, 2, length, 16, dtype=torch.bfloat16)
    q[:, :, -1] = torch.randn(2, 16)
    none, angle = q[:, :0], torch.ones(1, 8).expand(length, 8)
    y, _ = torch.ops.fastgpt.rope_fwd_cpp(q, none, angle, angle, False)
    last, _ = torch.ops.fastgpt.rope_fwd_cpp(q[:, :, -1:], none[:, :, -1:], angle[-1:], angle[-1:], False)
    assert torch.equal(y[:, :, -1:], last)
    assert not y[:, :, :-1].any()
