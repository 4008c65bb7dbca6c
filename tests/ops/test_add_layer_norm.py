"""Residual + layer normalisation: every backend against PyTorch by the error rule, and the corners."""

import pytest
import torch
import torch.nn.functional as T
from hypothesis import strategies as st

import fastgpt
from fastgpt import ops
from fastgpt.testing import LAYOUTS, check_error_rule, strided
from tests.support.contract import (
    any_of,
    check_compiles_once,
    check_every_slot_is_written,
    check_opcheck,
    check_same_bits_for_any_thread_count,
    registered,
    with_costly,
)


def pytorch(x, residual, weight=None, bias=None):
    total = x + residual
    return T.layer_norm(total, total.shape[-1:], weight, bias), total


def inputs(shape, dtype, layout, affine=True):
    vectors = [strided(shape[-1:], dtype, "gapped") for _ in range(2)] if affine else []
    return [strided(shape, dtype, layout), strided(shape, dtype, layout), *vectors]


@pytest.mark.parametrize("shape", [(5, 33), (2, 3, 64), (1, 7), (40, 9)])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("affine", [True, False])
def test_obeys_the_error_rule(backend, dtype, layout, affine, shape):
    check_error_rule(ops.add_layer_norm, pytorch, inputs(shape, dtype, layout, affine))


@any_of(
    rows=st.integers(0, 9),
    size=st.integers(2, 70),
    layout=st.sampled_from(LAYOUTS),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    weighted=st.booleans(),
    biased=st.booleans(),
)
def test_any_shape_and_stride(backend, rows, size, layout, dtype, weighted, biased):
    x, residual, weight, bias = inputs((rows, size), dtype, layout)
    given_vectors = [*([weight] if weighted else []), *([bias] if biased else [])]

    def as_vectors(vectors):
        vectors = iter(vectors)
        return next(vectors) if weighted else None, next(vectors) if biased else None

    check_error_rule(
        lambda x, r, *v: ops.add_layer_norm(x, r, *as_vectors(v)),
        lambda x, r, *v: pytorch(x, r, *as_vectors(v)),
        [x, residual, *given_vectors],
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("offset", [0, 1], ids=["aligned", "unaligned"])
def test_rows_of_any_size(backend, dtype, offset):
    """From one warp's to more than a block holds, where vectors of 16 bytes can be moved and where not."""

    def at_an_offset(*shape):
        memory = torch.randn(offset + torch.Size(shape).numel()).to(dtype)
        return memory[offset:].view(shape).requires_grad_()

    for size in (8, 256, 264, 1016, 1024, 1032, 4096, 4104, 8200, 16392):
        arguments = [at_an_offset(3, size), at_an_offset(3, size), at_an_offset(size), at_an_offset(size)]
        check_error_rule(ops.add_layer_norm, pytorch, arguments)


@pytest.mark.only("cpp", "cuda", "reference")
@pytest.mark.parametrize("shape", with_costly([(4700, 512), (3200, 8)], (4700, 512)))
def test_more_rows_than_partial_sums(backend, shape):
    """A team of threads comes to several rows, its sums over them in two stages."""
    check_error_rule(ops.add_layer_norm, pytorch, inputs(shape, torch.bfloat16, "contiguous"))


@pytest.mark.only("triton")
@pytest.mark.parametrize("rows", [100, 97])
def test_more_rows_than_tritons_programs_have_partial_sums_for(backend, rows):
    """Four programs for tiles of eight rows."""
    from fastgpt.kernels import tuned

    with tuned.trying({"add_layer_norm_bwd": (64, 4, 4)}) as trial:
        check_error_rule(ops.add_layer_norm, pytorch, inputs((rows, 8), torch.bfloat16, "contiguous"))
    assert any(kernel == "add_layer_norm_bwd" for kernel, *_ in trial.asked)


@pytest.mark.slow
@pytest.mark.only("triton")
def test_more_rows_than_triton_has_programs(backend):
    check_error_rule(ops.add_layer_norm, pytorch, inputs((4700, 512), torch.bfloat16, "contiguous"))


@any_of(
    x_dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    residual_dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    vector_dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    size=st.sampled_from([5, 8, 64, 1100]),
)
def test_any_mixture_of_dtypes(backend, x_dtype, residual_dtype, vector_dtype, size):
    """Against float64 from the rounded sum on: what follows it is rounded once."""
    x, residual = torch.randn(4, size).to(x_dtype), torch.randn(4, size).to(residual_dtype)
    weight, bias = (torch.randn(size).to(vector_dtype) for _ in range(2))
    leaves = [t.requires_grad_() for t in (x, residual, weight, bias)]
    normed, total = ops.add_layer_norm(*leaves)
    assert torch.equal(total, x + residual)
    exact_leaves = [t.detach().double().requires_grad_() for t in (x + residual, weight, bias)]
    expected = T.layer_norm(exact_leaves[0], (size,), *exact_leaves[1:])
    torch.testing.assert_close(normed, expected.to(total.dtype))
    grad = torch.randn_like(normed)
    found = torch.autograd.grad(normed, leaves, grad)
    dsum, dweight, dbias = torch.autograd.grad(expected, exact_leaves, grad.double())
    for got, exact, leaf in zip(found, (dsum, dsum, dweight, dbias), leaves, strict=True):
        torch.testing.assert_close(got, exact.to(leaf.dtype))


@pytest.mark.parametrize("shape", with_costly([(3, 8193), (130, 8200), (2, 16384)], (130, 8200)))
@pytest.mark.parametrize("affine", [True, False])
def test_rows_longer_than_registers(backend, dtype, affine, shape):
    """Triton cuts them into tiles, and the last tile may be partial."""
    check_error_rule(ops.add_layer_norm, pytorch, inputs(shape, dtype, "contiguous", affine))


@pytest.mark.parametrize("shape", ((0, 7), (3, 0)))
def test_no_rows_and_no_columns(backend, shape):
    arguments = inputs(shape, torch.float32, "contiguous")
    normed, total = ops.add_layer_norm(*arguments)
    assert normed.shape == total.shape == shape
    for grad, leaf in zip(torch.autograd.grad(normed, arguments, normed), arguments, strict=True):
        assert torch.equal(grad, torch.zeros_like(leaf))


def test_without_a_residual_it_is_layer_norm(backend, dtype):
    def ours(x, w, b):
        return ops.add_layer_norm(x, None, w, b)[0]

    x, _, w, b = inputs((5, 33), dtype, "contiguous")
    check_error_rule(ours, lambda x, w, b: T.layer_norm(x, (33,), w, b), [x, w, b])
    assert ops.add_layer_norm(x, None, w, b)[1] is x


def test_a_half_precision_branch_joins_a_float32_residual(backend):
    """As under autocast: sum, norm and both gradients have the dtypes that PyTorch gives them."""
    x = torch.randn(4, 16).bfloat16().requires_grad_()
    residual, w, b = (strided(s, torch.float32, "contiguous") for s in ((4, 16), (16,), (16,)))
    normed, total = ops.add_layer_norm(x, residual, w, b)
    expected_normed, expected_total = pytorch(x, residual, w, b)
    torch.testing.assert_close(normed, expected_normed)
    torch.testing.assert_close(total, expected_total)
    g = torch.randn(4, 16)
    ours = torch.autograd.grad(normed, (x, residual, w, b), g)
    theirs = torch.autograd.grad(expected_normed, (x, residual, w, b), g)
    for a, e in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, e)


