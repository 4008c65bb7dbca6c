"""Packed documents: every backend against PyTorch by the error rule, and each document gets what it gets alone."""

import pytest
import torch
from hypothesis import assume
from hypothesis import strategies as st

import fastgpt
from fastgpt import ops
from fastgpt.reference import dropout_keep
from fastgpt.testing import LAYOUTS, check_error_rule, run_with_gradients, strided
from tests.support.contract import (
    any_of,
    check_compiles_once,
    check_every_slot_is_written,
    check_opcheck,
    check_same_bits_for_any_thread_count,
    registered,
    with_costly,
)
from tests.support.plain_attention import composed_varlen

LENGTHS_Q, LENGTHS_K = (3, 0, 7, 1), (5, 2, 7, 0)


def bounds(lengths, dtype=torch.int32):
    return torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=dtype)


def inputs(
    dtype=torch.float32,
    lengths_q=LENGTHS_Q,
    lengths_k=LENGTHS_K,
    heads=4,
    kv_heads=2,
    size=8,
    value_size=None,
    rest=0,
    layout="contiguous",
):
    """q, k and v, with `rest` rows past the last document."""
    rows, columns = sum(lengths_q) + rest, sum(lengths_k) + rest
    shapes = ((rows, heads, size), (columns, kv_heads, size), (columns, kv_heads, value_size or size))
    return [strided(shape, dtype, layout) for shape in shapes]


def packed(lengths_q=LENGTHS_Q, lengths_k=LENGTHS_K, **options):
    """The op as a function of q, k and v."""
    cu_q, cu_k = bounds(lengths_q), bounds(lengths_k)
    longest = (max(lengths_q, default=0), max(lengths_k, default=0))
    return lambda q, k, v: ops.attention_varlen(q, k, v, cu_q, cu_k, *longest, **options)


def check(dtype, lengths_q, lengths_k, options, **shape):
    check_error_rule(
        packed(lengths_q, lengths_k, **options),
        lambda q, k, v: composed_varlen(q, k, v, lengths_q, lengths_k, **options),
        inputs(dtype, lengths_q, lengths_k, **shape),
    )


SLOPES = torch.tensor([0.5, 0.25, 0.1, 0.0])
MANY = tuple(1 + 7 * n % 23 for n in range(30))
CASES = {
    "full": ({}, {}, LENGTHS_Q, LENGTHS_K),
    "upper-left causal": ({"causal": "upper_left"}, {}, (70, 3, 66), (70, 5, 100)),
    "upper-left causal, three tiles": ({"causal": "upper_left"}, {}, (70, 3, 130), (70, 5, 100)),
    "lower-right causal": ({"causal": "lower_right"}, {}, (70, 3, 20), (80, 2, 100)),
    "window": ({"window": (9, 4)}, {}, (80, 0, 9, 33), (80, 4, 5, 70)),
    "causal window": ({"window": 9, "causal": "lower_right"}, {}, (40, 3, 66), (80, 0, 66)),
    "softcap": ({"softcap": 1.5, "causal": "upper_left"}, {}, LENGTHS_Q, LENGTHS_K),
    "alibi": ({"alibi_slopes": SLOPES, "causal": "lower_right"}, {}, (20, 70), (30, 66)),
    "alibi per document": ({"alibi_slopes": torch.stack([SLOPES, 2 * SLOPES])}, {}, (20, 70), (30, 66)),
    "scale": ({"scale": 0.7}, {}, LENGTHS_Q, LENGTHS_K),
    "a key head each": ({}, {"kv_heads": 4}, LENGTHS_Q, LENGTHS_K),
    "one key head": ({}, {"heads": 3, "kv_heads": 1}, LENGTHS_Q, LENGTHS_K),
    "head size 33, value size 5": ({}, {"size": 33, "value_size": 5}, LENGTHS_Q, LENGTHS_K),
    "head size 3, value size 64": ({}, {"size": 3, "value_size": 64}, (1, 65), (2, 64)),
    "head size 256": ({}, {"size": 256, "heads": 1, "kv_heads": 1}, (9, 4), (40, 4)),
    "dropout": ({"dropout_p": 0.3, "seed": 2**40 + 17}, {}, (18, 0, 5, 30), (23, 1, 70, 3)),
    "everything dropped": ({"dropout_p": 1.0, "seed": 1}, {}, LENGTHS_Q, LENGTHS_K),
    "rows past the last document": ({"causal": "upper_left"}, {"rest": 70}, (5, 66), (7, 70)),
    "one document": ({"causal": "upper_left"}, {}, (150,), (150,)),
    "many short documents": ({"causal": "upper_left"}, {}, MANY, MANY),
    # The long one's key heads are shared by several tasks, the others' are not.
    "one long among short ones": ({"causal": "upper_left"}, {}, (3, 20, 300, 5, 1), (3, 30, 300, 5, 9)),
    "as many keys as there are none": ({}, {}, (0, 0, 5), (200, 7, 0)),
}


