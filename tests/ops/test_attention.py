"""Attention: every backend against PyTorch by the error rule, option by option, and the contract's corners."""

import pytest
import torch
import torch.nn.functional as T
from hypothesis import assume
from hypothesis import strategies as st

import fastgpt
from fastgpt import ops
from fastgpt.reference import dropout_keep
from fastgpt.testing import check_error_rule, run_with_gradients, strided
from tests.support.contract import (
    any_of,
    check_compiles_once,
    check_every_slot_is_written,
    check_opcheck,
    check_same_bits_for_any_thread_count,
    registered,
    with_costly,
)
from tests.support.plain_attention import composed


def inputs(
    dtype, batch=2, heads=4, kv_heads=4, rows=20, columns=20, size=16, value_size=None, layout="contiguous"
):
    shapes = (
        (batch, heads, rows, size),
        (batch, kv_heads, columns, size),
        (batch, kv_heads, columns, value_size or size),
    )
    return [strided(shape, dtype, layout) for shape in shapes]


CASES = {
    "full": ({}, {}),
    "upper-left causal": ({"causal": "upper_left"}, {"rows": 70, "columns": 70}),
    "upper-left causal, more columns": ({"causal": "upper_left"}, {"rows": 20, "columns": 70}),
    "lower-right causal, more columns": ({"causal": "lower_right"}, {"rows": 20, "columns": 70}),
    "lower-right causal, more rows": ({"causal": "lower_right"}, {"rows": 70, "columns": 20}),
    "one row, as in decoding": ({"causal": "lower_right"}, {"rows": 1, "columns": 33}),
    "grouped queries": ({"causal": "upper_left"}, {"heads": 6, "kv_heads": 2}),
    "one key head": ({}, {"heads": 3, "kv_heads": 1}),
    "head size 33": ({"causal": "upper_left"}, {"size": 33, "heads": 1, "kv_heads": 1}),
    "head size 3, value size 5": ({}, {"size": 3, "value_size": 5}),
    "head size 256": ({}, {"size": 256, "batch": 1, "heads": 1, "kv_heads": 1, "rows": 9, "columns": 40}),
    "scale": ({"scale": 0.7}, {}),
    "window": ({"window": (9, 4)}, {"rows": 80, "columns": 80, "batch": 1}),
    "causal window": ({"window": 9, "causal": "lower_right"}, {"rows": 40, "columns": 80, "batch": 1}),
    # Bands that begin or end with the one column of a tile that they touch.
    "one column of the last tile": (
        {"causal": "lower_right"},
        {"rows": 64, "columns": 65, "batch": 1, "heads": 4},
    ),
    "one column of the first tile": (
        {"window": 1},
        {"rows": 130, "columns": 130, "batch": 1, "kv_heads": 1, "size": 8},
    ),
    "softcap": ({"softcap": 1.5, "causal": "upper_left"}, {}),
    "alibi": ({"alibi_slopes": torch.tensor([0.5, 0.25, 0.1, 0.0]), "causal": "lower_right"}, {}),
    "alibi per batch entry": ({"alibi_slopes": torch.tensor([[0.5], [0.1]])}, {"heads": 1, "kv_heads": 1}),
    "dropout": ({"dropout_p": 0.3, "seed": 2**40 + 17}, {"rows": 18, "columns": 23}),
    "dropout, causal, grouped": (
        {"dropout_p": 0.5, "seed": -3, "causal": "upper_left"},
        {"heads": 4, "kv_heads": 2, "rows": 30, "columns": 30},
    ),
    "everything dropped": ({"dropout_p": 1.0, "seed": 1}, {}),
}


@pytest.mark.parametrize("case", CASES)
def test_obeys_the_error_rule(backend, dtype, case):
    options, shape = CASES[case]
    check_error_rule(
        lambda q, k, v: ops.attention(q, k, v, **options),
        lambda q, k, v: composed(q, k, v, **options),
        inputs(dtype, **shape),
    )


@pytest.mark.parametrize("layout", ["transposed", "sliced", "gapped"])
def test_strided_inputs(backend, dtype, layout):
    check_error_rule(
        lambda q, k, v: ops.attention(q, k, v, causal="upper_left"),
        lambda q, k, v: composed(q, k, v, causal="upper_left"),
        inputs(dtype, layout=layout),
    )


