"""Attention sinks of both attention ops: every backend against a concatenated column, and the corners."""

import pytest
import torch
from hypothesis import assume
from hypothesis import strategies as st

import fastgpt
from fastgpt import ops, reference
from fastgpt.testing import check_error_rule, run_with_gradients, strided
from tests.support.contract import any_of, check_compiles_once, check_every_slot_is_written, with_costly
from tests.support.plain_attention import composed, composed_varlen

HEADS = 4
LENGTHS = [(5, 30, 0, 13), (7, 26, 3, 13)]  # of documents: of queries, of keys


def inputs(dtype, batch=2, kv_heads=4, rows=20, columns=20, size=16, layout="contiguous"):
    """q, k, v, and sinks among the log-sum-exps of the rows."""
    shapes = ((batch, HEADS, rows, size), *[(batch, kv_heads, columns, size)] * 2)
    sinks = (torch.randn(HEADS) + 3).to(dtype).requires_grad_()
    return [*(strided(shape, dtype, layout) for shape in shapes), sinks]


def packed(dtype, kv_heads=2, size=16, extra=0):
    rows, columns = (sum(lengths) + extra for lengths in LENGTHS)
    shapes = ((rows, HEADS, size), *[(columns, kv_heads, size)] * 2)
    sinks = (torch.randn(HEADS) + 3).to(dtype).requires_grad_()
    return [*(strided(shape, dtype, "contiguous") for shape in shapes), sinks]


def varlen(q, k, v, sinks, **options):
    bounds = [torch.tensor([0, *lengths]).cumsum(0) for lengths in LENGTHS]
    return ops.attention_varlen(q, k, v, *bounds, *map(max, LENGTHS), sinks=sinks, **options)


CASES = {
    "full": ({}, {}),
    "causal": ({"causal": "upper_left"}, {"rows": 70, "columns": 70, "batch": 1}),
    "causal window, grouped": ({"causal": "lower_right", "window": 9}, {"columns": 40, "kv_heads": 2}),
    "one row, as in decoding": ({"causal": "lower_right"}, {"rows": 1, "columns": 33}),
    "rows that see nothing": ({"causal": "lower_right"}, {"rows": 30, "columns": 20}),
    "scale and softcap": ({"scale": 0.7, "softcap": 1.5}, {}),
    "alibi": ({"alibi_slopes": torch.tensor([0.5, 0.25, 0.1, 0.0])}, {}),
    "dropout": ({"dropout_p": 0.3, "seed": 7}, {"rows": 18, "columns": 23}),
}


@pytest.mark.parametrize("case", with_costly(CASES, *list(CASES)[3:]))
def test_obeys_the_error_rule(backend, dtype, case):
    options, shape = CASES[case]
    check_error_rule(
        lambda q, k, v, s: ops.attention(q, k, v, sinks=s, **options),
        lambda q, k, v, s: composed(q, k, v, sinks=s, **options),
        inputs(dtype, **shape),
    )


VARLEN_CASES = {
    "full": {},
    "causal window": {"causal": "lower_right", "window": 5},
    "dropout": {"dropout_p": 0.3, "seed": 7},
}


@pytest.mark.parametrize("case", with_costly(VARLEN_CASES, "full", "dropout"))
def test_varlen_obeys_the_error_rule(backend, dtype, case):
    options = VARLEN_CASES[case]
    check_error_rule(
        lambda *tensors: varlen(*tensors, **options),
        lambda q, k, v, s: composed_varlen(q, k, v, *LENGTHS, sinks=s, **options),
        packed(dtype, extra=3),
    )


@pytest.mark.once
@pytest.mark.parametrize("layout", ["transposed", "sliced", "gapped"])
@pytest.mark.parametrize("masked", ["bool", "additive"])
def test_strided_inputs_with_a_mask(backend, masked, layout):
    mask = torch.rand(20, 20) > 0.3 if masked == "bool" else torch.randn(20, 20)
    check_error_rule(
        lambda q, k, v, s: ops.attention(q, k, v, attn_mask=mask, sinks=s),
        lambda q, k, v, s: composed(q, k, v, attn_mask=mask, sinks=s),
        inputs(torch.float32, layout=layout),
    )