# Options that Triton's and CUDA's kernels have from attention, whose tests prove them there.
AS_IN_ATTENTION = ("lower-right causal", "window", "causal window", "alibi", "alibi per document", "dropout")
LONG = ("upper-left causal, three tiles", "one document", "many short documents", "one long among short ones")


@pytest.mark.parametrize("case", with_costly(CASES, *LONG, *AS_IN_ATTENTION))
def test_obeys_the_error_rule(backend, dtype, case):
    options, shape, lengths_q, lengths_k = CASES[case]
    check(dtype, lengths_q, lengths_k, options, **shape)


@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "contiguous"])
def test_strided_inputs(backend, dtype, layout):
    check(dtype, LENGTHS_Q, LENGTHS_K, {"causal": "upper_left"}, layout=layout, rest=2)


def test_packed_qkv(backend, dtype):
    """q, k and v are views into one (total, 3, H, D) tensor."""
    check_error_rule(
        lambda p: packed((9, 10), (9, 10))(*p.unbind(1)),
        lambda p: composed_varlen(*p.unbind(1), (9, 10), (9, 10)),
        [strided((19, 3, 2, 8), dtype, "contiguous")],
    )


@any_of(
    lengths=st.lists(st.tuples(st.integers(0, 90), st.integers(0, 90)), min_size=1, max_size=5),
    rest=st.integers(0, 5),
    size=st.integers(1, 40),
    group=st.integers(1, 3),
    kv_heads=st.integers(1, 2),
    causal=st.sampled_from(["none", "upper_left", "lower_right"]),
    window=st.one_of(st.none(), st.integers(0, 20), st.tuples(st.integers(-1, 20), st.integers(-1, 20))),
    softcap=st.sampled_from([None, 2.0]),
    alibi=st.sampled_from([None, "heads", "documents"]),
    dropout_p=st.sampled_from([0.0, 0.4]),
    seed=st.integers(-(2**63), 2**63 - 1),
)
def test_any_documents_and_combination_of_options(
    backend,
    lengths,
    rest,
    size,
    group,
    kv_heads,
    causal,
    window,
    softcap,
    alibi,
    dropout_p,
    seed,
):
    assume(backend != "triton" or group * kv_heads * sum(q + k for q, k in lengths) < 400)
    heads, options = group * kv_heads, {"causal": causal, "window": window, "softcap": softcap}
    if alibi:
        options["alibi_slopes"] = torch.rand(*([len(lengths)] if alibi == "documents" else []), heads)
    if dropout_p:
        options |= {"dropout_p": dropout_p, "seed": seed}
    lengths_q, lengths_k = ([pair[i] for pair in lengths] for i in (0, 1))
    check(torch.float32, lengths_q, lengths_k, options, heads=heads, kv_heads=kv_heads, size=size, rest=rest)


@pytest.mark.parametrize(
    "options", [{}, {"causal": "upper_left"}, {"causal": "lower_right", "window": 2, "softcap": 2.0}]
)
def test_packed_documents_give_what_separate_calls_give(backend, options):
    q, k, v = inputs()
    out, lse = packed(return_lse=True, **options)(q, k, v)
    g, g_lse = torch.randn_like(out), torch.randn_like(lse).masked_fill(lse == -torch.inf, 0)
    grads = torch.autograd.grad((out, lse), (q, k, v), (g, g_lse))
    documents = zip(*(t.split(n) for t, n in ((q, LENGTHS_Q), (k, LENGTHS_K), (v, LENGTHS_K))), strict=True)
    alone = [
        ops.attention(*(t.transpose(0, 1).unsqueeze(0) for t in document), return_lse=True, **options)
        for document in documents
    ]
    outs, lses = [o[0].transpose(0, 1) for o, _ in alone], [entry[0] for _, entry in alone]
    torch.testing.assert_close(out, torch.cat(outs))
    torch.testing.assert_close(lse, torch.cat(lses, dim=1))
    upstream = (*g.split(LENGTHS_Q), *g_lse.split(LENGTHS_Q, dim=1))
    expected = torch.autograd.grad((*outs, *lses), (q, k, v), upstream)
    for a, e in zip(grads, expected, strict=True):
        torch.testing.assert_close(a, e)


