"""The square of ReLU: every backend against PyTorch by the error rule, and the contract's corners."""

import pytest
import torch
import torch.nn.functional as T
from hypothesis import strategies as st

import fastgpt
from fastgpt import ops
from fastgpt.testing import LAYOUTS, check_error_rule, strided
from tests.support.contract import (
    PROVED_ONCE,
    any_of,
    check_compiles_once,
    check_every_slot_is_written,
    check_opcheck,
    check_same_bits_for_any_thread_count,
    registered,
)

SHAPES = [(), (1,), (0,), (7,), (3, 1), (2, 0, 5), (5, 33), (3, 4, 100)]


def pytorch(x):
    return T.relu(x).square()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_obeys_the_error_rule(backend, dtype, layout, shape):
    check_error_rule(ops.relu_squared, pytorch, [strided(shape, dtype, layout, scale=3)])


@any_of(
    shape=st.lists(st.integers(0, 9), max_size=3),
    layout=st.sampled_from(LAYOUTS),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    scale=st.sampled_from([0.01, 1.0, 30.0]),
)
def test_any_shape_and_stride(backend, shape, layout, dtype, scale):
    check_error_rule(ops.relu_squared, pytorch, [strided(shape, dtype, layout, scale)])


def test_extreme_values_behave_as_in_pytorch(backend, dtype):
    """Zeros, subnormals, squares that overflow, infinities and NaN, forward and backward."""
    values = [
        0.0,
        -0.0,
        1e-30,
        -1e-30,
        1e-40,
        5.0,
        -5.0,
        300.0,
        6e4,
        -6e4,
        3e38,
        torch.inf,
        -torch.inf,
        torch.nan,
    ]
    x = torch.tensor(values, dtype=dtype, requires_grad=True)
    y, expected = ops.relu_squared(x), pytorch(x)
    torch.testing.assert_close(y, expected, equal_nan=True)
    (ours,) = torch.autograd.grad(y.sum(), x)
    (theirs,) = torch.autograd.grad(expected.sum(), x)
    torch.testing.assert_close(ours, theirs, equal_nan=True)


@pytest.mark.parametrize("value", [torch.inf, torch.nan])
def test_negative_numbers_have_no_gradient_whatever_comes_in(backend, dtype, value):
    x = torch.tensor([-2.0, -0.0, 0.0, 3.0], dtype=dtype, requires_grad=True)
    (ours,) = torch.autograd.grad(ops.relu_squared(x), x, torch.full_like(x, value))
    assert torch.equal(ours[:3], torch.zeros(3, dtype=dtype)) and not ours[3].isfinite()


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"]
)
def test_large_results_have_the_bits_of_small_ones(dtype):
    """From 16 MiB on the C++ kernels use streaming stores of whole lines; less than a line is left over here."""
    x, grad = torch.randn(2, 2**24 // dtype.itemsize + 37).to(dtype)

    def both(x, grad):
        x = x.clone().requires_grad_()
        y = ops.relu_squared(x)
        return y.detach(), *torch.autograd.grad(y, x, grad)

    with fastgpt.use_backend("cpp"):
        parts = [both(*part) for part in zip(x.tensor_split(3), grad.tensor_split(3), strict=True)]
        for large, small in zip(both(x, grad), zip(*parts, strict=True), strict=True):
            assert torch.equal(large, torch.cat(small))


def test_an_upstream_gradient_may_begin_at_any_address(backend):
    x = strided((5, 64), torch.float32, "contiguous")
    grad = torch.randn(5 * 64 + 1)[1:].view(5, 64)
    (ours,) = torch.autograd.grad(ops.relu_squared(x), x, grad)
    (theirs,) = torch.autograd.grad(pytorch(x), x, grad)
    torch.testing.assert_close(ours, theirs)


def test_only_the_input_is_kept_and_it_is_not_written_into(backend):
    x = strided((3, 5), torch.float32, "contiguous")
    before, kept = x.detach().clone(), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.data_ptr()) or t, lambda t: t):
        y = ops.relu_squared(x)
    assert kept == [x.data_ptr()]
    y.sum().backward()
    assert torch.equal(x, before)


def test_every_slot_is_written(backend):
    check_every_slot_is_written(ops.relu_squared, [strided((5, 33), torch.float32, "contiguous")])


def test_same_bits_for_any_thread_count():
    with fastgpt.use_backend("cpp"):
        x = strided((999, 130), torch.bfloat16, "contiguous")
        check_same_bits_for_any_thread_count(ops.relu_squared, [x])


@pytest.mark.once
def test_opcheck(backend):
    grad, x = torch.randn(2, 3, 5)
    check_opcheck(registered("relu_squared_fwd", backend), (x,), (x.bfloat16(),))
    check_opcheck(registered("relu_squared_bwd", backend), (grad, x))


@pytest.mark.once
def test_compiles_once_for_all_shapes(backend):
    batches = [[strided((n, 8), torch.float32, "contiguous")] for n in (3, 5, 12)]
    check_compiles_once(lambda x: ops.relu_squared(ops.relu_squared(x) - 1), batches)


def test_gradcheck_in_float64():
    with fastgpt.use_backend("cpp"):
        assert torch.autograd.gradcheck(ops.relu_squared, [strided((3, 4), torch.float64, "contiguous")])


@pytest.mark.parametrize("backend", [PROVED_ONCE], indirect=True)
def test_second_derivatives(backend):
    assert torch.autograd.gradgradcheck(ops.relu_squared, [strided((2, 3), torch.float64, "contiguous")])


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda x: ops.relu_squared(3.0), TypeError, "x must be a torch.Tensor, got float"),
        (lambda x: ops.relu_squared(x.long()), TypeError, "x must be float32.* got torch.int64"),
        (lambda x: ops.relu_squared(x.to_sparse()), ValueError, "x must be a dense tensor"),
    ],
)
def test_bad_input_gets_one_sentence(call, error, message):
    with pytest.raises(error, match=f"^relu_squared: {message}"):
        call(torch.ones(3, 4))
