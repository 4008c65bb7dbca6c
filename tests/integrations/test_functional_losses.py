"""The drop-in's losses, GELU and layer normalisation, option by option, against `torch.nn.functional`."""

import pytest
import torch
import torch.nn.functional as T
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import LinearCrossEntropyOptions

import fastgpt
from fastgpt import functional as F
from tests.support.contract import with_costly
from tests.support.dropin import check_same, check_same_error, classes, leaf

SHAPES = {"one": ((5,), ()), "rows": ((6, 5), (6,)), "images": ((2, 5, 3, 4), (2, 3, 4))}
REDUCTIONS = ("mean", "sum", "none")
LINEAR = "linear_cross_entropy"


@pytest.mark.parametrize("shape", with_costly(SHAPES, "images"))
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_cross_entropy_of_class_indices(backend, shape, reduction):
    sizes, target_sizes = SHAPES[shape]
    for smoothing in (0.0, 0.2, 1.0):
        for weight in (None, torch.rand(5) + 0.1):
            y = classes(*target_sizes)
            check_same(
                "cross_entropy",
                leaf(*sizes),
                y,
                weight=weight,
                reduction=reduction,
                label_smoothing=smoothing,
            )


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_cross_entropy_of_class_probabilities(shape, reduction):
    sizes, _ = SHAPES[shape]
    p = torch.rand(sizes)
    check_same(
        "cross_entropy", leaf(*sizes), p, reduction=reduction, weight=torch.rand(5), label_smoothing=0.1
    )
    check_same("cross_entropy", leaf(*sizes), p.requires_grad_(), reduction=reduction)


@pytest.mark.parametrize(
    "options", [{"size_average": False}, {"reduce": False}, {"size_average": True, "reduce": True}]
)
def test_legacy_reductions(options):
    check_same("cross_entropy", leaf(4, 5), classes(4), **options)


@pytest.mark.parametrize("index", with_costly([-100, 0, 3, -1, 7], 0, -1))
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_ignored_targets(backend, index, reduction):
    y = torch.tensor([1, 2, 4, 1, 2, 4])
    y[[1, 4]] = index
    options = {
        "ignore_index": index,
        "reduction": reduction,
        "weight": torch.rand(5) + 0.1,
        "label_smoothing": 0.2,
    }
    check_same("cross_entropy", leaf(6, 5), y, **options)
    check_same("cross_entropy", leaf(2, 5, 3), y.view(2, 3), **options)
    check_same(LINEAR, leaf(6, 3), leaf(5, 3), y, **options)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_nothing_but_ignored_targets_and_empty_batches(backend, reduction):
    for rows in (3, 0):
        y = torch.full((rows,), -100)
        for smoothing in (0.0, 0.3):
            options = {"reduction": reduction, "label_smoothing": smoothing}
            check_same("cross_entropy", leaf(rows, 5), y, **options)
            check_same(LINEAR, leaf(rows, 3), leaf(5, 3), y, linear_bias=leaf(5), **options)


def test_weights_that_add_up_to_nothing():
    """The mean is 0/0; its gradient too."""
    for reduction in REDUCTIONS:
        check_same("cross_entropy", leaf(3, 5), classes(3), weight=torch.zeros(5), reduction=reduction)


def test_no_classes():
    for reduction in REDUCTIONS:
        for smoothing in (0.0, 0.3):
            options = {"reduction": reduction, "label_smoothing": smoothing}
            check_same("cross_entropy", leaf(3, 0), torch.full((3,), -100), **options)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int16, torch.bool])
def test_targets_of_another_integer_dtype_are_pytorchs_error(dtype):
    check_same_error(RuntimeError, "cross_entropy", leaf(4, 5), classes(4).to(dtype))
    check_same_error(RuntimeError, LINEAR, leaf(4, 3), leaf(5, 3), classes(4).to(dtype))


def test_targets_that_are_uint8():
    check_same("cross_entropy", leaf(4, 5), classes(4).to(torch.uint8))
    check_same(LINEAR, leaf(4, 3), leaf(5, 3), classes(4).to(torch.uint8))
    byte = torch.uint8
    check_same_error(RuntimeError, "cross_entropy", leaf(2, 5, 3), classes(2, 3).to(byte))
    check_same("cross_entropy", leaf(4, 5), classes(4).to(byte), label_smoothing=0.1)
    weighted = {"weight": torch.rand(5), "label_smoothing": 0.1}
    check_same_error(RuntimeError, "cross_entropy", leaf(4, 5), classes(4).to(byte), **weighted)
    check_same_error(RuntimeError, LINEAR, leaf(4, 3), leaf(5, 3), classes(4).to(byte), **weighted)


