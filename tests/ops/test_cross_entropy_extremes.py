"""Both cross-entropies on logits and class weights far from the ordinary: masks, common offsets, absent classes."""

import pytest
import torch
import torch.nn.functional as T

from fastgpt import ops
from fastgpt.testing import check_error_rule

LOWEST = torch.finfo(torch.float32).min


def of_logits(logits, y, weight=None, **options):
    return ops.cross_entropy(logits, y, weight=weight, **options)


def of_a_projection(logits, y, weight=None, **options):
    """The same logits as the output of a linear layer: the rows of the identity times their columns, exactly."""
    return ops.linear_cross_entropy(torch.eye(len(y)).to(logits), logits.T, y, class_weight=weight, **options)


@pytest.fixture(params=[of_logits, of_a_projection], ids=["logits", "projection"])
def loss_of(request):
    return request.param


def check_against_float64(loss_of, logits, y, **options):
    """Loss and gradient by the error rule."""
    check_error_rule(
        lambda x: loss_of(x, y, **options),
        lambda x: T.cross_entropy(x, y, **_in(x.dtype, options)),
        [logits.requires_grad_()],
    )


def _in(dtype, options):
    return {k: v.to(dtype) if isinstance(v, torch.Tensor) else v for k, v in options.items()}


@pytest.mark.parametrize("vocab", [7, 130, 4099])
@pytest.mark.parametrize("masked", [-1e4, -1e9, -1e30])
@pytest.mark.parametrize("where", ["first", "last", "first block", "every other"])
@pytest.mark.parametrize("weighted", [False, True])
def test_smoothing_with_masked_classes(backend, loss_of, weighted, where, masked, vocab):
    """The sum over all classes has no pivot that one class could spoil, and that class absorbs no other."""
    logits = torch.randn(3, vocab)
    columns = {
        "first": slice(1),
        "last": slice(-1, None),
        "first block": slice(5),
        "every other": slice(0, None, 2),
    }
    logits[:, columns[where]] = masked
    y = torch.tensor([1, vocab - 2, 3])
    weight = torch.rand(vocab) + 0.1 if weighted else None
    check_against_float64(loss_of, logits, y, weight=weight, label_smoothing=0.1)


