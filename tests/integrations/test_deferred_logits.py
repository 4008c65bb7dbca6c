"""Deferred logits: every function of them gives the result for the logits, and a cross-entropy of them is one op."""

import pytest
import torch
from torch import nn
from torch.nn import functional as T

from fastgpt.backends import explain
from fastgpt.integrations.deferred_logits import DeferredLogits, requested
from fastgpt.integrations.language_model import LossHead

ROWS, LENGTH, WIDTH, CLASSES = 2, 5, 8, 11
TARGETS = torch.tensor([[3, -100, 5, 0, 10], [1, 2, -100, 7, 4]])
BIAS = torch.linspace(-1, 1, CLASSES)
MASK = TARGETS != -100


def shifted(logits):
    return T.cross_entropy(logits[..., :-1, :].contiguous().view(-1, CLASSES), TARGETS[:, 1:].reshape(-1))


def capped(logits):
    logits = torch.tanh(0.5 * logits.float() / 2.0) * 2.0
    return T.cross_entropy(logits.view(-1, logits.size(-1)), TARGETS.view(-1), reduction="sum") / 7


def smoothed(logits):
    logits = (logits + BIAS[None]).reshape([-1, CLASSES])
    return T.cross_entropy(logits, TARGETS.view(-1).clamp(min=0), ignore_index=0, label_smoothing=0.2)


def summed_and_penalized(logits):
    loss = T.cross_entropy(logits.view(-1, CLASSES), TARGETS.view(-1))
    return loss + 1e-3 * logits.logsumexp(-1).square().mean()


def changed_in_place(logits):
    flat = logits.view(-1, CLASSES)
    logits[..., 3] = -4.0
    return T.cross_entropy(flat, TARGETS.view(-1))


def changed_in_place_after_a_copy(logits):
    flat = (logits + BIAS).view(-1, CLASSES)
    logits[..., 3] = -4.0
    return T.cross_entropy(flat, TARGETS.view(-1))


def measured(logits):
    with torch.no_grad():
        hits = (logits.argmax(-1) == TARGETS).float().mean()
    return T.cross_entropy(logits.view(-1, CLASSES), TARGETS.view(-1)) + hits


def hooked(logits):
    flat = logits.view(-1, CLASSES)
    logits.register_hook(lambda gradient: 3 * gradient)
    return T.cross_entropy(flat, TARGETS.view(-1))


FUSED = {
    "flattened": lambda x: T.cross_entropy(x.view(-1, CLASSES), TARGETS.view(-1)),
    "shifted": shifted,
    "capped": capped,
    "smoothed": smoothed,
    "masked": lambda x: nn.CrossEntropyLoss()(x[MASK], TARGETS[MASK]),
    "of one row": lambda x: T.cross_entropy(x[1], TARGETS[1]),
    "of the last tokens": lambda x: T.cross_entropy(x[:, -2:, :].reshape(-1, CLASSES), TARGETS[:, -2:].flatten()),
    "moved": lambda x: T.cross_entropy(x.to(x.device).to(torch.float32)[0], target=TARGETS[0]),
}  # fmt: skip
MADE = {
    "penalized": summed_and_penalized,
    "in place": changed_in_place,
    "in place, a copy": changed_in_place_after_a_copy,
    "measured": measured,
    "hooked": hooked,
    "transposed": lambda x: T.cross_entropy(x.transpose(1, 2), TARGETS),
    "weighted": lambda x: T.cross_entropy(x.view(-1, CLASSES), TARGETS.view(-1), weight=BIAS.abs()),
    "by token": lambda x: T.cross_entropy(x.view(-1, CLASSES), TARGETS.view(-1), reduction="none").mean(),
    "to probabilities": lambda x: T.cross_entropy(x.view(-1, CLASSES), torch.full((10, CLASSES), 1 / CLASSES)),
    "some classes": lambda x: T.cross_entropy(x[..., :11:2][0], TARGETS[0].clamp(0, 5)),
    "other rows": lambda x: T.cross_entropy(x.view(CLASSES, -1).t(), TARGETS.view(-1)),
    "classes of the hidden": lambda x: T.cross_entropy(torch.cat([x[0], x[1]]), TARGETS.view(-1)),
    "scaled, then a bias": lambda x: T.cross_entropy((2 * x + BIAS)[0], TARGETS[0]),
    "scaled by a tensor": lambda x: T.cross_entropy((x * BIAS)[0], TARGETS[0]),
    "negative": lambda x: T.cross_entropy((-1.5 * x)[0], TARGETS[0]),
    "logarithm": lambda x: T.nll_loss(T.log_softmax(x, -1).view(-1, CLASSES), TARGETS.view(-1)),
    "a bias by row": lambda x: T.cross_entropy((x + BIAS[:5, None])[0], TARGETS[0]),
}  # fmt: skip