@pytest.mark.parametrize("bad", [5, -1, 10**12])
def test_target_out_of_range(backend, bad):
    """On a GPU, whose kernels act alike in the emulator, the loss is NaN."""
    y = torch.tensor([1, bad, 2, 0])
    if backend == "cuda" or y.is_cuda:
        for smoothing in (0.0, 0.1):
            assert F.cross_entropy(leaf(4, 5), y, label_smoothing=smoothing).isnan()
        assert F.cross_entropy(leaf(2, 5, 2), y.view(2, 2)).isnan()
        return
    for smoothing in (0.0, 0.1):
        check_same_error(IndexError, "cross_entropy", leaf(4, 5), y, label_smoothing=smoothing)
    check_same_error(IndexError, LINEAR, leaf(4, 3), leaf(5, 3), y)
    check_same_error(IndexError, "cross_entropy", leaf(2, 5, 2), y.view(2, 2))


@pytest.mark.parametrize(
    ("error", "arguments", "options"),
    [
        (ValueError, (leaf(3, 5), classes(2)), {}),
        (ValueError, (leaf(3, 5), classes(3)), {"reduction": "average"}),
        (RuntimeError, (leaf(3, 5), classes(3)), {"label_smoothing": 1.5}),
        (RuntimeError, (leaf(3, 5), classes(3)), {"weight": torch.rand(4)}),
        (RuntimeError, (leaf(3, 5), classes(3)), {"weight": torch.rand(5).double()}),
        (NotImplementedError, (torch.ones(3, 5).int(), classes(3)), {}),
        (RuntimeError, (leaf(2, 5, 3), classes(2, 4)), {}),
        (TypeError, (leaf(3, 5), [0, 1, 2]), {}),
        (TypeError, (leaf(3, 5), classes(3)), {"ignore_index": None}),
        (TypeError, (leaf(3, 5), classes(3)), {"ignore_index": True}),
        (TypeError, (leaf(3, 5), classes(3)), {"ignore_index": 2.5}),
        (TypeError, (leaf(3, 5), classes(3)), {"label_smoothing": None}),
    ],
)
def test_bad_input_of_cross_entropy_is_pytorchs_error(error, arguments, options):
    check_same_error(error, "cross_entropy", *arguments, **options)


def test_class_weight_that_requires_a_gradient_behaves_as_in_pytorch():
    y, weight = classes(4), (torch.rand(5) + 0.1).requires_grad_()
    check_same("cross_entropy", leaf(4, 5), torch.rand(4, 5), weight=weight)
    check_same_error(RuntimeError, "cross_entropy", leaf(4, 5), y, weight=weight)
    check_same_error(RuntimeError, LINEAR, leaf(4, 3), leaf(5, 3), y, weight=weight)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("batched", [True, False])
def test_linear_cross_entropy_of_class_indices(backend, reduction, batched):
    hidden = lambda: leaf(6, 3) if batched else leaf(3)  # noqa: E731
    y = classes(6, ignored=[1]) if batched else torch.tensor(2)
    for bias in (None, leaf(5)):
        for weight in (None, torch.rand(5) + 0.1):
            for smoothing in (0.0, 0.2):
                options = {"linear_bias": bias, "weight": weight, "label_smoothing": smoothing}
                check_same(LINEAR, hidden(), leaf(5, 3), y, reduction=reduction, **options)


def test_linear_cross_entropy_that_goes_to_pytorch():
    """Class probabilities, K-dimensional losses, options of PyTorch's own chunking."""
    options = LinearCrossEntropyOptions()
    for arguments, keywords in (
        ((leaf(4, 3), leaf(5, 3), torch.rand(4, 5)), {"label_smoothing": 0.1}),
        ((leaf(4, 3), leaf(5, 2, 3), classes(4, 2)), {"linear_bias": leaf(5, 2)}),
        ((leaf(4, 3), leaf(5, 3), classes(4, ignored=[2])), {"options": options, "weight": torch.rand(5)}),
    ):
        check_same(LINEAR, *arguments, **keywords)
        assert fastgpt.explain(F.linear_cross_entropy, *arguments, **keywords).backend == "pytorch"


