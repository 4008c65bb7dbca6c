"""A linear layer: every backend against PyTorch by the error rule, master weights, and the corners."""

import pytest
import torch
import torch.nn.functional as T
from hypothesis import example, given
from hypothesis import strategies as st

import fastgpt
from fastgpt import ops, reference
from fastgpt.testing import LAYOUTS, check_error_rule, strided
from tests.support.contract import (
    GPU_BACKENDS,
    PROVED_ONCE,
    any_of,
    check_compiles_once,
    check_every_slot_is_written,
    check_opcheck,
    check_same_bits_for_any_thread_count,
    registered,
)


def inputs(batch, size, width, dtype, bias=True, layout="contiguous", scale=1.0):
    x = strided((*batch, size), dtype, layout, scale)
    weight = strided((width, size), dtype, layout, scale=max(size, 1) ** -0.5)
    return [x, weight, strided((width,), dtype, "gapped", scale)] if bias else [x, weight]


def pytorch(x, weight, bias=None):
    """On rows, where PyTorch rounds once; else it rounds before it adds the bias as well."""
    y = T.linear(torch.atleast_2d(x).flatten(0, -2), weight, bias)
    return y.view(*x.shape[:-1], weight.shape[0])


@pytest.mark.parametrize(
    ("batch", "size", "width"), [((), 5, 7), ((9,), 8, 33), ((2, 3), 17, 64), ((3,), 8, 1)]
)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_obeys_the_error_rule(backend, dtype, bias, layout, batch, size, width):
    check_error_rule(ops.linear, pytorch, inputs(batch, size, width, dtype, bias, layout, scale=2.0))


@given(
    rows=st.integers(1, 10),
    size=st.integers(1, 70) | st.sampled_from([384, 800, 2085]),
    width=st.integers(1, 13),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    bias=st.booleans(),
)
@example(rows=8, size=2085, width=8, dtype=torch.float32, bias=True)  # beyond the first-level cache, by fours
@example(rows=8, size=2085, width=7, dtype=torch.float32, bias=True)  # and where fours do not fit
@example(rows=8, size=2085, width=7, dtype=torch.bfloat16, bias=False)
def test_obeys_the_error_rule_with_few_rows(rows, size, width, dtype, bias):
    """As in decoding: from one row to more than the kernel for few takes, in the first-level cache and beyond it."""
    with fastgpt.use_backend("cpp"):
        check_error_rule(ops.linear, pytorch, inputs((rows,), size, width, dtype, bias))


@pytest.mark.parametrize(
    ("batch", "size", "width"),
    [
        ((32,), 2, 2),  # the least that the kernels multiply themselves
        ((33,), 34, 70),  # neither rows nor columns make a whole tile, and an odd row has no partner
        ((4, 50), 130, 98),
        ((129,), 64, 320),  # two blocks of rows, two spans of panels
        ((40,), 2080, 34),  # several blocks along k
        ((2100,), 34, 64),  # the same for the weight's gradient
        ((64,), 5000, 32),  # so long a row that fewer of them are kept
        ((64,), 33, 64),  # odd sizes do not divide into pairs
        ((64,), 64, 33),
    ],
)
def test_obeys_the_error_rule_in_tiles(batch, size, width):
    """Sizes on and off the tiles of the bfloat16 product, for which one row would be left to PyTorch."""
    with fastgpt.use_backend("cpp"):
        for bias in (False, True):
            check_error_rule(ops.linear, pytorch, inputs(batch, size, width, torch.bfloat16, bias))


@any_of(
    batch=st.lists(st.integers(0, 70), max_size=2),
    size=st.integers(0, 40),
    width=st.integers(0, 40),
    layout=st.sampled_from(LAYOUTS),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    scale=st.sampled_from([0.01, 1.0, 30.0]),
    bias=st.booleans(),
)
def test_any_shape_and_stride(backend, batch, size, width, layout, dtype, scale, bias):
    check_error_rule(ops.linear, pytorch, inputs(batch, size, width, dtype, bias, layout, scale))


def test_the_reference_is_pytorchs():
    for bias in (False, True):
        x, weight, *rest = inputs((3, 4), 5, 6, torch.float64, bias)
        got = reference.linear(x, weight, rest[0] if bias else None)
        torch.testing.assert_close(got, pytorch(x, weight, *rest))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rows", [6, 64])
def test_autocast_acts_as_on_linear(backend, rows, bias):
    arguments = inputs((2, rows), 8, 12, torch.float32, bias)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        check_error_rule(ops.linear, pytorch, arguments, rounding=torch.bfloat16)
        assert ops.linear(*arguments).dtype == torch.bfloat16
        x, weight, *_ = arguments
        assert ops.linear(x.bfloat16(), weight).dtype == torch.bfloat16  # mixed, as a block's are
        if backend not in GPU_BACKENDS:
            doubles = [t.double() for t in arguments]
            torch.testing.assert_close(ops.linear(*doubles), pytorch(*doubles))  # which autocast leaves alone
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=False):
        assert ops.linear(*arguments).dtype == torch.float32


