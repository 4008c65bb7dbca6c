"""RMSNorm, alone and after an addition: every backend against PyTorch by the error rule, and the corners."""

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


def pytorch(x, residual, weight=None, offset=0.0):
    total = x if residual is None else x + residual
    shifted = None if weight is None else offset + weight
    return T.rms_norm(total, total.shape[-1:], shifted, 1e-6), total


def inputs(shape, dtype, layout, weighted=True):
    vectors = [strided(shape[-1:], dtype, "gapped")] if weighted else []
    return [strided(shape, dtype, layout), strided(shape, dtype, layout), *vectors]


@pytest.mark.parametrize("shape", [(5, 33), (2, 3, 64), (1, 7), (40, 9)])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("weighted", [True, False])
def test_obeys_the_error_rule(backend, dtype, layout, weighted, shape):
    check_error_rule(ops.add_rms_norm, pytorch, inputs(shape, dtype, layout, weighted))


@pytest.mark.parametrize("offset", [1.0, -0.5])
@pytest.mark.parametrize("weighted", [True, False])
def test_without_a_residual_obeys_the_error_rule(backend, dtype, weighted, offset):
    offset = offset if weighted else 0.0
    x, _, *w = inputs((5, 33), dtype, "sliced", weighted)
    check_error_rule(
        lambda x, *w: ops.rms_norm(x, *w, offset=offset),
        lambda x, *w: pytorch(x, None, *w, offset=offset)[0],
        [x, *w],
    )
    normed, total = ops.add_rms_norm(x, None, *w, offset=offset)
    assert total is x
    assert torch.equal(normed, ops.rms_norm(x, *w, offset=offset))


