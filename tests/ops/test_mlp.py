"""The MLP as one op: every backend against PyTorch by the error rule, what it keeps, and the corners."""

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


def inputs(batch, size, width, channels, dtype, biases=(True, True), layout="contiguous", scale=1.0):
    """x and the two layers, (..., size) -> (..., width) -> (..., channels), for pre-activations of about the scale."""
    x = strided((*batch, size), dtype, layout, scale)
    layers = []
    for n, k, bias in ((width, size, biases[0]), (channels, width, biases[1])):
        layers.append(strided((n, k), dtype, layout, scale=max(k, 1) ** -0.5))
        layers.append(strided((n,), dtype, "gapped", scale) if bias else None)
    return [x, *layers]


def given_of(arguments):
    return [t for t in arguments if t is not None]


def ours_and_pytorch(arguments, approximate):
    """The two functions of those arguments that are given; PyTorch's on rows, as in test_linear_gelu."""
    there = [t is not None for t in arguments]

    def whole(tensors):
        left = iter(tensors)
        return [next(left) if t else None for t in there]

    def ours(*tensors):
        return ops.mlp(*whole(tensors), approximate)

    def pytorch(*tensors):
        x, weight1, bias1, weight2, bias2 = whole(tensors)
        z = T.linear(torch.atleast_2d(x).flatten(0, -2), weight1, bias1)
        y = T.linear(T.gelu(z, approximate=approximate), weight2, bias2)
        return y.view(*x.shape[:-1], weight2.shape[0])

    return ours, pytorch


def check(arguments, approximate="none", **options):
    check_error_rule(*ours_and_pytorch(arguments, approximate), given_of(arguments), **options)


@pytest.mark.parametrize(
    ("batch", "size", "width", "channels"), [((), 5, 7, 3), ((2, 3), 17, 64, 16), ((1, 1, 70), 1, 9, 8)]
)
@pytest.mark.parametrize("layout", with_costly(LAYOUTS, "sliced", "gapped"))
@pytest.mark.parametrize("approximate", ["none", "tanh"])
@pytest.mark.parametrize("biases", [(False, False), (True, False), (False, True), (True, True)])
def test_obeys_the_error_rule(backend, dtype, approximate, biases, layout, batch, size, width, channels):
    check(inputs(batch, size, width, channels, dtype, biases, layout, scale=2.0), approximate)


@any_of(
    batch=st.lists(st.integers(0, 4), max_size=2),
    sizes=st.tuples(*[st.integers(0, 20)] * 3),
    layout=st.sampled_from(LAYOUTS),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    scale=st.sampled_from([0.01, 1.0, 30.0]),
    approximate=st.sampled_from(["none", "tanh"]),
    biases=st.tuples(st.booleans(), st.booleans()),
)
def test_any_shape_and_stride(backend, batch, sizes, layout, dtype, scale, approximate, biases):
    check(inputs(batch, *sizes, dtype, biases, layout, scale), approximate)


def test_bfloat16_layers_of_many_rows(backend):
    """Where the C++ kernels multiply bfloat16 themselves."""
    for approximate in ("none", "tanh"):
        check(inputs((70,), 32, 64, 48, torch.bfloat16), approximate)


@pytest.mark.parametrize("approximate", ["none", "tanh"])
def test_the_reference_is_pytorchs(approximate):
    for biases in ((False, False), (True, True)):
        arguments = inputs((3, 4), 5, 6, 7, torch.float64, biases)
        expected = ours_and_pytorch(arguments, approximate)[1](*given_of(arguments))
        torch.testing.assert_close(reference.mlp(*arguments, approximate == "tanh"), expected)


def test_the_two_layers_are_linear_gelu_and_linear(backend, dtype):
    x, weight1, bias1, weight2, bias2 = inputs((2, 3), 8, 16, 24, dtype)
    both = ops.linear(ops.linear_gelu(x, weight1, bias1, "tanh"), weight2, bias2)
    assert torch.equal(ops.mlp(x, weight1, bias1, weight2, bias2, "tanh"), both)


def test_keeps_the_pre_activation_and_the_activation(backend):
    """And the arguments, nothing else."""
    arguments, kept = inputs((2, 3), 5, 7, 4, torch.float32), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        ops.mlp(*arguments)
    known = {t.data_ptr() for t in arguments}
    assert len(kept) == len(arguments) + 2 - (backend == "triton")  # PyTorch's linear does not keep its bias
    assert [t.shape for t in kept if t.data_ptr() not in known] == [(6, 7), (6, 7)]


@pytest.mark.once
@pytest.mark.parametrize("backend", ["reference"])
def test_opcheck(backend):
    grad, weight = torch.randn(5, 3), torch.randn(3, 7)
    z = torch.randn(5, 7)
    op = registered("mlp_bwd", backend)
    check_opcheck(op, (grad, z, weight, False, True), (grad, z, weight, True, False))
    check_opcheck(op, (grad[:0], z[:0], weight, True, True))


def test_only_the_gradients_asked_for(backend):
    arguments = inputs((4,), 5, 6, 7, torch.float32)
    all_five = torch.autograd.grad(ops.mlp(*arguments).sum(), arguments)
    for i, expected in enumerate(all_five):
        some = [t if i == j else t.detach() for j, t in enumerate(arguments)]
        assert torch.equal(torch.autograd.grad(ops.mlp(*some).sum(), some[i])[0], expected)
    with torch.no_grad():
        assert torch.equal(without := ops.mlp(*arguments), ops.mlp(*(t.detach() for t in arguments)))
        assert not without.requires_grad