@pytest.mark.parametrize("bias", [False, True])
def test_a_master_weight_is_rounded_as_a_copy_would_be(bias):
    """Under autocast the result has the bits that rounded parameters give, and gradients come in float32."""
    arguments = inputs((3, 50), 34, 70, torch.float32, bias)
    rounded = [t.detach().bfloat16().requires_grad_() for t in arguments]
    with fastgpt.use_backend("cpp"):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = ops.linear(*arguments)
        expected = ops.linear(*rounded)
        assert torch.equal(y, expected)
        grad = torch.randn_like(y)
        for got, theirs in zip(
            torch.autograd.grad(y, arguments, grad), torch.autograd.grad(expected, rounded, grad), strict=True
        ):
            assert got.dtype == torch.float32
            assert torch.equal(got.bfloat16(), theirs)


@pytest.mark.parametrize("rows", [3, 64])
def test_infinity_and_nan_stay_in_their_row(backend, dtype, rows):
    x, weight, bias = (t.detach() for t in inputs((rows,), 8, 6, dtype))
    x[0, 3], x[1, 2], weight[:, 2:4] = torch.inf, torch.nan, 1.0
    y = ops.linear(x, weight, bias)
    assert (y[0] == torch.inf).all()
    assert y[1].isnan().all()
    assert y[2:].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_only_the_gradients_asked_for(backend, dtype):
    arguments = inputs((64,), 6, 8, dtype)
    all_three = torch.autograd.grad(ops.linear(*arguments).sum(), arguments)
    for i, expected in enumerate(all_three):
        some = [t if i == j else t.detach() for j, t in enumerate(arguments)]
        got = torch.autograd.grad(ops.linear(*some).sum(), some[i])[0]
        torch.testing.assert_close(got, expected)
    with torch.no_grad():
        assert not ops.linear(*arguments).requires_grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_upstream_gradients_of_any_strides(backend, dtype):
    arguments, grad = inputs((64,), 6, 8, dtype), torch.randn(8, 64, dtype=dtype).T
    ours = torch.autograd.grad(ops.linear(*arguments), arguments, grad)
    same = torch.autograd.grad(ops.linear(*arguments), arguments, grad.contiguous())
    for a, b in zip(ours, same, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_slot_is_written(backend, dtype):
    for bias in (False, True):
        check_every_slot_is_written(ops.linear, inputs((70,), 34, 38, dtype, bias))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_same_bits_for_any_thread_count(dtype):
    with fastgpt.use_backend("cpp"):
        check_same_bits_for_any_thread_count(
            ops.linear, inputs((999,), 16, 130, dtype), pytorch if dtype == torch.float32 else None
        )


@pytest.mark.once
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [5, 40])
def test_opcheck(backend, dtype, rows):
    """The weight is float32 either way, as under autocast."""
    x, weight, bias = torch.randn(rows, 8).to(dtype), torch.randn(6, 8), torch.randn(6)
    grad = torch.randn(rows, 6).to(dtype)
    check_opcheck(registered("linear_fwd", backend), (x, weight, None), (x, weight, bias))
    check_opcheck(
        registered("linear_bwd", backend),
        (grad, x, weight, True, True, True),
        (grad, x, weight, False, False, True),
        (grad, x, weight, True, False, False),
    )


@pytest.mark.once
@pytest.mark.parametrize("bias", [False, True])
def test_compiles_once_for_all_shapes(backend, bias):
    _, *parameters = inputs((), 8, 6, torch.float32, bias)
    batches = [[strided((n, n + 1, 8), torch.float32, "contiguous"), *parameters] for n in (3, 5, 12)]
    check_compiles_once(ops.linear, batches)


@pytest.mark.once
def test_compiles_under_autocast(backend):
    def function(*arguments):
        with torch.autocast(arguments[0].device.type, dtype=torch.bfloat16):
            return ops.linear(*arguments)

    check_compiles_once(function, [inputs((40,), 8, 6, torch.float32)])


@pytest.mark.parametrize("bias", [False, True])
def test_gradcheck_in_float64(bias):
    with fastgpt.use_backend("cpp"):
        assert torch.autograd.gradcheck(ops.linear, inputs((2, 2), 3, 4, torch.float64, bias))


@pytest.mark.parametrize("backend", [PROVED_ONCE], indirect=True)
@pytest.mark.parametrize("bias", [False, True])
def test_second_derivatives(backend, bias):
    assert torch.autograd.gradgradcheck(ops.linear, inputs((2,), 3, 2, torch.float64, bias))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": "text"}, TypeError, "x must be a torch.Tensor, got str"),
        ({"x": torch.tensor(1.0)}, ValueError, "x must have at least one dimension"),
        ({"x": torch.ones(2, 4).long()}, TypeError, "x must be float32.* got torch.int64"),
        ({"weight": torch.ones(4)}, ValueError, r"weight must have shape \(N, 4\), got \(4,\)"),
        ({"weight": torch.ones(4, 5)}, ValueError, r"weight must have shape \(N, 4\), got \(4, 5\)"),
        ({"weight": torch.ones(5, 4).half()}, TypeError, "the dtypes must be equal"),
        ({"weight": torch.ones(5, 4, device="meta")}, ValueError, "weight is on meta"),
        ({"bias": torch.ones(4)}, ValueError, r"bias must have shape \(5,\)"),
        ({"bias": torch.ones(5).double()}, TypeError, "the dtypes must be equal"),
    ],
)
def test_bad_input_gets_one_sentence(change, error, message):
    arguments = {"x": torch.ones(2, 4), "weight": torch.ones(5, 4), "bias": torch.ones(5)} | change
    with pytest.raises(error, match=f"^linear: {message}"):
        ops.linear(**arguments)
