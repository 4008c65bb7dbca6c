"""Linear + cross-entropy: every backend against PyTorch by the error rule, its memory, and the corners."""

import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as T
from hypothesis import strategies as st

import fastgpt
from fastgpt import ops
from fastgpt.testing import check_error_rule, poisoned_memory, strided
from tests.support.contract import (
    any_of,
    check_compiles_once,
    check_every_slot_is_written,
    check_opcheck,
    registered,
)


def inputs(rows, size, vocab, dtype, bias, layout="contiguous"):
    hidden = strided((rows, size), dtype, layout)
    weight = strided((vocab, size), dtype, layout, scale=size**-0.5)
    return [hidden, weight, strided((vocab,), dtype, "contiguous")] if bias else [hidden, weight]


def targets(rows, vocab):
    y = torch.where(torch.rand(rows) < 0.2, -100, torch.randint(0, vocab, (rows,)))
    y[:1] = 0
    return y


def ours_and_pytorch(y, **options):
    """The two functions of (hidden, weight[, bias])."""
    ours_options = {("class_weight" if k == "weight" else k): v for k, v in options.items()}
    torch_options = {k: v for k, v in options.items() if k != "chunk"}

    def ours(hidden, weight, bias=None):
        return ops.linear_cross_entropy(hidden, weight, y, bias=bias, **ours_options)

    def pytorch(hidden, weight, bias=None):
        w = torch_options.get("weight")
        o = {**torch_options, "weight": None if w is None else w.to(hidden.dtype)}
        return T.cross_entropy(T.linear(hidden, weight, bias) * o.pop("logit_scale", 1.0), y, **o)

    return ours, pytorch


@pytest.mark.parametrize(
    ("rows", "size", "vocab", "chunk", "layout"),
    [
        (9, 8, 30, 4, "contiguous"),
        (5, 17, 65, None, "transposed"),
    ],
)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_obeys_the_error_rule(backend, dtype, reduction, bias, rows, size, vocab, chunk, layout):
    functions = ours_and_pytorch(
        targets(rows, vocab),
        reduction=reduction,
        chunk=chunk,
        label_smoothing=0.1,
        weight=(torch.rand(vocab) + 0.1).to(dtype),
    )
    check_error_rule(*functions, inputs(rows, size, vocab, dtype, bias, layout))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("logit_scale", [0.125, 3.0])
def test_scaled_logits(backend, dtype, reduction, bias, logit_scale):
    """More classes than a slice and a block of the C++ kernel."""
    options = {"reduction": reduction, "label_smoothing": 0.1, "chunk": 4}
    functions = ours_and_pytorch(targets(9, 300), logit_scale=logit_scale, **options)
    check_error_rule(*functions, inputs(9, 8, 300, dtype, bias))


@any_of(
    rows=st.integers(1, 12),
    size=st.integers(1, 20),
    vocab=st.integers(1, 40),
    chunk=st.one_of(st.none(), st.integers(1, 15)),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    layout=st.sampled_from(["contiguous", "transposed", "sliced", "gapped"]),
    reduction=st.sampled_from(["mean", "sum", "none"]),
    bias=st.booleans(),
    logit_scale=st.sampled_from([1.0, 0.5, 2.3]),
)
def test_any_shape_and_chunk(backend, rows, size, vocab, chunk, dtype, layout, reduction, bias, logit_scale):
    options = {"reduction": reduction, "chunk": chunk, "logit_scale": logit_scale}
    functions = ours_and_pytorch(targets(rows, vocab), **options)
    check_error_rule(*functions, inputs(rows, size, vocab, dtype, bias, layout))


