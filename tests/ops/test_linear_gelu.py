"""Linear + GELU: every backend against PyTorch by the error rule, what it keeps, and the corners."""

import sys

import pytest
import torch
import torch.nn.functional as T
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
    with_costly,
)


def inputs(batch, size, width, dtype, bias=True, layout="contiguous", scale=1.0):
    """x, weight and perhaps bias, for pre-activations of about the scale."""
    x = strided((*batch, size), dtype, layout, scale)
    weight = strided((width, size), dtype, layout, scale=max(size, 1) ** -0.5)
    return [x, weight, strided((width,), dtype, "gapped", scale)] if bias else [x, weight]


def ours_and_pytorch(approximate):
    """The two functions of (x, weight[, bias]).

    PyTorch's on rows, where it rounds the pre-activation once: for a vector, or more than two dimensions that are
    not contiguous, it rounds before it adds the bias as well, and would be the lesser yardstick.
    """

    def ours(x, weight, bias=None):
        return ops.linear_gelu(x, weight, bias, approximate)

    def pytorch(x, weight, bias=None):
        z = T.linear(torch.atleast_2d(x).flatten(0, -2), weight, bias)
        return T.gelu(z, approximate=approximate).view(*x.shape[:-1], weight.shape[0])

    return ours, pytorch


@pytest.mark.parametrize(
    ("batch", "size", "width"),
    [
        ((), 5, 7),
        ((9,), 8, 33),
        ((2, 3), 17, 64),
        ((1, 1, 70), 1, 9),
        ((3,), 8, 1),
    ],
)
@pytest.mark.parametrize("approximate", ["none", "tanh"])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("layout", with_costly(LAYOUTS, "sliced", "gapped"))
def test_obeys_the_error_rule(backend, dtype, approximate, bias, layout, batch, size, width):
    arguments = inputs(batch, size, width, dtype, bias, layout, scale=2.0)
    check_error_rule(*ours_and_pytorch(approximate), arguments)


@any_of(
    batch=st.lists(st.integers(0, 4), max_size=2),
    size=st.integers(0, 20),
    width=st.integers(0, 20),
    layout=st.sampled_from(LAYOUTS),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    scale=st.sampled_from([0.01, 1.0, 30.0]),
    approximate=st.sampled_from(["none", "tanh"]),
    bias=st.booleans(),
)
def test_any_shape_and_stride(backend, batch, size, width, layout, dtype, scale, approximate, bias):
    """The sizes 0 included: without columns of x the result is gelu(bias), or 0."""
    arguments = inputs(batch, size, width, dtype, bias, layout, scale)
    check_error_rule(*ours_and_pytorch(approximate), arguments)


def test_several_tiles_with_and_without_tensor_descriptors(backend, dtype, monkeypatch):
    """Ragged in every size; Triton describes rows that are whole and a multiple of 16 bytes apart."""
    described, both = [], set()
    if backend == "triton":
        from fastgpt.kernels import linear_gelu as kernels

        ask = kernels._fits_descriptor
        monkeypatch.setattr(kernels, "_fits_descriptor", lambda x: described.append(ask(x)) or described[-1])
        both = {True, False} if kernels._has_descriptors(torch.empty(1)) else set()
    for size in (72, 71):
        arguments = inputs((77,), size, 45, dtype)
        check_error_rule(*ours_and_pytorch("none"), arguments)
    assert set(described) == both


def test_float32_products_are_tf32_only_where_pytorchs_are(monkeypatch):
    """What the launcher asks for; the interpreter multiplies in float32 either way."""
    pytest.importorskip("triton")
    from fastgpt.kernels import linear_gelu as kernels

    asked, launch = [], kernels._linear_gelu_fwd

    class Recorder:
        def __getitem__(self, grid):
            return lambda *arguments, **options: (
                asked.append(arguments) or launch[grid](*arguments, **options)
            )

    monkeypatch.setattr(kernels, "_linear_gelu_fwd", Recorder())
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    try:
        with fastgpt.use_backend("triton"):
            for matmul.fp32_precision, dtype, expected in [
                ("ieee", torch.float32, "ieee"),
                ("tf32", torch.float32, "tf32"),
                ("tf32", torch.bfloat16, "ieee"),
            ]:
                ops.linear_gelu(*inputs((3,), 8, 5, dtype))
                assert expected in asked[-1]
    finally:
        matmul.fp32_precision = before


