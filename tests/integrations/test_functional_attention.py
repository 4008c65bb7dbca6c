"""The drop-in's attention, option by option, against `torch.nn.functional`."""

import itertools

import pytest
import torch
import torch.nn.functional as T
from hypothesis import given
from hypothesis import strategies as st
from torch._subclasses import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel

import fastgpt
from fastgpt import functional as F
from tests.support.contract import check_compiles_once, with_costly
from tests.support.dropin import check_same, check_same_error, leaf

ATTENTION = "scaled_dot_product_attention"


def qkv(*batch, rows=4, columns=6, size=8, size_v=None, dtype=torch.float32):
    sizes = ((rows, size), (columns, size), (columns, size_v or size))
    return tuple(leaf(*batch, *shape, dtype=dtype) for shape in sizes)


@pytest.mark.parametrize("batch", [(), (2,), (2, 3)])
@pytest.mark.parametrize("causal", [False, True])
def test_inputs_of_two_to_four_dimensions(backend, batch, causal):
    for rows, columns in ((4, 6), (6, 4), (1, 1)):
        inputs = qkv(*batch, rows=rows, columns=columns, size_v=5)
        check_same(ATTENTION, *inputs, is_causal=causal)
        assert fastgpt.explain(F.scaled_dot_product_attention, *inputs).backend == backend


def test_three_dimensions_give_a_contiguous_result_as_in_pytorch(backend):
    """So that (batch·heads, L, D), the older layout, can be viewed as before."""
    q, k, v = qkv(6)
    ours, theirs = (m.scaled_dot_product_attention(q, k, v) for m in (F, T))
    assert ours.stride() == theirs.stride()


def test_five_dimensions_go_to_pytorch():
    check_same(ATTENTION, *qkv(2, 2, 3))
    assert fastgpt.explain(F.scaled_dot_product_attention, *qkv(2, 2, 3)).backend == "pytorch"


def test_causal_is_aligned_to_the_upper_left(backend):
    q, k, v = qkv(1, 1, rows=2, columns=5)
    out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    torch.testing.assert_close(out[..., 0, :], v[..., 0, :], msg="the first row sees the first column alone")


@pytest.mark.parametrize("dims", [2, 3, 4])
@pytest.mark.parametrize("kind", ["boolean", "additive"])
@pytest.mark.parametrize("ranks", with_costly(["some", "all"], "all"))
def test_masks_of_every_broadcastable_rank(backend, dims, kind, ranks):
    batch = (2, 3)[4 - dims :]
    for ones in range(2**dims) if ranks == "all" else (0, 2, 2**dims - 1):
        shape = [1 if ones >> i & 1 else n for i, n in enumerate((*batch, 4, 6))]
        for dropped in range(dims - 1):
            if ones % 2**dropped != 2**dropped - 1:  # a leading 1 may also be left out
                continue
            mask = torch.rand(shape[dropped:]) > 0.4 if kind == "boolean" else torch.randn(shape[dropped:])
            check_same(ATTENTION, *qkv(*batch), attn_mask=mask)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_additive_mask_has_the_querys_dtype_or_float32(dtype):
    for mask_dtype in (dtype, torch.float32):
        check_same(ATTENTION, *qkv(2, 3, dtype=dtype), attn_mask=torch.randn(4, 6).to(mask_dtype))
    other = torch.bfloat16 if dtype == torch.float16 else torch.float16
    check_same_error(RuntimeError, ATTENTION, *qkv(2, 3, dtype=dtype), attn_mask=torch.randn(4, 6).to(other))


