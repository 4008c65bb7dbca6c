"""The gradient of a mask that is added to the scores: a learned bias, of any shape that broadcasts."""

import pytest
import torch

import fastgpt
from fastgpt import ops
from fastgpt.testing import check_error_rule, strided
from tests.support.contract import (
    check_compiles_once,
    check_opcheck,
    check_same_bits_for_any_thread_count,
    registered,
    with_costly,
)
from tests.support.plain_attention import composed

pytestmark = pytest.mark.only("reference", "cpp", "triton")

BATCH, HEADS, KV_HEADS, ROWS, COLUMNS = 2, 4, 2, 70, 83  # more than a tile of rows and of columns
WHOLE = (BATCH, HEADS, ROWS, COLUMNS)
# A mask's shape; T5's, ALiBi-like, of a pair, of keys, of queries, of heads, a number.
SHAPES = [
    (1, HEADS, ROWS, COLUMNS),
    WHOLE,
    (BATCH, 1, ROWS, COLUMNS),
    (ROWS, COLUMNS),
    (BATCH, 1, 1, COLUMNS),
    (1, HEADS, 1, COLUMNS),
    (COLUMNS,),
    (BATCH, HEADS, ROWS, 1),
    (1, 1, ROWS, 1),
    (HEADS, 1, 1),
    (1,),
]
OPTIONS = {
    "causal": {"causal": "lower_right"},
    "window": {"window": (9, 4)},
    "upper-left, softcap": {"causal": "upper_left", "softcap": 3.0},
    "dropout": {"dropout_p": 0.3, "seed": 5},
    "ALiBi, window, dropout": {"window": (20, 40), "dropout_p": 0.1, "seed": 7, "alibi_slopes": torch.arange(4.0)},
    "negative scale": {"scale": -0.2},
    "deterministic": {"causal": "upper_left", "deterministic": True},
}  # fmt: skip


def inputs(dtype, shape, rows=ROWS, columns=COLUMNS, size=16, layout="contiguous"):
    """q, k, v and a mask."""
    shapes = (
        (BATCH, HEADS, rows, size),
        (BATCH, KV_HEADS, columns, size),
        (BATCH, KV_HEADS, columns, size + 8),
    )
    return [strided(each, dtype, layout) for each in shapes] + [strided(shape, dtype, "contiguous")]


def check(given, **options):
    plain = {name: value for name, value in options.items() if name != "deterministic"}
    check_error_rule(
        lambda q, k, v, mask: ops.attention(q, k, v, attn_mask=mask, **options),
        lambda q, k, v, mask: composed(q, k, v, attn_mask=mask, **plain),
        given,
    )


@pytest.mark.parametrize("shape", with_costly(SHAPES, *SHAPES[1:4], *SHAPES[5:]), ids=str)
def test_mask_of_any_shape_that_broadcasts(backend, dtype, shape):
    check(inputs(dtype, shape))


@pytest.mark.parametrize("name", with_costly(list(OPTIONS), *list(OPTIONS)[1:]))
@pytest.mark.parametrize(
    "shape", with_costly([WHOLE[1:], (BATCH, 1, 1, COLUMNS)], (BATCH, 1, 1, COLUMNS)), ids=str
)
def test_mask_beside_options(backend, dtype, name, shape):
    check(inputs(dtype, shape), **OPTIONS[name])


@pytest.mark.costly
@pytest.mark.parametrize("columns", [1, 60])
@pytest.mark.parametrize("shape", [(HEADS, -1, -1), (-1,)], ids=["heads, rows, columns", "columns"])
def test_rows_whose_columns_are_one_tile(backend, dtype, columns, shape):
    """There the sum of p·dp is made of the tile itself."""
    check(
        inputs(
            dtype,
            [{0: n, 1: ROWS, 2: columns}[i] if n < 0 else n for i, n in enumerate(shape, 3 - len(shape))],
            columns=columns,
        )
    )


@pytest.mark.costly
def test_mask_of_another_dtype_than_the_scores(backend):
    q, k, v, mask = inputs(torch.bfloat16, WHOLE[1:])
    check([q, k, v, mask.detach().float().requires_grad_()])


@pytest.mark.costly
@pytest.mark.parametrize("layout", ["transposed", "gapped"])
def test_strided_mask(backend, layout):
    given = inputs(torch.float32, WHOLE)
    check([*given[:3], strided(WHOLE, torch.float32, layout)])