@pytest.mark.parametrize("approximate", ["none", "tanh"])
def test_the_reference_is_pytorchs(approximate):
    for bias in (False, True):
        arguments = inputs((3, 4), 5, 6, torch.float64, bias)
        expected = ours_and_pytorch(approximate)[1](*arguments)
        x, weight, *rest = arguments
        got = reference.linear_gelu(x, weight, rest[0] if bias else None, approximate == "tanh")
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("approximate", ["none", "tanh"])
def test_extreme_pre_activations_behave_as_in_pytorch(backend, dtype, approximate):
    """Tails, infinity and NaN, from the product or from the bias."""
    values = torch.tensor([0.0, 1e-30, 5.0, -5.0, 60.0, -60.0, 6e4, -6e4, torch.inf, torch.nan])
    ours, pytorch = ours_and_pytorch(approximate)
    edges, one = values.to(dtype).unsqueeze(1), torch.ones(1, 1, dtype=dtype)
    exact = pytorch(edges.double(), one.double())
    torch.testing.assert_close(ours(edges, one), exact.to(dtype), equal_nan=True)
    zero, bias = torch.zeros(len(values), 1, dtype=dtype), edges[:, 0]
    torch.testing.assert_close(ours(one, zero, bias), exact.to(dtype).T, equal_nan=True)
    grads = []
    for function, to in ((ours, dtype), (pytorch, torch.float64)):
        leaves = [t.to(to).requires_grad_() for t in (one, zero[:-2], bias[:-2])]
        grads.append(torch.autograd.grad(function(*leaves).sum(), leaves))
    for got, expected in zip(*grads, strict=True):
        torch.testing.assert_close(got, expected.to(dtype))


@pytest.mark.parametrize("bias", [False, True])
def test_the_activation_is_not_kept(backend, bias):
    """The arguments and one matrix of the result's size, which is not the result."""
    arguments, kept = inputs((2, 3), 5, 7, torch.float32, bias), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = ops.linear_gelu(*arguments)
    known = {t.data_ptr() for t in arguments}
    fresh = [t for t in kept if t.data_ptr() not in known]
    assert len(kept) == len(arguments) + 1
    assert [t.shape for t in fresh] == [(6, 7)]
    assert fresh[0].data_ptr() != y.data_ptr()


@pytest.mark.parametrize("bias", [False, True])
def test_the_pre_activation_is_written_where_a_gradient_is_wanted(backend, bias, monkeypatch):
    """And not in inference, where it would be a third more bytes."""
    module, kept = sys.modules["fastgpt.ops.linear_gelu"], []
    forward = module._forward
    monkeypatch.setattr(module, "_forward", lambda *given: kept.append(given[4]) or forward(*given))
    arguments = inputs((4,), 5, 6, torch.float32, bias)
    y = ops.linear_gelu(*arguments)
    with torch.no_grad():
        assert torch.equal(ops.linear_gelu(*arguments), y)
    assert torch.equal(ops.linear_gelu(*(t.detach() for t in arguments)), y)
    some = [arguments[0].detach(), arguments[1], *(t.detach() for t in arguments[2:])]
    assert torch.equal(ops.linear_gelu(*some), y)
    assert kept == [True, False, False, True]


@pytest.mark.once
@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_opcheck(backend):
    if not fastgpt.available_backends("linear_gelu")[backend]:
        pytest.skip("there is no such backend here")
    x, weight, bias = (t.detach() for t in inputs((5,), 8, 6, torch.float32))
    check_opcheck(registered("linear_gelu_bwd", backend), (x, x.clone(), False), (x[:0], x[:0], True))
    op = registered("linear_gelu_fwd", backend)
    check_opcheck(
        op, (x, weight, bias, False, True), (x, weight, None, True, False), (x[:0], weight, None, True, True)
    )


def test_only_the_gradients_asked_for(backend):
    arguments = inputs((4,), 5, 6, torch.float32)
    all_three = torch.autograd.grad(ops.linear_gelu(*arguments).sum(), arguments)
    for i, expected in enumerate(all_three):
        some = [t if i == j else t.detach() for j, t in enumerate(arguments)]
        assert torch.equal(torch.autograd.grad(ops.linear_gelu(*some).sum(), some[i])[0], expected)
    with torch.no_grad():
        assert not ops.linear_gelu(*arguments).requires_grad