@pytest.mark.parametrize("kind", ["boolean", "additive"])
def test_rows_that_see_nothing_are_zero_with_finite_gradients(backend, kind):
    mask = torch.rand(2, 1, 4, 6) > 0.4
    mask[:, :, 1] = False
    mask[0] = False
    if kind == "additive":
        mask = torch.zeros(mask.shape).masked_fill(~mask, -torch.inf)
    q, k, v = qkv(2, 3)
    out = F.scaled_dot_product_attention(q, k, v, mask)
    assert (out[:, :, 1] == 0).all()
    assert (out[0] == 0).all()
    out.backward(torch.randn_like(out))
    assert (q.grad[:, :, 1] == 0).all()
    assert all(t.grad.isfinite().all() for t in (q, k, v))
    check_same(ATTENTION, q, k, v, attn_mask=mask)


@pytest.mark.only("reference", "cpp", "triton")
@pytest.mark.parametrize("shape", [(4, 6), (2, 1, 1, 6), (2, 3, 4, 6)], ids=str)
def test_mask_that_requires_a_gradient(backend, shape):
    check_same(ATTENTION, *qkv(2, 3), attn_mask=leaf(*shape))


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_grouped_queries(backend, groups):
    q = leaf(2, 4, 5, 8)
    check_same(ATTENTION, q, leaf(2, groups, 6, 8), leaf(2, groups, 6, 3), is_causal=True, enable_gqa=True)


def test_grouped_queries_that_do_not_fit_are_pytorchs_error():
    q = leaf(2, 4, 5, 8)
    check_same_error(RuntimeError, ATTENTION, q, leaf(2, 3, 5, 8), leaf(2, 3, 5, 8), enable_gqa=True)
    check_same_error(RuntimeError, ATTENTION, q, leaf(2, 2, 5, 8), leaf(2, 2, 5, 8))
    check_same_error(IndexError, ATTENTION, *qkv(), enable_gqa=True)


@pytest.mark.parametrize("scale", [None, 0.3, 2])
def test_scale(backend, scale):
    check_same(ATTENTION, *qkv(2, 3), scale=scale)


@pytest.mark.parametrize("scale", [0.0, -0.5])
def test_scale_that_is_not_positive_with_a_causal_mask(backend, scale):
    """PyTorch's plain implementation is the standard: its fused one gives NaN here."""
    with sdpa_kernel(SDPBackend.MATH):
        check_same(ATTENTION, *qkv(2, 3), scale=scale, is_causal=True)


def test_no_dropout_for_zero_and_nothing_left_for_one(backend):
    q, k, v = qkv(2, 3)
    plain = F.scaled_dot_product_attention(q, k, v)
    assert torch.equal(F.scaled_dot_product_attention(q, k, v, dropout_p=0.0), plain)
    nothing = F.scaled_dot_product_attention(q, k, v, dropout_p=1.0)
    assert torch.equal(nothing, torch.zeros_like(plain))
    assert all((g == 0).all() for g in torch.autograd.grad(nothing.sum(), (q, k, v)))


def test_dropout_keeps_the_mean_and_drops_its_share(backend):
    """With equal scores and v the identity, the output is the probabilities themselves: 0 or 1/(n·(1 - p))."""
    n, p = 32, 0.3
    batch = (
        40 if backend in ("cpp", "reference") else 12
    )  # 24 masks: some element dropped by all, once in 10^9 runs
    q, k, v = torch.zeros(batch, 2, n, 8), torch.zeros(batch, 2, n, 8), torch.eye(n).expand(batch, 2, n, n)
    out = F.scaled_dot_product_attention(q, k, v, dropout_p=p)
    kept = out != 0
    torch.testing.assert_close(out[kept], torch.full_like(out[kept], 1 / (n * (1 - p))))
    sigma = (p * (1 - p) / out.numel()) ** 0.5
    assert abs(float(kept.float().mean()) - (1 - p)) < 5 * sigma
    assert kept.flatten(0, 1).any(0).all(), "no element is dropped always"
    assert not torch.equal(kept[0], kept[1]), "batch entries have masks of their own"
    assert not torch.equal(kept[:, 0], kept[:, 1]), "heads have masks of their own"