def test_documents_of_one_length_are_a_batch_bit_for_bit():
    """Gradients included: the kernels are attention's, and so is the way the work is cut."""
    q, k, v = (strided((3, 100, heads, 16), torch.bfloat16, "contiguous") for heads in (4, 2, 2))
    slopes = torch.rand(3, 4)
    with fastgpt.use_backend("cpp"):
        batch = ops.attention(
            *(t.transpose(1, 2) for t in (q, k, v)),
            causal="upper_left",
            alibi_slopes=slopes,
            dropout_p=0.2,
            seed=3,
        ).transpose(1, 2)
        function = packed(
            (100,) * 3, (100,) * 3, causal="upper_left", alibi_slopes=slopes, dropout_p=0.2, seed=3
        )
        ours = function(*(t.flatten(0, 1) for t in (q, k, v)))
        assert torch.equal(ours, batch.flatten(0, 1))
        g = torch.randn_like(batch)
        for a, e in zip(
            torch.autograd.grad(ours, (q, k, v), g.flatten(0, 1)),
            torch.autograd.grad(batch, (q, k, v), g),
            strict=True,
        ):
            assert torch.equal(a, e)


def test_no_document_sees_another(backend):
    """NaN in one, or past the last, stays there: in the results, and in the gradients."""
    lengths = (20, 3, 7)  # shorter ones after it, so that what it left in a buffer would show
    function = packed(lengths, lengths, causal="lower_right")
    tensors = inputs(lengths_q=lengths, lengths_k=lengths, rest=3)
    (clean,), grads = run_with_gradients(function, tensors, None)
    with torch.no_grad():
        for t in tensors:
            t[:20] = t[30:] = torch.nan
    (spoilt,), spoilt_grads = run_with_gradients(function, tensors, None)
    assert spoilt[:20].isnan().all()
    for a, e in zip((spoilt, *spoilt_grads), (clean, *grads), strict=True):
        assert torch.equal(a[20:], e[20:])


def test_rows_of_no_document_and_of_no_key_are_zero_with_zero_gradients(backend):
    q, k, v = inputs(rest=70)
    out, lse = packed(return_lse=True)(q, k, v)
    blind = torch.ones(q.shape[0], dtype=torch.bool)
    blind[:3] = blind[3:10] = False  # the last document has a query and no key
    assert torch.equal((out == 0).flatten(1).all(1), blind)
    assert torch.equal(lse == -torch.inf, blind.expand(4, -1))
    unseen = torch.ones(k.shape[0], dtype=torch.bool)
    unseen[:5] = unseen[7:14] = False  # the second document has keys and no query
    grads = torch.autograd.grad((out, lse), (q, k, v), (torch.randn_like(out), torch.randn_like(lse)))
    for g, zero in zip(grads, (blind, unseen, unseen), strict=True):
        assert torch.equal((g == 0).flatten(1).all(1), zero)


@pytest.mark.parametrize("lengths", [(), (0,), (0, 0)])
def test_no_documents_and_empty_ones(backend, lengths):
    for rest in (0, 2):
        q, k, v = inputs(lengths_q=lengths, lengths_k=lengths, rest=rest)
        out, lse = packed(lengths, lengths, return_lse=True, dropout_p=0.5)(q, k, v)
        assert out.shape == q.shape
        assert lse.shape == (4, rest)
        assert not out.any()
        assert (lse == -torch.inf).all()
        for g, x in zip(torch.autograd.grad(out.sum(), (q, k, v)), (q, k, v), strict=True):
            assert torch.equal(g, torch.zeros_like(x))


def test_dropout_mask_is_that_of_a_batch_entry_bit_for_bit(backend):
    """With v the identity the output is the dropped probabilities themselves."""
    q, k, _ = inputs(lengths_q=(20, 20), lengths_k=(32, 32), kv_heads=4)
    v = torch.eye(32)[:, None].expand(32, 4, 32).repeat(2, 1, 1)
    seed = torch.tensor([-(2**62) + 12345])
    out = packed((20, 20), (32, 32), dropout_p=0.25, seed=seed)(q, k, v)
    kept = dropout_keep(seed, 0.25, (2, 4, 20, 32)).transpose(1, 2).flatten(0, 1)
    assert torch.equal(out != 0, kept)


