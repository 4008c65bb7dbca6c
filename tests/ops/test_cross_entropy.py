"""Cross-entropy: every backend against PyTorch by the error rule, and the contract's corners."""

import pytest
import torch
import torch.nn.functional as T
from hypothesis import strategies as st

import fastgpt
from fastgpt import ops
from fastgpt.testing import check_error_rule, strided
from tests.support.contract import (
    any_of,
    check_compiles_once,
    check_every_slot_is_written,
    check_opcheck,
    check_same_bits_for_any_thread_count,
    registered,
)


def targets(rows, vocab, ignored=0.2, ignore_index=-100):
    y = torch.randint(0, max(vocab, 1), (rows,))
    return torch.where(torch.rand(rows) < ignored, ignore_index, y)


def pytorch(
    logits, target, *, softcap=None, logit_scale=1.0, z_loss=0.0, reduction="mean", weight=None, **options
):
    """The same loss out of torch.nn.functional.cross_entropy and the few operations it lacks."""
    weight = None if weight is None else weight.to(logits.dtype)
    logits = logits * logit_scale
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    loss = T.cross_entropy(logits, target, weight, reduction=reduction, **options)
    if z_loss:
        ignore = options.get("ignore_index", -100)
        valid = target != ignore
        penalty = z_loss * torch.where(valid, torch.logsumexp(logits, dim=-1) ** 2, 0)
        if reduction == "mean":
            count = valid.sum() if weight is None else weight[torch.where(valid, target, 0)][valid].sum()
            penalty = penalty.sum() / count
        loss = loss + (penalty.sum() if reduction == "sum" else penalty)
    return loss


CASES = {
    "plain": {},
    "sum": {"reduction": "sum"},
    "none": {"reduction": "none"},
    "smoothed": {"label_smoothing": 0.1},
    "weighted": {"weight": True},
    "weighted and smoothed": {"weight": True, "label_smoothing": 0.3, "reduction": "none"},
    "z-loss": {"z_loss": 0.01},
    "softcap": {"softcap": 3.0},
    "scaled": {"logit_scale": 0.25},
    "scaled up": {"logit_scale": 3.0, "reduction": "none"},
    "scaled and smoothed": {"logit_scale": 2.5, "label_smoothing": 0.1, "weight": True},
    "scaled with z-loss": {"logit_scale": 0.4, "z_loss": 0.02},
    "scaled and capped": {"logit_scale": 1.7, "softcap": 3.0},
    "everything": {"weight": True, "label_smoothing": 0.1, "z_loss": 0.02, "softcap": 5.0, "ignore_index": 2},
    "everything, scaled": {
        "weight": True,
        "label_smoothing": 0.1,
        "z_loss": 0.02,
        "softcap": 5.0,
        "logit_scale": 0.6,
        "ignore_index": 2,
    },
}


