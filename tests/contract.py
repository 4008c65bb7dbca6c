"""Checks that every op must pass, called by each op's test file with a few cases of its own."""

import torch
from torch._dynamo.testing import CompileCounterWithBackend

from fastgpt.testing import poisoned_memory, run_with_gradients

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
GPU_BACKENDS = ("triton", "cuda")


def dtypes_of(backend):
    """float64 is served by cpp and reference."""
    return DTYPES[:3] if backend in GPU_BACKENDS else DTYPES


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
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend=counter)
    first = 0
    for inputs in batches:
        expected, expected_grads = run_with_gradients(function, inputs, None)
        got, got_grads = run_with_gradients(compiled, inputs, None)
        for a, b in zip([*got, *got_grads], [*expected, *expected_grads], strict=True):
            torch.testing.assert_close(a, b)
        first = first or counter.frame_count  # Dynamo may begin anew within the first compilation
    assert 0 < counter.frame_count == first, f"{counter.frame_count} compilations for {len(batches)} shapes"


def check_same_bits_for_any_thread_count(function, inputs):
    torch.set_num_threads(1)
    one, one_grads = run_with_gradients(function, inputs, None)
    torch.set_num_threads(2)
    two, two_grads = run_with_gradients(function, inputs, None)
    for a, b in zip([*one, *one_grads], [*two, *two_grads], strict=True):
        assert torch.equal(a, b)


def registered(name, backend):
    return getattr(torch.ops.fastgpt, f"{name}_{backend}").default