@pytest.mark.parametrize("logit_scale", [1.0, 0.4])
@pytest.mark.parametrize("softcap", [2.0, None])
def test_z_loss_and_softcap(backend, dtype, softcap, logit_scale):
    y = targets(7, 20)
    options = {"z_loss": 0.1, "softcap": softcap, "logit_scale": logit_scale}

    def ours(h, w):
        return ops.linear_cross_entropy(h, w, y, chunk=3, **options)

    def composed(h, w):
        x = T.linear(h, w) * logit_scale
        x = softcap * torch.tanh(x / softcap) if softcap else x
        valid = y != -100
        penalty = torch.where(valid, torch.logsumexp(x, -1) ** 2, 0).sum() / valid.sum()
        return T.cross_entropy(x, y) + 0.1 * penalty

    check_error_rule(ours, composed, inputs(7, 8, 20, dtype, bias=False))


def test_only_the_gradients_asked_for(backend):
    hidden, weight = inputs(5, 8, 12, torch.float32, bias=False)
    y = targets(5, 12)
    for reduction in ("mean", "none"):
        frozen = ops.linear_cross_entropy(hidden, weight.detach(), y, reduction=reduction).sum()
        expected = T.cross_entropy(T.linear(hidden, weight), y, reduction=reduction).sum()
        torch.testing.assert_close(
            torch.autograd.grad(frozen, hidden), torch.autograd.grad(expected, hidden), rtol=1e-4, atol=1e-6
        )
    with torch.no_grad():
        assert not ops.linear_cross_entropy(hidden, weight, y).requires_grad


def test_backward_may_run_twice_and_scales(backend):
    """The gradients kept from the forward are not spoilt by the first backward."""
    hidden, weight = inputs(5, 8, 12, torch.float32, bias=False)
    loss = ops.linear_cross_entropy(hidden, weight, targets(5, 12))
    first = torch.autograd.grad(loss, (hidden, weight), retain_graph=True)
    second = torch.autograd.grad(3 * loss, (hidden, weight))
    for a, b in zip(first, second, strict=True):
        torch.testing.assert_close(3 * a, b)


def test_all_ignored_targets(backend):
    hidden, weight = inputs(3, 4, 5, torch.float32, bias=False)
    y = torch.full((3,), -100)
    assert ops.linear_cross_entropy(hidden, weight, y).isnan()
    loss = ops.linear_cross_entropy(hidden, weight, y, reduction="sum")
    assert loss == 0
    for mean in (loss, ops.linear_cross_entropy(hidden, weight, y)):
        for grad in torch.autograd.grad(mean, (hidden, weight), retain_graph=True):
            assert torch.equal(grad, torch.zeros_like(grad))


@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_no_rows_give_gradients_of_zero(backend, reduction):
    hidden, weight, bias = inputs(0, 4, 5, torch.float32, bias=True)
    y = torch.zeros(0, dtype=torch.int64)
    with poisoned_memory():
        loss = ops.linear_cross_entropy(hidden, weight, y, bias=bias, reduction=reduction).sum()
        grads = torch.autograd.grad(loss, (weight, bias))
    assert loss == 0
    for grad, parameter in zip(grads, (weight, bias), strict=True):
        assert torch.equal(grad, torch.zeros_like(parameter))


def test_target_out_of_range_raises_pytorchs_error(backend):
    hidden, weight = inputs(2, 4, 5, torch.float32, bias=False)
    with pytest.raises(IndexError, match="Target 5 is out of bounds"):
        ops.linear_cross_entropy(hidden, weight, torch.tensor([0, 5]))


def test_fp16_gradients_of_a_mean_over_many_rows_do_not_underflow():
    """The gradient of a row's logits, 1/N of a probability, would be lost in float16."""
    rows, size, vocab = 4096, 8, 512
    y = torch.randint(0, vocab, (rows,))
    hidden = torch.randn(rows, size).half().requires_grad_()
    weight = (0.1 * torch.randn(vocab, size)).half().requires_grad_()
    with fastgpt.use_backend("cpp"):
        (grad,) = torch.autograd.grad(ops.linear_cross_entropy(hidden, weight, y), weight)
    exact_inputs = hidden.detach().double(), weight.detach().double().requires_grad_()
    (exact,) = torch.autograd.grad(T.cross_entropy(T.linear(*exact_inputs), y), exact_inputs[1])
    assert (grad.double() - exact).abs().max() < 2e-3 * exact.abs().max()


