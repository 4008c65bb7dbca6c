"""C++ ops and threads: how many compute, whoever calls, the bits are the same."""

import ctypes
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

import fastgpt
from fastgpt import extension
from fastgpt.testing import run_with_gradients
from tests.support import every_op

pytestmark = pytest.mark.skipif(not extension.loaded(), reason="the C++ kernels are not built")


def results(cases):
    """Outputs and gradients of every case, on the C++ kernels."""
    found = {}
    with fastgpt.use_backend("cpp"):
        for name, (function, _, inputs) in cases.items():
            outputs, gradients = run_with_gradients(function, inputs, None)
            found[name] = [*outputs, *gradients]
    return found


def assert_same_bits(found, expected):
    assert found.keys() == expected.keys()
    for name, tensors in expected.items():
        for got, want in zip(found[name], tensors, strict=True):
            assert torch.equal(got, want), name


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=str)
def cases(request):
    """Large enough that every op has work for three threads, with tails."""
    return {name: every_op.case(name, request.param, rows=301, size=259) for name in every_op.NAMES}


def test_same_bits_with_one_two_and_three_threads(cases):
    torch.set_num_threads(1)
    expected = results(cases)
    for threads in (2, 3):
        torch.set_num_threads(threads)
        assert_same_bits(results(cases), expected)


def test_same_bits_from_several_python_threads_at_once(cases):
    """As where data loaders or a server's workers compute; each thread has its own number of threads."""
    expected = results(cases)
    start, found = threading.Barrier(3, timeout=60), {}

    def work(threads):
        torch.set_num_threads(threads)
        start.wait()
        found[threads] = [results(cases) for _ in range(3)]

    workers = [threading.Thread(target=work, args=(threads,)) for threads in (1, 2, 3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert found.keys() == {1, 2, 3}
    for rounds in found.values():
        for one in rounds:
            assert_same_bits(one, expected)


def openmp():
    """The OpenMP library that PyTorch computes with, if it is GNU's."""
    paths = {
        line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines() if "libgomp" in line
    }
    return ctypes.CDLL(paths.pop()) if len(paths) == 1 else None


@pytest.mark.skipif(sys.platform != "linux", reason="looks for the OpenMP library in /proc")
def test_same_bits_from_within_a_parallel_region(cases):
    """As where an op is called from code that PyTorch or OpenMP has already made parallel."""
    library = openmp()
    if library is None:
        pytest.skip("PyTorch's OpenMP is not GNU's, or there are two of them")
    expected, found = results(cases), []

    @ctypes.CFUNCTYPE(None, ctypes.c_void_p)
    def region(_):
        found.append((library.omp_in_parallel(), results(cases)))

    library.GOMP_parallel(region, None, 2, 0)
    assert [inside for inside, _ in found] == [1, 1]
    for _, one in found:
        assert_same_bits(one, expected)


COUNT = """
import os, sys
import torch
torch.set_num_threads(1)
torch.ones(1, requires_grad=True).sum().backward()  # the threads that autograd may want are there from now on
from tests.support import every_op
from tests.ops import test_threads

def threads():
    return len(os.listdir("/proc/self/task"))

for count in (1, 3):
    torch.set_num_threads(count)
    before = threads()
    test_threads.results({name: every_op.case(name, torch.float32, rows=301, size=259) for name in every_op.NAMES})
    print(threads() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="counts threads in /proc")
def test_no_more_threads_than_asked_for_are_started():
    """One thread starts none beside itself, and three (so that the count is known to see them) two."""
    done = subprocess.run(
        [sys.executable, "-c", COUNT],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["0", "2"]
