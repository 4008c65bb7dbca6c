"""Attention on scores far from the ordinary: huge, equal, masked wholly by large numbers, of few columns in 16 bits."""

import pytest
import torch

from fastgpt import ops
from fastgpt.testing import check_error_rule, strided
from tests.support.contract import with_costly
from tests.support.plain_attention import composed

LOWEST = torch.finfo(torch.float32).min


def attend(q, k, v, **options):
    return ops.attention(q, k, v, **options)


def attend_packed(q, k, v, scale=None, causal="none", softcap=None):
    """The batch's entries as documents of attention_varlen."""
    batch, _, rows, _ = q.shape
    columns = k.shape[2]
    q, k, v = (t.transpose(1, 2).flatten(0, 1) for t in (q, k, v))
    bounds = [torch.arange(batch + 1) * n for n in (rows, columns)]
    out = ops.attention_varlen(q, k, v, *bounds, rows, columns, scale=scale, causal=causal, softcap=softcap)
    return out.view(batch, rows, *out.shape[1:]).transpose(1, 2)


@pytest.fixture(params=[attend, attend_packed], ids=["batch", "packed"])
def attention(request):
    return request.param


def one_winner(size_of_scores, rows, columns, dtype=torch.float32, sign=1):
    """q and k whose scores are about as large as given; in each row one is largest by far."""
    factor = size_of_scores**0.5
    q = torch.rand(2, 2, rows, 8) + 0.5
    k = torch.rand(2, 2, columns, 8) * 0.3
    winners = torch.randint(0, columns, (2, 2))
    k.scatter_(2, winners[..., None, None].expand(2, 2, 1, 8), torch.full((2, 2, 1, 8), 1.1))
    v = torch.randn(2, 2, columns, 8)
    return [(x * s).to(dtype).requires_grad_() for x, s in ((q, sign * factor), (k, factor), (v, 1))], winners


@pytest.mark.parametrize("rows", [3, 40])  # few rows are split over their columns on a GPU
@pytest.mark.parametrize("size_of_scores", with_costly([1e3, 1e5, 1e7, 1e10, 1e12], 1e3, 1e7, 1e10))
@pytest.mark.parametrize("scale", with_costly([0.3, 1.0, -0.7], 1.0))
def test_large_scores_have_an_exact_winner(backend, dtype, attention, scale, size_of_scores, rows):
    """p is 1 for it and 0 for the others, forward and backward: no rounding of a large product is exponentiated."""
    if dtype == torch.float16:
        size_of_scores = min(size_of_scores, 1e5)
    (q, k, v), winners = one_winner(size_of_scores, rows, 70, dtype, sign=1 if scale > 0 else -1)
    out = attention(q, k, v, scale=scale)
    rows_of_winners = winners[..., None, None].expand(2, 2, 1, 8)
    expected = v.gather(2, rows_of_winners).expand_as(out)
    torch.testing.assert_close(out, expected)
    upstream = torch.randn_like(out)
    dq, dk, dv = torch.autograd.grad(out, (q, k, v), upstream)
    expected_dv = torch.zeros_like(dv, dtype=torch.float64)
    expected_dv.scatter_(2, rows_of_winners, upstream.double().sum(dim=2, keepdim=True))
    torch.testing.assert_close(dv, expected_dv.to(dtype))
    assert not dk.isnan().any()
    # p (dp - delta) of the winner is 0 but for the rounding of out, and times a large factor still small beside it.
    tolerance = 1e-5 if dtype in (torch.float32, torch.float64) else 0.05
    assert dq.abs().max() <= tolerance * k.abs().max() * upstream.abs().max() * 8


@pytest.mark.parametrize("rows", [3, 70])
@pytest.mark.parametrize("value", with_costly([1e3, 1e6, -1e6, 1e9, 1e12], 1e3, -1e6, 1e12))
@pytest.mark.parametrize("columns", with_costly([5, 100], 5))
def test_scores_that_are_large_and_equal_are_uniform(backend, attention, columns, value, rows):
    """Maximum and log-sum are two numbers: in one, p would have another sum than 1 in the backward."""
    q, k = torch.full((1, 2, rows, 4), 1.0), torch.full((1, 2, columns, 4), value / 4)
    v = torch.randn(1, 2, columns, 6)
    for t in (q, k, v):
        t.requires_grad_()
    out = attention(q, k, v, scale=1.0)
    torch.testing.assert_close(out, v.mean(dim=2, keepdim=True).expand_as(out))
    upstream = torch.randn_like(out)
    (dv,) = torch.autograd.grad(out, v, upstream)
    torch.testing.assert_close(dv, (upstream.sum(dim=2, keepdim=True) / columns).expand_as(dv))