def test_one_masked_class_absorbs_no_other(loss_of):
    """Beside -1e9 the other fifty thousand count for 5e-6 of the loss, which PyTorch's sum keeps."""
    logits = torch.randn(2, 50257)
    logits[:, 0] = -1e9
    y = torch.tensor([1, 50000])
    loss = loss_of(logits, y, label_smoothing=0.1)
    expected = T.cross_entropy(logits.double(), y, label_smoothing=0.1)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("value", [-1e9, 1e15, -1e17, 1e30, LOWEST, -LOWEST])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_logits_that_are_huge_and_equal_are_uniform(backend, loss_of, smoothing, value):
    """Maximum and log-sum are two numbers: in one, the log-sum would be lost beside the maximum."""
    vocab = 333
    logits, y = torch.full((3, vocab), value), torch.tensor([0, 5, 332])
    logits.requires_grad_()
    loss = loss_of(logits, y, label_smoothing=smoothing)
    (grad,) = torch.autograd.grad(loss, logits)
    expected = torch.full((3, vocab), (1 - smoothing) / vocab)
    expected[torch.arange(3), y] -= 1 - smoothing
    torch.testing.assert_close(loss.item(), torch.tensor(vocab).log().item(), rtol=1e-6, atol=0)
    torch.testing.assert_close(grad, expected / 3, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("value", [-1e9, 1e17, LOWEST])
def test_two_huge_logits_share_the_row(backend, loss_of, value):
    logits = torch.full((2, 70), LOWEST)
    logits[:, 3] = logits[:, 66] = value if value != LOWEST else 0.0
    y = torch.tensor([3, 66])
    logits.requires_grad_()
    (grad,) = torch.autograd.grad(loss_of(logits, y, reduction="sum"), logits)
    expected = torch.zeros(2, 70)
    expected[:, [3, 66]] = torch.tensor([[-0.5, 0.5], [0.5, -0.5]])
    torch.testing.assert_close(grad, expected, rtol=1e-5, atol=1e-7)


def test_lse_of_huge_logits(backend):
    logits = torch.full((1, 4), 1e17, requires_grad=True)
    _, lse = ops.cross_entropy(logits, torch.tensor([1]), return_lse=True)
    assert lse.item() == pytest.approx(1e17)
    torch.testing.assert_close(torch.autograd.grad(lse.sum(), logits)[0], torch.full((1, 4), 0.25))


@pytest.mark.parametrize("absent", [torch.inf, -torch.inf, torch.nan])
@pytest.mark.parametrize("column", [0, 40, 69])
def test_the_weight_of_a_class_without_targets_is_not_read(backend, loss_of, column, absent):
    """Weights of 1 / count: a class that the batch has not may be infinite, or NaN."""
    weight = torch.rand(70) + 0.1
    weight[column] = absent
    y = torch.tensor([1, 2, 3, 68])
    check_against_float64(loss_of, torch.randn(4, 70), y, weight=weight)


@pytest.mark.parametrize("absent", [torch.inf, torch.nan])
def test_an_infinite_weight_under_smoothing_is_an_infinite_loss(backend, loss_of, absent):
    """As in PyTorch: smoothing gives every class a share."""
    weight = torch.rand(70) + 0.1
    weight[5] = absent
    y = torch.tensor([1, 2])
    logits = torch.randn(2, 70)
    loss, expected = (f(logits, y, weight=weight, label_smoothing=0.1) for f in (loss_of, T.cross_entropy))
    torch.testing.assert_close(loss, expected, equal_nan=True)


@pytest.mark.parametrize("value", [1e20, 1e25, -1e30])
def test_a_z_loss_of_zero_is_not_computed(backend, loss_of, value):
    """lse squared would be infinite, and 0 times that NaN; in the second derivative, too."""
    logits, y = torch.full((2, 6), value), torch.tensor([1, 2])
    logits[:, 3] /= 2
    logits.requires_grad_()
    (grad,) = torch.autograd.grad(loss_of(logits, y), logits, create_graph=True)
    assert grad.isfinite().all()
    assert torch.autograd.grad(grad.square().sum(), logits)[0].isfinite().all()


@pytest.mark.only("cpp", "triton", "cuda")
def test_a_scale_of_large_logits_keeps_every_digit(backend):
    """k·x - max k·x, contracted to one fma, would give the largest of these logits an exponent other than 0."""
    logits = torch.tensor([[1.1e10, 1.1e10, -3e9], [7.7e6, 7.7e6 - 8, 7.7e6 - 16]], requires_grad=True)
    y, scale = torch.tensor([0, 2]), 0.1234567
    loss = ops.cross_entropy(logits, y, logit_scale=scale, reduction="sum")
    (grad,) = torch.autograd.grad(loss, logits)
    exact = logits.detach().double().requires_grad_()
    exact_loss = T.cross_entropy(exact * scale, y, reduction="sum")
    (exact_grad,) = torch.autograd.grad(exact_loss, exact)
    torch.testing.assert_close(loss.double(), exact_loss, rtol=1e-6, atol=0)
    torch.testing.assert_close(grad.double(), exact_grad, rtol=1e-5, atol=1e-9)


@pytest.mark.only("cpp")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_subnormal_gradients_are_0_and_the_thread_stays_as_it_was(backend, loss_of, dtype):
    """Logits 80 to 110 below the largest: subnormal gradients, for which the processor takes hundreds of cycles."""
    logits = torch.linspace(-110, 0, 4096).repeat(300, 1).to(dtype).requires_grad_()
    loss_of(logits, torch.full((300,), 4095), reduction="sum").backward()
    size = logits.grad.float().abs()
    tiny = torch.finfo(torch.float32).tiny
    assert ((size == 0) | (size >= tiny)).all()
    likely = logits.detach()[0] > -70
    assert (size[:, likely] > 0).all()
    assert float(torch.tensor([tiny]) * 0.5) > 0  # the mode of the processor ends with the kernel