@pytest.mark.parametrize(
    ("rows", "vocab", "layout"),
    [
        (5, 7, "contiguous"),
        (3, 1100, "gapped"),
        (4, 33, "transposed"),
        (1, 1, "sliced"),
    ],
)
@pytest.mark.parametrize("case", CASES)
def test_obeys_the_error_rule(backend, dtype, case, rows, vocab, layout):
    options = dict(CASES[case])
    if options.get("weight"):
        options["weight"] = (torch.rand(vocab) + 0.1).to(dtype)
    y = targets(rows, vocab, ignore_index=options.get("ignore_index", -100))
    y[0] = 0  # one valid target at least, or the mean is NaN everywhere
    logits = strided((rows, vocab), dtype, layout, scale=2)
    check_error_rule(
        lambda x, y=y, o=options: ops.cross_entropy(x, y, **o),
        lambda x, y=y, o=options: pytorch(x, y, **o),
        [logits],
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_of_several_blocks(backend, dtype):
    """The running maximum moves from block to block. (In float16 PyTorch's own smoothing sum overflows here.)"""
    weight, y = torch.rand(9001) + 0.1, torch.tensor([9000, 4096, 0])
    options = {"label_smoothing": 0.1, "weight": weight.to(dtype)}
    logits = strided((3, 9001), dtype, "gapped", scale=4)
    with torch.no_grad():
        logits += torch.linspace(-3, 3, 9001).to(dtype)
    check_error_rule(
        lambda x, o=options: ops.cross_entropy(x, y, **o),
        lambda x, o=options: pytorch(x, y, **o),
        [logits],
    )


@any_of(
    rows=st.integers(0, 6),
    vocab=st.integers(1, 70),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    layout=st.sampled_from(["contiguous", "transposed", "sliced", "gapped"]),
    scale=st.sampled_from([0.1, 1.0, 20.0]),
    label_smoothing=st.sampled_from([0.0, 0.2, 1.0]),
    weighted=st.booleans(),
    reduction=st.sampled_from(["sum", "none"]),
)
def test_any_shape_and_option(
    backend, rows, vocab, dtype, layout, scale, label_smoothing, weighted, reduction
):
    options = {"label_smoothing": label_smoothing, "reduction": reduction}
    if weighted:
        options["weight"] = (torch.rand(vocab) + 0.1).to(dtype)
    y = targets(rows, vocab)
    check_error_rule(
        lambda x: ops.cross_entropy(x, y, **options),
        lambda x: pytorch(x, y, **options),
        [strided((rows, vocab), dtype, layout, scale)],
    )


@any_of(
    vocab=st.sampled_from([2, 40, 2047, 2048, 2049, 4095, 4096, 4097, 6100, 8192, 8193, 12289]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    gap=st.integers(0, 17),
    weighted=st.booleans(),
    label_smoothing=st.sampled_from([0.0, 0.1]),
    z_loss=st.sampled_from([0.0, 0.01]),
    softcap=st.sampled_from([None, 5.0]),
    logit_scale=st.sampled_from([1.0, 0.125, 2.3]),
    ignore_index=st.sampled_from([-100, 1]),
    reduction=st.sampled_from(["mean", "sum", "none"]),
)
def test_all_options_together_on_rows_of_any_number_of_tiles(
    backend,
    vocab,
    dtype,
    gap,
    weighted,
    label_smoothing,
    z_loss,
    softcap,
    logit_scale,
    ignore_index,
    reduction,
):
    """Rows that end with a tile, one before and one behind, and start anywhere within 16 bytes."""
    weight = (torch.rand(vocab) + 0.1).to(dtype) if weighted else None
    y = targets(3, vocab, ignore_index=ignore_index)
    y[0], y[1] = vocab - 1, 0  # at least one of them counts, whichever is ignored
    options = {"weight": weight, "label_smoothing": label_smoothing, "z_loss": z_loss, "softcap": softcap}
    options |= {"logit_scale": logit_scale, "ignore_index": ignore_index, "reduction": reduction}
    logits = torch.randn(3, vocab + gap).mul_(2).to(dtype)[:, :vocab].requires_grad_()
    check_error_rule(
        lambda x: ops.cross_entropy(x, y, **options), lambda x: pytorch(x, y, **options), [logits]
    )


@pytest.mark.parametrize(("softcap", "logit_scale"), [(4.0, 1.0), (None, 0.3), (None, 2.0), (4.0, 2.0)])
def test_log_sum_exp_is_returned_and_differentiable(backend, dtype, softcap, logit_scale):
    """Also of a row that the loss ignores, whose other gradients are 0."""
    y = targets(6, 40)
    y[0], y[1] = 3, -100
    options = {"softcap": softcap, "logit_scale": logit_scale, "label_smoothing": 0.1}

    def both(logits):
        loss, lse = ops.cross_entropy(logits, y, return_lse=True, **options)
        return loss, lse.to(logits.dtype)

    def expected(logits):
        x = logits * logit_scale
        x = softcap * torch.tanh(x / softcap) if softcap else x
        return pytorch(logits, y, **options), torch.logsumexp(x, dim=-1)

    check_error_rule(both, expected, [strided((6, 40), dtype, "contiguous", 3)])


def test_leading_dimensions_are_kept(backend):
    logits, y = strided((2, 3, 9), torch.float32, "contiguous"), targets(6, 9).view(2, 3)
    loss = ops.cross_entropy(logits, y, reduction="none")
    expected = T.cross_entropy(logits.flatten(0, 1), y.flatten(), reduction="none").view(2, 3)
    torch.testing.assert_close(loss, expected)


def test_all_ignored_targets(backend):
    """The mean is NaN, the sum 0, and the gradient 0 either way, as in PyTorch."""
    logits, y = strided((3, 5), torch.float32, "contiguous"), torch.full((3,), -100)
    for reduction in ("mean", "sum"):
        ours, theirs = (f(logits, y, reduction=reduction) for f in (ops.cross_entropy, T.cross_entropy))
        torch.testing.assert_close(ours, theirs, equal_nan=True)
        (grad,) = torch.autograd.grad(ours, logits)
        assert torch.equal(grad, torch.zeros_like(grad))


def test_no_rows(backend):
    logits, y = torch.randn(0, 5, requires_grad=True), torch.zeros(0, dtype=torch.int64)
    assert ops.cross_entropy(logits, y).isnan()
    assert ops.cross_entropy(logits, y, reduction="sum") == 0
    assert ops.cross_entropy(logits, y, reduction="none").shape == (0,)


def test_impossible_classes_and_infinite_logits(backend):
    """-inf logits have probability 0; the loss of a possible class stays finite, with a finite gradient."""
    logits = torch.tensor([[0.0, -torch.inf, 2.0], [-torch.inf, 1.0, -torch.inf]], requires_grad=True)
    y = torch.tensor([2, 1])
    ours, theirs = (f(logits, y, reduction="none") for f in (ops.cross_entropy, T.cross_entropy))
    torch.testing.assert_close(ours, theirs)
    grads = [torch.autograd.grad(loss.sum(), logits)[0] for loss in (ours, theirs)]
    torch.testing.assert_close(*grads)
    assert torch.equal(grads[0][logits == -torch.inf], torch.zeros(3)), "exactly 0, not just small"
    impossible = ops.cross_entropy(logits.detach(), torch.tensor([1, 1]), reduction="none")
    assert impossible[0] == torch.inf


def test_a_smoothed_loss_with_an_impossible_class_is_infinite(backend):
    """Wherever it stands; the first logit has a part of its own in the sum."""
    for column in range(3):
        logits = torch.zeros(1, 3)
        logits[0, column] = -torch.inf
        y = torch.tensor([(column + 1) % 3])
        assert ops.cross_entropy(logits, y, label_smoothing=0.1) == torch.inf
        assert T.cross_entropy(logits, y, label_smoothing=0.1) == torch.inf


def test_an_offset_common_to_a_row_changes_nothing(backend):
    """Logits around 4096: a log-sum-exp in one float32 number would cost the gradient three digits."""
    logits = (torch.randn(4, 50) * 256).round() / 256  # exact beside 4096 too
    y = targets(4, 50, ignored=0)
    found = []
    for offset in (0.0, 4096.0, -4096.0):
        x = (logits + offset).requires_grad_()
        loss = ops.cross_entropy(x, y, label_smoothing=0.1)
        found.append((loss.detach(), torch.autograd.grad(loss, x)[0]))
    for loss, grad in found[1:]:
        torch.testing.assert_close(loss, found[0][0], rtol=1e-5, atol=0)
        torch.testing.assert_close(grad, found[0][1], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("bad", [5, -1, -101, 2**40])
def test_target_out_of_range_raises_pytorchs_error(backend, bad):
    """On a GPU, whose kernels act alike in the emulator, an error would have to wait: the row is NaN."""
    logits, y = torch.randn(3, 5), torch.tensor([1, bad, 2])
    if backend != "cuda" and not logits.is_cuda:
        with pytest.raises(IndexError, match=f"Target {bad} is out of bounds"):
            ops.cross_entropy(logits, y)
        return
    for options in ({}, {"weight": torch.rand(5), "label_smoothing": 0.1, "z_loss": 0.1, "softcap": 2.0}):
        found = []
        for target in (y, torch.where(y == bad, 0, y)):
            x = logits.clone().requires_grad_()
            loss, lse = ops.cross_entropy(x, target, reduction="none", return_lse=True, **options)
            found.append((loss.detach(), lse.detach(), torch.autograd.grad(loss.sum(), x)[0]))
        (loss, lse, grad), (good_loss, good_lse, good_grad) = found
        assert torch.equal(lse, good_lse)
        assert loss[1].isnan()
        assert grad[1].isnan().all()
        for a, b in ((loss, good_loss), (grad, good_grad)):
            assert torch.equal(a[::2], b[::2]), "the other rows"


def test_large_logits_do_not_overflow(backend):
    logits = torch.tensor([[6e4, -6e4, 0.0], [-6e4, -6e4, -6e4]], requires_grad=True)
    y = torch.tensor([0, 1])
    torch.testing.assert_close(
        ops.cross_entropy(logits, y, reduction="none"), T.cross_entropy(logits, y, reduction="none")
    )


def test_inplace_backward_gives_the_same_gradient_in_the_logits_memory(backend, dtype):
    y = targets(6, 40)
    y[0] = 3
    hidden = strided((6, 40), dtype, "contiguous")
    (expected,) = torch.autograd.grad(ops.cross_entropy(hidden * 1, y), hidden)
    logits = hidden * 1
    logits.retain_grad()
    ops.cross_entropy(logits, y, inplace_backward=True).backward()
    assert torch.equal(hidden.grad, expected)
    assert torch.equal(logits.detach(), expected), "the gradient stands where the logits stood"


def test_callers_tensors_are_not_written(backend):
    logits, y, w = torch.randn(4, 6, requires_grad=True), targets(4, 6, 0), torch.rand(6)
    before = [t.detach().clone() for t in (logits, y, w)]
    ops.cross_entropy(logits, y, weight=w, label_smoothing=0.1).backward()
    for t, b in zip((logits, y, w), before, strict=True):
        assert torch.equal(t.detach(), b)


def test_every_slot_is_written(backend):
    y = targets(5, 40)
    y[0] = 1
    check_every_slot_is_written(
        lambda x: ops.cross_entropy(x, y, return_lse=True), [strided((5, 40), torch.float32, "contiguous")]
    )


def test_same_bits_for_any_thread_count():
    y = targets(300, 500)
    with fastgpt.use_backend("cpp"):
        check_same_bits_for_any_thread_count(
            lambda x: ops.cross_entropy(x, y), [strided((300, 500), torch.bfloat16, "contiguous")]
        )


@pytest.mark.once
def test_opcheck(backend):
    x, y, w, g = torch.randn(3, 5), torch.tensor([1, -100, 4]), torch.rand(5), torch.rand(3)
    statistics = torch.stack([x.amax(1), (x - x.amax(1, keepdim=True)).exp().sum(1)], 1)
    check_opcheck(
        registered("cross_entropy_fwd", backend),
        (x, y, w, -100, 0.1, 0.0, 0.0, 1.0),
        (x, y, None, -100, 0.0, 0.1, 2.0, 0.5),
    )
    check_opcheck(
        registered("cross_entropy_bwd", backend), (g, None, x, y, statistics, w, -100, 0.1, 0.0, 0.0, 1.0)
    )
    check_opcheck(
        registered("cross_entropy_bwd_inplace", backend),
        (g, g, x.clone(), y, statistics, None, -100, 0.0, 0.0, 0.0, 1.0),
    )


@pytest.mark.once
def test_compiles_once_for_all_shapes(backend):
    def function(x):
        return ops.cross_entropy(x, torch.arange(x.shape[0]) % x.shape[1], label_smoothing=0.1)

    check_compiles_once(function, [[strided((n, 9), torch.float32, "contiguous")] for n in (3, 5, 12)])


@pytest.mark.parametrize("softcap", [None, 2.0])
def test_gradcheck_in_float64(softcap):
    y = torch.tensor([0, -100, 3])
    w = torch.rand(5, dtype=torch.float64)
    options = {"weight": w, "label_smoothing": 0.2, "z_loss": 0.1, "return_lse": True}
    options |= {"softcap": softcap, "logit_scale": 1.5}
    with fastgpt.use_backend("cpp"):
        x = strided((3, 5), torch.float64, "contiguous")
        assert torch.autograd.gradcheck(lambda x: ops.cross_entropy(x, y, **options), (x,))
        assert torch.autograd.gradgradcheck(lambda x: ops.cross_entropy(x, y, **options), (x,))


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        ((torch.ones(2, 3), [0, 1]), {}, TypeError, "target must be a torch.Tensor, got list"),
        (
            (torch.ones(2, 3), torch.zeros(3, dtype=torch.int64)),
            {},
            ValueError,
            r"must match, got \(2, 3\) and \(3,\)",
        ),
        ((torch.ones(2, 3), torch.zeros(2)), {}, TypeError, "int64 class indices, got torch.float32"),
        (
            (torch.ones(2, 3).int(), torch.zeros(2, dtype=torch.int64)),
            {},
            TypeError,
            "logits must be float32",
        ),
        (
            (torch.ones(2, 3), torch.zeros(2, dtype=torch.int64)),
            {"reduction": "avg"},
            ValueError,
            "reduction must be",
        ),
        (
            (torch.ones(2, 3), torch.zeros(2, dtype=torch.int64)),
            {"label_smoothing": 2},
            ValueError,
            "between 0 and 1",
        ),
        (
            (torch.ones(2, 3), torch.zeros(2, dtype=torch.int64)),
            {"weight": torch.ones(2)},
            ValueError,
            "weight must",
        ),
        (
            (torch.ones(2, 3), torch.zeros(2, dtype=torch.int64)),
            {"z_loss": -1},
            ValueError,
            "not be negative",
        ),
        (
            (torch.ones(2, 3), torch.zeros(2, dtype=torch.int64)),
            {"softcap": -1},
            ValueError,
            "softcap must be",
        ),
        (
            (torch.ones(2, 3, device="meta"), torch.zeros(2, dtype=torch.int64)),
            {},
            ValueError,
            "target is on cpu",
        ),
    ],
)
def test_bad_input_gets_one_sentence(arguments, options, error, message):
    with pytest.raises(error, match=message):
        ops.cross_entropy(*arguments, **options)


@pytest.mark.parametrize("bad", [0, -1.0, float("inf"), float("nan"), torch.ones(())], ids=str)
def test_a_scale_is_a_positive_number(bad):
    error, message = (
        (TypeError, "a number, got a tensor")
        if isinstance(bad, torch.Tensor)
        else (ValueError, f"positive and finite, got {bad}")
    )
    with pytest.raises(error, match=f"cross_entropy: logit_scale must be {message}"):
        ops.cross_entropy(torch.ones(2, 3), torch.tensor([0, 1]), logit_scale=bad)


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"]
)
def test_gradients_past_the_caches_have_the_bits_of_small_ones(dtype):
    """From 16 MiB on the C++ kernel stores whole lines past the caches, in rows that begin anywhere in a line."""
    classes = 5003
    rows = 2**24 // (classes * dtype.itemsize) + 2
    logits, y = torch.randn(rows, classes).to(dtype), torch.randint(0, classes, (rows,))
    y[:4] = torch.tensor([0, classes - 1, -100, 17])

    def gradient(logits, y, **options):
        leaf = logits.clone().requires_grad_()
        return torch.autograd.grad(ops.cross_entropy(leaf, y, reduction="sum", **options), leaf)[0]

    with fastgpt.use_backend("cpp"):
        for options in ({}, {"label_smoothing": 0.1, "softcap": 3.0}, {"logit_scale": 0.3}):
            parts = zip(logits.tensor_split(3), y.tensor_split(3), strict=True)
            small = torch.cat([gradient(*part, **options) for part in parts])
            assert torch.equal(gradient(logits, y, **options), small)
