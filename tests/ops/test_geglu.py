"""GEGLU: every backend against PyTorch by the error rule, and the contract's corners."""

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


def ours_and_pytorch(approximate):
    """The two functions of (a, b)."""
    return (
        lambda a, b: ops.geglu(a, b, approximate),
        lambda a, b: T.gelu(a, approximate=approximate) * b,
    )


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("approximate", ["none", "tanh"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_obeys_the_error_rule(backend, dtype, approximate, layout, shape):
    a, b = strided(shape, dtype, layout, scale=3), strided(shape, dtype, "gapped")
    check_error_rule(*ours_and_pytorch(approximate), [a, b])


@any_of(
    shape=st.lists(st.integers(0, 9), max_size=3),
    layouts=st.tuples(st.sampled_from(LAYOUTS), st.sampled_from(LAYOUTS)),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    scale=st.sampled_from([0.01, 1.0, 30.0]),
    approximate=st.sampled_from(["none", "tanh"]),
)
def test_any_shape_and_stride(backend, shape, layouts, dtype, scale, approximate):
    inputs = [strided(shape, dtype, layout, scale) for layout in layouts]
    check_error_rule(*ours_and_pytorch(approximate), inputs)


def test_halves_of_one_tensor(backend, dtype):
    """As where one product gives the gate and what it gates."""
    h = strided((5, 2, 34), dtype, "contiguous")
    check_error_rule(
        lambda h: ops.geglu(*h.chunk(2, dim=-1)),
        lambda h: T.gelu(h[..., :17]) * h[..., 17:],
        [h],
    )


def test_only_the_gradient_asked_for(backend):
    a, b = (strided((3, 5), torch.float32, "contiguous") for _ in "ab")
    both = torch.autograd.grad(ops.geglu(a, b).sum(), (a, b))
    assert torch.equal(torch.autograd.grad(ops.geglu(a, b.detach()).sum(), a)[0], both[0])
    assert torch.equal(torch.autograd.grad(ops.geglu(a.detach(), b).sum(), b)[0], both[1])


@pytest.mark.parametrize("approximate", ["none", "tanh"])
def test_extreme_values_behave_as_in_pytorch(backend, dtype, approximate):
    """Tails, zeros, infinities and NaN in the gate, forward and backward, in every dtype that holds them."""
    values = [0.0, -0.0, 1e-30, -1e-30, 5.0, -5.0, 9.0, -9.0, 60.0, -60.0, 6e4, -6e4, torch.inf, torch.nan]
    ours, pytorch = ours_and_pytorch(approximate)
    a = torch.tensor(values, dtype=dtype, requires_grad=True)
    b = torch.linspace(-1, 1, len(values)).to(dtype).requires_grad_()
    exact = pytorch(a.double(), b.double())  # its float32 turns inf into NaN
    torch.testing.assert_close(ours(a, b), exact.to(dtype), equal_nan=True)
    finite = [t[:-2].detach().requires_grad_() for t in (a, b)]
    grads = torch.autograd.grad(ours(*finite).sum(), finite)
    exact_grads = torch.autograd.grad(pytorch(*(t.double() for t in finite)).sum(), finite)
    for got, expected in zip(grads, exact_grads, strict=True):
        torch.testing.assert_close(got, expected)
    for grad in torch.autograd.grad(ours(a, b).sum(), (a, b)):
        assert grad[-1].isnan(), "a NaN must not turn into a number"


def test_only_the_inputs_are_kept_and_none_is_written_into(backend):
    a, b = (strided((3, 5), torch.float32, "contiguous") for _ in "ab")
    before, kept = (a.detach().clone(), b.detach().clone()), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.data_ptr()) or t, lambda t: t):
        y = ops.geglu(a, b)
    assert sorted(kept) == sorted([a.data_ptr(), b.data_ptr()])
    y.sum().backward()
    assert torch.equal(a, before[0]) and torch.equal(b, before[1])


def test_every_slot_is_written(backend):
    a, b = (strided((5, 33), torch.float32, "contiguous") for _ in "ab")
    check_every_slot_is_written(ops.geglu, [a, b])


def test_same_bits_for_any_thread_count():
    with fastgpt.use_backend("cpp"):
        inputs = [strided((999, 130), torch.bfloat16, "contiguous") for _ in "ab"]
        check_same_bits_for_any_thread_count(ops.geglu, inputs)


@pytest.mark.once
def test_opcheck(backend):
    grad, a, b = torch.randn(3, 3, 5)
    check_opcheck(registered("geglu_fwd", backend), (a, b, True), (a.bfloat16(), b.bfloat16(), False))
    check_opcheck(registered("geglu_bwd", backend), (grad, a, b, True), (grad, a, b, False))


@pytest.mark.once
def test_compiles_once_for_all_shapes(backend):
    batches = [[strided((n, 8), torch.float32, "contiguous") for _ in "ab"] for n in (3, 5, 12)]
    check_compiles_once(lambda a, b: ops.geglu(ops.geglu(a, b, "tanh"), a), batches)


@pytest.mark.once
def test_compiles_with_one_tensor_as_both(backend):
    check_compiles_once(lambda x: ops.geglu(x, x), [[strided((3, 8), torch.float32, "contiguous")]])


@pytest.mark.parametrize("approximate", ["none", "tanh"])
def test_gradcheck_in_float64(approximate):
    inputs = [strided((3, 4), torch.float64, "contiguous") for _ in "ab"]
    with fastgpt.use_backend("cpp"):
        assert torch.autograd.gradcheck(lambda a, b: ops.geglu(a, b, approximate), inputs)


@pytest.mark.parametrize("backend", [PROVED_ONCE], indirect=True)
@pytest.mark.parametrize("approximate", ["none", "tanh"])
def test_second_derivatives(backend, approximate):
    inputs = [strided((2, 3), torch.float64, "contiguous") for _ in "ab"]
    assert torch.autograd.gradgradcheck(lambda a, b: ops.geglu(a, b, approximate), inputs)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda x: ops.geglu(x, 3.0), TypeError, "b must be a torch.Tensor, got float"),
        (lambda x: ops.geglu(x.long(), x.long()), TypeError, "a must be float32.* got torch.int64"),
        (lambda x: ops.geglu(x, x.half()), TypeError, "the dtypes must be equal"),
        (lambda x: ops.geglu(x, x[0]), ValueError, r"b must have a's shape \(3, 4\), got \(4,\)"),
        (lambda x: ops.geglu(x, x, "fast"), ValueError, "approximate must be one of 'none', 'tanh'"),
        (lambda x: ops.geglu(x, x.to_sparse()), ValueError, "b must be a dense tensor"),
        (lambda x: ops.geglu(x, x.to("meta")), ValueError, "b is on meta"),
    ],
)
def test_bad_input_gets_one_sentence(call, error, message):
    with pytest.raises(error, match=f"^geglu: {message}"):
        call(torch.ones(3, 4))
