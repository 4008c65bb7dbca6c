"""SwiGLU: every backend against PyTorch by the error rule, and the contract's corners."""

import pytest
import torch
import torch.nn.functional as T
from hypothesis import strategies as st

import fastgpt
from fastgpt import extension, ops
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


def pytorch(a, b):
    return T.silu(a) * b


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_obeys_the_error_rule(backend, dtype, layout, shape):
    a, b = strided(shape, dtype, layout, scale=3), strided(shape, dtype, "gapped")
    check_error_rule(ops.swiglu, pytorch, [a, b])


@any_of(
    shape=st.lists(st.integers(0, 9), max_size=3),
    layouts=st.tuples(st.sampled_from(LAYOUTS), st.sampled_from(LAYOUTS)),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    scale=st.sampled_from([0.01, 1.0, 30.0]),
)
def test_any_shape_and_stride(backend, shape, layouts, dtype, scale):
    inputs = [strided(shape, dtype, layout, scale) for layout in layouts]
    check_error_rule(ops.swiglu, pytorch, inputs)


def test_halves_of_one_tensor(backend, dtype):
    """As where one product gives the gate and what it gates."""
    h = strided((5, 2, 34), dtype, "contiguous")
    check_error_rule(
        lambda h: ops.swiglu(*h.chunk(2, dim=-1)),
        lambda h: T.silu(h[..., :17]) * h[..., 17:],
        [h],
    )


def test_only_the_gradient_asked_for(backend):
    a, b = (strided((3, 5), torch.float32, "contiguous") for _ in "ab")
    both = torch.autograd.grad(ops.swiglu(a, b).sum(), (a, b))
    assert torch.equal(torch.autograd.grad(ops.swiglu(a, b.detach()).sum(), a)[0], both[0])
    assert torch.equal(torch.autograd.grad(ops.swiglu(a.detach(), b).sum(), b)[0], both[1])


def test_extreme_values_behave_as_in_pytorch(backend, dtype):
    """Tails, zeros, subnormals, infinities and NaN in the gate, forward and backward, in every dtype."""
    values = [
        0.0,
        -0.0,
        1e-30,
        1e-40,
        -1e-40,
        5.0,
        -9.0,
        20.0,
        -20.0,
        88.0,
        -88.0,
        -100.0,
        1e4,
        -1e4,
        6e4,
        -6e4,
    ]
    a = torch.tensor([*values, torch.inf, -torch.inf, torch.nan], dtype=dtype, requires_grad=True)
    b = torch.linspace(-1, 1, len(a)).to(dtype).requires_grad_()
    expected, y = pytorch(a, b), ops.swiglu(a, b)
    torch.testing.assert_close(y, expected, equal_nan=True)
    assert y[-2].isnan(), "silu(-inf) is NaN in PyTorch"
    grads = torch.autograd.grad(y.sum(), (a, b))
    for got, theirs in zip(grads, torch.autograd.grad(expected.sum(), (a, b)), strict=True):
        torch.testing.assert_close(got, theirs, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_very_negative_gates_give_0(backend, dtype):
    a = torch.tensor([-1e3, -1e5, -1e10, -1e20, -1e30, -3e38], dtype=dtype, requires_grad=True)
    b = torch.ones_like(a, requires_grad=True)
    y = ops.swiglu(a, b)
    for found in (y, *torch.autograd.grad(y.sum(), (a, b))):
        assert torch.equal(found, torch.zeros_like(a))


@pytest.mark.skipif(extension.variant() is None, reason="the C++ kernels are not built")
def test_silu_and_its_derivative_have_a_small_error():
    """Relative to the value, also in the left tail; relative to 1 for the derivative, which has a zero."""
    x = torch.linspace(-80, 80, 200_001)
    exact = x.double().requires_grad_()
    y = T.silu(exact)
    (slope,) = torch.autograd.grad(y.sum(), exact)
    with fastgpt.use_backend("cpp"):
        leaf = x.clone().requires_grad_()
        ours = ops.swiglu(leaf, torch.ones_like(x))
        (our_slope,) = torch.autograd.grad(ours.sum(), leaf)
    assert ((ours - y).abs() <= 4e-7 * y.abs()).all()
    assert (our_slope - slope).abs().max() <= 1e-6


@pytest.mark.skipif(extension.variant() is None, reason="the C++ kernels are not built")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_every_number_of_16_bits_is_rounded_once(dtype):
    x = torch.arange(2**16).to(torch.int16).view(dtype)
    x = x[x.isfinite()].requires_grad_()
    y = T.silu(x.double())
    (slope,) = torch.autograd.grad(y.sum(), x)
    with fastgpt.use_backend("cpp"):
        ours = ops.swiglu(x, torch.ones_like(x))
        (our_slope,) = torch.autograd.grad(ours.sum(), x)
    half = torch.finfo(dtype).eps / 2
    normal = y.abs() >= 2 * torch.finfo(dtype).smallest_normal
    assert normal.sum() > 2**14
    # Without AVX-512 exp(x) below 2^-126 is 0, and so is the result, of at most 1e-36 in bfloat16.
    assert ((ours.double() - y).abs() <= (half + 1.2e-5) * y.abs() + 1e-36)[normal].all()
    assert ((our_slope.double() - slope.double()).abs() <= 2 * half * slope.double().abs() + 1.2e-5).all()


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"]
)
def test_large_results_have_the_bits_of_small_ones(dtype):
    """From 16 MiB on the C++ kernels use streaming stores of whole lines; less than a line is left over here."""
    a, b, grad = torch.randn(3, 2**24 // dtype.itemsize + 37).to(dtype)

    def all_three(a, b, grad):
        a, b = a.clone().requires_grad_(), b.clone().requires_grad_()
        y = ops.swiglu(a, b)
        return y.detach(), *torch.autograd.grad(y, (a, b), grad)

    with fastgpt.use_backend("cpp"):
        parts = [all_three(*part) for part in zip(*(t.tensor_split(3) for t in (a, b, grad)), strict=True)]
        for large, small in zip(all_three(a, b, grad), zip(*parts, strict=True), strict=True):
            assert torch.equal(large, torch.cat(small))


def test_an_upstream_gradient_may_begin_at_any_address(backend):
    a, b = (strided((5, 64), torch.float32, "contiguous") for _ in "ab")
    grad = torch.randn(5 * 64 + 1)[1:].view(5, 64)
    ours = torch.autograd.grad(ops.swiglu(a, b), (a, b), grad)
    theirs = torch.autograd.grad(pytorch(a, b), (a, b), grad)
    torch.testing.assert_close(ours, theirs)


def test_only_the_inputs_are_kept_and_none_is_written_into(backend):
    a, b = (strided((3, 5), torch.float32, "contiguous") for _ in "ab")
    before, kept = (a.detach().clone(), b.detach().clone()), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.data_ptr()) or t, lambda t: t):
        y = ops.swiglu(a, b)
    assert sorted(kept) == sorted([a.data_ptr(), b.data_ptr()])
    y.sum().backward()
    assert torch.equal(a, before[0]) and torch.equal(b, before[1])