def test_packed_qkv_in_and_contiguous_rows_out(backend, dtype):
    """q, k, v are views into one (B, T, 3, H, D) tensor; the output is a view of a contiguous (B, T, H, D)."""
    packed = strided((2, 19, 3, 2, 8), dtype, "contiguous")
    ours = lambda p: ops.attention(*p.permute(2, 0, 3, 1, 4), causal="upper_left")  # noqa: E731
    check_error_rule(ours, lambda p: composed(*p.permute(2, 0, 3, 1, 4), causal="upper_left"), [packed])
    assert ours(packed).transpose(1, 2).is_contiguous()


MASKS = [(2, 4, 20, 20), (1, 1, 20, 20), (2, 1, 1, 20), (20, 20), (1, 20), (20, 1), ()]


@pytest.mark.parametrize("shape", with_costly(MASKS, (1, 1, 20, 20), (20, 20), (1, 20), ()))
@pytest.mark.parametrize("kind", ["bool", "additive", "additive float32"])
def test_masks_of_every_broadcastable_shape(backend, dtype, shape, kind):
    if kind == "bool":
        mask = torch.rand(shape) > 0.3
    else:
        mask = torch.randn(shape).to(torch.float32 if kind.endswith("32") else dtype)
    check_error_rule(
        lambda q, k, v, m=mask: ops.attention(q, k, v, attn_mask=m),
        lambda q, k, v, m=mask: composed(q, k, v, attn_mask=m),
        inputs(dtype),
    )


