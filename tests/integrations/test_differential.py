"""Random calls of the drop-in against PyTorch and float64: eight layouts, four dtypes, autocast, options, gradients.

A failure names the seed of its call: `differential.case(function, seed)` makes it again.
"""

import contextlib
import random

import pytest
import torch
import torch.nn.functional as T
from torch.nn.attention import SDPBackend, sdpa_kernel

from fastgpt import functional as F
from fastgpt.testing import check_error_rule
from tests.support import differential

FUNCTIONS = [name for name in differential.FUNCTIONS if hasattr(T, name)]
CHUNKS = 20  # of the slow tier: 10,000 cases


def seeds(count):
    """Numbers that follow from the test's name and --seed."""
    draw = random.Random(torch.initial_seed())
    return [draw.getrandbits(32) for _ in range(count)]


@contextlib.contextmanager
def named(case):
    """An exception says which call raised it."""
    try:
        yield
    except Exception as error:
        raise AssertionError(f"{case}\n{type(error).__name__}: {error}") from error


def is_finite(function, tensors):
    result = function(*tensors)
    found = torch.autograd.grad(result.sum(), [t for t in tensors if t.requires_grad])
    return all(t.isfinite().all() for t in (result, *found))


def check(function, seed):
    case = differential.case(function, seed)
    rounding = torch.bfloat16 if case.autocast else None
    with named(case):
        theirs = case.call(T)
        if case.dtype in differential.HALF and not is_finite(theirs, case.tensors):
            # PyTorch's sum of a loss overflows in float16, and its fused loss reads unwritten memory in bfloat16.
            theirs = case.call(T, wide=True)
        check_error_rule(case.call(F), theirs, case.tensors, rounding=rounding)
        ours, theirs = (case.call(module, upstream=False)(*case.tensors) for module in (F, T))
        assert ours.requires_grad == theirs.requires_grad
        if function in ("gelu", "scaled_dot_product_attention"):
            assert ours.stride() == theirs.stride()


@pytest.mark.parametrize("function", FUNCTIONS)
def test_call_is_pytorchs(function):
    for seed in seeds(60):
        check(function, seed)


@pytest.mark.slow
@pytest.mark.parametrize("chunk", range(CHUNKS))
@pytest.mark.parametrize("function", FUNCTIONS)
def test_many_calls_are_pytorchs(function, chunk):
    for seed in seeds(10_000 // CHUNKS // len(FUNCTIONS)):
        check(function, seed)


def gradients(function, tensors):
    """A function's first gradients, as a function that can be differentiated again."""

    def first(*tensors):
        wanted = [t for t in tensors if t.requires_grad]
        result = function(*tensors)
        weights = torch.linspace(-1, 1, result.numel(), dtype=result.dtype).view(result.shape)
        return torch.autograd.grad((result * weights).sum(), wanted, create_graph=True)

    found = first(*tensors)
    wanted = [t for t in tensors if t.requires_grad]
    total = sum(g.square().sum() for g in found if g.requires_grad)
    again = torch.autograd.grad(total, wanted, allow_unused=True) if isinstance(total, torch.Tensor) else ()
    return [*found, *(g for g in again if g is not None)]


def check_close(case, ours, theirs):
    assert len(ours) == len(theirs)
    for mine, pytorchs in zip(ours, theirs, strict=True):
        largest = float(pytorchs.detach().abs().max()) if pytorchs.numel() else 0.0
        torch.testing.assert_close(mine, pytorchs, rtol=1e-8, atol=1e-9 * max(1.0, largest), equal_nan=True)


def check_differentiated(function, seed):
    """Second derivatives, forward mode and vmap in float64, whose tolerance no rounding fills."""
    case = differential.case(function, seed, (torch.float64,))
    if "bias" in case.names and "weight" not in case.names:
        return  # PyTorch's LayerNorm has no second derivative of that
    with named(case), sdpa_kernel(SDPBackend.MATH):
        found = []
        for module in (F, T):
            called = case.call(module, upstream=False)
            inputs = [t.detach().requires_grad_(t.requires_grad) for t in case.tensors]
            results = gradients(called, inputs)
            plain = [t.detach() for t in inputs]
            floats = [i for i, t in enumerate(inputs) if t.requires_grad]

            def of_floats(*given, called=called, plain=plain, floats=floats):
                return called(*[given[floats.index(i)] if i in floats else t for i, t in enumerate(plain)])

            primals = tuple(plain[i].resolve_neg().contiguous() for i in floats)  # as PyTorch's duals must be
            results += torch.func.jvp(of_floats, primals, tuple(p.cos() for p in primals))
            batch = tuple(torch.stack([p, p.sin()]) for p in primals)
            results.append(torch.vmap(of_floats)(*batch))
            found.append(results)
        check_close(case, *found)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_derivatives_of_a_call_are_pytorchs(function):
    for seed in seeds(10):
        check_differentiated(function, seed)


@pytest.mark.slow
@pytest.mark.parametrize("function", FUNCTIONS)
def test_derivatives_of_many_calls_are_pytorchs(function):
    for seed in seeds(300):
        check_differentiated(function, seed)


def check_compiled(function, seed):
    case = differential.case(function, seed)
    torch._dynamo.reset()
    with named(case):
        compiled = torch.compile(case.call(F, upstream=False), backend="aot_eager", fullgraph=True)
        rounding = torch.bfloat16 if case.autocast else None
        check_error_rule(compiled, case.call(T, upstream=False), case.tensors, rounding=rounding)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_compiled_call_is_pytorchs(function):
    for seed in seeds(2):
        check_compiled(function, seed)


@pytest.mark.slow
@pytest.mark.parametrize("function", FUNCTIONS)
def test_many_compiled_calls_are_pytorchs(function):
    for seed in seeds(60):
        check_compiled(function, seed)