def test_autocast_acts_as_on_linear_then_cross_entropy(backend):
    hidden, weight = inputs(6, 8, 12, torch.float32, bias=False)
    y = targets(6, 12)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours = ops.linear_cross_entropy(hidden, weight, y)
        theirs = T.cross_entropy(T.linear(hidden, weight), y)
    assert ours.dtype == theirs.dtype == torch.float32
    torch.testing.assert_close(ours, theirs, rtol=2e-2, atol=2e-2)
    grads = [torch.autograd.grad(loss, (hidden, weight)) for loss in (ours, theirs)]
    for a, b in zip(*grads, strict=True):
        assert a.dtype == torch.float32
        torch.testing.assert_close(a, b, rtol=5e-2, atol=5e-3)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_gradients_of_master_weights_are_not_rounded(backend, reduction):
    """Under autocast the loss has the bits that rounded parameters give; their gradients come in float32."""
    master = inputs(40, 8, 12, torch.float32, bias=True)
    rounded = [t.detach().bfloat16().requires_grad_() for t in master]
    y, grads, losses = targets(40, 12), [], []
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for h, w, b in (master, rounded):
            loss = ops.linear_cross_entropy(h, w, y, bias=b, reduction=reduction)
            losses.append(loss)
            grads.append(torch.autograd.grad(loss.sum(), (w, b)))
    assert torch.equal(*losses)
    for ours, theirs in zip(*grads, strict=True):
        assert (ours.dtype, theirs.dtype) == (torch.float32, torch.bfloat16)
        assert torch.equal(ours.bfloat16(), theirs)
        if reduction == "mean" and backend != "reference":
            assert not torch.equal(ours.bfloat16().float(), ours)