def test_dropout_repeats_under_the_same_torch_seed_only(backend):
    q, k, v = qkv(2, 3)
    outs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        outs.append(F.scaled_dot_product_attention(q, k, v, dropout_p=0.5))
    first = outs[0]
    assert torch.equal(first, outs[1])
    assert not torch.equal(first, outs[2])
    assert not torch.equal(first, F.scaled_dot_product_attention(q, k, v, dropout_p=0.5)), (
        "a call advances it"
    )


def test_backward_sees_the_dropout_of_the_forward(backend):
    """The output is linear in v: its gradient along v must reproduce it."""
    q, k, v = qkv(2, 3)
    out = F.scaled_dot_product_attention(q, k, v, dropout_p=0.5)
    upstream = torch.randn_like(out)
    (dv,) = torch.autograd.grad(out, v, upstream)
    torch.testing.assert_close((dv * v).sum(), (out * upstream).sum())


@pytest.mark.parametrize(
    "shapes",
    [
        ((2, 3, 4, 8), (1, 3, 5, 8), (1, 3, 5, 8)),
        ((2, 3, 4, 8), (2, 1, 5, 8), (2, 1, 5, 8)),
        ((2, 3, 4, 8), (3, 5, 8), (3, 5, 8)),
        ((4, 8), (2, 5, 8), (2, 5, 8)),
    ],
)
def test_batches_that_broadcast(shapes):
    check_same(ATTENTION, *(leaf(*shape) for shape in shapes))


@pytest.mark.parametrize(
    "shapes",
    [
        ((2, 3, 0, 8), (2, 3, 5, 8), (2, 3, 5, 8)),
        ((2, 3, 4, 8), (2, 3, 0, 8), (2, 3, 0, 8)),
        ((0, 3, 4, 8), (0, 3, 5, 8), (0, 3, 5, 8)),
        ((2, 0, 4, 8), (2, 0, 5, 8), (2, 0, 5, 8)),
        ((0, 4, 8), (0, 5, 8), (0, 5, 8)),
        ((2, 3, 4, 0), (2, 3, 5, 0), (2, 3, 5, 8)),
        ((2, 3, 4, 8), (2, 3, 5, 8), (2, 3, 5, 0)),
        ((1, 1, 3, 257), (1, 1, 4, 257), (1, 1, 4, 257)),
        ((1, 1, 3, 8), (1, 1, 4, 8), (1, 1, 4, 300)),
    ],
)
def test_empty_and_large_sizes(shapes):
    for causal in (False, True):
        check_same(ATTENTION, *(leaf(*shape) for shape in shapes), is_causal=causal)


def test_mixed_dtypes_are_pytorchs_error():
    q, k, v = qkv(2, 3)
    for mixed in ((q, k, v.double()), (q.bfloat16(), k, v), (q, k.half(), v.half()), (q, k.int(), v)):
        check_same_error(RuntimeError, ATTENTION, *mixed)


@pytest.mark.parametrize(
    ("error", "options"),
    [
        (RuntimeError, {"attn_mask": torch.ones(5, 6).bool()}),
        (RuntimeError, {"attn_mask": torch.ones(4, 6).int()}),
        (RuntimeError, {"attn_mask": torch.ones(4, 6).double()}),
        (IndexError, {"attn_mask": torch.tensor(True)}),
        (IndexError, {"attn_mask": torch.ones(6).bool()}),
        (TypeError, {"attn_mask": [1.0]}),
        (TypeError, {"scale": "large"}),
        (TypeError, {"is_causal": None}),
        (TypeError, {"is_causal": 1}),
        (TypeError, {"enable_gqa": 1}),
        (TypeError, {"dropout_p": None}),
        (RuntimeError, {"dropout_p": 1.5}),
        (RuntimeError, {"dropout_p": -0.5}),
    ],
)
def test_bad_options_are_pytorchs_error(error, options):
    check_same_error(error, ATTENTION, *qkv(2, 3), **options)