@pytest.mark.parametrize(
    "asked", with_costly(["by the option", "by PyTorch's switch"], "by PyTorch's switch")
)
@pytest.mark.parametrize("heads", with_costly([(1, 2, 1), (2, 4, 2)], (2, 4, 2)))
def test_deterministic_backward(backend, dtype, asked, heads):
    """Where it is another path, it is as exact; and its bits are the same in every run."""
    torch.use_deterministic_algorithms(asked == "by PyTorch's switch")
    options = {"causal": "lower_right", "softcap": 2.0, "window": (20, -1), "dropout_p": 0.3, "seed": 3}
    ours = lambda q, k, v: ops.attention(q, k, v, deterministic=asked == "by the option", **options)  # noqa: E731
    batch, query_heads, key_heads = heads
    shapes = ((batch, query_heads, 70, 24), *[(batch, key_heads, 80, 24)] * 2)
    tensors = [strided(shape, dtype, "contiguous") for shape in shapes]
    check_error_rule(ours, lambda q, k, v: composed(q, k, v, **options), tensors)
    first, second = (run_with_gradients(ours, tensors, None)[1] for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@any_of(
    rows=st.integers(1, 75),
    columns=st.integers(1, 75),
    size=st.integers(1, 40),
    group=st.integers(1, 3),
    kv_heads=st.integers(1, 2),
    layout=st.sampled_from(["contiguous", "transposed", "sliced", "gapped"]),
    causal=st.sampled_from(["none", "upper_left", "lower_right"]),
    window=st.one_of(st.none(), st.integers(0, 20), st.tuples(st.integers(-1, 20), st.integers(-1, 20))),
    softcap=st.sampled_from([None, 2.0]),
    alibi=st.booleans(),
    masked=st.sampled_from([None, "bool", "additive"]),
    dropout_p=st.sampled_from([0.0, 0.4]),
    seed=st.integers(-(2**63), 2**63 - 1),
)
def test_any_shape_and_combination_of_options(
    backend,
    rows,
    columns,
    size,
    group,
    kv_heads,
    layout,
    causal,
    window,
    softcap,
    alibi,
    masked,
    dropout_p,
    seed,
):
    assume(backend != "triton" or rows * columns < 2500)
    heads = group * kv_heads
    options = {"causal": causal, "window": window, "softcap": softcap}
    if alibi:
        options["alibi_slopes"] = torch.rand(heads)
    if masked:
        options["attn_mask"] = (
            torch.rand(rows, columns) > 0.2 if masked == "bool" else torch.randn(rows, columns)
        )
    if dropout_p:
        options |= {"dropout_p": dropout_p, "seed": seed}
    check_error_rule(
        lambda q, k, v: ops.attention(q, k, v, **options),
        lambda q, k, v: composed(q, k, v, **options),
        inputs(torch.float32, 1, heads, kv_heads, rows, columns, size, layout=layout),
    )


def test_agrees_with_pytorchs_own_kernel(backend, dtype):
    check_error_rule(
        lambda q, k, v: ops.attention(q, k, v, causal="upper_left"),
        lambda q, k, v: T.scaled_dot_product_attention(q, k, v, is_causal=True),
        inputs(dtype, rows=66, columns=66),
    )


def test_rows_that_see_nothing_are_zero_with_zero_gradients(backend):
    q, k, v = inputs(torch.float32)
    mask = torch.rand(20, 20) > 0.5
    mask[3] = mask[11] = False
    out, lse = ops.attention(q, k, v, attn_mask=mask, return_lse=True)
    assert torch.equal(out[:, :, [3, 11]], torch.zeros_like(out[:, :, [3, 11]]))
    assert (lse[:, :, [3, 11]] == -torch.inf).all()
    grads = torch.autograd.grad(out.sum(), (q, k, v))
    assert all(g.isfinite().all() for g in grads)
    assert torch.equal(grads[0][:, :, 3], torch.zeros_like(grads[0][:, :, 3]))
    nothing = ops.attention(q, k, v, attn_mask=torch.zeros(20, 20, dtype=torch.bool))
    for g in (nothing, *torch.autograd.grad(nothing.sum(), (q, k, v))):
        assert torch.equal(g, torch.zeros_like(g))


def test_log_sum_exp_is_returned_and_differentiable(backend, dtype):
    def both(q, k, v):
        out, lse = ops.attention(q, k, v, causal="upper_left", return_lse=True)
        return out, lse.to(q.dtype)

    def expected(q, k, v):
        s = (q @ k.transpose(-1, -2)) * q.shape[-1] ** -0.5
        s = s.masked_fill(torch.ones(s.shape[-2:]).triu(1).bool(), -torch.inf)
        return torch.softmax(s, -1) @ v, torch.logsumexp(s, -1)

    check_error_rule(both, expected, inputs(dtype))


def test_dropout_mask_is_the_references_bit_for_bit(backend):
    """With v the identity the output is the dropped probabilities themselves."""
    q, k, _ = inputs(torch.float32, rows=20, columns=32)
    v = torch.eye(32).expand(2, 4, 32, 32)
    seed = torch.tensor([-(2**62) + 12345])
    out = ops.attention(q, k, v, dropout_p=0.25, seed=seed)
    assert torch.equal(out != 0, dropout_keep(seed, 0.25, (2, 4, 20, 32)))


def test_dropout_draws_a_seed_from_torchs_generator(backend):
    q, k, v = inputs(torch.float32)
    torch.manual_seed(1)
    first, second = (ops.attention(q, k, v, dropout_p=0.5) for _ in range(2))
    torch.manual_seed(1)
    assert torch.equal(first, ops.attention(q, k, v, dropout_p=0.5))
    assert not torch.equal(first, second)
    state = torch.get_rng_state()
    ops.attention(q, k, v)
    assert torch.equal(state, torch.get_rng_state()), "without dropout nothing is drawn"


@pytest.mark.parametrize(("rows", "columns", "batch"), [(0, 5, 1), (5, 0, 1), (0, 0, 1), (5, 5, 0)])
def test_empty_lengths(backend, rows, columns, batch):
    q, k, v = inputs(torch.float32, batch=batch, rows=rows, columns=columns)
    for dropout_p in (0.0, 0.5):
        out, lse = ops.attention(q, k, v, causal="upper_left", return_lse=True, dropout_p=dropout_p)
        assert out.shape == q.shape
        assert torch.equal(out, torch.zeros_like(out)) or columns
        assert (lse == -torch.inf).all() or columns
        for g, x in zip(torch.autograd.grad(out.sum(), (q, k, v)), (q, k, v), strict=True):
            assert g.shape == x.shape
            assert torch.equal(g, torch.zeros_like(g)) or (rows and columns)


def test_large_scores_do_not_overflow(backend):
    q, k, v = (strided((1, 2, 20, 16), torch.float32, "contiguous", scale) for scale in (100, 100, 1))
    # Of whole numbers every score is exact: a near tie, whose gradient is all rounding, is then the same for all.
    q, k = (t.detach().round().requires_grad_() for t in (q, k))
    check_error_rule(ops.attention, T.scaled_dot_product_attention, [q, k, v])


def test_low_scores_do_not_overflow_past_the_last_column(backend, dtype):
    """Of zeros in the place of columns, in a tile that the last one ends within, exp(0 - lse) is inf in fp16."""
    q, v = torch.full((1, 1, 48, 16), 3.0, dtype=dtype), torch.randn(1, 1, 17, 16).to(dtype)
    tensors = [x.clone().requires_grad_() for x in (q, -q[:, :, :17], v)]
    grads = run_with_gradients(ops.attention, tensors, None)[1]
    assert [bool(grad.isfinite().all()) for grad in grads] == [True] * 3


def test_nan_is_not_hidden(backend):
    q, k, v = (t.detach() for t in inputs(torch.float32))
    q[0, 0, 3, 0] = torch.nan
    out = ops.attention(q, k, v, causal="upper_left")
    assert out[0, 0, 3].isnan().all()
    assert out[0, 0, :3].isfinite().all()


@pytest.mark.parametrize("lengths", with_costly([(20, 70), (70, 20)], (70, 20)))
def test_every_slot_is_written(backend, lengths):
    """Keys that no row sees included."""
    rows, columns = lengths
    tensors = inputs(torch.float32, rows=rows, columns=columns, heads=4, kv_heads=4 if rows < columns else 2)
    check_every_slot_is_written(lambda q, k, v: ops.attention(q, k, v, causal="upper_left"), tensors)


def test_callers_tensors_are_not_written(backend):
    tensors = [*inputs(torch.float32), torch.randn(20, 20)]
    before = [t.detach().clone() for t in tensors]
    ops.attention(*tensors[:3], attn_mask=tensors[3], dropout_p=0.2).sum().backward()
    for t, b in zip(tensors, before, strict=True):
        assert torch.equal(t.detach(), b)


def test_same_bits_for_any_thread_count():
    with fastgpt.use_backend("cpp"):
        check_same_bits_for_any_thread_count(
            lambda q, k, v: ops.attention(q, k, v, causal="upper_left"),
            inputs(torch.bfloat16, rows=200, columns=200, heads=6, kv_heads=3),
        )


def test_products_of_pytorch_between_calls_keep_their_bits():
    """On CPUs with AMX both configure the tile registers of the same threads."""
    a, b = torch.randn(70, 384).bfloat16(), torch.randn(384, 100).bfloat16()
    q, k, v = inputs(torch.bfloat16, rows=150, columns=150, size=64)
    expected, product, other = ops.attention(q, k, v), a @ b, b.T @ a.T
    for _ in range(20):
        found = ops.attention(q, k, v)
        assert torch.equal(a @ b, product)
        torch.autograd.grad(found.sum(), (q, k, v))
        assert torch.equal(b.T @ a.T, other)
        assert torch.equal(found, expected)


@pytest.mark.once
def test_opcheck(backend):
    q, k, v = (t.detach() for t in inputs(torch.float32, rows=5, columns=7))
    mask, slopes, seed = (torch.rand(5, 7) > 0.1).expand(2, 4, 5, 7), torch.rand(4), torch.tensor([5])
    plain, full = (0.25, False, -1, 0, 0.0, 0.0), (0.25, True, 4, 2, 3.0, 0.3)
    check_opcheck(
        registered("attention_fwd", backend),
        (q, k, v, None, None, None, *plain),
        (q, k, v, mask, slopes, seed, *full),
    )
    out, stats = registered("attention_fwd", backend)(q, k, v, mask, slopes, seed, *full)
    grads = torch.randn_like(out), stats[..., 0].clamp(-1, 1)
    check_opcheck(
        registered("attention_bwd", backend),
        (*grads, q, k, v, out, stats, mask, slopes, seed, *full, False, False),
    )


@pytest.mark.once
def test_compiles_once_for_all_shapes(backend):
    def function(q, k, v):
        return ops.attention(q, k, v, causal="upper_left").transpose(1, 2).flatten(2)

    batches = [inputs(torch.float32, batch=b, rows=n, columns=n) for b, n in ((2, 7), (3, 9), (5, 30))]
    check_compiles_once(function, batches)


@pytest.mark.once
def test_one_tensor_as_query_key_and_value_compiles(backend):
    x = strided((2, 4, 7, 16), torch.float32, "contiguous")
    check_compiles_once(lambda x: ops.attention(x, x, x), [[x]])


@pytest.mark.parametrize(
    "case", ["upper-left causal", "window", "alibi", "softcap", "dropout, causal, grouped"]
)
def test_gradcheck_in_float64(case):
    options, shape = CASES[case]
    shape = {**shape, "batch": 1, "rows": 4, "columns": 5, "size": 3}
    with fastgpt.use_backend("cpp"):
        function = lambda q, k, v: ops.attention(q, k, v, return_lse=case != "window", **options)  # noqa: E731
        assert torch.autograd.gradcheck(function, inputs(torch.float64, **shape))


def test_second_derivatives():
    with fastgpt.use_backend("cpp"):
        args = inputs(torch.float64, batch=1, heads=2, kv_heads=1, rows=3, columns=3, size=2)
        assert torch.autograd.gradgradcheck(lambda q, k, v: ops.attention(q, k, v, causal="upper_left"), args)


def shape(*dims, dtype=torch.float32):
    return torch.ones(dims, dtype=dtype)


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        (
            (shape(2, 4, 8), shape(2, 4, 8), shape(2, 4, 8)),
            {},
            ValueError,
            r"\(batch, heads, length, head_dim\)",
        ),
        (
            (shape(1, 3, 4, 8), shape(1, 2, 4, 8), shape(1, 2, 4, 8)),
            {},
            ValueError,
            "must divide the 3 heads of q",
        ),
        (
            (shape(1, 2, 4, 8), shape(1, 2, 4, 7), shape(1, 2, 4, 8)),
            {},
            ValueError,
            "one head_dim, got 8 and 7",
        ),
        (
            (shape(1, 2, 4, 8), shape(1, 2, 4, 8), shape(1, 2, 5, 8)),
            {},
            ValueError,
            "k and v in heads and length",
        ),
        (
            (shape(1, 2, 4, 8), shape(1, 2, 4, 8), shape(1, 2, 4, 8).half()),
            {},
            TypeError,
            "dtypes must be equal",
        ),
        ((shape(1, 2, 4, 8), shape(1, 2, 4, 8), 3), {}, TypeError, "v must be a torch.Tensor, got int"),
        ((shape(1, 2, 4, 8),) * 3, {"causal": True}, ValueError, "causal must be one of"),
        ((shape(1, 2, 4, 8),) * 3, {"window": -2}, ValueError, "window must be"),
        ((shape(1, 2, 4, 8),) * 3, {"softcap": -1.0}, ValueError, "softcap must be positive"),
        ((shape(1, 2, 4, 8),) * 3, {"dropout_p": 1.1}, ValueError, "between 0 and 1"),
        ((shape(1, 2, 4, 8),) * 3, {"attn_mask": shape(3, 4)}, ValueError, "attn_mask must broadcast to"),
        ((shape(1, 2, 4, 8),) * 3, {"attn_mask": shape(4, 4).long()}, TypeError, "attn_mask must be float32"),
        ((shape(1, 2, 4, 8),) * 3, {"alibi_slopes": shape(3)}, ValueError, "alibi_slopes must be"),
        ((shape(1, 2, 4, 8),) * 3, {"dropout_p": 0.1, "seed": shape(2)}, ValueError, "must hold one int64"),
    ],
)
def test_bad_input_gets_one_sentence(arguments, options, error, message):
    with pytest.raises(error, match=message):
        ops.attention(*arguments, **options)