def test_hidden_scores_have_gradient_zero(backend):
    """Where the mask holds -inf: single scores, whole tiles, whole rows."""
    q, k, v, mask = inputs(torch.float32, WHOLE[1:])
    hidden = torch.rand(WHOLE[1:]) < 0.3
    hidden[:, :, :64] |= torch.arange(ROWS)[:, None] < 64
    hidden[1, 65] = True
    mask = mask.detach().masked_fill(hidden, -torch.inf).requires_grad_()
    out = ops.attention(q, k, v, attn_mask=mask)
    expected = composed(q, k, v, attn_mask=mask)
    upstream = torch.randn_like(out)
    (ours,), (theirs,) = (torch.autograd.grad(y, mask, upstream) for y in (out, expected))
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)
    assert (ours[hidden] == 0).all()


@pytest.mark.parametrize("sizes", [(0, 4, 5, 6), (2, 4, 0, 6), (2, 4, 5, 0)], ids=str)
def test_mask_of_no_scores_has_gradient_zero(backend, sizes):
    batch, heads, rows, columns = sizes
    q, k = torch.randn(batch, heads, rows, 8), torch.randn(batch, heads, columns, 8)
    for shape in ((1, 1, 1, 1), sizes, (heads, rows, columns)):
        mask = torch.randn(shape, requires_grad=True)
        ops.attention(q.requires_grad_(), k, k, attn_mask=mask).sum().backward()
        assert mask.grad.shape == mask.shape
        assert (mask.grad == 0).all()


def test_gradient_is_summed_where_the_mask_is_an_expanded_view(backend):
    q, k, v, _ = inputs(torch.float32, (1,))
    bias = torch.randn(1, HEADS, ROWS, COLUMNS, requires_grad=True)
    found = [
        torch.autograd.grad(ops.attention(q, k, v, attn_mask=mask).sin().sum(), bias)[0]
        for mask in (bias, bias.expand(WHOLE), bias[0])
    ]
    torch.testing.assert_close(found[1], found[0], atol=1e-5, rtol=1e-4)
    assert torch.equal(found[2], found[0])


def test_without_a_mask_that_needs_one_the_gradients_are_the_same(backend):
    q, k, v, mask = inputs(torch.float32, WHOLE[1:])
    with_mask = torch.autograd.grad(ops.attention(q, k, v, attn_mask=mask).sin().sum(), (q, k, v, mask))[:3]
    without = torch.autograd.grad(ops.attention(q, k, v, attn_mask=mask.detach()).sin().sum(), (q, k, v))
    torch.testing.assert_close(with_mask, without, atol=1e-6, rtol=1e-5)


@pytest.mark.only("cpp")
@pytest.mark.parametrize("shape", [WHOLE[1:], (COLUMNS,)], ids=str)
def test_same_bits_for_any_number_of_threads(backend, shape):
    check_same_bits_for_any_thread_count(
        lambda q, k, v, mask: ops.attention(q, k, v, attn_mask=mask), inputs(torch.bfloat16, shape)
    )


@pytest.mark.once
def test_opcheck(backend):
    q, k, v, mask = (t.detach() for t in inputs(torch.float32, (1, HEADS, 5, 7), rows=5, columns=7))
    options = (0.25, True, 4, 2, 3.0, 0.0)
    out, stats = registered("attention_fwd", backend)(q, k, v, mask, None, None, *options)
    arguments = (torch.randn_like(out), None, q, k, v, out, stats, mask, None, None, *options)
    check_opcheck(registered("attention_bwd", backend), (*arguments, True, False))


@pytest.mark.once
def test_compiles_once_for_all_lengths(backend):
    table = torch.nn.Parameter(torch.randn(HEADS, 200))

    def learned(q, k, v):
        distance = (torch.arange(q.shape[2])[:, None] - torch.arange(k.shape[2])).abs()
        return ops.attention(q, k, v, attn_mask=table[:, distance])

    check_compiles_once(
        learned, [inputs(torch.float32, (1,), rows=n, columns=n + 9)[:3] for n in (20, 33, 70)]
    )


@pytest.mark.only("cuda")
def test_cuda_leaves_it_to_the_next_backend(backend):
    q, k, v, mask = inputs(torch.float32, WHOLE[1:])
    with pytest.raises(fastgpt.BackendUnavailable, match="attn_mask requires a gradient"):
        ops.attention(q, k, v, attn_mask=mask)