def test_the_sum_is_rounded_as_pytorch_rounds_it(backend, dtype):
    """To nearest, ties to even: bit for bit the sum that PyTorch gives."""
    x, residual = (torch.randn(40, 100).to(dtype) for _ in range(2))
    normed, total = ops.add_layer_norm(x, residual)
    assert torch.equal(total, x + residual)
    # The statistics are those of the rounded sum, which is what the backward will see.
    assert torch.equal(normed, ops.add_layer_norm(total, None)[0])


@pytest.mark.parametrize("size", [1, 2, 7, 768, 1000, 4097, 9000])
@pytest.mark.parametrize("value", [255.1, -1000.3, 1e5, 1e10, 1e20, 1e37])
def test_constant_rows_are_normalized_to_zero(backend, value, size):
    """As in PyTorch where it is no NaN; the gradient, which PyTorch rounds away, is that of a variance of 0."""
    x = torch.full((2, size), value, requires_grad=True)
    weight, bias, upstream = torch.randn(size), torch.randn(size), torch.randn(2, size)
    normed = ops.add_layer_norm(x, None, weight, bias)[0]
    assert torch.equal(normed, bias.expand(2, size))
    g = upstream.double() * weight
    exact = (g - g.mean(dim=1, keepdim=True)) / 1e-5**0.5
    torch.testing.assert_close(
        torch.autograd.grad(normed, x, upstream)[0].double(), exact, atol=1e-3, rtol=1e-5
    )


@pytest.mark.parametrize("value", [255.0, 1e4, 3e38])
def test_constant_rows_of_a_rounded_sum_are_zero(backend, value):
    x, residual = torch.full((3, 130), value / 2).bfloat16(), torch.full((3, 130), value / 2)
    assert not ops.add_layer_norm(x, residual.bfloat16())[0].any()
    assert not ops.add_layer_norm(x, residual)[0].any()  # a float32 sum of two dtypes