def test_mask_together_with_is_causal_is_left_to_pytorch():
    q, k, v = qkv(2, 3)
    options = {"attn_mask": torch.rand(4, 6) > 0.3, "is_causal": True}
    try:
        T.scaled_dot_product_attention(q, k, v, **options)
    except RuntimeError:  # from PyTorch 2.14 on
        check_same_error(RuntimeError, ATTENTION, q, k, v, **options)
    else:
        check_same(ATTENTION, q, k, v, **options)
    with fastgpt.use_backend("reference"), pytest.raises(fastgpt.BackendUnavailable, match="both given"):
        F.scaled_dot_product_attention(q, k, v, **options)


def test_shapes_that_do_not_fit_are_pytorchs_error():
    q, k, v = qkv(2, 3)
    check_same_error(RuntimeError, ATTENTION, q, k[..., :7], v)
    check_same_error(RuntimeError, ATTENTION, q[:, :2], k, v)
    check_same_error(RuntimeError, ATTENTION, torch.randn(8), torch.randn(8), torch.randn(8))


@given(
    batch=st.lists(st.integers(1, 3), max_size=2),
    rows=st.integers(1, 40),
    columns=st.integers(1, 40),
    size=st.integers(1, 33),
    size_v=st.integers(1, 33),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    mask=st.sampled_from([None, "causal", "boolean", "additive"]),
    scale=st.sampled_from([None, 0.5]),
)
def test_any_shape_and_option(batch, rows, columns, size, size_v, dtype, mask, scale):
    q, k, v = qkv(*batch, rows=rows, columns=columns, size=size, size_v=size_v, dtype=dtype)
    given_mask = {"boolean": torch.rand(rows, columns) > 0.3, "additive": torch.randn(rows, columns)}.get(
        mask
    )
    check_same(ATTENTION, q, k, v, attn_mask=given_mask, is_causal=mask == "causal", scale=scale)


@given(
    rows=st.integers(1, 40),
    columns=st.integers(1, 70),
    size=st.integers(1, 33),
    dtype=st.sampled_from([torch.bfloat16, torch.float16]),
    mask=st.sampled_from([None, "boolean", "additive"]),
)
def test_any_shape_in_16_bits(rows, columns, size, dtype, mask):
    q, k, v = qkv(2, 3, rows=rows, columns=columns, size=size, size_v=size, dtype=dtype)
    given_mask = {
        "boolean": torch.rand(rows, columns) > 0.3,
        "additive": torch.randn(rows, columns).to(dtype),
    }
    check_same(ATTENTION, q, k, v, attn_mask=given_mask.get(mask))


def laid_out_in_every_way(*shape):
    """Random queries of a shape in every order of its dimensions, dense, with gaps and in steps, and expanded."""
    dims = range(len(shape))
    for order in itertools.permutations(dims):
        sizes, inverse = [shape[d] for d in order], [order.index(d) for d in dims]
        whole = tuple(slice(size) for size in sizes)
        yield torch.randn(sizes).permute(inverse)
        yield torch.randn([size + 2 for size in sizes])[whole].permute(inverse)
        yield torch.randn([2 * size for size in sizes])[(slice(None, None, 2),) * len(shape)].permute(inverse)
    for expanded in range(1, 2 ** len(shape)):
        yield torch.randn([1 if expanded >> d & 1 else shape[d] for d in dims]).expand(shape)
    if len(shape) == 4:
        batch, heads, length, size = shape
        yield torch.randn(batch, heads, length, 3 * size).chunk(3, -1)[1]
        yield torch.randn(batch, length, 3, heads, size).unbind(2)[0].transpose(1, 2)


SHAPES = (
    (2, 3, 5, 8),
    (1, 3, 5, 8),
    (2, 1, 5, 8),
    (2, 3, 1, 8),
    (2, 3, 5, 1),
    (1, 1, 1, 8),
    (3, 5, 8),
    (1, 5, 8),
    (5, 8),
)
EMPTY = ((2, 3, 5, 0), (0, 3, 5, 8), (2, 0, 5, 8), (2, 3, 0, 8))