def test_upstream_gradients_of_any_strides(backend):
    arguments = inputs((4,), 5, 6, 8, torch.float32)
    ours, pytorch = ours_and_pytorch(arguments, "none")
    for grad in (torch.randn(8, 4).T, torch.randn(8).expand(4, 8), torch.randn(4, 1).expand(4, 8)):
        pairs = zip(
            torch.autograd.grad(ours(*arguments), arguments, grad),
            torch.autograd.grad(pytorch(*arguments), arguments, grad),
            strict=True,
        )
        for got, theirs in pairs:
            torch.testing.assert_close(got, theirs)


def test_one_tensor_may_stand_twice(backend):
    """A weight for both layers, a vector for both biases: their gradients add up."""
    x, weight, bias, *_ = inputs((9,), 8, 8, 8, torch.float32)
    check_error_rule(
        lambda x, w, b: ops.mlp(x, w, b, w, b),
        lambda x, w, b: T.linear(T.gelu(T.linear(x, w, b)), w, b),
        [x, weight, bias],
    )


@pytest.mark.parametrize("bias", [False, True])
def test_autocast_acts_as_on_the_layers(backend, bias):
    arguments = inputs((2, 6), 8, 12, 10, torch.float32, (bias, bias))
    some = given_of(arguments)
    ours, pytorch = ours_and_pytorch(arguments, "tanh")
    with torch.autocast(some[0].device.type, dtype=torch.bfloat16):
        check(arguments, "tanh", rounding=torch.bfloat16)
        assert ours(*some).dtype == pytorch(*some).dtype == torch.bfloat16
        assert ours(some[0].bfloat16(), *some[1:]).dtype == torch.bfloat16  # mixed, as a block's are
        if backend not in GPU_BACKENDS:
            doubles = [t.double() for t in some]
            torch.testing.assert_close(ours(*doubles), pytorch(*doubles))  # which autocast leaves alone


def test_every_slot_is_written(backend):
    for biases in ((True, True), (False, False)):
        arguments = inputs((5,), 8, 33, 7, torch.float32, biases)
        check_every_slot_is_written(ours_and_pytorch(arguments, "none")[0], given_of(arguments))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_same_bits_for_any_thread_count(dtype):
    with fastgpt.use_backend("cpp"):
        arguments = inputs((999,), 16, 130, 24, dtype)
        pytorch = ours_and_pytorch(arguments, "none")[1] if dtype == torch.float32 else None
        check_same_bits_for_any_thread_count(ops.mlp, arguments, pytorch)


@pytest.mark.once
@pytest.mark.parametrize("bias", [False, True])
def test_compiles_once_for_all_shapes(backend, bias):
    _, *layers = inputs((), 8, 6, 10, torch.float32, (bias, bias))
    batches = [[strided((n, n + 1, 8), torch.float32, "contiguous"), *given_of(layers)] for n in (3, 5, 12)]
    check_compiles_once(ours_and_pytorch([0, *layers], "none")[0], batches)


@pytest.mark.parametrize("approximate", ["none", "tanh"])
@pytest.mark.parametrize("bias", [False, True])
def test_gradcheck_in_float64(approximate, bias):
    arguments = inputs((2, 2), 3, 4, 5, torch.float64, (bias, bias))
    with fastgpt.use_backend("cpp"):
        assert torch.autograd.gradcheck(ours_and_pytorch(arguments, approximate)[0], given_of(arguments))


@pytest.mark.parametrize("backend", [PROVED_ONCE], indirect=True)
def test_second_derivatives(backend):
    assert torch.autograd.gradgradcheck(ops.mlp, inputs((2,), 3, 2, 3, torch.float64))


@pytest.mark.once
def test_second_derivatives_where_only_x_needs_one(backend):
    x, *layers = inputs((2,), 3, 4, 5, torch.float32)
    ours, pytorch = ours_and_pytorch([x, *layers], "none")
    found = []
    for function in (ours, pytorch):
        y = function(x, *(t.detach() for t in layers))
        (grad,) = torch.autograd.grad(y.sum(), x, create_graph=True)
        found.append(torch.autograd.grad(grad.square().sum(), x)[0])
    torch.testing.assert_close(*found)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": "text"}, TypeError, "x must be a torch.Tensor, got str"),
        ({"x": torch.tensor(1.0)}, ValueError, "x must have at least one dimension"),
        ({"weight1": torch.ones(4, 5)}, ValueError, r"weight1 must have shape \(N, 4\), got \(4, 5\)"),
        ({"weight1": None}, TypeError, "weight1 must be a torch.Tensor, got NoneType"),
        ({"bias1": torch.ones(4)}, ValueError, r"bias1 must have shape \(5,\)"),
        ({"weight2": torch.ones(3, 4)}, ValueError, r"weight2 must have shape \(N, 5\), got \(3, 4\)"),
        ({"weight2": torch.ones(3, 5).half()}, TypeError, "the dtypes must be equal"),
        ({"weight2": torch.ones(3, 5, device="meta")}, ValueError, "weight2 is on meta"),
        ({"weight2": torch.ones(3, 5).long()}, TypeError, "weight2 must be float32.* got torch.int64"),
        ({"bias2": torch.ones(5)}, ValueError, r"bias2 must have shape \(3,\)"),
        ({"approximate": "fast"}, ValueError, "approximate must be one of 'none', 'tanh'"),
    ],
)
def test_bad_input_gets_one_sentence(change, error, message):
    layers = {"weight1": (5, 4), "bias1": (5,), "weight2": (3, 5), "bias2": (3,)}
    arguments = {
        "x": torch.ones(2, 4),
        **{name: torch.ones(shape) for name, shape in layers.items()},
    } | change
    with pytest.raises(error, match=f"^mlp: {message}"):
        ops.mlp(**arguments)
