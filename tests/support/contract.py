"""Checks that every op must pass, called by each op's test file with a few cases of its own."""

import functools
import inspect

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import fastgpt
from fastgpt.testing import poisoned_memory, run_with_gradients

DTYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.float64: "fp64"}
GPU_BACKENDS = ("triton", "cuda")
# Schema, fake and autograd are the same for all backends: what is marked `once` is proved on this one (and, for gelu,
# on all of them), elsewhere it is slow. Second derivatives need float64.
PROVED_ONCE = "cpp" if fastgpt.available_backends("gelu")["cpp"] else "reference"


def dtypes_of(backend):
    """float64 is served by cpp and reference."""
    return [d for d in DTYPES if d != torch.float64 or backend not in GPU_BACKENDS]


def any_of(**strategies):
    """`hypothesis.given` for a test that takes a backend; the number of examples is the fixture `examples`.

    Every example has a seed of its own for torch, drawn with it, so that one that fails can be run again.
    """

    def decorate(test):
        @functools.wraps(test)
        def of_any(backend, examples, **fixtures):
            def example(torch_seed, **drawn):
                torch.manual_seed(torch_seed)
                test(backend=backend, **fixtures, **drawn)

            example.__name__ = test.__name__  # hypothesis seeds by it
            seeds = st.integers(0, 2**32 - 1)
            settings(max_examples=examples)(given(torch_seed=seeds, **strategies)(example))()

        parameters = inspect.signature(test).parameters
        names = ["backend", "examples", *(p for p in parameters if p not in {"backend", *strategies})]
        kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
        of_any.__signature__ = inspect.Signature([inspect.Parameter(name, kind) for name in names])
        return of_any

    return decorate


def check_every_slot_is_written(function, inputs):
    """In memory full of NaN the results are the same as in ordinary memory, and have no NaN."""
    for deterministic in (True, False):
        torch.use_deterministic_algorithms(deterministic)
        plain, plain_grads = run_with_gradients(function, inputs, None)
        with poisoned_memory(deterministic):
            poisoned, poisoned_grads = run_with_gradients(function, inputs, None)
        for a, b in zip([*plain, *plain_grads], [*poisoned, *poisoned_grads], strict=True):
            assert not b.isnan().any()
            assert torch.equal(a, b)


def check_opcheck(op, *argument_lists):
    """`torch.library.opcheck` on the registered op, for each list of arguments."""
    for arguments in argument_lists:
        torch.library.opcheck(op, arguments)


def check_compiles_once(function, batches):
    """fullgraph, dynamic: equal to eager, and one compilation serves every batch."""
    # Not at the top: it imports Triton, and conftest.py chooses the interpreter first.
    from torch._dynamo.testing import CompileCounterWithBackend

    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend=counter)
    first = 0
    for inputs in batches:
        expected, expected_grads = run_with_gradients(function, inputs, None)
        got, got_grads = run_with_gradients(compiled, inputs, None)
        for a, b in zip([*got, *got_grads], [*expected, *expected_grads], strict=True):
            torch.testing.assert_close(a, b)
        first = first or counter.frame_count  # Dynamo may restart within the first compilation
    assert 0 < counter.frame_count == first, f"{counter.frame_count} compilations for {len(batches)} shapes"


def check_same_bits_for_any_thread_count(function, inputs, pytorch=None):
    """One thread and two give the same results and gradients.

    Args:
        pytorch: for an op that leaves products to PyTorch, PyTorch's function. Where its own bits depend on the number
            of threads (MKL's do on some CPUs), so do the op's, and the test is skipped.
    """

    def same_bits(function):
        found = []
        for threads in (1, 2):
            torch.set_num_threads(threads)
            results, gradients = run_with_gradients(function, inputs, None)
            found.append([*results, *gradients])
        return all(torch.equal(a, b) for a, b in zip(*found, strict=True))

    if pytorch and not same_bits(pytorch):
        pytest.skip("on this CPU the bits of PyTorch's float32 products depend on the number of threads")
    assert same_bits(function)


def with_costly(cases, *costly):
    """The cases as parameters, some of them marked: interpreted or emulated, they are slow."""
    return [pytest.param(c, marks=pytest.mark.costly if c in costly else ()) for c in cases]


def registered(name, backend):
    return getattr(torch.ops.fastgpt, f"{name}_{backend}").default