@pytest.mark.parametrize(
    ("arguments", "options"),
    [
        ((leaf(4, 3), leaf(5, 2), classes(4)), {}),
        ((leaf(4, 3), leaf(5, 3), classes(3)), {}),
        ((leaf(4, 3), leaf(5, 3).double(), classes(4)), {}),
        ((leaf(4, 3), leaf(5, 3), classes(4)), {"linear_bias": leaf(4)}),
        ((leaf(4, 3), leaf(5, 3), classes(4)), {"linear_bias": leaf(5).double()}),
        ((leaf(4, 3), leaf(5, 3), classes(4)), {"weight": torch.rand(4)}),
        ((leaf(4, 3), leaf(5, 3), classes(4)), {"reduction": "average"}),
        ((leaf(4, 3), leaf(5, 3), torch.rand(4, 5)), {"ignore_index": 2}),
        ((leaf(2, 4, 3), leaf(5, 3), classes(2, 4)), {}),
        ((leaf(4, 3), leaf(3), classes(4)), {}),
        ((leaf(4, 3), leaf(5, 3), [1, 2, 3, 4]), {}),
    ],
)
def test_bad_input_of_linear_cross_entropy_is_pytorchs_error(arguments, options):
    with pytest.raises(Exception) as theirs:
        torch.nn.functional.linear_cross_entropy(*arguments, **options)
    check_same_error(theirs.type, LINEAR, *arguments, **options)


@pytest.mark.parametrize("approximate", ["none", "tanh"])
@pytest.mark.parametrize("shape", [(), (0,), (3, 0), (7,), (2, 3, 33)])
def test_gelu(backend, approximate, shape):
    check_same("gelu", leaf(*shape), approximate=approximate)


def test_bad_input_of_gelu_is_pytorchs_error():
    for approximate, error in (("fast", RuntimeError), (None, TypeError), (1, TypeError)):
        check_same_error(error, "gelu", leaf(3), approximate=approximate)