def test_gradients_of_long_rows_do_not_drift():
    """The gradient of the first keys is a sum over all rows: added up one by one in float32 it drifts off.

    Only the C++ kernels are fast enough for the length at which it shows.
    """
    with fastgpt.use_backend("cpp"):
        check_error_rule(
            lambda q, k, v: ops.attention(q, k, v, causal="upper_left"),
            lambda q, k, v: T.scaled_dot_product_attention(q, k, v, is_causal=True),
            inputs(torch.float32, 1, 1, 1, 4096, 4096, 64),
        )


@pytest.mark.parametrize("switch", ["ieee", "tf32"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fp32_goes_by_pytorchs_switch_for_tf32(monkeypatch, dtype, switch):
    """Only fp32 asks for tf32, and only where PyTorch's products may use it. The interpreter rounds nothing."""
    kernels = pytest.importorskip("fastgpt.kernels.attention")
    forward, asked = kernels._attention_fwd, []

    class Recorder:
        def __getitem__(self, grid):
            return lambda *arguments, **constants: (
                asked.append(constants["PRECISION"]) or forward[grid](*arguments, **constants)
            )

    monkeypatch.setattr(kernels, "_attention_fwd", Recorder())
    monkeypatch.setattr(torch.backends.cuda.matmul, "fp32_precision", switch)
    with fastgpt.use_backend("triton"):
        ops.attention(*inputs(dtype, batch=1, rows=20, columns=20)).float().sum().backward()
    assert asked == [switch if dtype == torch.float32 else "ieee"]