@any_of(
    rows=st.integers(0, 75),
    columns=st.integers(0, 75),
    size=st.integers(1, 40),
    kv_heads=st.sampled_from([1, 2, 4]),
    causal=st.sampled_from(["none", "upper_left", "lower_right"]),
    window=st.one_of(st.none(), st.integers(0, 20)),
    level=st.floats(-50, 50),
)
def test_any_shape_and_level(backend, rows, columns, size, kv_heads, causal, window, level):
    assume(backend not in ("triton", "cuda") or rows * columns < 2500)
    *qkv, sinks = inputs(torch.float32, 1, kv_heads, rows, columns, size)
    options = {"causal": causal, "window": window}
    check_error_rule(
        lambda q, k, v, s: ops.attention(q, k, v, sinks=s, **options),
        lambda q, k, v, s: composed(q, k, v, sinks=s, **options),
        [*qkv, (sinks.detach() + level).requires_grad_()],
    )


def test_log_sum_exp_has_the_sink(backend, dtype):
    def both(q, k, v, s):
        out, lse = ops.attention(q, k, v, sinks=s, causal="upper_left", return_lse=True)
        return out, lse.to(q.dtype)

    def expected(q, k, v, s):
        scores = (q @ k.transpose(-1, -2)) * q.shape[-1] ** -0.5
        scores = scores.masked_fill(torch.ones(scores.shape[-2:]).triu(1).bool(), -torch.inf)
        scores = torch.cat((scores, s.view(-1, 1, 1).expand(*scores.shape[:3], 1)), -1)
        return torch.softmax(scores, -1)[..., :-1] @ v, torch.logsumexp(scores, -1)

    check_error_rule(both, expected, inputs(dtype))


@pytest.mark.parametrize("packs", [False, True], ids=["attention", "varlen"])
def test_agrees_with_the_reference(packs, backend):
    options = {"causal": "lower_right", "window": (4, -1)}
    bounds = {"lower_right": True, "left": 4, "right": 0, "scale": 0.25}
    if packs:
        q, k, v, s = packed(torch.float32, extra=3)
        cu = [torch.tensor([0, *lengths]).cumsum(0) for lengths in LENGTHS]
        found = varlen(q, k, v, s, return_lse=True, **options)
        expected = reference.attention_varlen(q, k, v, *cu, sinks=s, **bounds)
        assert torch.equal(found[1][:, -3:], s[:, None].expand(-1, 3))  # the rows past the last document
    else:
        q, k, v, s = inputs(torch.float32, kv_heads=2, rows=30)
        found = ops.attention(q, k, v, sinks=s, return_lse=True, **options)
        expected = reference.attention(q, k, v, sinks=s, **bounds)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    grads = [torch.randn_like(t) for t in expected]
    of = [torch.autograd.grad(results, (q, k, v, s), grads) for results in (found, expected)]
    torch.testing.assert_close(*of, rtol=1e-4, atol=1e-5)