def test_log_sum_exp_is_differentiable(backend, dtype):
    def both(q, k, v):
        out, lse = packed((9, 70), (9, 66), return_lse=True)(q, k, v)
        return out, lse.to(q.dtype)

    def expected(q, k, v):
        documents = ((slice(0, 9), slice(0, 9)), (slice(9, 79), slice(9, 75)))
        scores = [torch.einsum("ihd,jhd->hij", q[i], k[j]) * 8**-0.5 for i, j in documents]
        return composed_varlen(q, k, v, (9, 70), (9, 66)), torch.cat([s.logsumexp(-1) for s in scores], dim=1)

    check_error_rule(both, expected, inputs(dtype, (9, 70), (9, 66), kv_heads=4))


@pytest.mark.parametrize(
    "case", with_costly([*LONG[2:], "as many keys as there are none", "dropout"], *LONG, "dropout")
)
def test_every_slot_is_written(backend, case):
    options, shape, lengths_q, lengths_k = CASES[case]
    tensors = inputs(torch.float32, lengths_q, lengths_k, rest=3, **shape)
    check_every_slot_is_written(packed(lengths_q, lengths_k, **options), tensors)


def test_callers_tensors_are_not_written(backend):
    tensors = [*inputs(), bounds(LENGTHS_Q), bounds(LENGTHS_K)]
    before = [t.detach().clone() for t in tensors]
    ops.attention_varlen(*tensors, 7, 7, dropout_p=0.2).sum().backward()
    for t, b in zip(tensors, before, strict=True):
        assert torch.equal(t.detach(), b)


@pytest.mark.parametrize("lengths", [MANY, (5, 300, 7), (400,)])
def test_same_bits_for_any_thread_count(lengths):
    with fastgpt.use_backend("cpp"):
        check_same_bits_for_any_thread_count(
            packed(lengths, lengths, causal="upper_left"), inputs(torch.bfloat16, lengths, lengths)
        )


def test_bounds_of_either_integer_type(backend):
    q, k, v = inputs()
    out = packed()(q, k, v)
    wide = ops.attention_varlen(q, k, v, bounds(LENGTHS_Q, torch.int64), bounds(LENGTHS_K, torch.int64), 7, 7)
    assert torch.equal(out, wide)


def test_gradcheck():
    with fastgpt.use_backend("cpp"):
        for options in ({"causal": "lower_right"}, {"alibi_slopes": SLOPES, "softcap": 2.0, "window": 3}):
            args = inputs(torch.float64, LENGTHS_Q[:3], LENGTHS_K[:3], size=3)
            function = packed(LENGTHS_Q[:3], LENGTHS_K[:3], **options)
            assert torch.autograd.gradcheck(function, args)


def test_second_derivatives():
    with fastgpt.use_backend("cpp"):
        args = inputs(torch.float64, (2, 3), (2, 3), heads=2, kv_heads=1, size=2)
        assert torch.autograd.gradgradcheck(packed((2, 3), (2, 3), causal="upper_left"), args)


@pytest.mark.once
def test_opcheck(backend):
    q, k, v = (t.detach() for t in inputs(layout="sliced", rest=1))
    cu_q, cu_k = bounds(LENGTHS_Q), bounds(LENGTHS_K)
    plain = (cu_q, cu_k, None, None, 30, 30, 0.3, False, -1, 0, 0.0, 0.0)
    full = (cu_q, cu_k, torch.rand(4, 4), torch.tensor([5]), 30, 30, 0.3, True, 4, 2, 3.0, 0.3)
    forward = registered("attention_varlen_fwd", backend)
    check_opcheck(forward, (q, k, v, *plain), (q, k, v, *full))
    out, stats = forward(q, k, v, *full)
    grads = torch.randn_like(out), stats[..., 0].clamp(-1, 1)
    check_opcheck(registered("attention_varlen_bwd", backend), (*grads, q, k, v, out, stats, *full, False))


@pytest.mark.once
def test_compiles_once_for_all_shapes(backend):
    def function(q, k, v, cu):
        return ops.attention_varlen(q, k, v, cu, cu, 30, 30, causal="upper_left").flatten(1)

    batches = [[*inputs(lengths_q=n, lengths_k=n), bounds(n)] for n in ((7, 4), (9, 30, 5), (1, 2, 3, 4))]
    check_compiles_once(function, batches)


def test_large_heads_go_to_the_reference():
    q, cu = torch.randn(3, 1, 257), torch.tensor([0, 3])
    assert fastgpt.explain(ops.attention_varlen, q, q, q, cu, cu, 3, 3).backend == "reference"