def test_every_slot_is_written(backend):
    a, b = (strided((5, 33), torch.float32, "contiguous") for _ in "ab")
    check_every_slot_is_written(ops.swiglu, [a, b])


def test_same_bits_for_any_thread_count():
    with fastgpt.use_backend("cpp"):
        inputs = [strided((999, 130), torch.bfloat16, "contiguous") for _ in "ab"]
        check_same_bits_for_any_thread_count(ops.swiglu, inputs)


@pytest.mark.once
def test_opcheck(backend):
    grad, a, b = torch.randn(3, 3, 5)
    check_opcheck(registered("swiglu_fwd", backend), (a, b), (a.bfloat16(), b.bfloat16()))
    check_opcheck(registered("swiglu_bwd", backend), (grad, a, b))


@pytest.mark.once
def test_compiles_once_for_all_shapes(backend):
    batches = [[strided((n, 8), torch.float32, "contiguous") for _ in "ab"] for n in (3, 5, 12)]
    check_compiles_once(lambda a, b: ops.swiglu(ops.swiglu(a, b), a), batches)


@pytest.mark.once
def test_compiles_with_one_tensor_as_both(backend):
    check_compiles_once(lambda x: ops.swiglu(x, x), [[strided((3, 8), torch.float32, "contiguous")]])


def test_gradcheck_in_float64():
    inputs = [strided((3, 4), torch.float64, "contiguous") for _ in "ab"]
    with fastgpt.use_backend("cpp"):
        assert torch.autograd.gradcheck(ops.swiglu, inputs)


@pytest.mark.parametrize("backend", [PROVED_ONCE], indirect=True)
def test_second_derivatives(backend):
    inputs = [strided((2, 3), torch.float64, "contiguous") for _ in "ab"]
    assert torch.autograd.gradgradcheck(ops.swiglu, inputs)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda x: ops.swiglu(x, 3.0), TypeError, "b must be a torch.Tensor, got float"),
        (lambda x: ops.swiglu(x.long(), x.long()), TypeError, "a must be float32.* got torch.int64"),
        (lambda x: ops.swiglu(x, x.half()), TypeError, "the dtypes must be equal"),
        (lambda x: ops.swiglu(x, x[0]), ValueError, r"b must have a's shape \(3, 4\), got \(4,\)"),
        (lambda x: ops.swiglu(x, x.to_sparse()), ValueError, "b must be a dense tensor"),
        (lambda x: ops.swiglu(x, x.to("meta")), ValueError, "b is on meta"),
    ],
)
def test_bad_input_gets_one_sentence(call, error, message):
    with pytest.raises(error, match=f"^swiglu: {message}"):
        call(torch.ones(3, 4))
