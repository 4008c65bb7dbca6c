"""C++ ops that find no memory: a Python error, inputs untouched, and the next call is right."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from fastgpt import extension
from tests.support import every_op

pytestmark = [
    pytest.mark.skipif(not extension.loaded(), reason="the C++ kernels are not built"),
    pytest.mark.skipif(
        sys.platform != "linux", reason="limits the address space and reads its size in /proc"
    ),
]

# Runs an op, forward and backward, again and again, each time with a little more address space than before, until it
# succeeds: so that every large block that it asks for is refused once, those of its threads included.
SWEEP = r"""
import collections, mmap, resource, sys
import torch
from tests.support import every_op
import fastgpt
from fastgpt.testing import run_with_gradients
torch.set_num_threads(2)
MIB = 2**20

def address_space():
    return int(open("/proc/self/statm").read().split()[0]) * mmap.PAGESIZE

def limit(size):
    resource.setrlimit(resource.RLIMIT_AS, (size, resource.RLIM_INFINITY))

for name, rows, size in CASES:
    function, _, inputs = every_op.case(name, torch.float16, rows, size)
    errors = collections.Counter()
    with fastgpt.use_backend("cpp"):
        expected = run_with_gradients(function, inputs, None)
        before = [x.detach().clone() for x in inputs]
        for step in range(1000):
            limit(address_space() + (step + 1) * MIB)
            try:
                found = run_with_gradients(function, inputs, None)
                break
            except (RuntimeError, MemoryError) as error:
                errors[f"{type(error).__name__}: {str(error).splitlines()[0]}"] += 1
            finally:
                limit(resource.RLIM_INFINITY)
    for ours, theirs in zip([*found[0], *found[1], *inputs], [*expected[0], *expected[1], *before], strict=True):
        assert torch.equal(ours, theirs), name
    for message, count in errors.items():
        print(name, count, message, sep="\t")
"""

# Rows and columns, for blocks of several MiB. In the first ones threads take such blocks themselves, through C++, not
# through PyTorch; a heap in which other ops have left holes could serve them.
IN_THREADS = {
    "add_layer_norm": (4, 1_000_000),
    "add_rms_norm": (4, 1_000_000),
    "rms_norm": (4, 1_000_000),
    "attention": (1000, 256),
    "linear_cross_entropy": (64, 10_000),
}
CASES = IN_THREADS | {
    "gelu": (8, 250_000),
    "bias_gelu": (8, 250_000),
    "linear": (1000, 2000),
    "linear_gelu": (1000, 2000),
    "mlp": (1000, 2000),
    "geglu": (8, 250_000),
    "swiglu": (8, 250_000),
    "relu_squared": (8, 250_000),
    "rope": (3000, 256),
    "attention_varlen": (1000, 256),
    "cross_entropy": (8, 150_000),
    "linear_cross_entropy, row by row": (64, 10_000),
}


@pytest.mark.slow
def test_no_memory_is_an_error_and_nothing_worse():
    cases = [(name, *shape) for name, shape in CASES.items()]
    done = subprocess.run(
        [sys.executable, "-c", f"CASES = {cases}\n{SWEEP}"],
        cwd=Path(__file__).parents[2],
        # Large blocks are mapped afresh each time, whatever was freed before.
        env=os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    refused = [line.split("\t") for line in done.stdout.splitlines()]
    assert {name for name, _, _ in refused} == set(every_op.NAMES)
    messages = {message for _, _, message in refused}
    assert all("can't allocate memory" in m or m == "MemoryError: std::bad_alloc" for m in messages), messages
    assert {name for name, _, message in refused if message.startswith("MemoryError")} >= {*IN_THREADS}
