"""Products of bfloat16 in the C++ kernels: our own, and PyTorch's, which CPUs with AMX take. Both run on every CPU."""

import random
from pathlib import Path

import pytest
import torch
import torch.nn.functional as T

import fastgpt
from fastgpt import extension, ops
from fastgpt.testing import check_error_rule, poisoned_memory, strided

BF16 = torch.bfloat16
pytestmark = pytest.mark.skipif(not extension.loaded(), reason="the C++ kernels are off")


@pytest.fixture(params=[False, True], ids=["own", "pytorchs"])
def products(request):
    """Run a test with our own products, then with PyTorch's."""
    before = torch.ops.fastgpt.use_amx_cpp(request.param)
    with fastgpt.use_backend("cpp"):
        yield request.param
    torch.ops.fastgpt.use_amx_cpp(before)


def targets(rows, vocab):
    y = torch.where(torch.rand(rows) < 0.2, -100, torch.randint(0, vocab, (rows,)))
    y[:1] = 0
    return y


OURS_ONLY = ("chunk", "z_loss", "softcap", "logit_scale")


def check_loss(rows, size, vocab, layout="contiguous", bias=False, class_weight=False, **options):
    y = targets(rows, vocab)
    w = (torch.rand(vocab) + 0.1).to(BF16) if class_weight else None
    inputs = [strided((rows, size), BF16, layout), strided((vocab, size), BF16, layout, scale=size**-0.5)]
    inputs += [strided((vocab,), BF16, "contiguous")] if bias else []
    ours_only = {name: options.pop(name) for name in OURS_ONLY if name in options}
    cap, z = ours_only.get("softcap"), ours_only.get("z_loss", 0.0)

    def ours(hidden, weight, bias=None):
        return ops.linear_cross_entropy(hidden, weight, y, bias=bias, class_weight=w, **options, **ours_only)

    def pytorch(hidden, weight, bias=None):
        logits = T.linear(hidden, weight, bias) * ours_only.get("logit_scale", 1.0)
        logits = logits if cap is None else cap * torch.tanh(logits / cap)
        loss = T.cross_entropy(logits, y, None if w is None else w.to(hidden.dtype), **options)
        if not z:
            return loss
        kept = (y != -100).to(logits.dtype)
        return loss + z * ((torch.logsumexp(logits, 1) * kept) ** 2).sum() / kept.sum()

    check_error_rule(ours, pytorch, inputs)


@pytest.mark.parametrize(
    ("rows", "size", "vocab", "chunk"), [(9, 8, 30, 4), (70, 33, 131, 64), (40, 64, 257, None)]
)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("bias", [False, True])
def test_cross_entropy_obeys_the_error_rule(products, rows, size, vocab, chunk, reduction, bias):
    options = {"reduction": reduction, "label_smoothing": 0.1, "class_weight": True, "bias": bias}
    check_loss(rows, size, vocab, chunk=chunk, **options)


@pytest.mark.parametrize(
    "options",
    [
        {"z_loss": 1e-2},
        {"softcap": 3.0},
        {"softcap": 3.0, "z_loss": 1e-2},
        {"logit_scale": 0.3, "z_loss": 1e-2},
        {"logit_scale": 2.0, "softcap": 3.0},
    ],
    ids=str,
)
def test_cross_entropy_with_options(products, options):
    check_loss(37, 20, 90, chunk=16, **options)


@pytest.mark.parametrize("number", range(20))
def test_cross_entropy_of_any_shape(products, number):
    draw = random.Random(number)
    rows, size, vocab = draw.randint(1, 40), draw.randint(1, 40), draw.randint(1, 80)
    options = {"chunk": draw.choice([None, 1, 7, 32]), "reduction": draw.choice(["mean", "sum", "none"])}
    check_loss(rows, size, vocab, draw.choice(["contiguous", "transposed"]), **options)


@pytest.mark.parametrize(("rows", "vocab"), [(0, 5), (3, 1)])
def test_cross_entropy_of_few(products, rows, vocab):
    hidden, weight = torch.randn(rows, 8, dtype=BF16, requires_grad=True), torch.randn(vocab, 8, dtype=BF16)
    weight.requires_grad_()
    loss = ops.linear_cross_entropy(hidden, weight, torch.zeros(rows, dtype=torch.int64), reduction="sum")
    loss.backward()
    assert loss.item() == 0 and not hidden.grad.any() and not weight.grad.any()


def test_every_element_is_written(products):
    y = targets(300, 70)
    hidden, weight = torch.randn(300, 24, dtype=BF16), torch.randn(70, 24, dtype=BF16)
    arguments = (hidden, weight, None, y, None, -100, 0.0, 0.0, 0.0, 1.0, 128)
    with poisoned_memory():
        found = torch.ops.fastgpt.linear_cross_entropy_fwd_cpp(*arguments, True)
    assert all(part.isfinite().all() for part in found)


def test_a_target_out_of_range_is_refused(products):
    hidden, weight = torch.randn(3, 8, dtype=BF16), torch.randn(5, 8, dtype=BF16)
    with pytest.raises(IndexError, match="Target 5 is out of bounds"):
        ops.linear_cross_entropy(hidden, weight, torch.tensor([0, 5, 1]))


@pytest.mark.parametrize(
    ("rows", "size", "columns"), [(40, 64, 66), (32, 2, 2), (129, 130, 258), (33, 15, 7)]
)
@pytest.mark.parametrize("weight_dtype", [BF16, torch.float32], ids=str)
@pytest.mark.parametrize("bias", [False, True])
def test_linear_obeys_the_error_rule(products, rows, size, columns, weight_dtype, bias):
    x = strided((rows, size), BF16, "contiguous")
    rest = [strided((columns, size), weight_dtype, "contiguous", scale=size**-0.5)]
    rest += [strided((columns,), weight_dtype, "contiguous")] if bias else []

    def pytorch(x, *rest):
        with torch.autocast("cpu", BF16, enabled=x.dtype == BF16):
            return T.linear(x, *rest)

    def ours(x, *rest):
        with torch.autocast("cpu", BF16):
            return ops.linear(x, *rest)

    check_error_rule(ours, pytorch, [x, *rest], rounding=BF16)


@pytest.mark.skipif(not Path("/proc/cpuinfo").exists(), reason="no /proc/cpuinfo to compare with")
def test_the_choice_is_that_of_the_cpu_until_it_is_set():
    flags = set(Path("/proc/cpuinfo").read_text().split())
    before = torch.ops.fastgpt.use_amx_cpp(None)
    assert torch.ops.fastgpt.use_amx_cpp(not before) is ("amx_bf16" in flags)
    assert torch.ops.fastgpt.use_amx_cpp(before) is not before