def option(name, shape):
    """Key and value for a query of a shape, and options, on which the layout of PyTorch's result depends."""
    *batch, rows, size = shape
    columns = {"longer keys": rows + 2, "no keys": 0}.get(name, rows)
    heads = [*batch[:-1], 1] if name == "grouped" else batch
    key = torch.randn(*heads, columns, size)
    value = torch.randn(*heads, columns, size + 4 if name == "wider values" else size)
    if name == "expanded keys":
        key = key[..., :1].expand_as(key)
    options = {
        "causal": {"is_causal": True},
        "mask": {"attn_mask": torch.ones(rows, columns, dtype=torch.bool)},
        "mask of three dimensions": {"attn_mask": torch.zeros(1, rows, columns)},
        "mask with a gradient": {"attn_mask": torch.zeros(rows, columns, requires_grad=True)},
        "dropout": {"dropout_p": 0.5},
        "grouped": {"enable_gqa": True},
    }
    return key, value, options.get(name, {})


FOR_FOUR = ("grouped", "mask of three dimensions")
OPTIONS = (
    *("plain", "longer keys", "no keys", "wider values", "expanded keys", "causal", "mask"),
    *("mask with a gradient", "dropout", *FOR_FOUR),
)


def check_strides(query, name, transform=lambda function: function, autocast=False):
    """The results of the drop-in and PyTorch have one shape, dtype and layout."""
    key, value, options = option(name, query.shape)
    found = []
    for module in (T, F):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            out = transform(module.scaled_dot_product_attention)(query, key, value, **options)
        found.append((out.shape, out.dtype, out.stride()))
    assert found[0] == found[1], (query.shape, query.stride(), name)


@pytest.mark.parametrize("name", OPTIONS)
def test_strides_are_pytorchs_for_every_layout_of_the_query(name):
    for shape in (*SHAPES, *EMPTY):
        if name not in FOR_FOUR or (len(shape) == 4 and shape[1]):
            for query in laid_out_in_every_way(*shape):
                check_strides(query, name)


def test_strides_are_pytorchs_under_autocast_and_with_flash_switched_off():
    for shape in SHAPES:
        for query in laid_out_in_every_way(*shape):
            check_strides(query, "plain", autocast=True)
            with sdpa_kernel(SDPBackend.MATH):
                check_strides(query, "plain")
            check_strides(query.detach().requires_grad_(), "plain")


def test_strides_of_fake_tensors_are_pytorchs():
    for shape in SHAPES:
        for query in list(laid_out_in_every_way(*shape))[::9]:
            for name in ("plain", "dropout", "wider values"):
                with FakeTensorMode(allow_non_fake_inputs=True) as mode:
                    check_strides(mode.from_tensor(query), name)


@pytest.mark.parametrize("name", ["plain", "dropout", "wider values"])
def test_strides_are_pytorchs_when_compiled(name):
    def compiled(function):
        torch._dynamo.reset()
        return torch.compile(function, backend="aot_eager", fullgraph=True)

    for shape in ((2, 3, 5, 8), (2, 1, 5, 8)):
        for query in list(laid_out_in_every_way(*shape))[2::37]:
            check_strides(query, name, compiled)


def test_layout_of_the_query_changes_no_gradient():
    for query in list(laid_out_in_every_way(2, 3, 5, 8))[::3]:
        _, key, value = qkv(2, 3, rows=5)
        check_same(ATTENTION, query.detach().requires_grad_(), key, value, is_causal=True)


def test_new_layouts_compile_once_for_all_sizes():
    def attention(q, k, v):
        return F.scaled_dot_product_attention(q.movedim(0, 2), k, v, is_causal=True)

    sizes = ((4, 2, 3, 8), (7, 3, 2, 8), (5, 4, 5, 8))
    check_compiles_once(
        attention, [[leaf(s[0], s[1], s[2], s[3]), *qkv(s[1], s[2], size=s[3])[1:]] for s in sizes]
    )