@any_of(
    rows=st.integers(0, 9),
    size=st.integers(1, 70),
    layout=st.sampled_from(LAYOUTS),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    weighted=st.booleans(),
    added=st.booleans(),
    offset=st.sampled_from([0.0, 1.0]),
)
def test_any_shape_and_stride(backend, rows, size, layout, dtype, weighted, added, offset):
    x, residual, *weight = inputs((rows, size), dtype, layout, weighted)
    offset = offset if weighted else 0.0
    if added:
        check_error_rule(
            lambda x, r, *w: ops.add_rms_norm(x, r, *w, offset=offset),
            lambda x, r, *w: pytorch(x, r, *w, offset=offset),
            [x, residual, *weight],
        )
    else:
        check_error_rule(
            lambda x, *w: ops.rms_norm(x, *w, offset=offset),
            lambda x, *w: pytorch(x, None, *w, offset=offset)[0],
            [x, *weight],
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("offset", [0, 1], ids=["aligned", "unaligned"])
def test_rows_of_any_size(backend, dtype, offset):
    """From one warp's to more than a block holds, where vectors of 16 bytes can be moved and where not."""

    def at_an_offset(*shape):
        memory = torch.randn(offset + torch.Size(shape).numel()).to(dtype)
        return memory[offset:].view(shape).requires_grad_()

    for size in (8, 256, 264, 1016, 1024, 1032, 4096, 4104, 8200, 16392):
        arguments = [at_an_offset(3, size), at_an_offset(3, size), at_an_offset(size)]
        check_error_rule(ops.add_rms_norm, pytorch, arguments)


@pytest.mark.only("cpp", "cuda", "reference")
@pytest.mark.parametrize("shape", with_costly([(4700, 512), (3200, 8)], (4700, 512)))
def test_more_rows_than_partial_sums(backend, shape):
    """The threads of a row process several rows, whose sums are added up in two stages."""
    check_error_rule(ops.add_rms_norm, pytorch, inputs(shape, torch.bfloat16, "contiguous"))


@pytest.mark.only("cpp")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("size", [3072, 3080])
def test_large_results_are_streamed(backend, dtype, size):
    """Results of 16 MiB and more, whose rows begin at a cache line or not: the bits of smaller calls."""
    rows = (16 << 20) // dtype.itemsize // size + 1
    x, residual, grad, grad_sum = (torch.randn(rows, size).to(dtype) for _ in range(4))
    weight = torch.randn(size)
    op = torch.ops.fastgpt
    normed, total, rstd = op.rms_norm_fwd_cpp(x, residual, weight, 1e-6, 0.0)
    dsum, _ = op.rms_norm_bwd_cpp(grad, grad_sum, total, weight, rstd, 0.0)
    for part in torch.arange(rows).split(rows // 2):
        found = op.rms_norm_fwd_cpp(x[part], residual[part], weight, 1e-6, 0.0)
        back, _ = op.rms_norm_bwd_cpp(grad[part], grad_sum[part], found[1], weight, found[2], 0.0)
        for whole, small in zip((normed, total, rstd, dsum), (*found, back), strict=True):
            assert torch.equal(whole[part], small)


@pytest.mark.only("triton")
@pytest.mark.parametrize("rows", [100, 97])
def test_more_rows_than_tritons_programs_have_partial_sums_for(backend, rows):
    """Four programs for tiles of eight rows."""
    from fastgpt.kernels import tuned

    with tuned.trying({"rms_norm_bwd": (64, 4, 4)}) as trial:
        check_error_rule(ops.add_rms_norm, pytorch, inputs((rows, 8), torch.bfloat16, "contiguous"))
    assert any(kernel == "rms_norm_bwd" for kernel, *_ in trial.asked)


@any_of(
    x_dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    residual_dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    vector_dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    size=st.sampled_from([5, 8, 64, 1100]),
)
def test_any_mixture_of_dtypes(backend, x_dtype, residual_dtype, vector_dtype, size):
    """Against float64 from the rounded sum on: the results that follow it are rounded once."""
    x, residual = torch.randn(4, size).to(x_dtype), torch.randn(4, size).to(residual_dtype)
    weight = torch.randn(size).to(vector_dtype)
    leaves = [t.requires_grad_() for t in (x, residual, weight)]
    normed, total = ops.add_rms_norm(*leaves, offset=1.0)
    assert torch.equal(total, x + residual)
    exact_leaves = [t.detach().double().requires_grad_() for t in (x + residual, weight)]
    expected = pytorch(exact_leaves[0], None, exact_leaves[1], 1.0)[0]
    torch.testing.assert_close(normed, expected.to(total.dtype))
    grad = torch.randn_like(normed)
    found = torch.autograd.grad(normed, leaves, grad)
    dsum, dweight = torch.autograd.grad(expected, exact_leaves, grad.double())
    for got, exact, leaf in zip(found, (dsum, dsum, dweight), leaves, strict=True):
        torch.testing.assert_close(got, exact.to(leaf.dtype))


@pytest.mark.parametrize("shape", with_costly([(3, 8193), (130, 8200), (2, 16384)], (130, 8200)))
@pytest.mark.parametrize("weighted", [True, False])
def test_rows_longer_than_registers(backend, dtype, weighted, shape):
    """Triton cuts them into tiles, and the last tile may be partial."""
    check_error_rule(ops.add_rms_norm, pytorch, inputs(shape, dtype, "contiguous", weighted))


@pytest.mark.parametrize("shape", ((0, 7), (3, 0)))
def test_no_rows_and_no_columns(backend, shape):
    arguments = inputs(shape, torch.float32, "contiguous")
    normed, total = ops.add_rms_norm(*arguments)
    assert normed.shape == total.shape == shape
    for grad, leaf in zip(torch.autograd.grad(normed, arguments, normed), arguments, strict=True):
        assert torch.equal(grad, torch.zeros_like(leaf))


def test_the_sum_is_rounded_as_pytorch_rounds_it(backend, dtype):
    """To nearest, ties to even: bit for bit the sum that PyTorch gives."""
    x, residual = (torch.randn(40, 100).to(dtype) for _ in range(2))
    normed, total = ops.add_rms_norm(x, residual)
    assert torch.equal(total, x + residual)
    # The statistic is that of the rounded sum, with which the backward computes.
    assert torch.equal(normed, ops.rms_norm(total))


def test_offset_is_added_before_rounding(backend):
    """As in Gemma, whose weights are small: 1 + weight has more digits than bfloat16."""
    x, weight = torch.randn(4, 64).bfloat16(), (1e-3 * torch.randn(64)).bfloat16()
    exact = pytorch(x.double(), None, weight.double(), 1.0)[0].bfloat16()
    torch.testing.assert_close(ops.rms_norm(x, weight, offset=1.0), exact, rtol=2**-8, atol=0.0)


@pytest.mark.parametrize("size", [3, 770, 17000])
@pytest.mark.parametrize("largest", [1e-18, 1e10, 1e18, 1e19, 1e30, 3e38])
def test_rows_of_any_magnitude_keep_their_digits(backend, largest, size):
    """The sum of squares overflows from 1e18 on, where PyTorch's result becomes 0. The exact one is of size 1."""
    x = torch.randn(3, size)
    x = (x / x.abs().amax(1, keepdim=True) * largest).requires_grad_()
    exact = x.detach().double().requires_grad_()
    normed, expected = ops.rms_norm(x, eps=0.0), T.rms_norm(exact, (size,), eps=1e-300)
    torch.testing.assert_close(normed.double(), expected, atol=1e-6, rtol=2e-6)
    upstream = torch.randn(3, size)
    ours, theirs = (torch.autograd.grad(y, t, upstream.to(y))[0] for y, t in ((normed, x), (expected, exact)))
    scale = theirs.abs().max()
    if largest < 1e37:  # beyond, a gradient is less than float32 can hold
        torch.testing.assert_close(ours.double() / scale, theirs / scale, atol=3e-6, rtol=3e-6)


@pytest.mark.only("cpp", "reference")
def test_float64_rows_of_any_magnitude_keep_their_digits(backend):
    x = torch.randn(3, 50, dtype=torch.float64)
    for scale in (1e-100, 1e160, 1e300):
        torch.testing.assert_close(ops.rms_norm(x * scale, eps=0.0), ops.rms_norm(x, eps=0.0))


def test_a_row_with_inf_or_nan_does_not_touch_others(backend):
    """inf gives NaN where it stands and 0 elsewhere, NaN gives NaN, as in PyTorch."""
    x = torch.randn(5, 40)
    x[1, 3], x[2, 0], x[3, 7] = float("inf"), float("nan"), -float("inf")
    torch.testing.assert_close(ops.rms_norm(x), pytorch(x, None)[0], equal_nan=True)


def test_gradient_of_the_sum_alone(backend):
    x, residual, w = inputs((3, 8), torch.float32, "contiguous")
    _, total = ops.add_rms_norm(x, residual, w)
    dx, dr = torch.autograd.grad(total.sum(), (x, residual))
    assert torch.equal(dx, torch.ones_like(dx))
    assert torch.equal(dr, torch.ones_like(dr))


def test_every_slot_is_written(backend):
    arguments = inputs((5, 33), torch.float32, "contiguous")
    check_every_slot_is_written(ops.add_rms_norm, arguments)
    check_every_slot_is_written(ops.rms_norm, arguments[::2])


def test_same_bits_for_any_thread_count():
    with fastgpt.use_backend("cpp"):
        arguments = inputs((999, 130), torch.bfloat16, "contiguous")
        check_same_bits_for_any_thread_count(ops.add_rms_norm, arguments)
        check_same_bits_for_any_thread_count(ops.rms_norm, arguments[::2])


@pytest.mark.once
def test_opcheck(backend):
    x, r, w = (t.detach() for t in inputs((5, 33), torch.float32, "contiguous"))
    check_opcheck(
        registered("rms_norm_fwd", backend),
        (x, r, w, 1e-6, 1.0),
        (x, None, None, 1e-6, 0.0),
        (x.bfloat16(), r, w, 1e-6, 0.0),
    )
    rstd = (x.square().mean(1) + 1e-6).rsqrt()
    check_opcheck(registered("rms_norm_bwd", backend), (r, None, x, w, rstd, 0.0), (r, r, x, None, rstd, 0.0))


@pytest.mark.once
def test_compiles_once_for_all_shapes(backend):
    w = strided((8,), torch.float32, "contiguous")
    batches = [[*inputs((n, 2, 8), torch.float32, "contiguous", weighted=False), w] for n in (3, 5, 12)]
    check_compiles_once(ops.add_rms_norm, batches)
    check_compiles_once(lambda x, w: ops.rms_norm(x, w, offset=1.0), [batch[::2] for batch in batches])


def test_gradcheck_in_float64():
    with fastgpt.use_backend("cpp"):
        args = inputs((3, 5), torch.float64, "contiguous")
        assert torch.autograd.gradcheck(ops.add_rms_norm, args)
        assert torch.autograd.gradgradcheck(ops.add_rms_norm, args)


def test_decision_has_the_name_of_the_op_called():
    x = torch.randn(2, 3)
    assert [d.op for d in fastgpt.explain(ops.rms_norm, x).decisions] == ["rms_norm"]
    assert [d.op for d in fastgpt.explain(ops.add_rms_norm, x, x).decisions] == ["add_rms_norm"]


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((torch.ones(2, 3), torch.ones(3, 2)), ValueError, r"residual must have x's shape \(2, 3\)"),
        ((torch.ones(2, 3), None, torch.ones(2)), ValueError, "add_rms_norm: weight must have shape"),
        ((torch.ones(2, 3).long(), None), TypeError, "x must be float32"),
        ((torch.tensor(1.0), None), ValueError, "at least one dimension"),
        (([1.0], None), TypeError, "x must be a torch.Tensor, got list"),
    ],
)
def test_bad_input_is_an_error_with_a_message(arguments, error, message):
    with pytest.raises(error, match=message):
        ops.add_rms_norm(*arguments)


def test_offset_without_a_weight_is_refused():
    for call in (ops.rms_norm, lambda x, **options: ops.add_rms_norm(x, x, **options)):
        with pytest.raises(ValueError, match="offset is added to weight, which is None"):
            call(torch.ones(2, 3), offset=1.0)