@pytest.mark.parametrize("dtype", [torch.int64, torch.complex64])
def test_gelu_of_another_dtype_is_pytorchs_error(dtype):
    check_same_error(NotImplementedError, "gelu", torch.ones(3, dtype=dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("normalized", [[5], (4, 5), [3, 4, 5], torch.Size([5])])
def test_layer_norm_over_the_last_dimensions(backend, dtype, normalized):
    x, shape = leaf(3, 4, 5, dtype=dtype), tuple(normalized)
    check_same("layer_norm", x, normalized, eps=0.1)
    check_same("layer_norm", x, normalized, leaf(*shape, dtype=dtype))
    check_same("layer_norm", x, normalized, None, leaf(*shape, dtype=dtype))
    check_same("layer_norm", x, normalized, leaf(*shape, dtype=dtype), leaf(*shape, dtype=dtype))
    check_same("layer_norm", x, normalized, leaf(*shape), leaf(*shape))  # parameters kept in float32
    check_same(
        "layer_norm", x.detach(), normalized, None, torch.randn(shape)
    )  # PyTorch's backward fails here
    F.layer_norm(x, normalized, None, leaf(*shape)).sum().backward()


def test_layer_norm_in_float64():
    check_same("layer_norm", leaf(3, 5, dtype=torch.float64), [5], leaf(5, dtype=torch.float64))


@pytest.mark.parametrize("shape", [(0, 5), (3, 0), (0, 3, 5), (3, 1)])
def test_layer_norm_of_empty_and_single_rows(shape):
    check_same("layer_norm", leaf(*shape), shape[-1:], leaf(shape[-1]), leaf(shape[-1]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("normalized", [[5], (4, 5), [3, 4, 5], torch.Size([5])])
@pytest.mark.filterwarnings("ignore:Mismatch dtype")
def test_rms_norm_over_the_last_dimensions(backend, dtype, normalized):
    x, shape = leaf(3, 4, 5, dtype=dtype), tuple(normalized)
    check_same("rms_norm", x, normalized, eps=0.1)
    check_same("rms_norm", x, normalized, leaf(*shape, dtype=dtype))
    for weight_dtype in (torch.float32, torch.bfloat16, torch.float16):
        check_same("rms_norm", x, normalized, leaf(*shape, dtype=weight_dtype), 1e-5)
    check_same("rms_norm", x, normalized, leaf(*shape, dtype=dtype), autocast=True)


@pytest.mark.filterwarnings("ignore:Mismatch dtype")
def test_rms_norm_in_float64():
    x = leaf(3, 5, dtype=torch.float64)
    check_same("rms_norm", x, [5], leaf(5, dtype=torch.float64))
    check_same("rms_norm", x, [5], leaf(5))
    check_same("rms_norm", leaf(3, 5), [5], leaf(5, dtype=torch.float64))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_rms_norm_without_eps_takes_that_of_the_arithmetic(dtype):
    """Of float32 for 16 bits: rows this small show which it is."""
    check_same("rms_norm", (1e-4 * torch.randn(3, 5)).to(dtype).requires_grad_(), [5])


@pytest.mark.parametrize("shape", [(0, 5), (3, 0), (0, 3, 5), (3, 1)])
def test_rms_norm_of_empty_and_single_rows(shape):
    check_same("rms_norm", leaf(*shape), shape[-1:], leaf(shape[-1]))


@pytest.mark.parametrize("shape", [(2, 3, 4, 5), (2, 3, 1, 1), (2, 3, 4, 5, 6)])
def test_rms_norm_of_channels_last_has_pytorchs_strides(shape):
    kind = torch.channels_last if len(shape) == 4 else torch.channels_last_3d
    for x in (torch.randn(shape).contiguous(memory_format=kind), torch.randn(shape).transpose(0, 1)):
        assert F.rms_norm(x, shape[-1:]).stride() == T.rms_norm(x, shape[-1:]).stride()


@pytest.mark.parametrize("value", [0.0, float("inf"), -float("inf"), float("nan"), 1e-30])
def test_rms_norm_of_special_values_is_pytorchs(backend, value):
    x = torch.randn(4, 7)
    x[0, 2], x[2] = value, value
    for eps in (0.0, None):
        ours, theirs = (module.rms_norm(x, [7], None, eps) for module in (F, T))
        torch.testing.assert_close(ours, theirs, equal_nan=True)


@pytest.mark.parametrize(
    ("error", "arguments"),
    [
        (RuntimeError, (leaf(3, 5), [3])),
        (RuntimeError, (leaf(3, 5), [])),
        (RuntimeError, (leaf(3, 5), [5], leaf(3))),
        (RuntimeError, (leaf(2, 3, 5), [3, 5], leaf(15))),
        (ValueError, (torch.tensor(1.0), [1])),
        (NotImplementedError, (torch.ones(3, 5).long(), [5])),
        (TypeError, (leaf(3, 5), 5)),
        (TypeError, (leaf(3, 5), [5], None, "small")),
    ],
)
def test_bad_input_of_rms_norm_is_pytorchs_error(error, arguments):
    check_same_error(error, "rms_norm", *arguments)


@pytest.mark.parametrize(
    ("error", "arguments"),
    [
        (RuntimeError, (leaf(3, 5), [3])),
        (RuntimeError, (leaf(3, 5), [])),
        (RuntimeError, (leaf(3, 5), [1, 3, 5])),
        (RuntimeError, (leaf(3, 5), [])),
        (RuntimeError, (leaf(3, 5), [1, 3, 5])),
        (RuntimeError, (leaf(3, 5), [5], leaf(3))),
        (RuntimeError, (leaf(2, 3, 5), [3, 5], leaf(15))),
        (RuntimeError, (leaf(3, 5), [5], leaf(5).bfloat16())),
        (RuntimeError, (leaf(3, 5).double(), [5], leaf(5))),
        (RuntimeError, (leaf(3, 5).bfloat16(), [5], leaf(5), leaf(5).bfloat16())),
        (TypeError, (leaf(3, 5), 5)),
        (TypeError, (leaf(3, 5), [5.0])),
        (TypeError, (leaf(3, 5), [5], None, None, "small")),
    ],
)
def test_bad_input_of_layer_norm_is_pytorchs_error(error, arguments):
    check_same_error(error, "layer_norm", *arguments)


@given(
    rows=st.integers(0, 40),
    width=st.integers(1, 40),
    vocab=st.integers(1, 70),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    smoothing=st.sampled_from([0.0, 0.1]),
    weighted=st.booleans(),
    reduction=st.sampled_from(["sum", "none"]),
)
def test_losses_of_any_shape_and_option(rows, width, vocab, dtype, smoothing, weighted, reduction):
    y = classes(rows, below=vocab, ignored=[0] if rows else [])
    weight = (torch.rand(vocab) + 0.1).to(dtype) if weighted else None
    options = {"weight": weight, "label_smoothing": smoothing, "reduction": reduction}
    check_same("cross_entropy", leaf(rows, vocab, dtype=dtype), y, **options)
    check_same(LINEAR, leaf(rows, width, dtype=dtype), leaf(vocab, width, dtype=dtype), y, **options)