@pytest.mark.parametrize(
    ("cu", "message"),
    [
        (torch.tensor([0, 5, 3, 11]), r"must ascend from 0 to at most 11, got \[0, 5, 3, 11\]"),
        (torch.tensor([0, 5, 12]), "must ascend from 0 to at most 11"),
        (torch.tensor([0, 5, 2**62]), "must ascend from 0 to at most 11"),
        (torch.tensor([0, -4, 11], dtype=torch.int32), "must ascend from 0"),
        (torch.tensor([1, 5, 11]), "must ascend from 0"),
    ],
)
@pytest.mark.only("reference", "cpp", "triton")
def test_document_bounds_are_checked(backend, cu, message):
    """On a GPU they are read there, where nothing outside the tensors is touched: the next test."""
    q, right = torch.randn(11, 2, 8), torch.full_like(cu, 11).scatter(0, torch.tensor([0]), 0)
    options = (None, None, 11, 11, 0.3, False, -1, -1, 0.0, 0.0)
    out, stats = torch.zeros(11, 2, 8), torch.zeros(2, 11, 2)
    for name, (cu_q, cu_k) in {"cu_seqlens_q": (cu, right), "cu_seqlens_k": (right, cu)}.items():
        with pytest.raises(ValueError, match=f"{name} {message}"):
            ops.attention_varlen(q, q, q, cu_q, cu_k, 11, 11)
        with pytest.raises(ValueError, match=f"{name} {message}"):
            registered("attention_varlen_bwd", backend)(
                out, None, q, q, q, out, stats, cu_q, cu_k, *options, False
            )


@pytest.mark.parametrize(
    "cu", [[0, 5, 12], [0, 5, 2**62], [0, -4, 11], [-(2**62), 5, 11], [1, 5, 11], [0, 12, 12]]
)
def test_cuda_kernels_keep_within_the_tensors_whatever_the_bounds_say(cuda, cu):
    """The emulator reports any access outside."""
    right, wrong = torch.tensor([0, 5, 11]), torch.tensor(cu)
    q, k, v = (torch.randn(11, 2, 8, requires_grad=True) for _ in "qkv")
    for cu_q, cu_k in ((wrong, right), (right, wrong), (wrong, wrong)):
        out = ops.attention_varlen(q, k, v, cu_q, cu_k, 11, 11, causal="lower_right")
        assert out.isfinite().all()
        assert all(g.isfinite().all() for g in torch.autograd.grad(out.sum(), (q, k, v)))


CU = torch.tensor([0, 4])


@pytest.mark.parametrize(
    ("shapes", "cu", "options", "error", "message"),
    [
        (((4, 2, 8), (4, 2, 8), (5, 2, 8)), CU, {}, ValueError, "must agree"),
        (((4, 2, 8), (4, 2, 7), (4, 2, 8)), CU, {}, ValueError, "must agree"),
        (((4, 3, 8), (4, 2, 8), (4, 2, 8)), CU, {}, ValueError, "must divide the 3 heads of q"),
        (((4, 2, 8),) * 3, CU.float(), {}, ValueError, "of int32 or int64"),
        (((4, 2, 8),) * 3, CU[None], {}, ValueError, r"must be \(documents \+ 1,\)"),
        (((4, 2, 8),) * 3, CU[:0], {}, ValueError, r"must be \(documents \+ 1,\)"),
        (((4, 2, 8),) * 3, [0, 4], {}, TypeError, "cu_seqlens_q must be a torch.Tensor"),
        (((4, 2, 8),) * 3, CU, {"alibi_slopes": torch.ones(3)}, ValueError, r"must be \(2,\) or \(1, 2\)"),
        (((4, 2, 8),) * 3, CU, {"softcap": -1.0}, ValueError, "softcap must be positive"),
        (((4, 2, 8),) * 3, CU, {"causal": True}, ValueError, "causal must be one of"),
        (((4, 2, 8),) * 3, CU, {"window": -2}, ValueError, "window must be"),
        (((4, 2, 8),) * 3, CU, {"dropout_p": 1.1}, ValueError, "between 0 and 1"),
    ],
)
def test_bad_input_gets_one_sentence(shapes, cu, options, error, message):
    with pytest.raises(error, match=message):
        ops.attention_varlen(*(torch.ones(shape) for shape in shapes), cu, cu, 4, 4, **options)


def test_both_bounds_name_the_same_documents():
    q = torch.ones(4, 2, 8)
    with pytest.raises(ValueError, match="same number of documents"):
        ops.attention_varlen(q, q, q, CU, torch.tensor([0, 2, 4]), 4, 4)