@pytest.mark.parametrize("value", [-1e4, -1e9, LOWEST])
@pytest.mark.parametrize("rows", [3, 40])
def test_rows_masked_wholly_by_a_large_number_are_uniform(backend, rows, value):
    q, k, v = (torch.randn(1, 2, n, 8, requires_grad=True) for n in (rows, 70, 70))
    mask = torch.zeros(rows, 70)
    mask[::2] = value
    out = ops.attention(q, k, v, attn_mask=mask)
    exact = [t.detach().double().requires_grad_() for t in (q, k, v)]
    s = (exact[0].float() @ exact[1].float().transpose(-1, -2) * 8**-0.5 + mask).double()
    expected = torch.softmax(s, -1) @ exact[2]
    torch.testing.assert_close(out.double(), expected, atol=1e-5, rtol=1e-4)
    upstream = torch.randn_like(out)
    (dv,) = torch.autograd.grad(out, v, upstream)
    (expected_dv,) = torch.autograd.grad(expected, exact[2], upstream.double())
    torch.testing.assert_close(dv.double(), expected_dv, atol=1e-5, rtol=1e-3)


def test_a_large_softcap_and_large_scores(backend, attention):
    (q, k, v), winners = one_winner(1e9, 40, 70)
    out = attention(q, k, v, scale=1.0, softcap=1e9)
    expected = v.gather(2, winners[..., None, None].expand(2, 2, 1, 8)).expand_as(out)
    torch.testing.assert_close(out, expected)
    upstream = torch.ones_like(out)
    (dv,) = torch.autograd.grad(out, v, upstream)
    torch.testing.assert_close(dv.sum(dim=2), upstream.sum(dim=2))


def test_the_gradient_of_a_large_lse_is_a_softmax(backend):
    q, k, v = (torch.full((1, 1, n, 4), 1e4, requires_grad=True) for n in (20, 50, 50))
    _, lse = ops.attention(q, k, v, return_lse=True)
    (dk,) = torch.autograd.grad(lse.sum(), k)
    torch.testing.assert_close(lse, torch.full_like(lse, 2e8))
    torch.testing.assert_close(dk, torch.full_like(dk, 0.5 * 1e4 * 20 / 50))


@pytest.mark.parametrize("rows", [20, pytest.param(64, marks=pytest.mark.costly)])
def test_nan_of_one_batch_entry_reaches_no_other(backend, rows):
    """Also where a buffer that one entry has left is used by the next: what the band hides of it is not read."""
    q, k, v = (torch.randn(4, 2, rows, 16) for _ in range(3))
    upstream = torch.randn(4, 2, rows, 16)
    alone = gradients_of(q[1::2], k[1::2], v[1::2], upstream[1::2])
    for poisoned in (upstream, v, q):
        kept = poisoned[::2].clone()
        poisoned[::2] = torch.nan
        together = gradients_of(q, k, v, upstream)
        for found, expected in zip(together, alone, strict=True):
            torch.testing.assert_close(found[1::2], expected)
        poisoned[::2] = kept


def gradients_of(q, k, v, upstream):
    inputs = [t.clone().requires_grad_() for t in (q, k, v)]
    return torch.autograd.grad(ops.attention(*inputs, causal="upper_left"), inputs, upstream)


@pytest.mark.parametrize("columns", with_costly([1, 2, 7, 16], 1, 2))
@pytest.mark.parametrize(("causal", "deterministic"), [("none", False), ("upper_left", True)])
@pytest.mark.parametrize("offset", [0.0, 30.0])
def test_short_rows_obey_the_error_rule(backend, dtype, offset, deterministic, causal, columns):
    """In 16 bits, too, with an upstream gradient that has a part in common: delta is not taken from the rounded out."""
    q, k, v = (strided((2, 2, columns, 16), dtype, "contiguous") for _ in range(3))
    upstream = (torch.randn(2, 2, columns, 16) + offset).to(dtype)
    check_error_rule(
        lambda q, k, v: (
            ops.attention(q, k, v, causal=causal, deterministic=deterministic) * upstream.to(q.dtype)
        ),
        lambda q, k, v: composed(q, k, v, causal=causal) * upstream.to(q.dtype),
        [q, k, v],
    )