def test_upstream_gradients_of_any_strides(backend):
    arguments = inputs((4,), 5, 6, torch.float32)
    expected, grad = T.gelu(T.linear(*arguments)), torch.randn(6, 4).T
    pairs = zip(
        torch.autograd.grad(ops.linear_gelu(*arguments), arguments, grad),
        torch.autograd.grad(expected, arguments, grad),
        strict=True,
    )
    for got, theirs in pairs:
        torch.testing.assert_close(got, theirs)


@pytest.mark.parametrize("bias", [False, True])
def test_autocast_acts_as_on_linear_then_gelu(backend, bias):
    arguments = inputs((2, 6), 8, 12, torch.float32, bias)
    ours, pytorch = ours_and_pytorch("tanh")
    with torch.autocast(arguments[0].device.type, dtype=torch.bfloat16):
        check_error_rule(ours, pytorch, arguments, rounding=torch.bfloat16)
        assert ours(*arguments).dtype == pytorch(*arguments).dtype == torch.bfloat16
        x, weight, *_ = arguments
        assert ops.linear_gelu(x.bfloat16(), weight).dtype == torch.bfloat16  # mixed, as a block's are
        if backend not in GPU_BACKENDS:
            doubles = [t.double() for t in arguments]
            torch.testing.assert_close(ours(*doubles), pytorch(*doubles))  # which autocast leaves alone
    with torch.autocast(x.device.type, dtype=torch.bfloat16, enabled=False):
        assert ours(*arguments).dtype == torch.float32


def test_every_slot_is_written(backend):
    for bias in (False, True):
        check_every_slot_is_written(ops.linear_gelu, inputs((5,), 8, 33, torch.float32, bias))


def test_same_bits_for_any_thread_count():
    with fastgpt.use_backend("cpp"):
        arguments = inputs((999,), 16, 130, torch.float32)
        check_same_bits_for_any_thread_count(ops.linear_gelu, arguments, ours_and_pytorch("none")[1])


@pytest.mark.once
@pytest.mark.parametrize("bias", [False, True])
def test_compiles_once_for_all_shapes(backend, bias):
    _, *parameters = inputs((), 8, 6, torch.float32, bias)
    batches = [[strided((n, n + 1, 8), torch.float32, "contiguous"), *parameters] for n in (3, 5, 12)]
    check_compiles_once(ops.linear_gelu, batches)


@pytest.mark.once
def test_compiles_under_autocast(backend):
    arguments = inputs((3,), 8, 6, torch.float32)

    def function(*arguments):
        with torch.autocast(arguments[0].device.type, dtype=torch.bfloat16):
            return ops.linear_gelu(*arguments)

    check_compiles_once(function, [arguments])


@pytest.mark.parametrize("approximate", ["none", "tanh"])
@pytest.mark.parametrize("bias", [False, True])
def test_gradcheck_in_float64(approximate, bias):
    arguments = inputs((2, 2), 3, 4, torch.float64, bias)
    with fastgpt.use_backend("cpp"):
        assert torch.autograd.gradcheck(ours_and_pytorch(approximate)[0], arguments)


@pytest.mark.parametrize("backend", [PROVED_ONCE], indirect=True)
@pytest.mark.parametrize("bias", [False, True])
def test_second_derivatives(backend, bias):
    assert torch.autograd.gradgradcheck(ops.linear_gelu, inputs((2,), 3, 2, torch.float64, bias))


@pytest.mark.once
def test_second_derivatives_where_only_x_needs_one(backend):
    x, weight, bias = inputs((2,), 3, 4, torch.float32)
    found = []
    for function in (ops.linear_gelu, lambda *t: T.gelu(T.linear(*t))):
        y = function(x, weight.detach(), bias.detach())
        (grad,) = torch.autograd.grad(y.sum(), x, create_graph=True)
        found.append(torch.autograd.grad(grad.square().sum(), x)[0])
    torch.testing.assert_close(*found)


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
        ({"approximate": "fast"}, ValueError, "approximate must be one of 'none', 'tanh'"),
    ],
)
def test_bad_input_gets_one_sentence(change, error, message):
    arguments = {"x": torch.ones(2, 4), "weight": torch.ones(5, 4), "bias": torch.ones(5)} | change
    with pytest.raises(error, match=f"^linear_gelu: {message}"):
        ops.linear_gelu(**arguments)
