"""GELU and bias_gelu: every backend against PyTorch by the error rule, and the contract's corners."""

import pytest
import torch
import torch.nn.functional as T
from hypothesis import strategies as st

import fastgpt
from fastgpt import extension, ops
from fastgpt.testing import LAYOUTS, check_error_rule, strided
from tests.support.contract import (
    any_of,
    check_compiles_once,
    check_every_slot_is_written,
    check_opcheck,
    check_same_bits_for_any_thread_count,
    registered,
)

SHAPES = [(), (1,), (0,), (7,), (3, 1), (2, 0, 5), (5, 33), (3, 4, 100)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("approximate", ["none", "tanh"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_gelu_obeys_the_error_rule(backend, dtype, approximate, layout, shape):
    x = strided(shape, dtype, layout, scale=3)
    check_error_rule(lambda x: ops.gelu(x, approximate), lambda x: T.gelu(x, approximate=approximate), [x])


@pytest.mark.parametrize(
    ("shape", "layout"),
    [
        ((5, 33), "transposed"),
        ((2, 3, 64), "sliced"),
        ((1, 1), "gapped"),
        ((40, 9), "gapped"),
        ((130, 9), "contiguous"),  # more rows than a program takes
    ],
)
@pytest.mark.parametrize("approximate", ["none", "tanh"])
def test_bias_gelu_obeys_the_error_rule(backend, dtype, approximate, shape, layout):
    def pytorch(x, bias):
        return T.gelu(x + bias, approximate=approximate)

    x, bias = strided(shape, dtype, layout), strided(shape[-1:], dtype, "gapped")
    check_error_rule(lambda x, b: ops.bias_gelu(x, b, approximate), pytorch, [x, bias])


@any_of(
    shape=st.lists(st.integers(0, 9), max_size=3),
    layout=st.sampled_from(LAYOUTS),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    scale=st.sampled_from([0.01, 1.0, 30.0]),
    approximate=st.sampled_from(["none", "tanh"]),
)
def test_gelu_of_any_shape_and_stride(backend, shape, layout, dtype, scale, approximate):
    x = strided(shape, dtype, layout, scale)
    check_error_rule(lambda x: ops.gelu(x, approximate), lambda x: T.gelu(x, approximate=approximate), [x])


@any_of(
    rows=st.lists(st.integers(0, 9), max_size=2),
    size=st.integers(0, 300),
    layout=st.sampled_from(LAYOUTS),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    scale=st.sampled_from([0.01, 1.0, 30.0]),
    approximate=st.sampled_from(["none", "tanh"]),
)
def test_bias_gelu_of_any_shape_and_stride(backend, rows, size, layout, dtype, scale, approximate):
    inputs = [strided((*rows, size), dtype, layout, scale), strided((size,), dtype, "gapped", scale)]
    check_error_rule(
        lambda x, b: ops.bias_gelu(x, b, approximate),
        lambda x, b: T.gelu(x + b, approximate=approximate),
        inputs,
    )


@pytest.mark.parametrize("approximate", ["none", "tanh"])
def test_extreme_values_behave_as_in_pytorch(backend, dtype, approximate):
    """Tails, zeros, infinities and NaN, forward and backward, in every dtype that holds them."""
    values = [0.0, -0.0, 1e-30, -1e-30, 5.0, -5.0, 9.0, -9.0, 60.0, -60.0, 6e4, -6e4, torch.inf, torch.nan]
    x = torch.tensor(values, dtype=dtype, requires_grad=True)
    exact = T.gelu(x.double(), approximate=approximate)  # its float32 turns inf into NaN
    torch.testing.assert_close(ops.gelu(x, approximate), exact.to(dtype), equal_nan=True)
    finite = torch.tensor(values[:-2], dtype=dtype, requires_grad=True)
    (ours,) = torch.autograd.grad(ops.gelu(finite, approximate).sum(), finite)
    (theirs,) = torch.autograd.grad(T.gelu(finite.double(), approximate=approximate).sum(), finite)
    torch.testing.assert_close(ours, theirs)
    (at_infinity,) = torch.autograd.grad(ops.gelu(x, approximate).sum(), x)
    assert at_infinity[-1].isnan(), "a NaN must not turn into a number"


@pytest.mark.parametrize("approximate", ["none", "tanh"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nothing_is_left_of_very_negative_values(backend, dtype, approximate):
    """A share that is only almost 0 of a number like -1e38 would be a number."""
    x = torch.tensor([-1e3, -1e5, -1e10, -1e20, -1e30, -3e38], dtype=dtype)
    assert torch.equal(ops.gelu(x, approximate), torch.zeros_like(x))


@pytest.mark.skipif(extension.variant() is None, reason="the C++ kernels are not built")
@pytest.mark.parametrize(("approximate", "share"), [("none", 6.6e-8), ("tanh", 5.2e-8)])
def test_tables_keep_the_stated_error(approximate, share):
    """csrc/cpu/gelu_terms.h states the errors of y/x and dy/dx; a rounding of y comes on top."""
    x = torch.linspace(-8, 8, 200_001)
    exact = x.double().requires_grad_()
    y = T.gelu(exact, approximate=approximate)
    (slope,) = torch.autograd.grad(y.sum(), exact)
    with fastgpt.use_backend("cpp"):
        leaf = x.clone().requires_grad_()
        ours = ops.gelu(leaf, approximate)
        (our_slope,) = torch.autograd.grad(ours.sum(), leaf)
    assert ((ours - y).abs() <= share * exact.abs() + 6e-8 * y.abs()).all()
    assert (our_slope - slope).abs().max() <= 1.2e-7


@pytest.mark.skipif(extension.variant() is None, reason="the C++ kernels are not built")
@pytest.mark.parametrize("approximate", ["none", "tanh"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_every_number_of_16_bits_is_rounded_right_but_for_the_stated_error(dtype, approximate):
    x = torch.arange(2**16).to(torch.int16).view(dtype)
    x = x[x.isfinite()].requires_grad_()
    y = T.gelu(x.double(), approximate=approximate)
    (slope,) = torch.autograd.grad(y.sum(), x)
    with fastgpt.use_backend("cpp"):
        ours = ops.gelu(x, approximate)
        (our_slope,) = torch.autograd.grad(ours.sum(), x)
    half = torch.finfo(dtype).eps / 2
    normal = y.abs() >= torch.finfo(dtype).smallest_normal
    assert normal.sum() > 2**14
    error = (ours.double() - y).abs()
    assert (error <= half * y.abs() + 6.6e-8 * x.double().abs())[normal].all()
    assert ((our_slope.double() - slope.double()).abs() <= 2 * half * slope.double().abs() + 1.2e-7).all()


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"]
)
def test_results_past_the_caches_have_the_bits_of_small_ones(dtype):
    """From 16 MiB on the C++ kernels store whole lines past the caches; less than a line is left over here."""
    columns = 1056
    rows = 2**24 // (columns * dtype.itemsize) + 3
    x, bias = torch.randn(rows, columns).to(dtype), torch.randn(columns).to(dtype)
    uneven = x.flatten()[: 2**24 // dtype.itemsize + 37]

    def both(function, x):
        leaf = x.clone().requires_grad_()
        y = function(leaf)
        return y.detach(), torch.autograd.grad(y, leaf, x)[0]

    functions = {
        "gelu": (ops.gelu, uneven),
        "bias_gelu": (lambda x: ops.bias_gelu(x, bias, "tanh"), x),
        "geglu": (lambda x: ops.geglu(x, x), uneven),
    }
    with fastgpt.use_backend("cpp"):
        for name, (function, whole) in functions.items():
            parts = [both(function, part) for part in whole.tensor_split(3)]
            for large, small in zip(both(function, whole), zip(*parts, strict=True), strict=True):
                assert torch.equal(large, torch.cat(small)), name


def test_an_upstream_gradient_may_begin_at_any_address(backend):
    """Where 16 bytes cannot be moved at once, though the input and the result allow it."""
    x = strided((5, 64), torch.float32, "contiguous")
    grad = torch.randn(5 * 64 + 1)[1:].view(5, 64)
    (ours,) = torch.autograd.grad(ops.gelu(x), x, grad)
    (theirs,) = torch.autograd.grad(T.gelu(x), x, grad)
    torch.testing.assert_close(ours, theirs)


def test_every_slot_is_written(backend):
    x, bias = strided((5, 33), torch.float32, "contiguous"), strided((33,), torch.float32, "contiguous")
    check_every_slot_is_written(ops.gelu, [x])
    check_every_slot_is_written(ops.bias_gelu, [x, bias])


def test_same_bits_for_any_thread_count():
    with fastgpt.use_backend("cpp"):
        x, bias = (
            strided((999, 130), torch.bfloat16, "contiguous"),
            strided((130,), torch.bfloat16, "contiguous"),
        )
        check_same_bits_for_any_thread_count(ops.bias_gelu, [x, bias])


def test_opcheck(backend):
    x, bias = torch.randn(3, 5), torch.randn(5)
    check_opcheck(registered("gelu_fwd", backend), (x, True), (x.bfloat16(), False))
    check_opcheck(registered("gelu_bwd", backend), (torch.randn(3, 5), x, True))
    check_opcheck(registered("bias_gelu_fwd", backend), (x, bias, False))
    check_opcheck(registered("bias_gelu_bwd", backend), (torch.randn(3, 5), x, bias, True))


def test_compiles_once_for_all_shapes(backend):
    bias = strided((8,), torch.float32, "contiguous")
    batches = [[strided((n, 8), torch.float32, "contiguous"), bias] for n in (3, 5, 12)]
    check_compiles_once(lambda x, b: ops.bias_gelu(ops.gelu(x, "tanh"), b), batches)


@pytest.mark.parametrize("approximate", ["none", "tanh"])
def test_gradcheck_in_float64(approximate):
    x, bias = (strided(s, torch.float64, "contiguous") for s in ((3, 4), (4,)))
    with fastgpt.use_backend("cpp"):
        assert torch.autograd.gradcheck(lambda x: ops.gelu(x, approximate), (x,))
        assert torch.autograd.gradcheck(lambda x, b: ops.bias_gelu(x, b, approximate), (x, bias))


@pytest.mark.parametrize("backend", ["reference", "cpp"], indirect=True)
def test_second_derivatives(backend):
    x, bias = (strided(s, torch.float64, "contiguous") for s in ((2, 3), (3,)))
    assert torch.autograd.gradgradcheck(ops.gelu, (x,))
    assert torch.autograd.gradgradcheck(ops.bias_gelu, (x, bias))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: ops.gelu(3.0), TypeError, "x must be a torch.Tensor, got float"),
        (lambda: ops.gelu(torch.ones(3, dtype=torch.int64)), TypeError, "got torch.int64"),
        (lambda: ops.gelu(torch.ones(3), "fast"), ValueError, "approximate must be one of 'none', 'tanh'"),
        (lambda: ops.gelu(torch.eye(3).to_sparse()), ValueError, "must be a dense tensor"),
        (lambda: ops.bias_gelu(torch.ones(3, 4), torch.ones(3)), ValueError, r"bias must have shape \(4,\)"),
        (lambda: ops.bias_gelu(torch.ones(4), torch.ones(4).half()), TypeError, "dtypes must be equal"),
        (lambda: ops.bias_gelu(torch.ones(4), torch.ones(4, device="meta")), ValueError, "bias is on meta"),
        (lambda: ops.bias_gelu(torch.tensor(1.0), torch.ones(1)), ValueError, "at least one dimension"),
    ],
)
def test_bad_input_gets_one_sentence(call, error, message):
    with pytest.raises(error, match=message):
        call()