def test_autocast_does_not_act_within_the_op(backend):
    """Autocast was applied to the arguments; the products inside must keep the dtype they were given."""
    h, w = (t.detach() for t in inputs(6, 8, 12, torch.float32, bias=False))
    y = targets(6, 12)
    arguments = (h, w, None, y, None, -100, 0.0, 0.0, 0.0, 1.0, 0)
    plain = registered("linear_cross_entropy_fwd", backend)(*arguments, True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = registered("linear_cross_entropy_fwd", backend)(*arguments, True)
    for a, b in zip(plain, cast, strict=True):
        assert torch.equal(a, b)


MEMORY = """
import resource, torch
from fastgpt import ops
rows, size, vocab = 4096, 16, 32768
hidden, weight = torch.randn(rows, size, requires_grad=True), torch.randn(vocab, size, requires_grad=True)
y = torch.randint(0, vocab, (rows,))
ops.linear_cross_entropy(hidden[:64], weight, y[:64]).backward()
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
ops.linear_cross_entropy(hidden, weight, y).backward()
after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print((after - before) * 1024 / (rows * vocab * 4))
"""


def test_never_holds_the_logits():
    """Peak memory of forward and backward grows by less than 15 % of what the logits would take (512 MiB)."""
    run = subprocess.run([sys.executable, "-c", MEMORY], capture_output=True, text=True, check=True)
    assert float(run.stdout) < 0.15


WITHOUT_TRITON = """
import sys
sys.modules["triton"] = None
import torch, fastgpt
from tests.simt import emulator
with emulator.running(), fastgpt.use_backend("cuda"):
    hidden, weight = torch.randn(5, 8, requires_grad=True), torch.randn(12, 8, requires_grad=True)
    for reduction in ("mean", "none"):
        loss = fastgpt.ops.linear_cross_entropy(hidden, weight, torch.arange(5), reduction=reduction, chunk=2)
        loss.sum().backward()
    fastgpt.ops.linear_gelu(hidden, weight).sum().backward()
"""


def test_the_cuda_backend_needs_no_triton():
    from tests.simt import emulator

    if emulator.problem():
        pytest.skip(emulator.problem())
    path = {"PYTHONPATH": os.pathsep.join((".", os.environ.get("PYTHONPATH", "")))}
    subprocess.run([sys.executable, "-c", WITHOUT_TRITON], check=True, env=os.environ | path)


@pytest.mark.only("triton", "cuda")
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_what_pads_the_rows_of_logits_reaches_no_result(backend, reduction):
    """Rows of 135 logits are kept 144 apart; products of so many rows are those that look at what is between."""
    y = targets(37, 135)
    tensors = inputs(37, 67, 135, torch.bfloat16, bias=True)
    with poisoned_memory(False):
        loss = ops.linear_cross_entropy(tensors[0], tensors[1], y, bias=tensors[2], reduction=reduction)
        found = torch.autograd.grad(loss.sum(), tensors)
    assert loss.isfinite().all() and all(g.isfinite().all() for g in found)


def test_every_slot_is_written(backend):
    y = targets(5, 12)
    for reduction in ("mean", "none"):
        check_every_slot_is_written(
            lambda h, w, b, r=reduction: ops.linear_cross_entropy(h, w, y, bias=b, reduction=r, chunk=2),
            inputs(5, 8, 12, torch.float32, bias=True),
        )


@pytest.mark.once
def test_opcheck(backend):
    h, w, b = (t.detach() for t in inputs(5, 8, 12, torch.float32, bias=True))
    y, cw = targets(5, 12), torch.rand(12)
    logits = T.linear(h, w, b)
    statistics = torch.stack([logits.amax(1), (logits - logits.amax(1, keepdim=True)).exp().sum(1)], 1)
    rest = (-100, 0.1, 0.0, 0.0, 0.5, 2)
    check_opcheck(
        registered("linear_cross_entropy_fwd", backend),
        (h, w, b, y, cw, *rest, True),
        (h, w, None, y, None, *rest, False),
    )
    check_opcheck(
        registered("linear_cross_entropy_bwd", backend), (torch.rand(5), h, w, b, y, statistics, cw, *rest)
    )


@pytest.mark.once
def test_compiles_once_for_all_shapes(backend):
    weight = inputs(1, 8, 12, torch.float32, bias=False)[1]

    def function(h, w):
        return ops.linear_cross_entropy(h, w, torch.arange(h.shape[0]) % w.shape[0])

    check_compiles_once(
        function, [[strided((n, 8), torch.float32, "contiguous"), weight] for n in (3, 5, 12)]
    )


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_gradcheck_in_float64(reduction, softcap):
    y = torch.tensor([0, -100, 3])
    args = inputs(3, 4, 5, torch.float64, bias=True)

    def function(h, w, b):
        options = {"z_loss": 0.1, "softcap": softcap, "logit_scale": 1.4, "chunk": 2}
        return ops.linear_cross_entropy(h, w, y, bias=b, reduction=reduction, **options)

    with fastgpt.use_backend("cpp"):
        assert torch.autograd.gradcheck(function, args)
        assert torch.autograd.gradgradcheck(function, args)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"weight": torch.ones(5, 3)}, ValueError, r"weight must have shape \(V, 4\), got \(5, 3\)"),
        ({"target": torch.zeros(3, dtype=torch.int64)}, ValueError, "must match"),
        ({"bias": torch.ones(4)}, ValueError, "bias must have shape"),
        ({"class_weight": torch.ones(4)}, ValueError, "class_weight must have shape"),
        ({"weight": torch.ones(5, 4).half()}, TypeError, "dtypes must be equal"),
        ({"chunk": 0}, ValueError, "chunk must be at least 1"),
        ({"logit_scale": -1}, ValueError, "logit_scale must be positive and finite, got -1"),
        ({"hidden": None}, TypeError, "hidden must be"),
    ],
)
def test_bad_input_gets_one_sentence(change, error, message):
    arguments = {
        "hidden": torch.ones(2, 4),
        "weight": torch.ones(5, 4),
        "target": torch.zeros(2, dtype=torch.int64),
    }
    arguments |= change
    if arguments["hidden"] is None:
        arguments["hidden"] = "text"
    with pytest.raises(error, match=message):
        ops.linear_cross_entropy(**arguments)
