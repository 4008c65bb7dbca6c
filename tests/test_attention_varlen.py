"""Packed documents of different lengths: each gets what it gets alone."""

import pytest
import torch
from contract import check_opcheck, registered

import fastgpt
from fastgpt import ops
from fastgpt.testing import strided

LENGTHS_Q, LENGTHS_K = (3, 0, 7, 1), (5, 2, 7, 0)


def bounds(lengths):
    return torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32)


def inputs(dtype=torch.float32):
    q = strided((sum(LENGTHS_Q), 4, 8), dtype, "contiguous")
    return [q, *(strided((sum(LENGTHS_K), 2, 8), dtype, "contiguous") for _ in range(2))]


def packed(q, k, v, **options):
    return ops.attention_varlen(q, k, v, bounds(LENGTHS_Q), bounds(LENGTHS_K), 7, 7, **options)


@pytest.mark.parametrize(
    "options", [{}, {"causal": "upper_left"}, {"causal": "lower_right", "window": 2, "softcap": 2.0}]
)
def test_packed_documents_give_what_separate_calls_give(options):
    q, k, v = inputs()
    out, lse = packed(q, k, v, return_lse=True, **options)
    g = torch.randn_like(out)
    grads = torch.autograd.grad(out, (q, k, v), g)
    qs, ks, vs, gs = (
        torch.split(t, n) for t, n in ((q, LENGTHS_Q), (k, LENGTHS_K), (v, LENGTHS_K), (g, LENGTHS_Q))
    )
    with fastgpt.use_backend("reference"):
        alone = [
            ops.attention(*(t.transpose(0, 1).unsqueeze(0) for t in parts), return_lse=True, **options)
            for parts in zip(qs, ks, vs, strict=True)
        ]
    outs = [o[0].transpose(0, 1) for o, _ in alone]
    torch.testing.assert_close(out, torch.cat(outs))
    torch.testing.assert_close(lse, torch.cat([entry[0] for _, entry in alone], dim=1))
    expected = torch.autograd.grad(outs, (q, k, v), gs)
    for a, e in zip(grads, expected, strict=True):
        torch.testing.assert_close(a, e)


def test_no_document_sees_another():
    q, k, v = inputs()
    changed = k.detach().clone()
    changed[:5] += 1  # the first document's keys
    assert torch.equal(packed(q, k, v)[3:], packed(q, changed, v)[3:])
    assert not torch.equal(packed(q, k, v)[:3], packed(q, changed, v)[:3])


def test_dropout_mask_of_a_document_is_that_of_a_batch_entry():
    q = torch.randn(2, 4, 5, 8)
    cu = torch.tensor([0, 5, 10])
    flat = q.transpose(1, 2).reshape(10, 4, 8)
    out = ops.attention_varlen(flat, flat, flat, cu, cu, 5, 5, dropout_p=0.4, seed=9)
    padded = ops.attention(q, q, q, dropout_p=0.4, seed=9)
    torch.testing.assert_close(out, padded.transpose(1, 2).reshape(10, 4, 8))


def test_gradcheck_and_opcheck():
    args = inputs(torch.float64)
    assert torch.autograd.gradcheck(lambda q, k, v: packed(q, k, v, causal="lower_right"), args)
    q, k, v = (t.detach() for t in inputs())
    rest = (bounds(LENGTHS_Q), bounds(LENGTHS_K), None, None, 0.3, True, -1, 0, 0.0, 0.0)
    check_opcheck(registered("attention_varlen_fwd", "reference"), (q, k, v, *rest))
    check_opcheck(
        registered("attention_varlen_bwd", "reference"), (torch.randn_like(q), None, q, k, v, *rest)
    )


@pytest.mark.parametrize("backend", ["cpp", "triton"])
def test_backends_without_it_say_so(backend):
    with (
        fastgpt.use_backend(backend),
        pytest.raises(fastgpt.BackendUnavailable, match="no attention_varlen yet"),
    ):
        packed(*inputs())


@pytest.mark.parametrize(
    ("cu", "message"),
    [
        (torch.tensor([0, 5, 3, 11]), "must ascend from 0"),
        (torch.tensor([0, 5, 99]), "must ascend from 0 to at most"),
        (torch.tensor([1, 5, 11]), "must ascend from 0"),
        (torch.tensor([0.0, 11.0]), "of int32 or int64"),
    ],
)
def test_document_bounds_are_checked(cu, message):
    q = torch.randn(11, 2, 8)
    with pytest.raises(ValueError, match=message):
        ops.attention_varlen(q, q, q, cu, cu, 11, 11)
