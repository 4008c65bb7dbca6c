"""The fixture of the benchmarks: verify, then time forward and backward."""

import pytest
import torch

from fastgpt.heap import keep_heap
from fastgpt.testing import check_error_rule


@pytest.fixture(scope="session", autouse=True)
def _heap_kept():
    """Both sides get the heap that `fastgpt train` gives itself: freed memory is not handed back at once."""
    keep_heap()


@pytest.fixture
def measure(benchmark):
    """measure(function, pytorch, inputs): the first is checked against the second, then timed."""

    def run(function, pytorch, inputs):
        check_error_rule(function, pytorch, inputs)
        upstream = torch.randn_like(pytorch(*inputs))

        def once():
            for t in inputs:
                t.grad = None
            function(*inputs).backward(upstream)

        benchmark.extra_info |= {
            "torch": torch.__version__,
            "threads": torch.get_num_threads(),
            "heap": "kept",
        }
        benchmark.pedantic(once, rounds=11, warmup_rounds=2)

    return run