def found(compute, deferred, bias=True):
    """The loss, its gradients, and whether it was one op with the head."""
    torch.manual_seed(0)
    head = nn.Linear(WIDTH, CLASSES, bias=bias)
    hidden = torch.randn(ROWS, LENGTH, WIDTH, requires_grad=True)
    head.__class__ = LossHead
    losses = []

    def run():
        with requested(head if deferred else None):
            logits = head(2 * hidden)
            assert isinstance(logits, DeferredLogits) is deferred
            assert (logits.shape, logits.dtype, logits.requires_grad) == (
                (ROWS, LENGTH, CLASSES), torch.float32, True,
            )  # fmt: skip
            losses.append(compute(logits))

    ops = {decision.op for decision in explain(run).decisions}
    gradients = torch.autograd.grad(losses[0], (hidden, *head.parameters()))
    return losses[0].detach(), gradients, "linear_cross_entropy" in ops


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("name", [*FUSED, *MADE])
def test_loss_and_gradients_are_those_of_the_logits(name, bias):
    compute = {**FUSED, **MADE}[name]
    loss, gradients, _ = found(compute, False, bias)
    ours, own, fused = found(compute, True, bias)
    assert type(ours) is torch.Tensor
    torch.testing.assert_close(ours, loss, rtol=1e-5, atol=1e-6)
    for gradient, expected in zip(own, gradients, strict=True):
        torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-6)
    assert fused is (name in FUSED or name == "penalized")


def test_a_bias_that_learns_gets_its_gradient():
    bias = BIAS.clone().requires_grad_()
    compute = lambda x: T.cross_entropy((x + bias).view(-1, CLASSES), TARGETS.view(-1))  # noqa: E731
    gradients = []
    for deferred in (False, True):
        head = LossHead(WIDTH, CLASSES)
        torch.manual_seed(0)
        nn.init.normal_(head.weight)
        nn.init.zeros_(head.bias)
        with requested(head if deferred else None):
            logits = head(torch.linspace(-1, 1, ROWS * LENGTH * WIDTH).view(ROWS, LENGTH, WIDTH))
            gradients.append(torch.autograd.grad(compute(logits), bias)[0])
    torch.testing.assert_close(*gradients)


def test_other_heads_and_autocast_modes_get_logits():
    head, other = LossHead(WIDTH, CLASSES), LossHead(WIDTH, CLASSES)
    x = torch.randn(3, WIDTH)
    with requested(head) as around:
        assert not around
        assert type(other(x)) is torch.Tensor
        with requested(head) as around_both:
            assert around_both
        logits = head(x)
        with torch.autocast("cpu", torch.bfloat16):
            assert logits.view(-1, CLASSES).dtype == torch.float32
        torch.testing.assert_close(logits + 0.0, nn.functional.linear(x, head.weight, head.bias))
    assert type(head(x)) is torch.Tensor


def test_hidden_states_changed_in_place_are_an_error():
    head, x = LossHead(WIDTH, CLASSES), torch.randn(3, WIDTH)
    with requested(head):
        logits = head(x)
        x.add_(1.0)
        with pytest.raises(RuntimeError, match="cross_entropy=False"):
            logits.sum()


def test_a_function_past_torchs_own_is_an_error():
    class Double(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            with torch._C.DisableTorchFunctionSubclass():
                return 2 * x

        @staticmethod
        def backward(ctx, gradient):
            return 2 * gradient

    head = LossHead(WIDTH, CLASSES)
    with requested(head), pytest.raises(RuntimeError, match="cross_entropy=False"):
        Double.apply(head(torch.randn(3, WIDTH)))