@pytest.mark.parametrize("size", [33, 1024, 9000])
@pytest.mark.parametrize(
    ("offset", "spread"), [(1e3, 1.0), (255.0, 1e-2), (1e5, 1e-2), (-1e6, 1.0), (1e17, 1e14)]
)
def test_rows_with_a_large_offset_keep_their_digits(backend, offset, spread, size):
    """To float32's last digits, as if the offset were not there: mean and variance are corrected."""
    x = (offset + spread * torch.randn(4, size)).requires_grad_()
    upstream, exact = torch.randn(4, size), x.detach().double().requires_grad_()
    normed, expected = ops.add_layer_norm(x, None)[0], T.layer_norm(exact, (size,))
    torch.testing.assert_close(normed.double(), expected, atol=3e-6, rtol=3e-6)
    ours, theirs = (torch.autograd.grad(y, t, upstream.to(y))[0] for y, t in ((normed, x), (expected, exact)))
    scale = theirs.abs().max()
    torch.testing.assert_close(ours.double() / scale, theirs / scale, atol=3e-6, rtol=3e-6)


@pytest.mark.parametrize("first", [1e4, -1e9, 1e30])
def test_a_first_element_far_from_the_others_costs_nothing(backend, first):
    """The pivot of the mean is the row's first element: the result does not depend on that choice."""
    x = torch.randn(5, 515)
    x[:, 0] = first
    check_error_rule(lambda x: ops.add_layer_norm(x, None)[0], lambda x: T.layer_norm(x, (515,)), [x])


def test_rows_whose_variance_overflows_are_zero(backend):
    x = torch.tensor([1e20, 1e37, 1e38, 1.5e38])[:, None] * torch.randn(4, 300).sign()
    assert not ops.add_layer_norm(x, None)[0].any()


def test_gradient_of_the_sum_alone(backend):
    x, residual, w, b = inputs((3, 8), torch.float32, "contiguous")
    _, total = ops.add_layer_norm(x, residual, w, b)
    dx, dr = torch.autograd.grad(total.sum(), (x, residual))
    assert torch.equal(dx, torch.ones_like(dx))
    assert torch.equal(dr, torch.ones_like(dr))


def test_every_slot_is_written(backend):
    check_every_slot_is_written(ops.add_layer_norm, inputs((5, 33), torch.float32, "contiguous"))


def test_same_bits_for_any_thread_count():
    with fastgpt.use_backend("cpp"):
        check_same_bits_for_any_thread_count(
            ops.add_layer_norm, inputs((999, 130), torch.bfloat16, "contiguous")
        )


@pytest.mark.once
def test_opcheck(backend):
    x, r, w, b = (t.detach() for t in inputs((5, 33), torch.float32, "contiguous"))
    check_opcheck(
        registered("add_layer_norm_fwd", backend),
        (x, r, w, b, 1e-5),
        (x, None, None, None, 1e-5),
        (x.bfloat16(), r, w, None, 1e-5),
    )
    mean, rstd = x.double().mean(1), (x.var(1, correction=0) + 1e-5).rsqrt()
    check_opcheck(
        registered("add_layer_norm_bwd", backend), (r, None, x, w, mean, rstd), (r, r, x, None, mean, rstd)
    )


@pytest.mark.once
def test_compiles_once_for_all_shapes(backend):
    w, b = (strided((8,), torch.float32, "contiguous") for _ in range(2))
    batches = [[*inputs((n, 2, 8), torch.float32, "contiguous", affine=False), w, b] for n in (3, 5, 12)]
    check_compiles_once(ops.add_layer_norm, batches)


def test_gradcheck_in_float64():
    with fastgpt.use_backend("cpp"):
        args = inputs((3, 5), torch.float64, "contiguous")
        assert torch.autograd.gradcheck(ops.add_layer_norm, args)
        assert torch.autograd.gradgradcheck(ops.add_layer_norm, args)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((torch.ones(2, 3), torch.ones(3, 2)), ValueError, r"residual must have x's shape \(2, 3\)"),
        ((torch.ones(2, 3), None, torch.ones(2)), ValueError, "weight must have shape"),
        ((torch.ones(2, 3).long(), None), TypeError, "x must be float32"),
        ((torch.tensor(1.0), None), ValueError, "at least one dimension"),
        (([1.0], None), TypeError, "x must be a torch.Tensor, got list"),
    ],
)
def test_bad_input_gets_one_sentence(arguments, error, message):
    with pytest.raises(error, match=message):
        ops.add_layer_norm(*arguments)