def test_a_zero_sink_without_values_is_a_column_of_zeros(backend):
    """StreamingLLM's zero sink: as if a key and a value of zeros preceded all columns."""
    q, k, v, _ = inputs(torch.float32)
    padded = (torch.cat((torch.zeros(2, 4, 1, 16), t), dim=2) for t in (k, v))
    expected, _ = ops.attention(q, *padded, return_lse=True)
    torch.testing.assert_close(ops.attention(q, k, v, sinks=torch.zeros(4)), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("rows_see", ["something", "nothing"])
def test_sinks_of_minus_infinity_are_none(backend, rows_see):
    q, k, v, _ = inputs(torch.float32)
    mask = torch.rand(20, 20) > 0.5
    if rows_see == "nothing":
        mask[3] = mask[11] = False
    sinks = torch.full((HEADS,), -torch.inf, requires_grad=True)
    given, left_out = (
        ops.attention(q, k, v, attn_mask=mask, return_lse=True, sinks=s) for s in (sinks, None)
    )
    assert all(torch.equal(a, b) for a, b in zip(given, left_out, strict=True))
    # The gradient of a log-sum-exp of -inf is handed over too: it counts for nothing.
    ones = [torch.ones_like(t) for t in given]
    *of_given, of_sinks = torch.autograd.grad(given, (q, k, v, sinks), ones)
    of_left_out = torch.autograd.grad(left_out, (q, k, v), ones)
    assert all(torch.equal(a, b) for a, b in zip(of_given, of_left_out, strict=True))
    assert torch.equal(of_sinks, torch.zeros(HEADS))


def test_rows_that_see_nothing_have_the_sink_alone(backend):
    q, k, v, sinks = inputs(torch.float32)
    mask = torch.rand(20, 20) > 0.5
    mask[3] = mask[11] = False
    out, lse = ops.attention(q, k, v, attn_mask=mask, sinks=sinks, return_lse=True)
    assert not out[:, :, [3, 11]].any()
    assert torch.equal(lse[:, :, [3, 11]], sinks[:, None].expand(2, HEADS, 2))
    results = (out[:, :, [3, 11]].sum(), lse[:, :, [3, 11]].sum())
    *of_qkv, of_sinks = torch.autograd.grad(results, (q, k, v, sinks))
    assert not any(g.any() for g in of_qkv)
    assert torch.equal(of_sinks, torch.full((HEADS,), 4.0))  # of the log-sum-exps


@pytest.mark.parametrize("level", with_costly([torch.inf, 1e30, 200.0, -200.0, -1e30], 1e30, 200.0, -1e30))
def test_sinks_far_from_the_scores(backend, level):
    q, k, v, _ = inputs(torch.float32)
    sinks = torch.full((HEADS,), level, requires_grad=True)
    out, lse = ops.attention(q, k, v, sinks=sinks, return_lse=True)
    plain, plain_lse = ops.attention(q, k, v, return_lse=True)
    torch.testing.assert_close(out, plain if level < 0 else torch.zeros_like(out))
    torch.testing.assert_close(lse, plain_lse if level < 0 else torch.full_like(lse, level))
    *of_qkv, of_sinks = torch.autograd.grad((out.sum(), lse.sum()), (q, k, v, sinks))
    torch.testing.assert_close(of_sinks, torch.full_like(of_sinks, 0.0 if level < 0 else lse[:, 0].numel()))
    if level > 0:
        assert not any(g.any() for g in of_qkv)
    else:
        torch.testing.assert_close(
            of_qkv, list(torch.autograd.grad((plain.sum(), plain_lse.sum()), (q, k, v)))
        )


@pytest.mark.parametrize(("rows", "columns", "batch"), [(0, 5, 1), (5, 0, 1), (0, 0, 1), (5, 5, 0)])
def test_empty_lengths(backend, rows, columns, batch):
    q, k, v, sinks = inputs(torch.float32, batch, rows=rows, columns=columns)
    out, lse = ops.attention(q, k, v, sinks=sinks, return_lse=True)
    assert out.shape == q.shape and not out.any()
    assert torch.equal(lse, sinks[:, None].expand(batch, HEADS, rows))
    for g, x in zip(torch.autograd.grad(out.sum(), (q, k, v, sinks)), (q, k, v, sinks), strict=True):
        assert g.shape == x.shape and not g.any()


@pytest.mark.once
@pytest.mark.parametrize("packs", [False, True], ids=["attention", "varlen"])
def test_layout_and_dtype_are_those_without_sinks(packs, backend, dtype):
    *qkv, sinks = packed(dtype) if packs else inputs(dtype)
    of = (
        (lambda s, **o: varlen(*qkv, s, **o)) if packs else (lambda s, **o: ops.attention(*qkv, sinks=s, **o))
    )
    for given in (sinks, sinks.float(), sinks.double()):
        for a, b in zip(of(given, return_lse=True), of(None, return_lse=True), strict=True):
            assert (a.shape, a.dtype, a.stride()) == (b.shape, b.dtype, b.stride())
        assert torch.equal(of(given), of(given, return_lse=True)[0])


@pytest.mark.parametrize("packs", [False, True], ids=["attention", "varlen"])
def test_only_the_sinks_require_a_gradient(packs, backend):
    *qkv, sinks = packed(torch.float32) if packs else inputs(torch.float32)
    function = varlen if packs else lambda q, k, v, s: ops.attention(q, k, v, sinks=s)
    (expected,) = torch.autograd.grad(function(*qkv, sinks).sin().sum(), sinks)
    (found,) = torch.autograd.grad(function(*(t.detach() for t in qkv), sinks).sin().sum(), sinks)
    assert torch.equal(found, expected) and found.all()


@pytest.mark.once
def test_parameters_in_float32_under_autocast(backend):
    """The sinks are not rounded to autocast's dtype."""
    q, k, v, sinks = inputs(torch.float32)
    with torch.autocast(q.device.type, torch.bfloat16):
        found = ops.attention(q, k, v, sinks=sinks)
    expected = ops.attention(*(t.bfloat16() for t in (q, k, v)), sinks=sinks)
    assert found.dtype == torch.bfloat16 and torch.equal(found, expected)
    assert torch.autograd.grad(found.sum(), sinks)[0].dtype == torch.float32


@pytest.mark.once
@pytest.mark.parametrize("packs", [False, True], ids=["attention", "varlen"])
def test_compiles_once_for_all_shapes(packs, backend):
    if packs:
        check_compiles_once(lambda *tensors: varlen(*tensors, return_lse=True), [packed(torch.float32)])
        return
    check_compiles_once(
        lambda q, k, v, s: ops.attention(q, k, v, causal="upper_left", sinks=s, return_lse=True),
        [inputs(torch.float32, b, rows=n, columns=n) for b, n in ((2, 7), (3, 9), (5, 30))],
    )


@pytest.mark.once
def test_every_slot_is_written(backend):
    check_every_slot_is_written(
        lambda q, k, v, s: ops.attention(q, k, v, causal="lower_right", sinks=s),
        inputs(torch.float32, kv_heads=2, rows=40, columns=20),
    )


def tiny():
    return [t.detach()[..., :3].double().requires_grad_() for t in inputs(torch.float64, 1, 2, 3, 4, 3)[:3]]


@pytest.mark.parametrize("return_lse", [False, True])
def test_first_and_second_derivatives_in_float64(return_lse):
    sinks = torch.randn(HEADS, dtype=torch.float64, requires_grad=True)
    options = {"causal": "upper_left", "return_lse": return_lse}
    function = lambda q, k, v, s: ops.attention(q, k, v, sinks=s, **options)  # noqa: E731
    with fastgpt.use_backend("cpp"):
        assert torch.autograd.gradcheck(function, (*tiny(), sinks))
        assert torch.autograd.gradgradcheck(function, (*tiny(), sinks))


def test_second_derivatives_have_no_nan_where_nothing_is_seen():
    q, k, v = tiny()
    mask = torch.tensor([True, False, True])[:, None].expand(3, 4)
    sinks = torch.tensor([0.5, -torch.inf, torch.inf, 3.0], dtype=torch.float64, requires_grad=True)
    results = ops.attention(q, k, v, attn_mask=mask, sinks=sinks, return_lse=True)
    results = [r.nan_to_num(posinf=0.0, neginf=0.0) for r in results]
    first = torch.autograd.grad(
        results, (q, k, v, sinks), [torch.ones_like(r) for r in results], create_graph=True
    )
    second = torch.autograd.grad(sum(g.sin().sum() for g in first), (q, k, v, sinks))
    assert all(g.isfinite().all() for g in (*first, *second))


def test_transforms_are_refused_for_the_sinks_too():
    q, k, v, sinks = (t.detach() for t in inputs(torch.float32))
    with pytest.raises(fastgpt.BackendUnavailable, match="transform"):
        torch.func.grad(lambda s: ops.attention(q, k, v, sinks=s).sum())(sinks)
    with (
        torch.autograd.forward_ad.dual_level(),
        pytest.raises(fastgpt.BackendUnavailable, match="forward-mode"),
    ):
        ops.attention(q, k, v, sinks=torch.autograd.forward_ad.make_dual(sinks, sinks))


@pytest.mark.once
def test_sinks_that_are_a_column_of_a_wider_tensor(backend):
    q, k, v, sinks = inputs(torch.float32)
    wide = torch.stack((sinks.detach(), torch.randn(HEADS)), dim=1)
    assert torch.equal(ops.attention(q, k, v, sinks=wide[:, 0]), ops.attention(q, k, v, sinks=sinks))


@pytest.mark.once
def test_callers_tensors_are_not_written(backend):
    tensors = inputs(torch.float32)
    before = [t.detach().clone() for t in tensors]
    results, _ = run_with_gradients(lambda q, k, v, s: ops.attention(q, k, v, sinks=s), tensors, None)
    assert results[0].any()
    assert all(torch.equal(t, b) for t, b in zip(tensors, before, strict=True))


BAD = [
    (torch.zeros(3), ValueError, r"sinks must have shape \(4,\), got \(3,\)"),
    (torch.zeros(1, 4), ValueError, r"sinks must have shape \(4,\), got \(1, 4\)"),
    (torch.zeros(4, dtype=torch.int64), TypeError, "sinks must be float32, bfloat16"),
    (torch.zeros(4, device="meta"), ValueError, "sinks is on meta but q is on cpu"),
    (torch.zeros(4).to_sparse(), ValueError, "sinks must be a dense tensor"),
    (0.0, TypeError, "sinks must be a torch.Tensor, got float"),
]


@pytest.mark.parametrize(("sinks", "error", "message"), BAD, ids=[message[:25] for *_, message in BAD])
@pytest.mark.parametrize("packs", [False, True], ids=["attention", "varlen"])
def test_bad_sinks_get_one_sentence(packs, sinks, error, message):
    *qkv, _ = packed(torch.float32) if packs else inputs(torch.float32)
    op = "attention_varlen" if packs else "attention"
    with pytest.raises(error, match=f"{op}: {message}"):
        varlen(*qkv, sinks) if packs else ops.attention(*qkv, sinks=sinks)
